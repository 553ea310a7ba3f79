"""Which baselines the tests of a run used, and what is said of them at its end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypedDict

import pytest

from pytest_subnet.devices import follows
from pytest_subnet.marker import short_name
from pytest_subnet.settings import settings_key
from pytest_subnet.text import plural, printable, redacted, safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

DIRECTORY = "subnet_baselines"
"""Beside the test module."""

used_key = pytest.StashKey[set[str]]()
"""Of a test: which of its baselines it asked for."""

passed_key = pytest.StashKey[bool]()
"""Of a test: whether its body came to its end."""

written_key = pytest.StashKey[list[str]]()
"""Of a run: what was written, a line each."""

_NARROWS = ("keyword", "markexpr", "lf", "stepwise", "deselect", "collectonly")
"""Options by whose `dest` a run is not a complete one."""

_WORKER = "subnet baselines"


class Used(TypedDict):
    """What the tests of one module did with its baselines; plain types, for xdist.

    Attributes:
        tests: that were collected.
        passed: of these.
        used: the baselines that they asked for, as test and name.
    """

    tests: list[str]
    passed: list[str]
    used: list[tuple[str, str]]


class WorkerUse(TypedDict):
    """What one process saw.

    Attributes:
        complete: whether it collected and ran all there is.
        files: by the path of the baseline file.
    """

    complete: bool
    files: dict[str, Used]


def key_of(item: pytest.Item) -> str:
    """What a test's baselines are filed under: its classes and its name.

    Not its node id, which plugins change; and without the pair of its mark, which is another one
    in each release.
    """
    return printable(redacted("::".join([*classes_of(item), name_of(item)])))


def classes_of(item: pytest.Item) -> list[str]:
    """The names of the classes that a test is in, the outermost first."""
    return [node.name for node in item.listchain() if isinstance(node, pytest.Class)]


def name_of(item: pytest.Item) -> str:
    """A test's name, without the parameter that stands for the mark `model_pair`."""
    mark, callspec = item.get_closest_marker("model_pair"), getattr(item, "callspec", None)
    if mark is None or callspec is None or "model_pair" not in callspec.params:
        return item.name
    pair = "-".join(short_name(callspec.params["model_pair"][side]) for side in ("base", "tuned"))
    start, bracket, _ = item.name.partition("[")
    parts = f"-{callspec.id}-".replace(f"-{pair}-", "-", 1)[1:-1] if bracket else ""
    return f"{start}[{parts}]" if parts else start


def path_for(module: Path) -> Path:
    """Where the baselines of a module, or of a policy, are kept."""
    stem = module.name.removesuffix(".py")
    return module.parent / DIRECTORY / f"{stem}.json"


def refuse_writing(config: pytest.Config) -> None:
    """Raise `UsageError` where baselines are to be written and must not be."""
    if not config.stash[settings_key].write_baselines:
        return
    if config.getoption("numprocesses", None) or config.getoption("dist", "no") != "no":
        raise pytest.UsageError(
            "--subnet-write-baselines cannot run under xdist: workers would overwrite what the "
            "others wrote; repeat with -n0"
        )
    if os.environ.get("CI", "").strip().lower() not in ("", "0", "false"):
        raise pytest.UsageError(
            "--subnet-write-baselines is refused where CI is set: a release would be held to "
            "itself; record where you can look at the difference, and commit it"
        )


