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
_REMEDIES = {
    "only base": 'say with rename={"name in tuned": "name in base"} where names differ',
    "only tuned": 'say with rename={"name in tuned": "name in base"} where names differ',
    "ambiguous": 'say with rename={"name in tuned": "name in base"} where names differ',
    "empty": "gather sharded weights before saving them",
    "quantised": "dequantise both sides before comparing them",
}


def describe(problems: Sequence[Problem], *, pair: str, total: int) -> str:
    """The message for tensors that do not pair: counts, the first of them, what to do.

    Args:
        problems: at least one.
        pair: how the pair is called.
        total: how many tensors there are in all.
    """
    counts = Counter(problem.kind for problem in problems)
    summary = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    rows = [("pair", pair)]
    for problem in problems[:_SHOWN]:
        rows.append((problem.kind, f"{safe(problem.name)}  {problem.text}".rstrip()))
    if len(problems) > _SHOWN:
        rows.append(("", f"… {len(problems) - _SHOWN:,} more"))
    remedies = dict.fromkeys(_REMEDIES[kind] for kind in counts if kind in _REMEDIES)
    rows.append(("to mend", "; ".join([*remedies, _LEAVE_OUT])))
    return facts(f"tensors do not pair: {summary} (of {plural(total, 'tensor')})", rows)
