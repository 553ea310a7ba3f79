"""Checkpoints of one run, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.strategies.finetunes import finetunes

if TYPE_CHECKING:
    from pytest_subnet.strategies.training_runs import Finetune, FinetuneTrajectory


def trajectories(
    *, runs: st.SearchStrategy[Finetune] | None = None
) -> st.SearchStrategy[FinetuneTrajectory]:
    """A strategy for the `Trajectory` of a tiny decoder that is really trained.

    Its checkpoints are the weights before the run and after each of its steps, and `.run` is the
    `Finetune` they are of. Trajectories shrink as their runs do, towards few steps.

    Args:
        runs: of which runs; None: `finetunes(min_steps=2, max_steps=4)`, three to five checkpoints.

    Raises:
        InvalidArgument: `runs` is no strategy.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5, deadline=None)
    ... @given(trajectories())
    ... def test_parts(trajectory):
    ...     found = update_dynamics(trajectory)
    ...     assert found.never + found.cancelled + found.final == found.numel
    >>> test_parts()
    """
    if runs is None:
        runs = finetunes(min_steps=2, max_steps=4)
    if not isinstance(runs, st.SearchStrategy):
        raise InvalidArgument(
            f"Expected SearchStrategy but got runs={runs!r} (type={type(runs).__name__})"
        )
    return runs.map(lambda run: run.trajectory)
