"""How two values that differ are shown: short, escaped, where they come apart."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pytest_subnet.text import column, facts, plural, redacted, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.findings.interface.finding import Difference, SameInterface

ABSENT = object()
"""Stands for a key that a side does not have."""
NOT_THERE = "(not there)"

_WIDTH = 48
_SHOWN = 12


def spell_two(base: object, tuned: object) -> tuple[str, str]:
    r"""Both values as text; of long ones where they first differ.

    >>> spell_two(10000.0, 500000.0), spell_two(True, ABSENT)
    (('10000.0', '500000.0'), ('true', '(not there)'))
    >>> spell_two("one\ntwo", "one\nthree")
    ('line 2: "two"', '"three"')
    """
    if isinstance(base, str) and isinstance(tuned, str):
        shown = redacted(base), redacted(tuned)
        return _two_texts(*shown) if shown[0] != shown[1] else (spell(base), spell(tuned))
    if isinstance(base, list) and isinstance(tuned, list) and _is_long(base, tuned):
        return _two_lists(base, tuned)
    if isinstance(base, dict) and isinstance(tuned, dict) and _is_long(base, tuned):
        return _two_tables(base, tuned)
    return spell(base), spell(tuned)


def spell(value: object) -> str:
    """One value as JSON, cut where it is long; how many are in a list or a table."""
    if value is ABSENT:
        return NOT_THERE
    if isinstance(value, dict | list) and len(value) > _SHOWN:
        return plural(len(value), "entry")
    return _cut(json.dumps(value, ensure_ascii=False, default=str))


def _cut(text: str) -> str:
    text = redacted(text)
    return safe(text if len(text) <= _WIDTH else f"{text[:_WIDTH]}…")


def _is_long(*values: Sequence[object] | dict[str, object]) -> bool:
    return any(len(value) > _SHOWN for value in values)


def _two_texts(base: str, tuned: str) -> tuple[str, str]:
    if "\n" not in base + tuned:
        return _two_lines(base, tuned)
    one, other = base.split("\n"), tuned.split("\n")
    line = _first_apart(one, other)
    first, second = (lines[line] if line < len(lines) else None for lines in (one, other))
    if first is None or second is None:
        texts = (NOT_THERE if each is None else spell(each) for each in (first, second))
        return f"line {line + 1}: {next(texts)}", next(texts)
    left, right = _two_lines(first, second)
    return f"line {line + 1}: {left}", right


def _two_lines(base: str, tuned: str) -> tuple[str, str]:
    """Two lines; where both are long, from shortly before they come apart."""
    if max(len(base), len(tuned)) <= _WIDTH:
        return spell(base), spell(tuned)
    start = max(_first_apart(base, tuned) - _WIDTH // 4, 0)
    before = "…" if start else ""
    return spell(before + base[start:]), spell(before + tuned[start:])


def _two_lists(base: list[object], tuned: list[object]) -> tuple[str, str]:
    at = _first_apart(base, tuned)
    first, second = (spell(each[at]) if at < len(each) else NOT_THERE for each in (base, tuned))
    return (
        f"{plural(len(base), 'entry')}, number {at + 1} {first}",
        f"{plural(len(tuned), 'entry')}, number {at + 1} {second}",
    )


def _two_tables(base: dict[str, object], tuned: dict[str, object]) -> tuple[str, str]:
    differs = [
        key for key in {**base, **tuned} if not same(base.get(key, ABSENT), tuned.get(key, ABSENT))
    ]
    key = min(differs, key=str)
    first, second = (spell(each.get(key, ABSENT)) for each in (base, tuned))
    return (
        f"{plural(len(base), 'entry')}, {_cut(json.dumps(key, ensure_ascii=False))} {first}",
        f"{plural(len(tuned), 'entry')}, {second} ({len(differs):,} differ)",
    )


def _first_apart(base: Sequence[object], tuned: Sequence[object]) -> int:
    pairs = zip(base, tuned, strict=False)
    return next(
        (at for at, (one, other) in enumerate(pairs) if not same(one, other)),
        min(len(base), len(tuned)),
    )


def same(base: object, tuned: object) -> bool:
    """Whether two values mean the same: 1 and 1.0 do, 1 and true do not, NaN and NaN do.

    >>> same(10000, 10000.0), same(True, 1), same([1, {"a": None}], [1, {"a": None}])
    (True, False, True)
    """
    if isinstance(base, bool) or isinstance(tuned, bool):
        return base is tuned
    if isinstance(base, dict) and isinstance(tuned, dict):
        return base.keys() == tuned.keys() and all(same(base[key], tuned[key]) for key in base)
    if isinstance(base, list | tuple) and isinstance(tuned, list | tuple):
        return len(base) == len(tuned) and all(map(same, base, tuned))
    return base == tuned or (base != base and tuned != tuned)


def differs(result: SameInterface) -> str:
    """The message of a failed `assert_same_interface`."""
    rows = [("pair", result.pair), *column("note", result.notes)]
    rows += _column("differs", [spell_difference(each) for each in result.differences])
    if result.allowed:
        rows += _column("allowed", [each.place for each in result.allowed])
    rows += [
        ("usually", "saved by another version of transformers, a tokenizer that was changed for"),
        ("", "training, or a config that was edited for it and not set back"),
        ("to accept", f"allow=[{_places(result)}], if the release means it"),
    ]
    count = plural(len(result.differences), "difference")
    return facts(f"{count} beside the weights, in {_files(result)}", rows)


def spell_difference(each: Difference) -> str:
    """One difference on one line."""
    key = f"{safe(each.key)} " if each.key else ""
    return f"{safe(each.file)}: {key}{each.base} → {each.tuned}"


def _column(label: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    shown = [safe(line) for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"… {len(lines) - _SHOWN:,} more")
    return column(label, shown)


def _places(result: SameInterface) -> str:
    """All that differs, as patterns that can be pasted: by file where they are many."""
    found = (*result.allowed, *result.differences)
    places = [each.place for each in found]
    if len(places) > _SHOWN:
        places = list(dict.fromkeys(each.file for each in found))
    return ", ".join(safe(json.dumps(each, ensure_ascii=False)) for each in places)


def _files(result: SameInterface) -> str:
    return ", ".join(dict.fromkeys(each.file for each in result.differences))
