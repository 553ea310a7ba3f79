"""Results held to those recorded in the repository: what the fixture `subnet_baseline` gives."""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from pytest_subnet.devices import follows
from pytest_subnet.errors import SubnetError
from pytest_subnet.findings.common.bounds import check_limit
from pytest_subnet.gating.baseline_file import BaselineFile, Entry, is_fingerprint
from pytest_subnet.gating.baseline_selection import selection
from pytest_subnet.gating.baseline_texts import (
    Change,
    changed,
    measured_otherwise,
    missing,
    other_base,
    was_written,
)
from pytest_subnet.gating.baseline_use import (
    classes_of,
    key_of,
    name_of,
    passed_key,
    path_for,
    used_key,
    written_key,
)
from pytest_subnet.settings import settings_key, shown
from pytest_subnet.text import first_few, nearest, printable, redacted, safe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_subnet.gating.baseline_file import Number, Tests
    from pytest_subnet.recording import Traceable

ResultT = TypeVar("ResultT", bound="Traceable")

_UNDER = ("dtype", "form", "k", "null", "of", "operator", "selection", "side", "tolerance")
"""What a finding was asked: with another of these it is another measurement."""

_COVERAGE = ("numel", "tensors", "tensors_total")

_SHOWN = 20

_read_key = pytest.StashKey[dict[Path, "Tests"]]()


class Baseline:
    """Holds the results of one test to what was recorded of it, or records them.

    >>> def test_release(model_pair, subnet_baseline):
    ...     subnet_baseline.check(update_sparsity(model_pair), within={"sparsity": 0.02})
    """

    def __init__(self, item: pytest.Item) -> None:
        """Of a test, or of an item of a policy; nothing is read yet."""
        self._item = item
        self._config = item.config
        self._file = file_at(path_for(item.path), item.config, item.path)
        self._test = key_of(item)
        self._writes = item.config.stash[settings_key].write_baselines
        self._count: Counter[str] = Counter()
        self._measured: dict[str, tuple[Entry, Mapping[str, float]]] = {}
        item.stash[used_key] = set()
        item.stash[passed_key] = False  # a rerun is judged by itself

    def check(self, result: ResultT, *, within: Mapping[str, float]) -> ResultT:
        """Fail unless the numbers of `result` are those recorded, within the tolerances given.

        Only the numbers named in `within` are compared; no two trainings give the same counts, and
        how far each may be off is yours to say. How the result was measured, what it covers and the
        base must be as recorded. The second result of a finding in a test is recorded apart.

        With `--subnet-write-baselines` the result is recorded when the test has passed.

        Valid usages:
            subnet_baseline.check(update_sparsity(pair), within={"sparsity": 0.02})
            subnet_baseline.check(update_rank(pair), within={"ratio": 0.01, "rank": 40})
            subnet_baseline.check(update_sparsity(pair), within={"updated": 0})    # the very count

        Args:
            result: what a measure or an assertion of this package returned.
            within: by the name of a number in `result.to_dict()`, how far it may be from the
                recorded one: a finite number of at least 0, in the units of the number.

        Returns:
            `result`.

        Raises:
            AssertionError: a number is further off.
            SubnetError: nothing was recorded, or of another base, tolerance, dtype or selection; or
                the file cannot be read.
            CheckpointError: a checkpoint has changed since it was measured.
            ValueError: `within` is empty, names something that is no number of the result, or gives
                it a tolerance below 0 or without end.
            TypeError: `result` is no result, or does not say which checkpoints it is of.
        """
        __tracebackhide__ = True
        said = _said(result)
        numbers = dict(_numbers(said))
        finding = printable(said["finding"])
        _check_within(within, finding, said, numbers)
        name = self._name(finding)
        _check_base(finding, result.fingerprints)
        if self._writes:
            prints = dict(result.fingerprints)
            _check_fingerprints(finding, prints)
            self._measured[name] = _entry(finding, said, numbers, prints), dict(within)
            return result
        recorded = self._recorded(name)
        self._check_same_measure(name, recorded, said, result.fingerprints)
        changes = self._changes(name, recorded, numbers, within)
        if changes:
            raise AssertionError(self._say_changed(name, changes, recorded, said, result))
        return result

    def write(self) -> None:
        """Record what was measured in the test, which has passed; without the option nothing.

        Raises:
            SubnetError: the file cannot be read or written.
        """
        if not self._measured or follows():
            return
        before = self._file.merge(
            self._test, {name: entry for name, (entry, _) in self._measured.items()}
        )
        self._config.stash[written_key].extend(
            was_written(self._file.label, self._test, before, self._measured)
        )

    def _name(self, finding: str) -> str:
        self._count[finding] += 1
        number = self._count[finding]
        name = finding if number == 1 else f"{finding}#{number}"
        self._item.stash[used_key].add(name)
        return name

    @property
    def _command(self) -> str:
        return command(self._config, self._item.path, _selected(self._item))

    @property
    def _place(self) -> str:
        return f"{self._file.label}, {safe(self._test)}"

    def _recorded(self, name: str) -> Entry:
        read = self._config.stash.setdefault(_read_key, {})
        if self._file.path not in read:
            read[self._file.path] = self._file.read()
        found = read[self._file.path].get(self._test, {}).get(name)
        if found is None:
            is_there = self._file.path.exists()
            raise SubnetError(missing(name, self._place, self._command, is_there=is_there))
        return found

    def _check_same_measure(
        self, name: str, recorded: Entry, said: Mapping[str, object], now: Mapping[str, str]
    ) -> None:
        bases = [role for role in (*recorded.fingerprints, *now) if role.startswith("base")]
        before = {role: recorded.fingerprints.get(role, "") for role in bases}
        here = {role: now.get(role, "") for role in bases}
        if before != here:
            tuned = recorded.fingerprints.get("tuned", "")
            raise SubnetError(other_base(name, before, here, tuned, self._place, self._command))
        for before_it, here_it in (
            (recorded.under, _under(said)),
            (recorded.coverage, _coverage(said)),
        ):
            if before_it != here_it:
                text = measured_otherwise(name, before_it, here_it, self._place, self._command)
                raise SubnetError(text)

    def _changes(
        self,
        name: str,
        recorded: Entry,
        numbers: Mapping[str, Number],
        within: Mapping[str, float],
    ) -> list[Change]:
        """Those beyond their tolerance, worst first."""
        unknown = [number for number in within if number not in recorded.numbers]
        if unknown:
            what = f"{name} with {first_few(unknown)}"
            raise SubnetError(missing(what, self._place, self._command))
        changes = [
            Change(number, recorded.numbers[number], numbers[number], limit)
            for number, limit in within.items()
        ]
        return sorted(filter(_is_beyond, changes), key=_badness, reverse=True)

    def _say_changed(
        self,
        name: str,
        changes: list[Change],
        recorded: Entry,
        said: Mapping[str, object],
        result: Traceable,
    ) -> str:
        prints = {role: result.fingerprints[role] for role in result.fingerprints}
        now = _entry(recorded.finding, said, {}, prints)
        return changed(name, changes, recorded, now, said, self._place, self._command)


