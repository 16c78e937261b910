"""The ``asyncllm`` command: parses argv into a ``Config``, prints help and docs/cli.md, serves.

Defines how options are spelled and the one-line errors. It imports models and devices only in order
to serve, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
import textwrap
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from asyncllm import __version__, log
from asyncllm.config import FLAGS, OPERATION, TOPICS, Config, Flag, roles
from asyncllm.config.foreign import FOREIGN, ForeignOption
from asyncllm.environment import has_cuda, imports_that_stay, quiet_libraries
from asyncllm.errors import StartupError
from asyncllm.server import signals
from asyncllm.server.compile_helper import CompileHelper
from asyncllm.server.cuda_context import open_early
from asyncllm.server.early_ranks import EarlyRanks

NUMBER = re.compile(r"[-+]?[0-9.eE+-]*|[-+]?(inf|nan)", re.ASCII)
ALIASES = {
    alias.replace("-", "_"): name for name, option in FLAGS.items() for alias in option.aliases
}
REFUSED_TITLE = """\
## Options of LightLLM that are refused

They would change answers, capacity or access, and are not available.
"""
IGNORED_TITLE = """\
## Options of LightLLM that are ignored with a warning

They make no difference here.
"""
INTRO = """\
# Command line

<!-- made by `python -m asyncllm.cli > docs/cli.md`; edit asyncllm/config/options.py instead -->

`asyncllm [--option value ...]`, the same as `python -m asyncllm`. Every option may also be written
with hyphens: `--model-dir` is `--model_dir`. With an unknown option or an invalid value the command
prints one line to stderr and exits with code 2; so it does if an option that would change answers,
capacity or access cannot be honoured. An option without effect in the chosen mode is a warning in
the log.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program name; default: those of this process.

    Returns:
        The exit code: 2 after one line on stderr if the server cannot start as configured.
    """
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
    except StartupError as error:
        return _refuse(error)
    except SystemExit as done:  # --help and --version have printed
        return 0 if done.code is None else int(done.code)
    first_rank = config.node_rank * config.tp // config.nnodes
    apart = config.run_mode in roles.LISTEN
    who = config.run_mode if apart else f"rank{first_rank}"
    log.setup(config.log_level, json=config.log_json, who=who)
    quiet_libraries()
    signals.hold()
    if config.check:
        signals.end_when_stopped(code=None)
    try:
        if config.make_cluster_key is not None:
            return _make_cluster_key(config.make_cluster_key)
        with contextlib.ExitStack() as stack:
            ahead = stack.enter_context(CompileHelper()) if _compiles(config) else None
            early = None
            if others := _other_ranks(config):
                early = stack.enter_context(EarlyRanks(others, cuda=ahead is not None))
            if ahead is not None:
                open_early(0)
            with imports_that_stay():
                from asyncllm.rank import serve  # takes seconds: torch
            return serve(config, ahead, early)
    except StartupError as error:
        return _refuse(error)


def _compiles(config: Config) -> bool:
    """Whether there are kernels to compile ahead of time, as far as this is known without torch."""
    return (
        has_cuda()
        and config.device != "cpu"
        and config.run_mode not in roles.LISTEN
        and not config.check
    )


def _other_ranks(config: Config) -> int:
    """How many ranks of this node to start already."""
    alone = config.check or config.run_mode in roles.LISTEN
    return 0 if alone else config.tp // config.nnodes - 1


def _make_cluster_key(name: str) -> int:
    from asyncllm.server.secret import make_key_file

    make_key_file(Path(name))
    sys.stdout.write(f"a secret is in {name}; copy it to all nodes: --cluster_key_file {name}\n")
    return 0


def parse(argv: list[str]) -> Config:
    """The configuration given by ``argv``.

    Raises:
        StartupError: an unknown option, or a value that ``Config`` refuses.
        SystemExit: --help or --version, printed to stdout.
    """
    words, warnings = _ours(argv)
    given = vars(_parser().parse_args(words))
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Config(**values, explicit=frozenset(values), warnings=tuple(warnings))


def markdown() -> str:
    """Return the text of docs/cli.md."""
    parts = [INTRO]
    for group in TOPICS:
        parts.append(
            f"## {group}\n\n| option | default | meaning | availability |\n|---|---|---|---|"
        )
        parts += [_table_row(option) for option in FLAGS.values() if option.group == group]
        if group == OPERATION:
            parts.append("| `--help` |  | show all options and exit | yes |")
            parts.append("| `--version` |  | show the version and exit | yes |")
        parts.append("")
    for title, refused in ((REFUSED_TITLE, True), (IGNORED_TITLE, False)):
        parts += [title, "| options | why |\n|---|---|"]
        reasons = dict.fromkeys(f.reason for f in FOREIGN.values() if f.refused == refused)
        parts += [f"| {', '.join(_foreign(reason))} | {reason} |" for reason in reasons]
        parts.append("")
    return "\n".join(parts)


def _foreign(reason: str) -> list[str]:
    """The rows for LightLLM's options that have this reason."""
    found = []
    for name, option in FOREIGN.items():
        if option.reason == reason:
            other = f" (but `{'`, `'.join(option.harmless)}`)" if option.harmless else ""
            found.append(f"`--{name}`{other}")
    return found


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises ``StartupError`` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        message = message.replace("unrecognized arguments", "unknown argument")
        raise StartupError(message.replace("ignored explicit argument", "takes no value, but has"))


