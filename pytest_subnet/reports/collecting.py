"""What tests measured and how they ended: on the report of each test, then put together.

A worker of xdist hands its results over with the reports of its tests; the controller keeps them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.devices import follows
from pytest_subnet.reports.building import run_of
from pytest_subnet.reports.destination import check_destination, only_lists, write_report
from pytest_subnet.reports.github import append_summary, write_annotations
from pytest_subnet.reports.measured import lines, measured, text
from pytest_subnet.reports.properties import PropertySink
from pytest_subnet.reports.session import report_key
from pytest_subnet.settings import settings_key, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Generator
    from pathlib import Path

    from pytest_subnet.recording import Recordable, Sink
    from pytest_subnet.reports.run import Measured, Outcome, Run, Test
    from pytest_subnet.settings import Settings

_results_key = pytest.StashKey[list["Measured"]]()
_with_tensors_key = pytest.StashKey[bool]()
"""Whether the report shows numbers by tensor; not there where no report is wanted."""
_ATTRIBUTE = "subnet"
"""Of a test's report: whether it is a gate, and its results; xdist sends along what is plain."""
_RANKS: dict[Outcome, int] = {
    "passed": 0,
    "xpassed": 1,
    "xfailed": 2,
    "skipped": 3,
    "error": 4,
    "failed": 5,
}
"""A test that fails, then errs in its teardown, has failed."""
_NARROWS = {
    "keyword": "-k",
    "markexpr": "-m",
    "deselect": "--deselect",
    "ignore": "--ignore",
    "ignore_glob": "--ignore-glob",
    "lf": "--lf",
}
"""Options that leave tests out, by their `dest`."""


def collect_run(config: pytest.Config, *, fixtures: Collection[str]) -> None:
    """Collect the run where a report of it is wanted; does nothing elsewhere.

    Args:
        config: with its settings in the stash.
        fixtures: a test that asks for one of them is a gate.

    Raises:
        UsageError: the file that was asked for cannot be written.
    """
    settings = config.stash[settings_key]
    on_github = os.environ.get("GITHUB_ACTIONS") == "true"
    if not (settings.report or on_github) or follows() or only_lists(config):
        return
    is_controller = not hasattr(config, "workerinput")
    if is_controller and settings.report:
        check_destination(settings.report, shown(str(settings.report), settings.root))
    suffix = settings.report.suffix.lower() if settings.report else ""
    config.stash[_with_tensors_key] = suffix in (".html", ".json")
    config.pluginmanager.register(_Carrier(fixtures), "subnet-carrier")
    if is_controller:
        config.pluginmanager.register(_Collector(config, on_github=on_github), "subnet-collector")


def sink_for(item: pytest.Item) -> Sink:
    """Where the results of a test go: its properties, and its report where one is wanted."""
    properties = PropertySink(item.user_properties)
    with_tensors = item.config.stash.get(_with_tensors_key, None)
    if with_tensors is None:
        return properties
    results = item.stash[_results_key] = []

    def keep(result: Recordable) -> None:
        properties(result)
        results.append(measured(result, with_tensors=with_tensors))

    return keep


class _Carrier:
    """Puts what a test measured on its report."""

    def __init__(self, fixtures: Collection[str]) -> None:
        self._fixtures = frozenset(fixtures)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Each result goes with the first report that is made after it, a subtest's too."""
        report = yield
        results = item.stash.get(_results_key, [])
        asked = self._fixtures.intersection(getattr(item, "fixturenames", ()))
        is_gate = bool(results or asked) or item.path.name.endswith(".subnet.toml")
        vars(report)[_ATTRIBUTE] = {"gate": is_gate, "results": results.copy()}
        results.clear()
        return report


