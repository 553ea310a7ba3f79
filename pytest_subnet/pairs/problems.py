"""What keeps base and tuned from being compared, in words a user can act on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.text import facts, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """One tensor that does not align.

    Attributes:
        kind: `"only base"`, `"only tuned"`, `"reshaped"`, `"retyped"`, `"empty"`, `"ambiguous"`
            or `"quantised"`.
        name: the tensor's name in the base; in the tuned checkpoint if the base has none.
        text: what is wrong and what would allow it.
    """

    kind: str
    name: str
    text: str


def describe(problems: Sequence[Problem], *, pair: str, total: int) -> str:
    """The message for tensors that do not pair: counts first, then the first of each kind.

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
    return facts(f"tensors do not pair: {summary} (of {plural(total, 'tensor')})", rows)
