"""What a failed assertion on the rank of an update says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import WORST, bound_below, share_against
from pytest_subnet.text import column, facts, percent, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_subnet.findings.rank.result import RankOfUpdate, UpdateRank


def nothing_moved(result: UpdateRank) -> str:
    """No matrix changed."""
    return facts(
        "no matrix moved: the update has rank 0",
        [
            *result.coverage(),
            ("usually", "the base was saved again, or no step was as large as the dtype resolves"),
        ],
    )


def too_low(result: UpdateRank, bound: float) -> str:
    """The bare number does not reach the bound."""
    value, required = share_against(result.ratio, bound)
    return facts(
        f"update rank {value} is below the required {required}",
        [
            *result.coverage(),
            *_ranks(result),
            *_worst(sorted(result.per_tensor, key=lambda each: each.ratio), _of_all),
            ("usually", "an adapter of low rank (LoRA), or matrices and rows that did not train"),
            *_to_accept(bound_below(result.ratio)),
        ],
    )


def only_rounding(result: UpdateRank, bound: float) -> str:
    """The bare number reaches the bound, what stands out of the rounding noise does not."""
    resolved = result.resolved_ratio or 0.0
    value, required = share_against(resolved, bound)
    furthest = sorted(result.per_tensor, key=lambda each: each.ratio_beyond_rounding)
    return facts(
        f"update rank {value} beyond rounding is below the required {required}",
        [
            *result.coverage(),
            *_ranks(result),
            *_worst(furthest, _beyond),
            (
                "usually",
                "steps too small for the dtype: its rounding alone has full rank, whatever",
            ),
            ("", "was learnt; compare float32 checkpoints, or more steps, to know"),
            *_to_accept(bound_below(resolved), "null=None to assert the bare number"),
        ],
    )


def _ranks(result: UpdateRank) -> list[tuple[str, str]]:
    mean = f"{percent(result.ratio)} of min(m, n), stable rank {result.stable_rank:.1f}"
    lines = [("rank", f"{mean} (means over the matrices)")]
    resolved = result.resolved_ratio
    if resolved is not None:
        explains = "; rounding alone explains the rest" if result.explained_by_rounding else ""
        lines.append(("null", f"rounding: {percent(resolved)} stand out of its noise{explains}"))
    elif result.null is None:
        lines.append(("null", "none: what rounding produces by itself is counted too"))
    return lines


def _of_all(each: RankOfUpdate) -> str:
    return f"rank {each.rank:,} of {each.max_rank:,}"


def _beyond(each: RankOfUpdate) -> str:
    resolved = each.rank if each.resolved_rank is None else each.resolved_rank
    return f"{resolved:,} of {each.max_rank:,} resolved, rank {each.rank:,}"


def _worst(
    tensors: Sequence[RankOfUpdate], number: Callable[[RankOfUpdate], str]
) -> list[tuple[str, str]]:
    shown = [(safe(each.name), number(each), each) for each in tensors[:WORST]]
    names, numbers = max(len(row[0]) for row in shown), max(len(row[1]) for row in shown)
    lines = [
        f"{name:<{names}}  {text:>{numbers}}  ({spell_tensor(each.dtype, each.shape)})"
        for name, text, each in shown
    ]
    if len(tensors) > WORST:
        lines.append(f"… {len(tensors) - WORST:,} more")
    return column("worst", lines)


def _to_accept(bound: str | None, otherwise: str = "") -> list[tuple[str, str]]:
    choices = [otherwise] if otherwise else []
    if bound is not None:
        choices.append(f"at_least={bound}")
    return [("to accept", ", or ".join(choices))] if choices else []