def file_at(path: Path, config: pytest.Config, owner: Path | None = None) -> BaselineFile:
    """The file of baselines at `path`, as messages name it.

    Args:
        path: where it is, or will be.
        config: of the run.
        owner: the module or policy that it belongs to; None takes the one of its name.
    """
    if owner is None:
        owner = path.parent.parent / path.stem
        owner = owner if owner.exists() else owner.with_name(f"{owner.name}.py")
    label = safe(redacted(shown(str(path), config.rootpath)))
    return BaselineFile(path, label, command(config, owner))


def command(config: pytest.Config, module: Path, selected: str = "") -> str:
    """What a shell takes to record the baselines of a module, or of one of its tests."""
    path = os.path.relpath(module, config.invocation_params.dir)
    words = ["pytest", f"{path}::{selected}" if selected else path]
    for side in ("base", "tuned"):
        source = config.getoption(f"subnet_{side}")
        if source:
            words.append(f"--subnet-{side}={source}")
    if hasattr(config, "workerinput"):
        words.append("-n0")
    return printable(redacted(shlex.join([*words, "--subnet-write-baselines"])))


def _selected(item: pytest.Item) -> str:
    name = name_of(item)
    # Without brackets pytest takes all parameters, and the mark gives one.
    return "::".join([*classes_of(item), item.name if "[" in name else name])


def _said(result: object) -> Mapping[str, object]:
    """What the result says of itself."""
    to_dict = getattr(result, "to_dict", None)
    said = to_dict() if callable(to_dict) else None
    if not isinstance(said, Mapping) or not isinstance(said.get("finding"), str):
        raise TypeError(
            f"check() takes what a measure or an assertion returned, not {safe(repr(result))}; it "
            'needs to_dict(), with the name of the finding under "finding"'
        )
    if not isinstance(getattr(result, "fingerprints", None), Mapping):
        raise TypeError(
            f"a baseline of {safe(said['finding'])} needs .fingerprints, a mapping with that of "
            f'the base under "base" (Checkpoint.fingerprint()); {safe(type(result).__name__)} has '
            "none, and which checkpoints it is of cannot be told"
        )
    of = selection(result)
    return {**said, "selection": of} if of is not None else said


