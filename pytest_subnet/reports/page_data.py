"""What a page draws, as compact JSON types: tensors by column, matrices of overlap, curves."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

from pytest_subnet.reports.page_words import number, spelled
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_subnet.reports.run import Frame, Measured, Run

_MEASURES = ("lift", "kappa", "jaccard", "one_sided_a", "one_sided_b")
_OF_SPECTRA = ("rank", "max_rank", "stable_rank", "resolved_rank")
_OF_PAIRS = ("entries", "updated", "beyond", "max_change", "change_norm", "base_norm")
_ATOL = re.compile(r"atol=(\S+)")


def pairs(run: Run) -> list[dict[str, object]]:
    """The tensors of each pair, and the tolerances that its largest changes are seen against."""
    return [
        {
            "tensors": _columns(pair["tensors"], ("kind", "dtype", "shape"), _OF_PAIRS),
            "tolerances": _tolerances(run, pair["pair"]),
        }
        for pair in run["pairs"]
    ]


def sections(run: Run) -> dict[str, list[dict[str, object]]]:
    """What tests measured beside sparsity; of each section its words and, as `data`, its curves."""
    return {
        "spectra": _spectra(run),
        "overlaps": _overlaps(run),
        "trajectories": _trajectories(run),
    }


def _spectra(run: Run) -> list[dict[str, object]]:
    """The rank of each matrix, for each pair of which tests measured it."""
    return [
        {
            "title": safe(result["numbers"].get("pair", "")),
            "facts": [
                (spelled(key), number(key, result["numbers"][key]))
                for key in ("ratio", "resolved_ratio", "stable_rank")
                if result["numbers"].get(key) is not None
            ],
            "data": _columns(result["tensors"], ("kind",), _OF_SPECTRA),
        }
        for result in _results(run, "update_rank")
        if result["tensors"] and result["tensors"]["rows"]
    ]


def _overlaps(run: Run) -> list[dict[str, object]]:
    """One matrix, runs by runs, for each null and selection under which overlaps were measured."""
    groups: dict[tuple[str, str], list[dict[str, object]]] = {}
    for result in _results(run, "mask_overlap"):
        numbers = result["numbers"]
        groups.setdefault((str(numbers.get("null")), str(numbers.get("numel"))), []).append(numbers)
    return [
        {
            "title": "no null" if null == "None" else f"null: {safe(null)}",
            "entries": number("numel", members[0].get("numel", 0)),
            "data": _matrix(members),
        }
        for (null, _), members in groups.items()
    ]


def _trajectories(run: Run) -> list[dict[str, object]]:
    """Sparsity along each run of which tests measured it."""
    found: list[dict[str, object]] = []
    for result in _results(run, "update_dynamics"):
        numbers = result["numbers"]
        names, whole, steps = (
            value if isinstance(value := numbers.get(key), list) else []
            for key in ("checkpoints", "sparsities", "step_sparsities")
        )
        shares = [
            (spelled(key), number(key, numbers[key]))
            for key in ("never", "cancelled", "final", "levels_off")
            if numbers.get(key) is not None
        ]
        data = {
            "checkpoints": [_shown(name) for name in names],
            "whole": [_rounded(each) for each in whole],
            "steps": [_rounded(each) for each in steps],
        }
        title = safe(numbers.get("pair", ""))
        about = safe(numbers.get("tolerance", ""))
        found.append({"title": title, "about": about, "facts": shares, "data": data})
    return found


def _matrix(members: Sequence[dict[str, object]]) -> dict[str, object]:
    runs = dict.fromkeys(str(each[side]) for each in members for side in ("a", "b"))
    at = {label: index for index, label in enumerate(runs)}
    return {
        "runs": [_shown(label) for label in runs],
        "short": [_shown(label) for label in _apart(list(runs))],
        "cells": [
            [at[str(each["a"])], at[str(each["b"])]]
            + [_rounded(each.get(name)) for name in ("intersection", "expected", *_MEASURES)]
            for each in members
        ],
    }


def _apart(labels: list[str]) -> list[str]:
    """The labels without what all of them begin and end with, up to a slash or a blank."""
    start = min(labels)[: _shared(min(labels), max(labels))]
    start = start[: 1 + max(start.rfind("/"), start.rfind(" "))]
    rest = [label.removeprefix(start) for label in labels]
    backward = [label[::-1] for label in rest]
    end = min(backward)[: _shared(min(backward), max(backward))][::-1]
    end = end[end.find(" ") :] if " " in end else ""
    short = [label.removesuffix(end) for label in rest]
    return short if all(short) else labels


def _results(run: Run, finding: str) -> Iterator[Measured]:
    """Each result of a finding once: tests of one pair may measure the same."""
    seen = set()
    for test in run["tests"]:
        for result in test["results"]:
            key = json.dumps(result["numbers"], sort_keys=True, default=str)
            if result["finding"] == finding and key not in seen:
                seen.add(key)
                yield result


def _tolerances(run: Run, label: str) -> list[float]:
    """The absolute tolerances under which results speak of a pair, 1e-5 among them."""
    found = {1e-5}
    for test in run["tests"]:
        for result in test["results"]:
            atol = _ATOL.fullmatch(str(result["numbers"].get("tolerance")))
            if atol and result["numbers"].get("pair") == label:
                found.add(float(atol[1]))
    return sorted(found - {0.0})


def _columns(frame: Frame, words: Sequence[str], numbers: Sequence[str]) -> dict[str, object]:
    """A frame by columns: names coded by what they add, repeated words by their number."""
    at = {name: index for index, name in enumerate(frame["columns"])}

    def column(name: str) -> list[object]:
        index = at.get(name)
        return [None if index is None else row[index] for row in frame["rows"]]

    return {
        "names": _front_coded([_shown(name) for name in column("name")]),
        "layer": column("layer"),
        **{name: _coded([_shown(each) for each in column(name)]) for name in words},
        **{name: [_rounded(each) for each in column(name)] for name in numbers},
    }


def _shown(name: object) -> str:
    text = "" if name is None else str(name)
    return text if len(text) <= 300 and text.isprintable() else safe(text)


def _front_coded(names: Sequence[str]) -> list[object]:
    """Each name as how many characters it shares with the one before, and the rest.

    Only within ASCII: JavaScript counts other characters in its own way.
    """
    coded: list[object] = []
    before = ""
    for name in names:
        shared = _shared(before, name) if before.isascii() and name.isascii() else 0
        coded += [shared, name[shared:]]
        before = name
    return coded


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    most = min(len(one), len(other))
    return next((at for at in range(most) if one[at] != other[at]), most)


def _coded(words: Sequence[str]) -> dict[str, object]:
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(word, len(numbers)) for word in words]
    return {"words": list(numbers), "codes": codes}


def _rounded(value: object) -> object:
    """A number in six digits, which are more than the page shows; text where it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
