"""What is said of a result and its baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.text import column, facts, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_subnet.gating.baseline_file import Entry, Number


class Change(NamedTuple):
    """A number that is not what was recorded.

    Attributes:
        name: of the number.
        recorded: what it was.
        now: what it is.
        within: how far it may be off.
    """

    name: str
    recorded: Number
    now: Number
    within: float

    def __str__(self) -> str:
        """`sparsity 0.95 → 0.9`."""
        old, new = _apart(self.recorded, self.now)
        return f"{safe(self.name)} {old} → {new}"

    @property
    def allowed(self) -> str:
        """`-0.05, ±0.02 allowed`."""
        delta = self.now - self.recorded
        by = f"{delta:+.6g}" if isinstance(delta, float) else f"{delta:+,}"
        limit = f"{self.within:,}" if isinstance(self.within, int) else f"{float(self.within):g}"
        return f"{by}, ±{limit} allowed"


def missing(name: str, place: str, command: str, *, is_there: bool = True) -> str:
    """There is nothing to compare with; `is_there` says whether there is a file at all."""
    where = place if is_there else f"{place}   (there is no such file: is it committed?)"
    return facts(
        f"no baseline for {safe(name)} was recorded",
        [("baseline", where), ("to record", command)],
    )


def other_base(
    name: str,
    before: Mapping[str, str],
    here: Mapping[str, str],
    tuned: str,
    place: str,
    command: str,
) -> str:
    """What was recorded is of another base, and says nothing of this one."""
    rows = []
    for role, known in before.items():
        if known != here[role]:
            rows += [
                (safe(role), f"recorded {known or 'of an unknown one'}"),
                ("", f"here     {here[role] or 'unknown'}"),
            ]
    if tuned and tuned in here.values():
        rows.append(("usually", "base and tuned are swapped: this base was recorded as tuned"))
    return facts(
        f"{safe(name)} was recorded for another base",
        [*rows, ("baseline", place), ("to accept", command)],
    )


def measured_otherwise(
    name: str, before: Mapping[str, object], here: Mapping[str, object], place: str, command: str
) -> str:
    """What was recorded was measured in another way, or of other tensors."""
    differ = [key for key in {**before, **here} if before.get(key) != here.get(key)]
    rows = [
        (safe(key), f"recorded {_value(before.get(key))}, here {_value(here.get(key))}")
        for key in differ
    ]
    return facts(
        f"{safe(name)} was recorded with another {safe(differ[0])}",
        [*rows, ("baseline", place), ("to accept", command)],
    )


def _value(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else safe(value)


def changed(
    name: str,
    changes: list[Change],
    recorded: Entry,
    now: Entry,
    said: Mapping[str, object],
    place: str,
    command: str,
) -> str:
    """Numbers are further off than they may be."""
    worst, *others = changes
    more = f", and {len(others):,} more" if others else ""
    rows = [("pair", safe(said["pair"]))] if "pair" in said else []
    rows += column("changed", (f"{change}   ({change.allowed})" for change in changes))
    rows += _about(recorded, now)
    return facts(
        f"{worst}: not as recorded ({safe(name)}{more})",
        [*rows, ("baseline", place), ("to accept", command)],
    )


def _about(recorded: Entry, now: Entry) -> Iterator[tuple[str, str]]:
    """What else is not as it was."""
    for role, fingerprint in now.fingerprints.items():
        before = recorded.fingerprints.get(role, "")
        if not role.startswith("base") and before and fingerprint:
            if before == fingerprint:
                yield safe(role), "the checkpoint that was recorded: how it is measured has changed"
            else:
                yield safe(role), f"another than recorded: {before} → {fingerprint}"
    for package, version in now.versions.items():
        before = recorded.versions.get(package, version)
        if before != version:
            yield "version", f"of {safe(package)}: {safe(before)} → {safe(version)}"


def was_written(
    label: str,
    test: str,
    before: Mapping[str, Entry],
    now: Mapping[str, tuple[Entry, Mapping[str, float]]],
) -> Iterator[str]:
    """What was recorded of a test, a line for each result: old → new."""
    for name, (entry, within) in now.items():
        where = f"{label}: {safe(test)} {safe(name)}"
        if name not in before:
            yield f"{where}: new"
        elif before[name] == entry:
            yield f"{where}: as before"
        else:
            yield f"{where}: {', '.join(_differences(before[name], entry, within))}"
    for name in before:
        if name not in now:
            yield f"{label}: {safe(test)} {safe(name)}: removed, the test does not check it"


def _differences(before: Entry, now: Entry, within: Mapping[str, float]) -> Iterator[str]:
    for name, limit in within.items():
        if name not in before.numbers:
            yield f"{safe(name)} new"
        elif before.numbers[name] == now.numbers[name]:
            yield f"{safe(name)} as before"
        else:
            yield str(Change(name, before.numbers[name], now.numbers[name], limit))
    for role, fingerprint in now.fingerprints.items():
        if before.fingerprints.get(role, "") != fingerprint:
            yield f"another {safe(role)}"
    for key, value in now.under.items():
        if before.under.get(key) != value:
            yield f"{safe(key)} {safe(before.under.get(key))} → {safe(value)}"


def _apart(one: Number, other: Number) -> tuple[str, str]:
    """Two numbers, with as few digits as tell them apart."""
    for digits in (6, 9, 17):
        texts = _digits(one, digits), _digits(other, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _digits(number: Number, digits: int) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:.{digits}g}"