def _numbers(said: Mapping[str, object]) -> Iterator[tuple[str, Number]]:
    """Those that can be compared, by name; of what is nested `lifts.matrix`, `sparsities[0]`."""
    for key, value in said.items():
        if key not in (*_UNDER, *_COVERAGE):
            yield from _flat(printable(key), value)


def _flat(name: str, value: object) -> Iterator[tuple[str, Number]]:
    match value:
        case dict():
            for key, part in value.items():
                yield from _flat(f"{name}.{printable(key)}", part)
        case list() | tuple():
            for index, part in enumerate(value):
                yield from _flat(f"{name}[{index}]", part)
        case bool():
            return
        case Integral():
            yield name, int(value)
        case Real():
            if math.isfinite(value):
                yield name, float(value)


def _under(said: Mapping[str, object]) -> dict[str, str | None]:
    return {
        key: None if said[key] is None else printable(said[key]) for key in _UNDER if key in said
    }


def _coverage(said: Mapping[str, object]) -> dict[str, int]:
    counts = {key: said[key] for key in _COVERAGE if key in said}
    return {key: int(count) for key, count in counts.items() if isinstance(count, Integral)}


def _entry(
    finding: str,
    said: Mapping[str, object],
    numbers: Mapping[str, Number],
    prints: Mapping[str, str],
) -> Entry:
    return Entry(
        finding=finding,
        numbers=dict(numbers),
        under=_under(said),
        coverage=_coverage(said),
        fingerprints=dict(prints),
        versions=dict(_versions()),
    )


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("numpy", "pytest-subnet", "torch"):
        try:
            yield package, version(package)
        except PackageNotFoundError:  # from a checkout that nobody installed
            yield package, "unknown"


def _check_within(
    within: object, finding: str, said: Mapping[str, object], numbers: Mapping[str, Number]
) -> None:
    if not isinstance(within, Mapping):
        raise TypeError(f"within={safe(repr(within))} is no mapping from numbers to tolerances")
    there = f"{safe(finding)} has {first_few(sorted(numbers), _SHOWN) or 'no numbers'}"
    if not within:
        raise ValueError(
            "within={} compares nothing; say how far each number may be from the recorded one: "
            + there
        )
    for name, tolerance in within.items():
        if name not in numbers:
            if isinstance(name, str) and name in said:
                what = f" is {safe(repr(said[name]))}, no number to compare"
            else:
                what = f" is no number of it{nearest(str(name), numbers)}"
            raise ValueError(f"within: {safe(repr(name))}{what}; {there}")
        check_limit(f"within[{safe(repr(name))}]", tolerance)


def _check_base(finding: str, prints: Mapping[str, str]) -> None:
    if not any(prints[role] for role in prints if role.startswith("base")):
        raise SubnetError(
            f"a baseline of {safe(finding)} needs the fingerprint of the base, and it does not say "
            "of which base it is: was it made of masks that are not of a checkpoint?"
        )


def _check_fingerprints(finding: str, prints: Mapping[str, object]) -> None:
    for role, fingerprint in prints.items():
        if not is_fingerprint(fingerprint):
            raise TypeError(
                f"fingerprints[{safe(repr(role))}] of {safe(finding)} is "
                f"{safe(repr(fingerprint))}, not 32 hexadecimal digits as of "
                "Checkpoint.fingerprint(), nor empty for unknown"
            )


def _exact(number: object) -> Fraction:
    # As it is written: 0.72 is within 0.02 of 0.7, which a difference of floats is not. Tolerances
    # may be numpy's, whose repr() is no number.
    return Fraction(int(number)) if isinstance(number, Integral) else Fraction(str(number))


def _distance(change: Change) -> Fraction:
    return abs(_exact(change.now) - _exact(change.recorded))


def _is_beyond(change: Change) -> bool:
    return _distance(change) > _exact(change.within)


def _badness(change: Change) -> tuple[bool, Fraction]:
    """The distance in tolerances; where none is allowed, the distance itself comes first."""
    limit = _exact(change.within)
    return not limit, _distance(change) / limit if limit else _distance(change)
