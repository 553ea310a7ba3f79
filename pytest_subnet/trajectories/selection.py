"""Which tensors of a trajectory a measure covers: those that are selected, in every checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.errors import PairMismatchError
from pytest_subnet.pairs.selection import Selection, select
from pytest_subnet.text import safe
from pytest_subnet.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns


def select_everywhere(
    trajectory: Trajectory,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> Selection:
    """Choose tensors of `trajectory`, as rows of its first pair.

    Args:
        trajectory: where to choose.
        include: as in `select`.
        exclude: as in `select`.
        kinds: as in `select`.

    Raises:
        TypeError: `trajectory` is something else.
        SelectionError: as in `select`.
        PairMismatchError: a selected tensor does not align in one of the checkpoints, or is counted
            in some of them and not in others.
    """
    check_trajectory(trajectory)
    first, *others = trajectory.pairs
    selection = select(first, include, exclude, kinds)
    wanted = _names(first, selection.rows)
    for pair in others:
        found = _names(pair, select(pair, include, exclude, kinds).rows)
        for name in [*wanted, *found]:
            if name not in wanted or name not in found:
                raise PairMismatchError(_uneven(name, first, pair))
    return selection


def check_trajectory(trajectory: object) -> None:
    """Raise `TypeError` unless `trajectory` is one; the path of a run in its place is no reason."""
    if not isinstance(trajectory, Trajectory):
        raise TypeError(
            f"a Trajectory is needed, got {safe(type(trajectory).__name__)}; make one with "
            "open_trajectory(run), or take the fixture of that name"
        )


def _names(pair: ModelPair, rows: tuple[int, ...]) -> dict[str, None]:
    return dict.fromkeys(pair.tensors[row].name for row in rows)


def _uneven(name: str, first: ModelPair, other: ModelPair) -> str:
    """The message for a tensor that only one of two pairs counts."""
    labels = safe(first.tuned.label), safe(other.tuned.label)
    if (name in first.tied) != (name in other.tied):
        tied, apart = labels if name in first.tied else labels[::-1]
        return (
            f"{safe(name)} is tied to another tensor in {tied} and one of its own in {apart}: it "
            "cannot be counted through the run; save all checkpoints alike, or follow those "
            "before and after it apart"
        )
    return (
        f"{safe(name)} is a weight in one of {labels[0]} and {labels[1]} and a buffer in the "
        "other; leave it out with exclude="
    )
