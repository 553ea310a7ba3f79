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
            ("chance", "a matrix without structure has rank min(m, n), and so has rounding"),
            (
                "usually",
                "a layer that trained without its structure, or another operator than its own",
            ),
            *_to_accept(result),
        ],
    )


def nothing_to_see(result: DisplacementRanks) -> str:
    """Of an update: each matrix moved less than rounding alone would move it."""
    largest = max(result.per_tensor, key=lambda each: each.tolerance)
    return facts(
        "displacement rank 0 of every update: none is above what rounding produces by itself, and "
        "whether it is structured cannot be seen",
        [
            *result.coverage(),
            ("tolerance", f"{largest.tolerance:.3g} at most: of {safe(largest.name)}"),
            ("usually", "few steps, or a learning rate of reinforcement learning"),
            ("to mend", 'of="tuned", where the weights themselves are meant to be structured'),
        ],
    )


def _to_accept(result: DisplacementRanks) -> list[tuple[str, str]]:
    """A bound that all matrices meet, where it is one that each of them could fail."""
    if result.rank < min(each.max_rank for each in result.per_tensor):
        return [("to accept", f"max_rank={result.rank}")]
    if len(result.per_tensor) == 1:
        return []
    return [("to mend", "include= or kinds=, to name the matrices that are meant to be structured")]
