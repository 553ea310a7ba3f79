"""What a failed assertion on displacement says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import worst
from pytest_subnet.text import facts, safe

if TYPE_CHECKING:
    from pytest_subnet.findings.displacement.result import DisplacementRanks


def too_high(result: DisplacementRanks, max_rank: int) -> str:
    """A matrix is less structured than was asked."""
    above = sorted(
        (each for each in result.per_tensor if each.rank > max_rank), key=lambda each: -each.rank
    )
    first = above[0]
    return facts(
        f"displacement rank {first.rank:,} is above the allowed {max_rank:,}: {safe(first.name)}",
        [
            *result.coverage(),
            (
                "tolerance",
                f"{first.tolerance:.3g}: what rounding to its dtype produces by itself",
            ),
            *worst(above, lambda each: [f"rank {each.rank:,} of {each.max_rank:,}"]),
            (
                "usually",
                "a layer that trained without its structure, or another operator than its own",
            ),
            ("to accept", f"max_rank={result.rank}"),
        ],
    )
