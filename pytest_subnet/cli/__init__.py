"""The command line: what is measured in tests, from a shell.

Nothing heavy is imported before a command knows what it is asked, so that `--help` comes at once.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pytest_subnet.cli.arguments import parse
from pytest_subnet.cli.stream import OutputError, ReaderLeftError, put

if TYPE_CHECKING:
    from collections.abc import Sequence

_FAILED = 1
_INTERRUPTED, _PIPE_CLOSED = 130, 141
"""As a shell sees what a signal has ended: 128 and the number of SIGINT, of SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 0 when it is done, 1 when it could not be, 130 after Ctrl-C, 141 when who
        reads the output has left.

    Raises:
        SystemExit: with 2 for wrong usage, with 0 after `--help` and `--version`.

    >>> main(["mask", "base", "tuned", "-o", "grpo.mask"])
    grpo.mask: 4,323 of 115,008 entries of 21 tensors (3.76%, same bits)
    0
    """
    if sys.stdout is None:  # closed before the program began
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until it ends
    try:
        try:
            return _carry_out(argv)
        finally:
            put("")  # --help is still to be written too, and leaves by SystemExit
    except KeyboardInterrupt:
        print("pytest-subnet: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except ReaderLeftError:
        return _PIPE_CLOSED
    except OutputError as error:
        print(f"pytest-subnet: {error}", file=sys.stderr)
        return _FAILED


def _carry_out(argv: Sequence[str] | None) -> int:
    arguments = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        # What cannot show a "→" in its encoding shows its number instead of ending with an error.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

    import importlib

    from pytest_subnet.errors import SubnetError
    from pytest_subnet.text import redacted

    command = importlib.import_module(f"pytest_subnet.cli.{arguments.command}")
    try:
        command.run(arguments)
    except SubnetError as error:
        print(f"pytest-subnet: {redacted(str(error))}", file=sys.stderr)
        return _FAILED
    return 0
