"""Whether tasks keep out of each other's way: exclusive masks, exclusive updates, frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_fraction, check_message, warn_of_vacuous
from pytest_subnet.findings.common.fingerprints import Fingerprints, of_sides
from pytest_subnet.findings.common.result import Coverage, Message, reworded
from pytest_subnet.findings.exclusive.counts import (
    check_none_empty,
    count_pairs,
    count_shared,
    count_steps,
    differing,
    named,
)
from pytest_subnet.findings.exclusive.result import (
    ExclusiveStep,
    ExclusiveTensor,
    ExclusiveUpdates,
    MasksExclusive,
)
from pytest_subnet.findings.exclusive.texts import (
    earlier_moved,
    mask_changed,
    masks_share,
    not_trained,
    outside_moved,
)
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.recording import record
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.text import plural, safe, short_dtype
from pytest_subnet.trajectories.selection import check_trajectory

if TYPE_CHECKING:
    from pytest_subnet.findings.exclusive.counts import Named, Stepped
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.trajectories import Trajectory

Masks: TypeAlias = Mapping[str, UpdateMask] | Sequence[UpdateMask]
Snapshots: TypeAlias = Sequence[Mapping[str, UpdateMask]] | Sequence[Sequence[UpdateMask]]


def assert_masks_exclusive(
    masks: Masks, *, max_overlap: float = 0.0, message: Message | None = None
) -> MasksExclusive:
    """Fail if masks share entries: more than `max_overlap` of those that any of them holds.

    overlap = entries that two or more masks hold / entries that any mask holds. Masks that are
    together denser than 1 in a tensor cannot be exclusive; a failure says so.

    Valid usages:
        assert_masks_exclusive(supermasks.exclusive)            # what ExSSNeT trains
        assert_masks_exclusive([first, second, third])
        assert_masks_exclusive(by_task, max_overlap=0.05)

    Args:
        masks: two or more, of the same tensors: a mapping from tasks, or a sequence.
        max_overlap: fraction in [0, 1].
        message: rewords a failure.

    Returns:
        MasksExclusive: overlap, shared, union, used, per_tensor; also when the bound holds.

    Raises:
        AssertionError: more is shared.
        SelectionError: fewer than two masks, one that is empty, or one that is given twice.
        PairMismatchError: masks cover other tensors.
        TypeError: something else is given.
        ValueError: `max_overlap` outside [0, 1].

    >>> left = UpdateMask.of({"weight": [True, True, False, False]})
    >>> right = UpdateMask.of({"weight": [False, False, True, False]})
    >>> assert_masks_exclusive({"left": left, "right": right}).used
    0.75
    """
    __tracebackhide__ = True
    check_fraction("max_overlap", max_overlap)
    check_message(message)
    given = named(masks)
    if len(given.masks) < 2:
        raise SelectionError(
            f"{plural(len(given.masks), 'mask')} can share nothing; give two or more"
        )
    check_none_empty(given)
    tensors, first = count_shared(given.masks)
    result = MasksExclusive(
        masks=given.names,
        counts=tuple(mask.count for mask in given.masks),
        first_counts=tuple(first),
        per_tensor=tuple(tensors),
        fingerprints=_fingerprints(given),
    )
    record(result)
    if result.overlap > max_overlap:
        text = masks_share(result, count_pairs(given.masks), max_overlap)
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_masks_exclusive", max_overlap=max_overlap)
    return result


def assert_updates_exclusive(
    trajectory: Trajectory,
    masks: Masks,
    *,
    allow_identical: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    message: Message | None = None,
) -> ExclusiveUpdates:
    """Fail if training a task moved anything but the entries that are its own.

    Step t, from checkpoint t to the next, may move the entries of mask t that no earlier mask
    holds. What has other bits counts as moved, be it in a bias, a norm or a buffer that no mask
    covers. Fails too where a step moved nothing though it had entries to train.

    Valid usages:
        run = open_trajectory(["start", "after-1", "after-2"])
        assert_updates_exclusive(run, [mask_1, mask_2])
        assert_updates_exclusive(run, supermasks)                     # a mapping, in its order
        assert_updates_exclusive(run, masks, exclude="heads.*")       # each task has its own head

    Args:
        trajectory: the start, and a checkpoint after each task.
        masks: one a step, in the order of training, of the same tensors.
        allow_identical: accept steps that moved nothing.
        include: glob or globs on names in the first checkpoint; None takes all.
        exclude: glob or globs on these names to leave out.
        message: rewords a failure.

    Returns:
        ExclusiveUpdates: `.steps` with what each moved.

    Raises:
        AssertionError: something else moved, or nothing.
        ValueError: another number of masks than of steps.
        SelectionError: a pattern matches nothing, masks name nothing that is selected, all are
            empty, or one is given twice.
        PairMismatchError: checkpoints do not align, or masks are of another model.
        TypeError: `trajectory` or `masks` is something else.

    Source: arXiv 2210.10209 (ExSSNeT), section 3.2.

    >>> mask_1 = UpdateMask.of({"weight": [True, True, False, False]})
    >>> mask_2 = UpdateMask.of({"weight": [False, True, True, False]})
    >>> from pytest_subnet import open_trajectory
    >>> run = open_trajectory([{"weight": torch.tensor(each)} for each in (
    ...     [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0])])
    >>> assert_updates_exclusive(run, [mask_1, mask_2])
    ExclusiveUpdates(2 tasks, moved=3, outside=0, earlier=0, same bits)
    """
    __tracebackhide__ = True
    check_message(message)
    check_trajectory(trajectory)
    given = named(masks)
    result = _measured(trajectory, given, include, exclude)
    record(result)
    text = None
    idle = [step for step in result.steps if step.exclusive and not step.moved]
    if result.outside:
        text = outside_moved(result)
    elif result.earlier:
        text = earlier_moved(result)
    elif idle and not allow_identical:
        text = not_trained(result, idle)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


def assert_previous_masks_frozen(
    trajectory: Trajectory,
    masks: Masks | Snapshots,
    *,
    allow_identical: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    message: Message | None = None,
) -> ExclusiveUpdates:
    """Fail if training a task moved an entry of an earlier task's mask, or changed such a mask.

    In step t the entries of the masks 1 … t−1 keep their bits; a sum or a norm would not see two
    that were swapped. Elsewhere anything may move: `assert_updates_exclusive` asks for more. With
    snapshots of all masks after each step, masks themselves must stay as they were first seen.

    Valid usages:
        assert_previous_masks_frozen(run, [mask_1, mask_2])
        assert_previous_masks_frozen(run, [[mask_1], [mask_1_now, mask_2]])
        assert_previous_masks_frozen(run, snapshots)       # of dict(supermasks) after each task

    Args:
        trajectory: the start, and a checkpoint after each task.
        masks: one a step, in the order of training; or after each step all masks so far, as a
            sequence or a mapping: one after the first, two after the second.
        allow_identical: accept a run that moved nothing after its first task, as where only masks
            are learnt.
        include: glob or globs on names in the first checkpoint; None takes all.
        exclude: glob or globs on these names to leave out.
        message: rewords a failure.

    Returns:
        ExclusiveUpdates: `.steps` with `.earlier`, and `.changed_masks`.

    Raises:
        AssertionError: such an entry moved, a mask changed, or no step after the first moved
            anything.
        ValueError: another number of masks than of steps, or snapshots that do not grow by one.
        SelectionError: one task alone, a pattern matches nothing, masks name nothing that is
            selected, all are empty, or one is given twice.
        PairMismatchError: checkpoints do not align, or masks are of another model.
        TypeError: `trajectory` or `masks` is something else.

    >>> mask_1 = UpdateMask.of({"weight": [True, True, False, False]})
    >>> mask_2 = UpdateMask.of({"weight": [False, True, True, False]})
    >>> from pytest_subnet import open_trajectory
    >>> run = open_trajectory([{"weight": torch.tensor(each)} for each in (
    ...     [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0])])
    >>> assert_previous_masks_frozen(run, [mask_1, mask_2]).outside
    1
    """
    __tracebackhide__ = True
    check_message(message)
    check_trajectory(trajectory)
    given, changed = _first_seen(masks)
    if len(given.masks) < 2:
        raise SelectionError(
            f"{plural(len(given.masks), 'task')} has no previous mask; give two or more, in the "
            "order of training"
        )
    result = _measured(trajectory, given, include, exclude, changed)
    record(result)
    text = None
    if result.changed_masks:
        text = mask_changed(result)
    elif result.earlier:
        text = earlier_moved(result)
    elif not any(step.moved for step in result.steps[1:]) and not allow_identical:
        text = not_trained(result, [step for step in result.steps if not step.moved])
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


def _first_seen(masks: Masks | Snapshots) -> tuple[Named, tuple[str, ...]]:
    """Each mask as it was first given, and in words which of them later ones differ from."""
    if isinstance(masks, Mapping | UpdateMask) or not isinstance(masks, Sequence):
        return named(masks), ()
    if not masks or not isinstance(masks[0], Mapping | Sequence):
        return named(masks), ()
    snapshots = [named(each) for each in masks]
    last = snapshots[-1].names
    found: list[UpdateMask] = []
    changed: list[str] = []
    for number, (names, now) in enumerate(snapshots, 1):
        if len(now) != number or names != last[:number]:
            raise ValueError(
                f"snapshot {number} holds {plural(len(now), 'mask')}"
                f"{f' ({safe(names[-1])} last)' if names else ''}: after step {number}, the masks "
                "of all tasks so far are to be there, in one order"
            )
        for name, first, later in zip(names, found, now, strict=False):
            differ = 0 if first is later else differing(first, later)
            if differ:
                changed.append(f"{safe(name)} in {plural(differ, 'entry')} after {safe(names[-1])}")
        found.append(now[-1])
    return named(dict(zip(last, found, strict=True))), tuple(changed)


def _measured(
    trajectory: Trajectory,
    given: Named,
    include: Patterns | None,
    exclude: Patterns | None,
    changed: tuple[str, ...] = (),
) -> ExclusiveUpdates:
    steps = len(trajectory.checkpoints) - 1
    if len(given.masks) != steps:
        raise ValueError(
            f"{plural(len(given.masks), 'mask')} for {plural(steps, 'step')} of "
            f"{trajectory.label}: one mask a step is needed, and the checkpoint that training "
            "started from comes first"
        )
    if not any(given.masks):
        raise SelectionError("all masks are empty: no step may move anything; give those of a run")
    counted = list(count_steps(trajectory, given.masks, include, exclude))
    return ExclusiveUpdates(
        coverage=_cover(trajectory, counted[0][1]),
        steps=tuple(
            ExclusiveStep(
                name=trajectory.names[number + 1],
                previous=trajectory.names[number],
                task=given.names[number],
                number=number + 1,
                exclusive=exclusive,
                moved=sum(each.moved for each in step),
                outside=sum(each.outside for each in step),
                earlier=sum(each.earlier for each in step),
            )
            for number, (exclusive, step) in enumerate(counted)
        ),
        per_tensor=tuple(
            ExclusiveTensor(
                each[0].tensor.name,
                each[0].tensor.shape,
                each[0].tensor.dtype,
                each[0].tensor.numel,
                moved=sum(step.moved for step in each),
                outside=sum(step.outside for step in each),
                earlier=sum(step.earlier for step in each),
            )
            for each in zip(*(step for _, step in counted), strict=True)
        ),
        changed_masks=changed,
    )


def _cover(trajectory: Trajectory, tensors: Sequence[Stepped]) -> Coverage:
    first, last = trajectory.pairs[0], trajectory.pairs[-1]
    notes = [note for pair in trajectory.pairs for note in pair.notes]
    notes += [f"{safe(name)} is tied, counted once" for name in first.tied]
    return Coverage(
        pair=trajectory.label,
        tolerance=SAME_BITS,
        dtype="+".join(sorted({short_dtype(each.tensor.dtype) for each in tensors})),
        tensors=len(tensors),
        tensors_total=len(first.tensors),
        numel=sum(each.tensor.numel for each in tensors),
        notes=tuple(dict.fromkeys(notes)),
        fingerprints=of_sides({"base": (first, first.base), "tuned": (last, last.tuned)}),
    )


def _fingerprints(given: Named) -> Fingerprints:
    return Fingerprints(
        {
            f"{side}_{number}": partial(getattr, mask.origin, side)
            for side in ("base", "tuned")
            for number, mask in enumerate(given.masks, 1)
        }
    )