class BaselineUse:
    """Watches a run; at its end it names the baselines that no test used.

    Only of a complete run, in which every test was collected and had its turn. A test that failed
    or was skipped may not have come to its baseline, and is no owner to judge by.
    """

    def __init__(self, config: pytest.Config) -> None:
        """Nothing seen yet."""
        self._config = config
        self._complete = True
        self._received: list[WorkerUse] = []
        self._unused: list[str] = []
        config.stash[written_key] = []

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Not all that there is will run."""
        self._complete = self._complete and not items

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """What is in a module that cannot be imported is not known."""
        self._complete = self._complete and not report.failed

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Remember whether the body of a test came to its end."""
        if call.when == "call":
            item.stash[passed_key] = call.excinfo is None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        """A worker of xdist has ended; one that crashed leaves nothing."""
        output = getattr(node, "workeroutput", None) or {}
        if _WORKER in output:
            self._received.append(output[_WORKER])
        else:
            self._complete = False

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Tell the controller, or judge."""
        seen = self._seen(session, exitstatus)
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output[_WORKER] = seen
            return
        everything = [seen, *self._received]
        if follows() or not all(each["complete"] for each in everything):
            return
        files = _merged(each["files"] for each in everything)
        self._unused = list(_unused(files, self._config))
        strict = self._config.stash[settings_key].strict
        if self._unused and strict and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show what was written, and what nobody used."""
        lines = [*self._config.stash[written_key]]
        if self._unused:
            strict = self._config.stash[settings_key].strict
            verdict = ", and --subnet-strict fails the run" if strict else ""
            lines += [
                f"{plural(len(self._unused), 'baseline')} that no test used{verdict}; delete from "
                "the file what nothing is held to, or check it again:",
                *(f"  {line}" for line in self._unused),
            ]
        if lines:
            terminalreporter.write_sep("=", "subnet: baselines")
        for line in lines:
            terminalreporter.write_line(line)

    def _seen(self, session: pytest.Session, exitstatus: int) -> WorkerUse:
        config = session.config
        complete = (
            self._complete
            and not any(config.getoption(name, None) for name in _NARROWS)
            and not any("::" in argument for argument in config.args)
            and not (session.shouldstop or session.shouldfail)
            and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        )
        # A run that was stopped early has no items.
        items = getattr(session, "items", []) if complete else []
        return {"complete": complete, "files": _files(items)}


def _files(items: Iterable[pytest.Item]) -> dict[str, Used]:
    """What was done with each file of baselines beside the tests that ran."""
    items = list(items)
    modules = {item.path for item in items}
    directories = {module.parent / DIRECTORY for module in modules}
    files: dict[str, Used] = {
        str(file): {"tests": [], "passed": [], "used": []}
        for directory in directories
        if directory.is_dir()
        for file in directory.glob("*.json")
    }
    owned = {module: str(path_for(module)) for module in modules} if files else {}
    for item in items:
        seen = files.get(owned.get(item.path, ""))
        if seen is not None:
            key = key_of(item)
            seen["tests"].append(key)
            seen["used"].extend((key, name) for name in sorted(item.stash.get(used_key, ())))
            if item.stash.get(passed_key, False):
                seen["passed"].append(key)
    return files


def _merged(processes: Iterable[Mapping[str, Used]]) -> dict[str, Used]:
    merged: dict[str, Used] = {}
    for files in processes:
        for path, seen in files.items():
            known = merged.setdefault(path, {"tests": [], "passed": [], "used": []})
            known["tests"].extend(seen["tests"])
            known["passed"].extend(seen["passed"])
            known["used"].extend(seen["used"])
    return merged


def _unused(files: Mapping[str, Used], config: pytest.Config) -> Iterator[str]:
    """The baselines that nobody used, and why that is certain; a line each."""
    from pathlib import Path

    from pytest_subnet.errors import SubnetError
    from pytest_subnet.gating.baselines import file_at

    for path, seen in sorted(files.items()):
        file = file_at(Path(path), config)
        owners = Path(path).parent.parent / file.path.stem
        gone = not owners.exists() and not owners.with_name(f"{owners.name}.py").exists()
        if not seen["tests"] and not gone:
            continue  # its tests were not asked for, or the module skips itself
        try:
            recorded = file.read()
        except SubnetError as error:
            if not seen["used"]:  # else it is what the test failed for
                yield str(error)
            continue
        used = {(test, name) for test, name in seen["used"]}  # lists, where a worker sent them
        for test, entries in recorded.items():
            names = [name for name in entries if (test, name) not in used]
            if test not in seen["tests"]:
                why = "there is no such module" if gone else "there is no such test"
            elif test in seen["passed"] and names:
                why = "the test passed without it"
            else:
                continue
            yield f"{file.label}: {safe(test)} ({', '.join(map(safe, names))}): {why}"