class _Collector:
    """Keeps what comes of each test, and hands the run out when it is over."""

    def __init__(self, config: pytest.Config, *, on_github: bool) -> None:
        self._config = config
        self._on_github = on_github
        self._tests: dict[tuple[str, str], Test] = {}
        self._done: set[tuple[str, str]] = set()
        self._run: Run | None = None
        self._is_written = False
        self._problems: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be collected is an error, whatever it held."""
        if not report.failed:
            return
        name = text(report.nodeid)
        key = report.nodeid, ""
        self._tests[key] = {
            "nodeid": name,
            "outcome": "error",
            "seconds": 0.0,
            "message": _message(report),
            "file": name.partition("::")[0],
            "line": 1,
            "gate": name.endswith(".subnet.toml"),
            "results": [],
        }
        self._done.add(key)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test, or one of its subtests, is over."""
        is_whole = type(report) is pytest.TestReport
        key = report.nodeid, _worker_of(report)
        if key not in self._tests or (is_whole and report.when == "setup"):  # anew: a rerun
            self._tests[key] = _started(report)
            self._done.discard(key)
        test = self._tests[key]
        carried = vars(report).get(_ATTRIBUTE, {"gate": False, "results": []})
        test["results"] += carried["results"]
        test["gate"] = test["gate"] or carried["gate"]
        if not is_whole:
            _take_message(test, report)
            return
        test["seconds"] += report.duration
        outcome = _outcome(report)
        if outcome is not None and _RANKS[outcome] >= _RANKS[test["outcome"]]:
            test["outcome"] = outcome
        if outcome not in (None, "passed"):
            _take_message(test, report)
        if outcome is not None:
            self._done.add(key)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Write the file, after whatever else can still fail the run and before the terminal."""
        result = yield
        tests = [test for key, test in self._tests.items() if key in self._done]
        passed = session.exitstatus == 0 and any(test["outcome"] == "passed" for test in tests)
        settings = self._config.stash[settings_key]
        self._run = run_of(
            self._config.stash[report_key].tables(),
            tests=tests,
            passed=passed,
            settings={**_environment(settings), **_narrowed(self._config)},
        )
        if settings.report:
            self._write(self._run, settings.report, session)
        if self._on_github and _is_ours(self._run):
            self._problems += append_summary(self._run)
        return result

    def _write(self, run: Run, path: Path, session: pytest.Session) -> None:
        try:
            write_report(path, run)
            self._is_written = True
        except OSError as error:  # it could be written when the run began
            self._problems.append(f"subnet: the report is not written: {text(error)}")
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where the report is."""
        if self._run is None:
            return
        settings = self._config.stash[settings_key]
        if self._on_github:
            write_annotations(terminalreporter, self._run, settings.root)
        for problem in self._problems:
            terminalreporter.write_line(problem, red=True)
        if settings.report and self._is_written:
            name = text(shown(str(settings.report), settings.root))
            terminalreporter.write_line(f"subnet: report written to {name}")


def _worker_of(report: pytest.TestReport) -> str:
    """The worker that ran the test; what xdist itself says of one that crashed names its node."""
    node = getattr(report, "node", None)
    return getattr(report, "worker_id", "") or (node.gateway.id if node is not None else "")


def _started(report: pytest.TestReport) -> Test:
    file, line, _ = report.location
    return {
        "nodeid": text(report.nodeid),
        "outcome": "passed",
        "seconds": 0.0,
        "message": "",
        "file": text(file),
        "line": (line or 0) + 1,
        "gate": False,
        "results": [],
    }


def _outcome(report: pytest.TestReport) -> Outcome | None:
    """What a phase says of its test; None where it says nothing yet."""
    expected = hasattr(report, "wasxfail")
    if report.failed:
        return "failed" if report.when == "call" else "error"
    if report.skipped:
        return "xfailed" if expected else "skipped"
    if report.passed and report.when == "call":
        return "xpassed" if expected else "passed"
    return None


def _take_message(test: Test, report: pytest.TestReport) -> None:
    if not report.passed:
        message = _message(report)
        test["message"] = f"{test['message']}\n\n{message}" if test["message"] else message


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why, without a traceback where there is one."""
    reason = getattr(report, "wasxfail", None)
    if reason is not None:
        return lines(str(reason))
    if isinstance(report.longrepr, tuple):  # of what was skipped: file, line and why
        return lines(report.longrepr[2].removeprefix("Skipped: "))
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longrepr if crash is None else crash.message)
    return lines(message.removeprefix("AssertionError: ").strip())


def _is_ours(run: Run) -> bool:
    """Whether anything in the run is about weights; most projects have other tests too."""
    return bool(run["pairs"]) or any(test["gate"] for test in run["tests"])


def _environment(settings: Settings) -> dict[str, str]:
    found = {"device": settings.device or "as found", "engine": settings.engine or "threads"}
    for name, source in (("base", settings.base), ("tuned", settings.tuned)):
        if source:
            found[name] = shown(source, settings.root)
    if settings.tolerances:
        found["tolerances"] = ", ".join(settings.tolerances)
    found["strict"] = "yes" if settings.strict else "no"
    if settings.write_baselines:
        found["baselines"] = "written, not compared"
    return found


def _narrowed(config: pytest.Config) -> dict[str, str]:
    """What took tests out of the run: a reader of "passed" would take them for passed, too."""
    given = {option: config.getoption(name, None) for name, option in _NARROWS.items()}
    words = [
        option if value is True else f"{option} {each}"
        for option, value in given.items()
        if value
        for each in (value if isinstance(value, list | tuple) else [value])
    ]
    words += [argument for argument in config.args if "::" in argument]
    return {"selection": ", ".join(words)} if words else {}
