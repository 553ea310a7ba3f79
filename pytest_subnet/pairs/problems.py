"""What keeps base and tuned from being compared, in words a user can act on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.text import facts, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.errors import Problem

_SHOWN = 8
_LEAVE_OUT = "leave tensors out with exclude="
_RENAME = 'say with rename={"name in tuned": "name in base"} where names differ'
_REMEDIES = {
    "only base": _RENAME,
    "only tuned": _RENAME,
    "ambiguous": _RENAME,
    "empty": "gather sharded weights before saving them",
    "quantised": "dequantise both sides before comparing them",
}


def describe(
    problems: Sequence[Problem], *, pair: str, total: int, can_exclude: bool = True
) -> str:
    """The message for tensors that do not pair: counts, the first of them, what to do.

    Args:
        problems: at least one.
        pair: how the pair is called.
        total: how many tensors there are in all.
        can_exclude: whether whoever raises it takes `exclude=`.
    """
    counts = Counter(problem.kind for problem in problems)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    rows = [("pair", pair)]
    for problem in problems[:_SHOWN]:
        what, _ = _parts(problem)
        rows.append((problem.kind, f"{safe(problem.name)}  {what}".rstrip()))
    if len(problems) > _SHOWN:
        rows.append(("", f"… {len(problems) - _SHOWN:,} more"))
    if _are_other_models(problems, total):
        rows.append(("probably", "two different models; check which checkpoints are compared"))
    remedies = [
        remedy for each in problems for remedy in (_REMEDIES.get(each.kind), _parts(each)[1])
    ]
    told = [*dict.fromkeys(filter(None, remedies)), *([_LEAVE_OUT] if can_exclude else [])]
    if told:
        rows.append(("to mend", "; ".join(told)))
    if any("=" in remedy for remedy in told if remedy is not _LEAVE_OUT):
        rows += [
            ("", "(rename=, vocab= and as_dtype= go to open_pair or the model_pair marker,"),
            ("", "as_dtype= also to open_trajectory)"),
        ]
    return facts(f"tensors do not pair: {summary} (of {plural(total, 'tensor')})", rows)


def _parts(problem: Problem) -> tuple[str, str]:
    """What is wrong with a tensor, and what would allow it; the same advice is given once."""
    if problem.kind == "ambiguous":  # names from the files: they may hold anything
        return problem.text, ""
    what, _, remedy = problem.text.partition("; ")
    return what, remedy


def _are_other_models(problems: Sequence[Problem], total: int) -> bool:
    """Whether most tensors have other shapes, or no name of one side is found on the other."""
    reshaped = sum(each.kind == "reshaped" and not _parts(each)[1] for each in problems)
    one_sided = Counter(each.kind for each in problems if each.kind in ("only base", "only tuned"))
    return 2 * reshaped > total or (len(one_sided) == 2 and one_sided.total() == total)