class _Formatter(argparse.HelpFormatter):
    """Help that never breaks option names at a hyphen, so that they can be searched."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _parser() -> _Parser:
    parser = _Parser(
        prog="asyncllm",
        usage="asyncllm [--option value ...]",
        description="Serve a large language model over HTTP. Every option may be written with "
        "hyphens too (--model-dir).",
        formatter_class=lambda prog: _Formatter(prog, max_help_position=32),
        allow_abbrev=False,
        add_help=False,
    )
    for group in TOPICS:
        chapter = parser.add_argument_group(group)
        for option in FLAGS.values():
            if option.group == group:
                chapter.add_argument(f"--{option.name}", **_argument(option))
    chapter = parser.add_argument_group("Information")
    chapter.add_argument("-h", "--help", action="help", help="show this and exit")
    chapter.add_argument(
        "--version", action="version", version=f"asyncllm {__version__}", help="show it and exit"
    )
    return parser


def _argument(option: Flag) -> dict[str, Any]:
    """Keywords for ``add_argument``. No default, so that only the given options are set."""
    text = option.help
    if option.default not in (None, False, ()):
        text += f" (default: {option.default})"
    if option.aliases:
        text += f" (also {', '.join(f'--{alias}' for alias in option.aliases)})"
    if (state := _availability(option)) != "yes":
        text += f" [{state}]"
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if option.kind is bool:
        return {**keywords, "action": "store_true"}
    metavar = option.metavar or {int: "N", float: "X", str: "TEXT"}[option.kind]
    if option.choices:
        metavar = "{" + ",".join(option.choices) + "}"
    keywords |= {"type": _reader(option), "metavar": metavar}
    if option.nargs:
        keywords |= {"action": "extend", "nargs": option.nargs}
    return keywords


def _reader(option: Flag) -> Callable[[str], object]:
    """Return a function that converts text to the option's type."""
    noun = {int: "a whole number", float: "a number", str: "text"}[option.kind]

    def read(text: str) -> object:
        try:
            if option.kind is not str and not NUMBER.fullmatch(text):
                raise ValueError(text)  # Python accepts more: 1_0, digits of any script, spaces
            return option.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"needs {noun}, not {text!r}") from None

    return read


def _ours(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split argv into the words for argparse and a warning for each ignored LightLLM option.

    Raises:
        StartupError: an unknown option, or a LightLLM option that would change what is served.
    """
    words, warnings, at = [], [], 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if not word.startswith("--") or word == "--":
            words.append(word)
            continue
        typed, equals, value = word[2:].partition("=")
        name = typed.replace("-", "_")
        name = ALIASES.get(name, name)
        if name in FLAGS or name in {"help", "version"}:
            words.append(f"--{name}{equals}{value}")
        elif (foreign := FOREIGN.get(name)) is not None:
            given = [value] if equals else _values(argv[at:], foreign)
            at += 0 if equals else len(given)
            if foreign.refused and not (foreign.harmless and set(given) <= {*foreign.harmless}):
                what = f"--{typed} is an option of LightLLM that is not available"
                raise StartupError(f"{what}: {foreign.reason}")
            if foreign.values != "none" and not given:
                raise StartupError(f"--{typed}: expected one argument")
            warnings.append(f"{' '.join([f'--{typed}', *given])} has no effect: {foreign.reason}")
        else:
            raise StartupError(_unknown(typed, name))
    return words, warnings


def _values(rest: list[str], foreign: ForeignOption) -> list[str]:
    """The leading words of ``rest`` that are values of the preceding option."""
    most = {"none": 0, "one": 1, "many": len(rest)}[foreign.values]
    return list(takewhile(lambda word: not word.startswith("--"), rest[:most]))


def _unknown(typed: str, name: str) -> str:
    """The error for an unknown option; suggests the most similar known one."""
    spellings = [*FLAGS, *ALIASES, "help", "version"]
    near = difflib.get_close_matches(name.lower(), spellings, n=1)
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    return f"unknown option --{typed}; {hint}"


def _availability(option: Flag) -> str:
    return "yes" if option.needs is None else f"only with {option.needs.text}"


def _table_row(option: Flag) -> str:
    default = "off" if option.kind is bool else option.default
    shown = "" if default in (None, ()) else f"`{default}`"
    meaning = option.help
    if option.choices:
        meaning += f"; one of {', '.join(f'`{choice}`' for choice in option.choices)}"
    if option.nargs:
        meaning += "; takes several values, and may be repeated"
    if option.aliases:
        meaning += f"; also {', '.join(f'`--{alias}`' for alias in option.aliases)}"
    return f"| `--{option.name}` | {shown} | {meaning} | {_availability(option)} |"


def _refuse(error: StartupError) -> int:
    sys.stderr.write(f"asyncllm: {' '.join(str(error).split())}\n")
    return 2


if __name__ == "__main__":
    sys.stdout.write(markdown())
