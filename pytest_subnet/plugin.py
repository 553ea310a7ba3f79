"""pytest hooks and options. Nothing heavy is imported here: numpy and torch wait for their use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from pytest_subnet import progress
from pytest_subnet.devices import follows
from pytest_subnet.fixtures import (
    causal_lm_pair,
    model_pair,
    open_model_pair,
    open_trajectory,
    record_update,
    subnet_baseline,
    subnet_device,
)
from pytest_subnet.gating.baseline_use import BaselineUse, refuse_writing
from pytest_subnet.gating.policies import collect_policy
from pytest_subnet.gating.strict import be_strict
from pytest_subnet.marker import MARKER, parametrize_marked, refuse_ignored_mark
from pytest_subnet.opened import Opened, opened_key
from pytest_subnet.recording import recording_to
from pytest_subnet.reports.collecting import collect_run, sink_for
from pytest_subnet.reports.destination import remove_last
from pytest_subnet.reports.session import SessionReport, WorkerTables, report_key
from pytest_subnet.reports.terminal import TerminalStream, write_summary
from pytest_subnet.settings import add_options, read_settings, settings_key
from pytest_subnet.tracebacks import end_at_caller

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

__all__ = [
    "causal_lm_pair",
    "model_pair",
    "open_model_pair",
    "open_trajectory",
    "record_update",
    "subnet_baseline",
    "subnet_device",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Check the settings, register the marker, and listen to xdist's workers, if any."""
    config.addinivalue_line("markers", MARKER)
    remove_last(config)
    config.stash[settings_key] = read_settings(config)
    refuse_writing(config)
    config.stash[report_key] = SessionReport()
    config.stash[opened_key] = Opened(config)
    if config.stash[settings_key].strict:
        be_strict(config, fixtures=__all__)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(WorkerTables(config.stash[report_key]), "subnet-workers")
    config.pluginmanager.register(BaselineUse(config), "subnet-baselines")
    collect_run(config, fixtures={*__all__} - {"subnet_device"})


def pytest_report_header(config: pytest.Config) -> str | None:
    """Show the settings that change a verdict."""
    return config.stash[settings_key].header()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect policies: gates in TOML."""
    return collect_policy(file_path, parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give marked tests their own pair."""
    parametrize_marked(metafunc)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: a test is judged by the pair that its mark names, or not at all."""
    # Comes after pytest has skipped what is to be skipped, and before it sets fixtures up.
    refuse_ignored_mark(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Collect what the test measures, and let progress bars reach the terminal."""
    with (
        recording_to(sink_for(item)),
        progress.shown_on(None if follows() else TerminalStream.of(item.config)),
    ):
        return (yield)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Show an error of ours at the line that asked for what cannot be."""
    # No wrapper: what unittest caught is in `call` only after its own hook, which comes first.
    if call.excinfo is not None and not item.config.getoption("fulltrace", False):
        end_at_caller(call.excinfo.value)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop a cluster that this run started; under xdist, send the controller what was scanned."""
    engine = sys.modules.get("pytest_subnet.scan.ray_cluster")
    if engine is not None:  # nothing was started by what was not imported
        engine.disconnect()
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["subnet"] = session.config.stash[report_key].tables()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show what moved, whether the tests passed or failed."""
    tables = config.stash[report_key].tables()
    write_summary(terminalreporter, tables, verbose=config.get_verbosity() > 0)
