"""``python -m asyncllm`` is the ``asyncllm`` command, from its first moments on."""

from typing import NoReturn

from asyncllm.server import signals


def main() -> int:
    """Run the command; the exit code. It can be stopped while it is still being imported."""
    signals.end_when_stopped()
    from asyncllm import cli

    return cli.main()


def run() -> NoReturn:
    """The command as users start it."""
    signals.end(main())


if __name__ == "__main__":  # spawned children import this module under another name
    run()
