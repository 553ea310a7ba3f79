"""What a page says in words and numbers: the verdict, each test, the facts of each pair."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from pytest_subnet.reports.measured import words_of
from pytest_subnet.text import percent, plural, printable, safe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_subnet.reports.run import Frame, Measured, Pair, Run, Test

_OUTCOMES = {
    "passed": "passed",
    "failed": "failed",
    "error": "error",
    "skipped": "skipped",
    "xfailed": "failed as expected",
    "xpassed": "passed, not expected to",
}
_SHARES = re.compile(
    "(.*_)?(sparsity|sparsities|density|share|spread|jaccard|dice|ratio|match|one_sided(_[ab])?)"
    "|never|cancelled|final|recovered|inside|missed"
)
_LEADS = {"mask_overlap": ("lift", "kappa", "jaccard"), "update_rank": ("ratio", "stable_rank")}
_LONGEST = 20_000
"""Characters of a message: some print whole tensors."""
_RESULTS = 5
"""Of a test, before the others are folded."""
_ITEMS = 12
"""Of a list among a result's numbers."""


def verdict_of(run: Run) -> dict[str, str]:
    """The first lines: what came of the run, and of how many tests."""
    counts = run["counts"]
    ran = [f"{counts[key]:,} {word}" for key, word in _OUTCOMES.items() if counts.get(key)]
    seconds = math.fsum(test["seconds"] for test in run["tests"])
    details = f"{', '.join(ran)} in {seconds:,.1f} s"
    if not run["tests"]:
        compared = plural(len(run["pairs"]), "pair")
        return {"tone": "plain", "title": "Measured", "details": f"{compared}; no test judged it"}
    if run["passed"]:
        unless = {key: run["environment"].get(key) for key in ("selection", "baselines")}
        but = "".join(f"; {key} {safe(value)}" for key, value in unless.items() if value)
        return {"tone": "passed", "title": "Passed", "details": f"{details}{but}"}
    if counts.get("failed") or counts.get("error"):
        return {"tone": "failed", "title": "Failed", "details": details}
    why = "nothing was judged"
    if counts.get("passed"):
        why = "stopped, or failed for something else than a test"
    return {"tone": "failed", "title": "Not passed", "details": f"{details}: {why}"}


def entry_of(test: Test) -> dict[str, object]:
    """One test: what it is called, what came of it, what it measured."""
    first, _, rest = _message(test["message"]).partition("\n")
    return {
        "name": safe(test["nodeid"]),
        "outcome": test["outcome"],
        "failed": test["outcome"] in ("failed", "error"),
        "gate": test["gate"],
        "word": _OUTCOMES[test["outcome"]],
        "seconds": f"{test['seconds']:.2f} s",
        "place": f"{safe(test['file'])}:{test['line']}",
        "first": safe(first),
        "rest": rest.strip("\n"),
        "message": f"{first}\n{rest}".strip("\n"),
        "results": [_result(each) for each in test["results"][:_RESULTS]],
        "more": [_result(each) for each in test["results"][_RESULTS:]],
    }


def _message(message: str) -> str:
    lines = "\n".join(map(printable, message[:_LONGEST].split("\n"))).strip("\n")
    left = len(message) - _LONGEST
    return lines if left <= 0 else f"{lines}\n… {left:,} more characters"


def _result(result: Measured) -> dict[str, object]:
    finding, numbers = result["finding"], result["numbers"]
    leads = _LEADS.get(finding) or [
        key for key, value in numbers.items() if _is_number(value) and not isinstance(value, bool)
    ]
    known = [key for key in leads if numbers.get(key) is not None][:3]
    about = [numbers.get(key) for key in ("tolerance", "null", "dtype", "pair", "a", "b")]
    return {
        "finding": safe(finding.replace("_", " ")),
        "leads": [(spelled(key), number(key, numbers[key])) for key in known],
        "about": " · ".join(safe(each) for each in about if each),
        "numbers": list(_flat("", numbers)),
    }


def pair_of(pair: Pair) -> dict[str, object]:
    """How much of one pair moved, and the published numbers beside that."""
    entries = pair["entries"]
    density = pair["updated"] / entries if entries else 0.0
    beyond = pair["beyond"] / entries if entries else 0.0
    return {
        "label": safe(pair["pair"]),
        "sides": [
            (word, safe(side["label"]), safe(side["fingerprint"] or ""))
            for word, side in (("base", pair["base"]), ("tuned", pair["tuned"]))
        ],
        "notes": [safe(note) for note in pair["notes"]],
        "density": percent(density),
        "sparsity": percent(1 - density),
        "beyond": percent(beyond),
        "within": percent(1 - beyond),
        "updated": f"{pair['updated']:,}",
        "entries": f"{entries:,}",
        "tensors": f"{len(pair['tensors']['rows']):,} of {plural(pair['total'], 'tensor')}",
        "has_tensors": bool(pair["tensors"]["rows"]),
        "published": [_published(row) for row in _records(pair["published"])],
    }


def _published(row: dict[str, object]) -> dict[str, object]:
    sparsity = row.get("sparsity")
    shares = ["", ""]
    if isinstance(sparsity, int | float):
        shares = [percent(sparsity), percent(1 - sparsity)]
    words = [
        safe(row.get(key) or "not said")
        for key in ("source", "algorithm", "model", "tolerance", "dtype")
    ]
    return {"cells": words, "shares": shares, "comparable": bool(row.get("comparable"))}


def _records(frame: Frame) -> list[dict[str, object]]:
    return [dict(zip(frame["columns"], row, strict=True)) for row in frame["rows"]]


def _flat(prefix: str, numbers: dict[str, object]) -> Iterator[tuple[str, str]]:
    for key, value in numbers.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{spelled(key)} · ", value)
        elif value is not None and value != []:
            yield f"{prefix}{spelled(key)}", number(str(key), value)


def number(key: str, value: object) -> str:
    """A value as it is read, by what its key says it is."""
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            share = _SHARES.fullmatch(key) and 0 <= value <= 1
            return percent(value) if share else f"{value:.4g}"
        case list() | tuple():
            left = len(value) - _ITEMS
            items = [number(key, each) for each in value[:_ITEMS]]
            return ", ".join(items + ([f"… {left:,} more"] if left > 0 else []))
        case _:
            return safe(value)


def spelled(key: object) -> str:
    """A key as words."""
    return safe(words_of(str(key)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
