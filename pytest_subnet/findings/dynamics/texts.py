"""What a failed assertion on the dynamics of a run says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import (
    WORST,
    bound_above,
    bound_below,
    share_against,
    worst,
)
from pytest_subnet.findings.dynamics.result import trajectory_rows
from pytest_subnet.text import column, facts, first_few, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_subnet.findings.dynamics.result import (
        DynamicsStep,
        TensorDynamics,
        UpdateDynamics,
    )

_SAVED_AGAIN = [
    ("usually", "a checkpoint was saved again, every step was smaller than half a step of the"),
    ("", "storage dtype (bf16 without float32 masters), or the learning rate fell to 0"),
    ("to accept", "allow_identical=True"),
]


def nothing_moved(result: UpdateDynamics) -> str:
    """Nothing moved in any step, whatever the bounds."""
    return facts(
        f"nothing moved: all {len(result.steps) + 1} checkpoints hold the same values",
        [*trajectory_rows(result.coverage), *_not_finite(result), *_SAVED_AGAIN],
    )


def stalled(result: UpdateDynamics) -> str:
    """Nothing moved in some steps, whatever the bound."""
    still = [step for step in result.steps if not step.moved]
    names = first_few([f"{step.previous} -> {step.name}" for step in still])
    return facts(
        f"{plural(len(still), 'step')} of {len(result.steps):,} stalled: nothing moved",
        [
            *trajectory_rows(result.coverage),
            ("stalled", names),
            *_not_finite(result),
            *_SAVED_AGAIN,
        ],
    )


def step_too_dense(result: UpdateDynamics, bound: float) -> str:
    """A step changed more than `at_least` allows."""
    densest = sorted(result.steps, key=lambda step: -step.stepped)
    value, required = share_against(densest[0].step_sparsity, bound)
    below = sum(step.step_sparsity < bound for step in result.steps)
    return facts(
        f"step sparsity {value} is below the required {required}, at {safe(densest[0].name)}",
        [
            *trajectory_rows(result.coverage),
            *_not_finite(result),
            ("below", f"{below:,} of {plural(len(result.steps), 'step')}"),
            *_steps(
                densest,
                lambda step: f"{percent(step.step_sparsity)} unchanged since {safe(step.previous)}",
            ),
            ("usually", "a higher learning rate, or more optimiser steps between two checkpoints"),
            *_to_accept("at_least", bound_below(densest[0].step_sparsity)),
        ],
    )


def too_few_never(result: UpdateDynamics, bound: float) -> str:
    """Fewer entries than `min_never` asks for were never updated."""
    value, required = share_against(result.never_share, bound)
    return facts(
        f"never updated {value} is below the required {required}",
        [
            *_parts(result),
            *worst(
                sorted(result.per_tensor, key=lambda each: each.never / each.numel),
                lambda each: (f"{percent(each.never / each.numel)} never",),
            ),
            ("usually", "a higher learning rate, or more steps than before"),
            *_to_accept("min_never", bound_below(result.never_share)),
        ],
    )


def too_many(result: UpdateDynamics, part: str, bound: float) -> str:
    """More entries than allowed are `part`: `"cancelled"` or `"final"`."""
    share = result.cancelled_share if part == "cancelled" else result.final_share
    value, allowed = share_against(share, bound)
    usually = {
        "cancelled": "steps that cancel out: a learning rate that is too high, or a small batch",
        "final": "a higher learning rate, or more steps than before",
    }

    def count(tensor: TensorDynamics) -> int:
        return tensor.cancelled if part == "cancelled" else tensor.final

    return facts(
        f"{part} {value} is above the allowed {allowed}",
        [
            *_parts(result),
            *worst(
                sorted(result.per_tensor, key=lambda each: -count(each) / each.numel),
                lambda each: (f"{percent(count(each) / each.numel)} {part}",),
            ),
            ("usually", usually[part]),
            *_to_accept(f"max_{part}", bound_above(share)),
        ],
    )


def not_level(result: UpdateDynamics, level: DynamicsStep | None, bound: float, band: float) -> str:
    """The sparsity against the start levels off later than `level_by`, or not at all."""
    count = len(result.steps)
    verdict = (
        f"sparsity has not levelled off within {percent(band)}"
        if level is None
        else f"sparsity levels off at step {level.number} of {count}, {safe(level.name)}"
    )
    last = result.steps[-3:]
    return facts(
        f"{verdict}; required by {percent(bound)} of the steps",
        [
            *_parts(result),
            ("sparsity", ", ".join(f"{percent(step.sparsity)} {safe(step.name)}" for step in last)),
            ("usually", "the run is not done, or its learning rate does not decay"),
            *_to_accept(
                "level_by",
                level and bound_above(level.number / count),
                _wider_band(result, bound),
            ),
        ],
    )


def _parts(result: UpdateDynamics) -> list[tuple[str, str]]:
    def part(count: int) -> str:
        return f"{count:,} / {result.numel:,}   ({percent(count / result.numel)})"

    return [
        *trajectory_rows(result.coverage),
        ("never", part(result.never)),
        ("cancelled", f"{part(result.cancelled)}, or more between checkpoints"),
        ("final", part(result.final)),
        *_not_finite(result),
    ]


def _not_finite(result: UpdateDynamics) -> list[tuple[str, str]]:
    names = [result.steps[0].previous, *(step.name for step in result.steps)]
    found = [
        f"{count:,} in {name}" for count, name in zip(result.nonfinite, names, strict=True) if count
    ]
    return [("not finite", first_few(found))] if found else []


def _steps(
    steps: Sequence[DynamicsStep], number: Callable[[DynamicsStep], str]
) -> list[tuple[str, str]]:
    width = max(len(safe(step.name)) for step in steps[:WORST])
    lines = [f"{safe(step.name).ljust(width)}  {number(step)}" for step in steps[:WORST]]
    if len(steps) > WORST:
        lines.append(f"… {len(steps) - WORST:,} more")
    return column("worst", lines)


def _wider_band(result: UpdateDynamics, level_by: float) -> str:
    """The band within which it has levelled off in time; nothing where only 1 is one."""
    last, count = result.steps[-1], len(result.steps)
    early = [step for step in result.steps[:-1] if step.number / count <= level_by]
    if not early:
        return ""
    late = result.steps[early[-1].number - 1 :]
    band = bound_above(max(abs(step.updated - last.updated) / result.numel for step in late))
    return f"band={band}" if band is not None else ""


def _to_accept(name: str, bound: str | None, otherwise: str = "") -> list[tuple[str, str]]:
    """What to paste; nothing where only a bound that says nothing would hold."""
    choices = [f"{name}={bound}"] if bound is not None else []
    choices += [otherwise] if otherwise else []
    return [("to accept", ", or ".join(choices))] if choices else []
