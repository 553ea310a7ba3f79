"""What a failed assertion on exclusive masks and updates says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.findings.common.wording import WORST, bound_above, share_against, worst
from pytest_subnet.findings.dynamics.result import trajectory_rows
from pytest_subnet.text import column, facts, first_few, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_subnet.findings.exclusive.result import (
        ExclusiveStep,
        ExclusiveUpdates,
        MasksExclusive,
    )


def masks_share(result: MasksExclusive, pairs: NDArray[np.int64], bound: float) -> str:
    """Masks hold more entries together than `max_overlap` allows.

    Args:
        result: of two or more masks.
        pairs: `[T, T]`, how many entries each two share.
        bound: what is allowed.
    """
    value, allowed = share_against(result.overlap, bound)
    accept = bound_above(result.overlap)
    return facts(
        f"masks share {value} of the entries they hold, allowed {allowed}",
        [
            (
                "masks",
                f"{len(result.masks):,} over {plural(len(result.per_tensor), 'tensor')}, "
                f"{plural(result.numel, 'entry')}, of which they use {result.union:,} "
                f"({percent(result.used)})",
            ),
            ("shared", f"{plural(result.shared, 'entry')} in two masks or more"),
            *_pairs(result, pairs),
            *worst(
                sorted(
                    (each for each in result.per_tensor if each.shared),
                    key=lambda each: -each.shared,
                ),
                lambda each: (f"{each.shared:,} shared",),
            ),
            *_infeasible(result),
            ("usually", "whole masks of tasks, which overlap: only what is trained is exclusive"),
            *([("to accept", f"max_overlap={accept}")] if accept is not None else []),
        ],
    )


def _pairs(result: MasksExclusive, pairs: NDArray[np.int64]) -> list[tuple[str, str]]:
    rows, columns = np.triu_indices(len(result.masks), 1)
    counts = pairs[rows, columns]
    lines = [
        f"{safe(result.masks[rows[place]])} and {safe(result.masks[columns[place]])} share "
        f"{counts[place]:,}"
        for place in np.argsort(-counts, kind="stable")[:WORST]
        if counts[place]
    ]
    more = int(np.count_nonzero(counts)) - len(lines)
    if more > 0:
        lines.append(f"… {more:,} more pairs")
    return column("pairs", lines)


def _infeasible(result: MasksExclusive) -> list[tuple[str, str]]:
    """Where no choice of entries could have been exclusive."""
    dense = [each for each in result.per_tensor if each.assigned > each.numel]
    if not dense:
        return []
    densest = max(dense, key=lambda each: each.assigned / each.numel)
    total = densest.assigned / densest.numel
    return [
        (
            "infeasible",
            f"the densities sum to {total:.4g} in {safe(densest.name)}, above 1 in "
            f"{plural(len(dense), 'tensor')}: fewer or",
        ),
        ("", "sparser masks are needed to be exclusive there"),
    ]


def outside_moved(result: ExclusiveUpdates) -> str:
    """A step moved what its mask does not hold."""
    steps = [step for step in result.steps if step.outside]
    tensors = sorted(
        (each for each in result.per_tensor if each.outside), key=lambda each: -each.outside
    )
    return facts(
        f"{plural(result.outside, 'entry')} moved outside the mask of the task that was trained",
        [
            *_steps(result, steps, "outside"),
            *worst(tensors, lambda each: (f"{each.outside:,} outside",)),
            ("usually", "weight decay or momentum on masked gradients, a bias or norm that was"),
            ("", "trained too, the statistics of a batch norm, or masks in another order"),
        ],
    )


def earlier_moved(result: ExclusiveUpdates) -> str:
    """A step moved what an earlier mask holds."""
    steps = [step for step in result.steps if step.earlier]
    tensors = sorted(
        (each for each in result.per_tensor if each.earlier), key=lambda each: -each.earlier
    )
    return facts(
        f"{plural(result.earlier, 'entry')} of earlier masks moved: those tasks compute otherwise",
        [
            *_steps(result, steps, "earlier"),
            *worst(tensors, lambda each: (f"{each.earlier:,} moved",)),
            ("usually", "all of a mask was trained (SSNeT) instead of what no earlier mask holds,"),
            ("", "weight decay or momentum on masked gradients, or masks in another order"),
        ],
    )


def mask_changed(result: ExclusiveUpdates) -> str:
    """A mask is not what it was when its task was learnt."""
    return facts(
        f"a previous mask changed: {result.changed_masks[0]}",
        [
            *trajectory_rows(result.coverage),
            *([("also", first_few(result.changed_masks[1:]))] if result.changed_masks[1:] else []),
            ("usually", "scores of an old task were averaged or trained in place; copy them first"),
        ],
    )


def not_trained(result: ExclusiveUpdates, idle: Sequence[ExclusiveStep]) -> str:
    """Steps had something to train, and moved nothing."""
    names = first_few([f"{step.previous} -> {step.name}" for step in idle])
    return facts(
        f"{plural(len(idle), 'step')} of {len(result.steps):,} moved nothing: it is no training",
        [
            *trajectory_rows(result.coverage),
            ("idle", names),
            ("usually", "a checkpoint was saved again, or only masks are learnt (SupSup)"),
            ("to accept", "allow_identical=True"),
        ],
    )


def _steps(
    result: ExclusiveUpdates, steps: Sequence[ExclusiveStep], what: str
) -> list[tuple[str, str]]:
    lines = [
        f"{getattr(step, what):,} of {step.moved:,} moved by {safe(step.task)} "
        f"({safe(step.previous)} -> {safe(step.name)})"
        for step in steps[:WORST]
    ]
    if len(steps) > WORST:
        lines.append(f"… {len(steps) - WORST:,} more steps")
    return [
        *trajectory_rows(result.coverage),
        *column("steps", lines),
    ]
