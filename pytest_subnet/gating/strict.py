"""`--subnet-strict`: what would be skipped fails, what would be warned of is an error."""

from __future__ import annotations

import re
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.errors import VacuousBoundWarning
from pytest_subnet.gating.policies import SUFFIX
from pytest_subnet.settings import shown
from pytest_subnet.text import facts, redacted, safe

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

_ERROR = f"error::{VacuousBoundWarning.__module__}.{VacuousBoundWarning.__name__}"
_REMEDY = "give the test what it lacks, or leave it out by name: --deselect, --ignore, -k or -m"


def be_strict(config: pytest.Config, fixtures: Iterable[str]) -> None:
    """Make this run strict.

    Args:
        config: of the run; under xdist each worker does the same.
        fixtures: the plugin's; a test that takes one of them is a gate.
    """
    # The last line of the ini file, so to say: what comes after it, -W and the mark
    # filterwarnings, is on purpose and counts more.
    config.addinivalue_line("filterwarnings", _ERROR)
    if not config.pluginmanager.hasplugin("warnings"):  # nobody would read that line
        outside = ExitStack()
        outside.enter_context(warnings.catch_warnings())
        config.add_cleanup(outside.close)
        warnings.simplefilter("error", VacuousBoundWarning)
    config.pluginmanager.register(_Strict(frozenset(fixtures)), "subnet-strict")


class _Strict:
    """Turns the skips of gates into failures."""

    def __init__(self, fixtures: frozenset[str]) -> None:
        """Gates are what uses `fixtures`, among others."""
        self._fixtures = fixtures
        self._ours = re.compile(rf"\b({'|'.join(('pytest_subnet', *sorted(fixtures)))})\b")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """A gate that was skipped has failed; one that is expected to fail was not skipped."""
        report = yield  # outermost: by now pytest has told the two apart
        if report.skipped and not hasattr(report, "wasxfail") and self._is_gate(item):
            text = _text(report, item.config.rootpath)
            failure = pytest.fail.Exception(text, pytrace=False)
            if call.excinfo is not None:
                failure = failure.with_traceback(call.excinfo.tb)
            report.outcome = "failed"
            # As pytest shows pytest.fail(), so that every reporter finds the message in it.
            report.longrepr = (
                pytest.ExceptionInfo.from_exception(failure).getrepr(style="value")
                if failure.__traceback__ is not None
                else text
            )
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """A file of gates that skips itself as a whole is an error of collection."""
        report = yield
        if report.skipped and self._is_ours(collector.path):
            report.longrepr = _text(report, collector.config.rootpath)
            report.outcome = "failed"
        return report

    def _is_gate(self, item: pytest.Item) -> bool:
        return (
            not self._fixtures.isdisjoint(getattr(item, "fixturenames", ()))
            or item.get_closest_marker("model_pair") is not None
            or self._is_ours(item.path)
        )

    def _is_ours(self, path: Path) -> bool:
        """Whether a file is a policy or names this package or a fixture of it; a directory, one."""
        if path.is_dir():  # its conftest.py skipped whatever is in it
            return any(map(self._is_ours, (*path.rglob("*.py"), *path.rglob(f"*{SUFFIX}"))))
        if path.name.endswith(SUFFIX):
            return True
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # other plugins collect what is in no file
            return False
        return self._ours.search(text) is not None


def _text(report: pytest.TestReport | pytest.CollectReport, root: Path) -> str:
    """Why a gate that was skipped fails."""
    skipped = report.longrepr
    rows = [("to mend", _REMEDY)]
    if isinstance(skipped, tuple):
        path, line, reason = skipped
        rows.insert(0, ("at", f"{safe(shown(path, root))}:{line}"))
    else:
        reason = str(skipped)
    why = safe(redacted(reason.removeprefix("Skipped: ")))
    return facts(f"skipped, which fails under --subnet-strict: {why}", rows)
