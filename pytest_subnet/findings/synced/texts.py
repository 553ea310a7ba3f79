"""What a failed comparison of trainer and rollout says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.pairs.problems import describe
from pytest_subnet.text import column, facts, plural, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.errors import PairMismatchError
    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.findings.synced.finding import Synced
    from pytest_subnet.scan.locating import Difference


def not_paired(error: PairMismatchError, pair: str, total: int) -> str:
    """Tensors are on one side only, or have other shapes.

    Args:
        error: what cannot be compared.
        pair: how the two are labelled, escaped.
        total: how many tensors there are in all.
    """
    text = describe(error.problems, pair=pair, total=total)
    return text + facts("", [("where", "base is the trainer, tuned the rollout")])


def not_two_copies(trainer: str, rollout: str) -> str:
    """Trainer and rollout are the same object, files or memory.

    Args:
        trainer: how it is labelled, not escaped.
        rollout: likewise.
    """
    both = safe(trainer) if trainer == rollout else f"{safe(trainer)} and {safe(rollout)}"
    return (
        f"trainer and rollout are one thing, {both}: it is in sync with itself, whatever the sync "
        "does; pass the weights that train (trainer.model) and those that generate: the engine's "
        "module or state_dict, or the path that it loaded"
    )


def not_synced(result: Synced, found: Sequence[tuple[Movement, Difference | None]]) -> str:
    """Tensors of the rollout have other bits: all of them are named, in the trainer's order.

    Args:
        result: with such a tensor.
        found: these tensors, with the place where each begins to differ, if that is known.
    """
    names = [f"{safe(each.name)}{'' if first is None else first}" for each, first in found]
    counts = [f"{each.changed:,} / {each.numel:,}" for each, _ in found]
    shapes = [f"({spell_tensor(each.dtype, each.shape)})" for each, _ in found]
    widths = max(map(len, names)), max(map(len, counts))
    lines = [
        f"{name.ljust(widths[0])}  {count.rjust(widths[1])}  {shape}"
        for name, count, shape in zip(names, counts, shapes, strict=True)
    ]
    return facts(
        f"{len(found):,} of {plural(len(result.per_tensor), 'tensor')} are not synced: "
        f"{result.differing:,} of {plural(result.numel, 'entry')} have other bits",
        [
            *result.coverage.rows(),
            *column("first", lines),
            *_usually(result),
            ("to accept", "leave the tensors out with exclude="),
        ],
    )


def _usually(result: Synced) -> list[tuple[str, str]]:
    if len(result.unsynced) == len(result.per_tensor):
        return [("usually", "weights of an earlier step: the sync did not happen, or was undone")]
    return [
        ("usually", "an adapter that was not merged, parts that the sync leaves out, or a cast on"),
        ("", "the way"),
    ]
