"""The file that `--subnet-report` names: looked at before the run, written after it."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.atomic import write_text
from pytest_subnet.devices import follows
from pytest_subnet.settings import report_path
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_subnet.reports.run import Run

_PAGES = {".html": "html", ".json": "json_file", ".md": "markdown"}
"""The module for each ending, with a function `page(run)`."""
_NEEDED = ("jinja2", "plotly")
_MARKS = {
    ".html": re.compile(rb"<title>[^<]*pytest-subnet</title>"),
    ".json": re.compile(rb'\A\{"version":\d+,"passed":'),
    ".md": re.compile(rb"\A## pytest-subnet: "),
}
"""What stands at the start of a report, by its ending, and of no other file."""
_START = 4096


def remove_last(config: pytest.Config) -> None:
    """Remove the report of an earlier run: whatever ends this one, it is not taken for this one's.

    Comes before all that can be wrong with a run. What only lists tests or options has no report,
    and leaves that of others alone; and so stays what is no report, as where a name was mistaken,
    or is write-protected.
    """
    if hasattr(config, "workerinput") or follows() or only_lists(config):
        return
    path = report_path(config)
    with suppress(OSError, ValueError):  # what is wrong with it is said later
        if path and path.is_file() and os.access(path, os.W_OK) and _is_report(path):
            path.unlink()


def _is_report(path: Path) -> bool:
    mark = _MARKS.get(_ending(path))
    if mark is None:
        return False
    with path.open("rb") as file:
        return mark.search(file.read(_START)) is not None


def only_lists(config: pytest.Config) -> bool:
    """Whether nothing will be judged."""
    options = ("collectonly", "showfixtures", "show_fixtures_per_test", "help", "version")
    return any(config.getoption(option, False) for option in options)


def _ending(path: Path) -> str:
    return path.suffix.lower()


def check_destination(path: Path, name: str) -> None:
    """Find out before anything is scanned that the report cannot be written.

    Args:
        path: absolute.
        name: as messages show it.

    Raises:
        UsageError: with what to do.
    """
    option = f"--subnet-report (or subnet_report) is {safe(name)!r}"
    if _ending(path) not in _PAGES:
        raise pytest.UsageError(f"{option}; its name must end in .html, .json or .md")
    missing = [each for each in _NEEDED if importlib.util.find_spec(each) is None]
    if _ending(path) == ".html" and missing:
        raise pytest.UsageError(
            f"{option}, and a page needs {' and '.join(missing)}: "
            'pip install "pytest-subnet[report]", or name a file that ends in .json or .md'
        )
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # what is missing is named below
        pass
    except (OSError, ValueError) as error:  # too long, a null byte, a directory to keep out of
        reason = getattr(error, "strerror", None) or error
        raise pytest.UsageError(f"{option}, and no file can be made there ({reason})") from None
    if path.is_dir():
        raise pytest.UsageError(f"{option}, which is a directory; name a file in it")
    if not path.parent.is_dir():
        raise pytest.UsageError(
            f"{option}, and there is no directory {safe(path.parent)}; make it first"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise pytest.UsageError(
            f"{option}, and no file can be made in {safe(path.parent)} "
            f"({error.strerror or error}); name one in a directory that you can write to"
        ) from None
    if path.is_file() and os.access(path, os.R_OK) and path.stat().st_size and not _is_report(path):
        raise pytest.UsageError(
            f"{option}, which is there and is no report; name another file, or remove that one"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise pytest.UsageError(f"{option}, which is write-protected; remove it or name another")


def write_report(path: Path, run: Run) -> None:
    """Write `run` to `path` in the format that its ending names.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    module = import_module(f"pytest_subnet.reports.{_PAGES[_ending(path)]}")
    write_text(path, module.page(run))
