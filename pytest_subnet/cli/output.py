"""Where a command's results go: to the terminal, and into files that are written whole."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.cli.stream import put
from pytest_subnet.errors import SubnetError
from pytest_subnet.reports.terminal import no_command
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_target(name: str, sources: Iterable[str]) -> Path:
    """The path to write to; raise before anything is read where it cannot be written.

    Raises:
        SubnetError: its directory is missing or cannot be written to, it is a directory itself, or
            it would lie among the weights that are compared.
    """
    path = Path(name)
    directory = path.parent
    if not name or "\0" in name:
        raise SubnetError(f"cannot write to {safe(repr(name))}: it names no file")
    if os.path.isdir(path):  # noqa: PTH112 - pathlib's raises for a name that is too long
        raise SubnetError(f"cannot write to {safe(name)}: it is a directory; name a file in it")
    if not os.path.isdir(directory):  # noqa: PTH112
        raise SubnetError(
            f"cannot write to {safe(name)}: there is no directory {safe(directory)}; make it first"
        )
    if not os.access(directory, os.W_OK):
        raise SubnetError(
            f"cannot write to {safe(name)}: nothing can be written to the directory "
            f"{safe(directory)}; name a file elsewhere"
        )
    if os.path.exists(path) and not os.access(path, os.W_OK):  # noqa: PTH110
        raise SubnetError(
            f"cannot write to {safe(name)}: it is write-protected; remove it, or name another file"
        )
    for source in sources:
        if _is_within(path, source):
            raise SubnetError(
                f"cannot write to {safe(name)}: it would lie among the weights of {safe(source)}; "
                "name a file elsewhere"
            )
    return path


def _is_within(path: Path, source: str) -> bool:
    """Whether `path` is the file `source`, or lies directly in the directory of its weights."""
    if source.endswith(".index.json"):
        source = os.path.dirname(source) or "."  # noqa: PTH120 - an address is no path
    return any(
        os.path.exists(source) and os.path.exists(each) and os.path.samefile(each, source)  # noqa: PTH110, PTH121
        for each in (path, path.parent)
    )


def check_page() -> None:
    """Raise where a page in HTML could not be made."""
    missing = [each for each in ("jinja2", "plotly") if importlib.util.find_spec(each) is None]
    if missing:
        raise SubnetError(
            f"a page in HTML needs {' and '.join(missing)}: "
            'pip install "pytest-subnet[report]", or write --json'
        )


def write(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all.

    Raises:
        SubnetError: it cannot be written.
    """
    from pytest_subnet.atomic import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise SubnetError(f"cannot write to {safe(path)}: {error.strerror}") from error


def columns() -> int:
    """How wide the terminal is; without bounds where a program reads, which wants whole names."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def show(text: str) -> None:
    """Print `text`; in the log of a GitHub job no line of it is a command to its runner."""
    put("".join(f"{no_command(line)}\n" for line in text.splitlines()))
