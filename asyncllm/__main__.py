"""``python -m asyncllm``: the ``asyncllm`` command; handles signals from the first moment on."""

from typing import NoReturn

from asyncllm.server import signals


def main() -> int:
    """Run the command and return its exit code. Signals are handled even during the imports."""
    signals.end_when_stopped()
    from asyncllm import cli

    return cli.main()


def run() -> NoReturn:
    """Entry point of the installed command."""
    signals.end(main())


if __name__ == "__main__":  # spawned children import this module under another name
    run()
