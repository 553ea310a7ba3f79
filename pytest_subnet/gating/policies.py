"""Policies in pytest: a file `*.subnet.toml` is collected, each of its tables is a test."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_subnet.errors import SubnetError, VacuousBoundWarning
from pytest_subnet.opened import opened_key
from pytest_subnet.settings import locate, settings_key, shown
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_subnet.gating.policy_file import Policy, Table
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.trajectories import Trajectory

SUFFIX = ".subnet.toml"
"""How the name of a policy ends."""


def collect_policy(file_path: Path, parent: pytest.Collector) -> PolicyFile | None:
    """The collector of a policy; None for any other file."""
    if not file_path.name.endswith(SUFFIX):
        return None
    collected: PolicyFile = PolicyFile.from_parent(parent, path=file_path)
    return collected


class PolicyFile(pytest.File):
    """A policy file: one test a table."""

    def collect(self) -> Iterator[PolicyItem]:
        """Read the file; what is wrong with it ends the collection."""
        from pytest_subnet.gating.policy_file import read_policy

        label = safe(shown(str(self.path), self.config.rootpath))
        try:
            policy = read_policy(self.path, label)
            judged = _Judged(policy, self.path.parent, self.config)
        except SubnetError as error:
            # Not a UsageError: during collection xdist turns that into an internal error.
            raise self.CollectError(str(error)) from None
        for table in policy.tables:
            yield PolicyItem.from_parent(self, name=table.name, table=table, judged=judged)


class PolicyItem(pytest.Item):
    """A table of a policy as a test."""

    def __init__(self, *, table: Table, judged: _Judged, **keywords: Any) -> None:
        """Judge by `table` what `judged` opens."""
        super().__init__(**keywords)
        self.table = table
        self.judged = judged

    def runtest(self) -> None:
        """Make the assertion."""
        gate = self.table.gate
        subject = self.judged.trajectory() if gate.subject == "trajectory" else self.judged.pair()
        others = {gate.other: self.judged.pair(self.table.other)} if gate.other else {}
        gate.call(subject, **self.table.arguments, **others)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The text of a failure is all there is to see: no line of Python asked for it."""
        if not isinstance(excinfo.value, AssertionError | SubnetError | VacuousBoundWarning):
            return super().repr_failure(excinfo, style)
        representation = excinfo.getrepr(style="value", chain=False)
        if representation.reprcrash is not None:
            representation.reprcrash.path = str(self.path)
            representation.reprcrash.lineno = self.table.line or 1
            representation.reprcrash.message = str(excinfo.value)
        return representation

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The table in the file."""
        line = self.table.line
        return self.path, None if line is None else line - 1, self.name


class _Judged:
    """What a policy is about: opened when its first test runs, and once for all of them."""

    def __init__(self, policy: Policy, directory: Path, config: pytest.Config) -> None:
        """Find out where it is; raise `SubnetError` if nobody says."""
        self._policy = policy
        self._directory = directory
        self._opened = config.stash[opened_key]
        named = [side for side in ("base", "tuned") if config.getoption(f"subnet_{side}")]
        if policy.trajectory is not None and named:
            options = " and ".join(f"--subnet-{side}" for side in named)
            raise SubnetError(
                f"{policy.label}: it names a trajectory, so it would judge that run and not what "
                f"{options} {'names' if len(named) == 1 else 'name'}; give the file a command of "
                "its own, without the option"
            )
        settings = config.stash[settings_key]
        # The command line is for this run, the file for this gate, the ini file for the project.
        written = {
            side: locate(source, directory)
            for side, source in (("base", policy.base), ("tuned", policy.tuned))
            if source is not None and not config.getoption(f"subnet_{side}")
        }
        settings = replace(
            settings,
            base=written.get("base", settings.base),
            tuned=written.get("tuned", settings.tuned),
        )
        sides = {"base": settings.base, "tuned": settings.tuned}
        self._sides = {side: source for side, source in sides.items() if source is not None}
        absent = [side for side in sides if side not in self._sides]
        if policy.trajectory is None and absent:
            options = " and ".join(f"--subnet-{side}" for side in absent)
            lines = " and ".join(f'{side} = "…"' for side in absent)
            raise SubnetError(
                f"{policy.label}: no {' and no '.join(absent)} checkpoint is named: pass {options} "
                f"on the command line, or write {lines} at the top of the file; a run that judges "
                "no release leaves the file out with --ignore"
            )

    def pair(self, other: str | None = None) -> ModelPair:
        """Base and tuned, or the base and `other`."""
        from pytest_subnet.scan.gathering import declare

        tuned = self._sides["tuned"] if other is None else locate(other, self._directory)
        pair = self._opened.pair(self._sides["base"], tuned, **self._policy.opening)
        declare(pair, self._tolerances())
        return pair

    def trajectory(self) -> Trajectory:
        """The checkpoints of the run."""
        from pytest_subnet.scan.following import declare

        source = os.path.expanduser(self._policy.trajectory or "")  # noqa: PTH111 - as in locate
        run = self._opened.trajectory(
            self._directory / source, pattern=self._policy.pattern, **self._policy.opening
        )
        declare(run, self._tolerances())
        return run

    def _tolerances(self) -> list[Tolerance]:
        """Those of all tables: what the first of them reads is then counted for the others too."""
        from pytest_subnet.scan.tolerance import Tolerance

        given = [table.arguments for table in self._policy.tables]
        pairs: list[Any] = [(each.get("atol"), each.get("rtol")) for each in given]
        return [Tolerance(atol, rtol) for atol, rtol in dict.fromkeys(pairs)]
