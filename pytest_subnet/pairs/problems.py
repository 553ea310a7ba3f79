"""What keeps base and tuned from being compared, in words a user can act on."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.text import facts, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.errors import Problem

_SHOWN = 8
_LEAVE_OUT = "leave tensors out with exclude="
_RENAME = 'say with rename={"name in tuned": "name in base"} where names differ'
_MERGE = (
    "an adapter is no model by itself: merge it (merge_and_unload), pass its directory to "
    "open_pair(base, DIRECTORY), or open it with open_adapter(DIRECTORY, base)"
)
_DEQUANTISE = "dequantise both sides before comparing them"
_DEQUANTISED = (
    "fp8 and compressed-tensors files are read through dequantised(PATH) in place of PATH"
)
_REMEDIES = {
    "ambiguous": _RENAME,
    "empty": "gather sharded weights before saving them",
    "quantised": _DEQUANTISE,
}
_ONE_SIDED = ("only base", "only tuned")
_OF_ADAPTERS = re.compile(
    r"(?:.*\.)?(?:lora_\w+|ia3_l|hada_w\w+|lokr_w\w+|oft_\w+|vera_\w+|modules_to_save)(?:\..*)?",
    re.ASCII | re.DOTALL,
)
_OF_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|absmax|quant_map|SCB|weight_(?:packed|shape|scale\w*|"
    r"zero_point|g_idx))|.*_(?:scale_inv|blocks|scales)",
    re.ASCII | re.DOTALL,
)
"""What only a side that is quantised has."""


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
    one_sided = _one_sided(problems)
    if _are_other_models(problems, total) and one_sided == (_RENAME,):
        rows.append(("probably", "two different models; check which checkpoints are compared"))
    remedies = [
        remedy
        for each in problems
        for remedy in (
            *(one_sided if each.kind in _ONE_SIDED else [_REMEDIES.get(each.kind)]),
            _parts(each)[1],
        )
    ]
    told = [*dict.fromkeys(filter(None, remedies)), *([_LEAVE_OUT] if can_exclude else [])]
    if told:
        rows.append(("to mend", "; ".join(told)))
    if any("=" in remedy for remedy in told if remedy is not _LEAVE_OUT):
        rows += [
            ("", "(rename=, vocab= and as_dtype= go to open_pair, the model_pair marker,"),
            ("", "or the top of a policy; as_dtype= also to open_trajectory)"),
        ]
    return facts(f"tensors do not pair: {summary} (of {plural(total, 'tensor')})", rows)


def _one_sided(problems: Sequence[Problem]) -> tuple[str, ...]:
    """What helps where names are on one side only: a side may not be a model as it is."""
    names = [each.name for each in problems if each.kind in _ONE_SIDED]
    if any(_OF_ADAPTERS.fullmatch(name) for name in names):
        return (_MERGE,)
    if any(_OF_QUANTISED.fullmatch(name) for name in names):
        return _DEQUANTISE, _DEQUANTISED
    return (_RENAME,)


def _parts(problem: Problem) -> tuple[str, str]:
    """What is wrong with a tensor, and what would allow it; the same advice is given once."""
    if problem.kind == "ambiguous":  # names from the files: they may hold anything
        return problem.text, ""
    what, _, remedy = problem.text.partition("; ")
    return what, remedy


def _are_other_models(problems: Sequence[Problem], total: int) -> bool:
    """Whether most tensors have other shapes, or no name of one side is found on the other."""
    reshaped = sum(each.kind == "reshaped" and not _parts(each)[1] for each in problems)
    one_sided = Counter(each.kind for each in problems if each.kind in _ONE_SIDED)
    return 2 * reshaped > total or (len(one_sided) == 2 and one_sided.total() == total)
