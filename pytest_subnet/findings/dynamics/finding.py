"""How a run's update came about, checkpoint by checkpoint (arXiv 2505.11711, section 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_message,
    check_tolerance,
    warn_of_vacuous,
)
from pytest_subnet.findings.common.fingerprints import of_sides
from pytest_subnet.findings.common.result import Coverage, Message, reworded
from pytest_subnet.findings.dynamics.result import (
    BAND,
    DynamicsStep,
    TensorDynamics,
    UpdateDynamics,
)
from pytest_subnet.findings.dynamics.texts import (
    not_level,
    nothing_moved,
    stalled,
    step_too_dense,
    too_few_never,
    too_many,
)
from pytest_subnet.recording import record
from pytest_subnet.scan.following import follow
from pytest_subnet.text import plural, safe, short_dtype
from pytest_subnet.trajectories.selection import check_trajectory, select_everywhere

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.following import Diary
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.trajectories import Trajectory


def update_dynamics(
    trajectory: Trajectory,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> UpdateDynamics:
    """Measure which entries a run never updated, updated for good, and updated and put back.

    An entry is updated in a checkpoint when it differs from the first one under the tolerance:
    never = in none, final = in the last, cancelled = in some, but not in the last. Each checkpoint
    is read once, whatever their number; buffers and integer tensors are left out.

    Args:
        trajectory: two or more checkpoints, read in pieces; what was read is not read again.
        include: glob or globs on names in the first checkpoint; None takes all.
        exclude: glob or globs on these names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"norm"`, …).
        atol: |after - before| <= atol counts as unchanged, in weight units; the paper's is 1e-5.
        rtol: |after - before| <= rtol * max(|before|, |after|) counts as unchanged.

    Returns:
        The three parts, and each checkpoint against the start and against the one before.

    Raises:
        SelectionError: a pattern matches nothing, or only buffers and integer tensors are left.
        PairMismatchError: a selected tensor is missing, or has another shape or dtype, in one of
            the checkpoints.
        CheckpointError: a checkpoint cannot be read, or was written to since it was opened.
        ValueError: both tolerances, or a negative one.

    Source: arXiv 2505.11711, section 6 and appendix D (Figures 2 and 6).

    >>> import torch
    >>> from pytest_subnet.trajectories import open_trajectory
    >>> run = [{"weight": torch.tensor([0.0, 0.0, 0.0, 0.0])},
    ...        {"weight": torch.tensor([1.0, 1.0, 0.0, 0.0])},
    ...        {"weight": torch.tensor([2.0, 0.0, 0.0, 0.0])}]
    >>> update_dynamics(open_trajectory(run))
    UpdateDynamics(never=0.5, cancelled=0.25, final=0.25, 2 steps, same bits, f32)
    """
    tolerance = check_tolerance(atol, rtol)
    selection = select_everywhere(trajectory, include, exclude, kinds)
    if not selection.rows:
        raise SelectionError(
            f"only buffers and integer tensors are selected ({len(selection.apart):,}), which "
            "dynamics leave apart"
        )
    known = follow(trajectory, selection.rows, tolerance)
    result = _result(trajectory, known, selection.rows, tolerance)
    record(result)
    return result


def _result(
    trajectory: Trajectory, known: Diary, rows: Sequence[int], tolerance: Tolerance
) -> UpdateDynamics:
    tensors = tuple(_tensor(trajectory, known, row, tolerance) for row in rows)
    together = known.steps(rows, tolerance)
    matrices = [row for row, tensor in zip(rows, tensors, strict=True) if len(tensor.shape) > 1]
    moved = [known.steps([row], tolerance).moved for row in matrices]
    numel = sum(tensor.numel for tensor in tensors)
    return UpdateDynamics(
        coverage=_cover(trajectory, tensors, tolerance),
        never=sum(tensor.never for tensor in tensors),
        cancelled=sum(tensor.cancelled for tensor in tensors),
        final=sum(tensor.final for tensor in tensors),
        steps=tuple(
            DynamicsStep(
                name=trajectory.names[column + 1],
                previous=trajectory.names[column],
                number=column + 1,
                numel=numel,
                updated=int(together.updated[column]),
                stepped=int(together.stepped[column]),
                moved=int(together.moved[column]),
                ever=int(together.ever[column]),
                outside=int(together.outside[column]),
                matrices=len(matrices),
                stalled=sum(not int(each[column]) for each in moved),
            )
            for column in range(len(trajectory.pairs))
        ),
        per_tensor=tensors,
        nonfinite=tuple(together.nonfinite.tolist()),
    )


def _tensor(trajectory: Trajectory, known: Diary, row: int, tolerance: Tolerance) -> TensorDynamics:
    tensor = trajectory.pairs[0].tensors[row]
    steps = known.steps([row], tolerance)
    ever, final = int(steps.ever[-1]), int(steps.updated[-1])
    return TensorDynamics(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tensor.layer,
        tensor.kind,
        tensor.numel,
        never=tensor.numel - ever,
        cancelled=ever - final,
        final=final,
    )


def _cover(
    trajectory: Trajectory, tensors: Sequence[TensorDynamics], tolerance: Tolerance
) -> Coverage:
    first, last = trajectory.pairs[0], trajectory.pairs[-1]
    notes = [note for pair in trajectory.pairs for note in pair.notes]
    # A start and a checkpoint of one dtype need no cast where other checkpoints do.
    notes = [note for note in notes if not note.startswith("0 tensors cast")]
    notes += [
        f"{safe(name)} is tied, counted once" for pair in trajectory.pairs for name in pair.tied
    ]
    left_out = {problem.name for pair in trajectory.pairs for problem in pair.problems}
    if left_out:  # all of them were excluded, or there would be no measure
        notes.append(f"{plural(len(left_out), 'tensor')} left out that cannot be compared")
    return Coverage(
        pair=trajectory.label,
        tolerance=tolerance,
        dtype="+".join(sorted({short_dtype(tensor.dtype) for tensor in tensors})),
        tensors=len(tensors),
        tensors_total=sum(tensor.is_weight for tensor in first.tensors),
        numel=sum(tensor.numel for tensor in tensors),
        notes=tuple(dict.fromkeys(notes)),
        fingerprints=of_sides(
            {"base": (first, first.base), "tuned": (last, last.tuned)},
        ),
    )


def assert_update_dynamics(
    trajectory: Trajectory,
    *,
    min_never: float | None = None,
    max_cancelled: float | None = None,
    max_final: float | None = None,
    level_by: float | None = None,
    band: float = BAND,
    allow_identical: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateDynamics:
    """Fail unless the parts of a run's update, and when it levels off, are within the bounds.

    Fails too where nothing moved in any step, whatever the bounds.

    Valid usages:
        assert_update_dynamics(run, min_never=0.6, max_cancelled=0.10)    # the paper: 0.72 and 0.08
        assert_update_dynamics(run, max_final=0.30, atol=1e-5)
        assert_update_dynamics(run, level_by=0.75)           # flat in the last quarter, within 0.01
        assert_update_dynamics(run, level_by=0.5, band=0.02)

    Args:
        trajectory: two or more checkpoints.
        min_never: fraction in [0, 1]: least share of entries never updated.
        max_cancelled: fraction in [0, 1]: largest share updated on the way and not in the end; what
            is measured is a lower bound.
        max_final: fraction in [0, 1]: largest share updated in the end.
        level_by: fraction in [0, 1] of the steps: when, at the latest, the sparsity against the
            start has levelled off; takes three checkpoints or more.
        band: fraction in [0, 1]: how far from its last value that sparsity may be from there on.
        allow_identical: accept a run in which nothing moved.
        include: as in `update_dynamics`.
        exclude: as in `update_dynamics`.
        kinds: as in `update_dynamics`.
        atol: as in `update_dynamics`.
        rtol: as in `update_dynamics`.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        What `update_dynamics` measured.

    Raises:
        AssertionError: a bound does not hold, or nothing moved.
        ValueError: no bound, or one outside [0, 1].
        SelectionError: as in `update_dynamics`, or `level_by` and fewer than three checkpoints.
        PairMismatchError: as in `update_dynamics`.

    Source: arXiv 2505.11711, section 6.

    >>> from pytest_subnet.trajectories import open_trajectory
    >>> run = open_trajectory(["base", "tuned"])
    >>> assert_update_dynamics(run, min_never=0.9).cancelled
    0
    """
    __tracebackhide__ = True
    bounds = {
        "min_never": min_never,
        "max_cancelled": max_cancelled,
        "max_final": max_final,
        "level_by": level_by,
    }
    for name, value in (*bounds.items(), ("band", band)):
        if value is not None:
            check_fraction(name, value)
    if all(value is None for value in bounds.values()):
        raise ValueError(f"no bound: give {', '.join(bounds)}, or the assertion says nothing")
    check_message(message)
    check_trajectory(trajectory)
    if level_by is not None and len(trajectory.checkpoints) < 3:
        raise SelectionError(
            f"level_by= needs three checkpoints or more, and the run has two ({trajectory.label}): "
            "the last one is within any band of itself; put the model that training started from "
            "first, or leave level_by= out"
        )
    result = update_dynamics(
        trajectory, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    text = None
    if result.nothing_moved and not allow_identical:
        text = nothing_moved(result)
    elif min_never is not None and result.never_share < min_never:
        text = too_few_never(result, min_never)
    elif max_cancelled is not None and result.cancelled_share > max_cancelled:
        text = too_many(result, "cancelled", max_cancelled)
    elif max_final is not None and result.final_share > max_final:
        text = too_many(result, "final", max_final)
    elif level_by is not None:
        text = _not_level_by(result, level_by, band)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous(
        "assert_update_dynamics",
        min_never=min_never,
        max_cancelled=max_cancelled,
        max_final=max_final,
        band=None if level_by is None else band,
    )
    return result


def _not_level_by(result: UpdateDynamics, level_by: float, band: float) -> str | None:
    level = result.levels_off(band)
    if level is not None and level.number / len(result.steps) <= level_by:
        return None
    return not_level(result, level, level_by, band)


def assert_step_sparsity(
    trajectory: Trajectory,
    *,
    at_least: float,
    allow_identical: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateDynamics:
    """Fail unless every checkpoint keeps at least this share of the entries of the one before.

    Fails too where nothing moved in a step: it is stalled, whatever the bound.

    Valid usages:
        assert_step_sparsity(run, at_least=0.98)          # neighbouring optimiser steps in bf16
        assert_step_sparsity(run, at_least=0.85)          # checkpoints hundreds of steps apart

    Args:
        trajectory: two or more checkpoints.
        at_least: fraction in [0, 1].
        allow_identical: accept steps in which nothing moved.
        include: as in `update_dynamics`.
        exclude: as in `update_dynamics`.
        kinds: as in `update_dynamics`.
        atol: as in `update_dynamics`.
        rtol: as in `update_dynamics`.
        message: rewords a failure.

    Returns:
        What `update_dynamics` measured; `.steps` has `.step_sparsity`.

    Raises:
        AssertionError: a step changed more, or nothing.
        ValueError: `at_least` outside [0, 1], or two tolerances.
        SelectionError: as in `update_dynamics`.
        PairMismatchError: as in `update_dynamics`.

    Source: arXiv 2602.03839 (neighbouring steps); arXiv 2505.11711, section 6 (checkpoints).

    >>> from pytest_subnet.trajectories import open_trajectory
    >>> assert_step_sparsity(open_trajectory(["base", "tuned"]), at_least=0.9).steps[0].name
    'tuned'
    """
    __tracebackhide__ = True
    check_fraction("at_least", at_least)
    check_message(message)
    result = update_dynamics(
        trajectory, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    text = None
    if not allow_identical and any(not step.moved for step in result.steps):
        text = stalled(result)
    elif any(step.step_sparsity < at_least for step in result.steps):
        text = step_too_dense(result, at_least)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_step_sparsity", at_least=at_least)
    return result
