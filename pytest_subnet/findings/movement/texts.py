"""What a failed assertion on movement says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import (
    bound_below,
    limit_above,
    number_against,
    share_against,
    worst,
)
from pytest_subnet.text import facts, percent, plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.findings.movement.finding import UpdateMovement
    from pytest_subnet.scan.locating import Difference

_SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11}


def not_frozen(result: UpdateMovement, moved: Sequence[Movement], first: Difference | None) -> str:
    """Something moved that must not.

    Args:
        result: with a tensor that moved.
        moved: the tensors that did, the one that moved most first.
        first: where the first of them differs, if that is known.
    """
    where = [("first", f"{safe(moved[0].name)}{first}")] if first is not None else []
    furthest = max(each.max_change for each in moved)
    by = f" by up to {furthest:.3g}" if furthest else ""
    drift = (
        limit_above(furthest) if furthest and not any(each.nonfinite for each in moved) else None
    )
    return facts(
        f"{len(moved):,} of {plural(len(result.per_tensor), 'frozen tensor')} moved{by}",
        [
            *result.coverage.rows(),
            ("updated", f"{result.updated:,} / {result.numel:,}"),
            *worst(moved, lambda each: (f"{each.updated:,} / {each.numel:,}", _how_far(each))),
            *where,
            (
                "usually",
                "weight decay on zero gradients, optimiser state from before freezing, or a",
            ),
            ("", "tie to a tensor that is trained"),
            (
                "to accept",
                "leave the tensors out with exclude=" + (f", or atol={drift}" if drift else ""),
            ),
        ],
    )


def _how_far(tensor: Movement) -> str:
    if not tensor.has_distance:
        return "other bits"
    parts = [f"by up to {tensor.max_change:.3g}"] if tensor.max_change else []
    if not parts and tensor.changed == tensor.zero_sign_flips:
        parts.append("only signs of zeros")
    if tensor.nonfinite:
        parts.append(f"{tensor.nonfinite_tuned:,} NaN or Inf, {tensor.nonfinite_base:,} before")
    return ", ".join(parts)


def not_updated(
    result: UpdateMovement,
    still: Sequence[Movement],
    sparse: Sequence[Movement],
    bound: float | None,
    movable: Mapping[float, float],
) -> str:
    """A tensor did not move, or too little of it.

    Args:
        result: with such a tensor.
        still: the tensors that did not move.
        sparse: the tensors that moved, but less of them than `bound`.
        bound: the density required of each.
        movable: which share of these weights a step of some size can move at all, by its size.
    """
    total = plural(len(result.per_tensor), "tensor")
    lines = [
        *result.coverage.rows(),
        ("updated", f"{result.updated:,} / {result.numel:,}   in {result.moved:,} of {total}"),
    ]
    accept = "leave the tensors out with exclude="
    if still:
        verdict = f"{len(still):,} of {total} did not move"
        lines += worst(still, _why_still)
        if sparse:
            required = percent(bound or 0)
            lines.append(("too little", f"{len(sparse):,} more, below the required {required}"))
    else:
        sparse = sorted(sparse, key=lambda each: each.value_density)
        least = sparse[0].value_density
        value, required = share_against(least, bound or 0)
        verdict = f"density {value} is below the required {required} in {len(sparse):,} of {total}"
        lines += worst(sparse, lambda each: (f"{percent(each.value_density)} updated",))
        accept += f", or at_least={bound_below(least)}"
    hint = _resolution((still or sparse)[0])
    return facts(
        verdict,
        [
            *lines,
            *([("resolution", hint), *_movable(movable)] if hint else []),
            (
                "usually",
                "no gradient reaches them (a LoRA A while its B is zero), the optimiser does not",
            ),
            ("", "own them, or each step is smaller than the storage dtype resolves"),
            ("to accept", accept),
        ],
    )


def _why_still(tensor: Movement) -> tuple[str, ...]:
    count = f"{tensor.updated:,} / {tensor.numel:,}"
    if tensor.updated and tensor.changed > tensor.zero_sign_flips:
        return (count, "only NaN or Inf")
    return (count, "only signs of zeros" if tensor.updated else "")


def _movable(shares: Mapping[float, float]) -> list[tuple[str, str]]:
    """Under the resolution: how many of the weights a step can move at all."""
    parts = [f"{percent(share)} at {step:.0e}" for step, share in shares.items()]
    return [("", f"a step can move, of these, {', '.join(parts)}")] if parts else []


def _resolution(tensor: Movement) -> str | None:
    """What a step must exceed to be stored at the size these weights have."""
    bits = _SIGNIFICAND_BITS.get(tensor.dtype)
    size = tensor.base_norm / math.sqrt(tensor.numel)
    if bits is None or size == 0:
        return None
    return (
        f"{short_dtype(tensor.dtype)} stores no step below {size / 2 ** (bits + 1):.2g} at "
        f"|w| = {size:.2g} (rms) without float32 masters"
    )


def not_finite(result: UpdateMovement) -> str:
    """NaN or Inf on either side."""
    bad = sorted(
        (each for each in result.per_tensor if each.nonfinite),
        key=lambda each: (-each.nonfinite_tuned, -each.nonfinite_base),
    )
    return facts(
        f"{result.nonfinite_tuned:,} NaN or Inf in tuned, {result.nonfinite_base:,} in base",
        [
            *result.coverage.rows(),
            *worst(
                bad,
                lambda each: (
                    f"{each.nonfinite_tuned:,} in tuned",
                    f"{each.nonfinite_base:,} in base",
                ),
            ),
            ("usually", "a diverged run, or a cast to a dtype with a smaller range (bf16 to f16)"),
            ("to accept", "leave the tensors out with exclude="),
        ],
    )


def too_far(result: UpdateMovement, bound: float, *, relative: bool) -> str:
    """A tensor moved further than the cap."""

    def change(each: Movement) -> float:
        return each.relative_change if relative else each.max_change

    furthest = sorted(
        (each for each in result.per_tensor if change(each) > bound),
        key=lambda each: -change(each),
    )
    value, allowed = number_against(change(furthest[0]), bound)
    limit = limit_above(change(furthest[0]))
    return facts(
        f"{'relative' if relative else 'largest'} change {value} is above the allowed {allowed}",
        [
            *result.coverage.rows(),
            ("beyond", f"{len(furthest):,} of {plural(len(result.per_tensor), 'tensor')}"),
            *worst(furthest, lambda each: (f"{change(each):.3g}",)),
            ("usually", "a learning rate too high, or a tensor that was initialised again"),
            (
                "to accept",
                "leave the tensor out with exclude=" + (f", or at_most={limit}" if limit else ""),
            ),
        ],
    )
