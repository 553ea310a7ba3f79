"""Trajectories that are drawn: of a run, from its start to its end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis.errors import InvalidArgument

from pytest_subnet import Trajectory
from pytest_subnet.strategies.training_runs import Finetune, FinetuneTrajectory
from pytest_subnet.strategies.trajectories import trajectories


@settings(max_examples=5, deadline=None, derandomize=True)
@given(trajectories())
def test_it_is_the_run_step_by_step(trajectory: FinetuneTrajectory) -> None:
    run = trajectory.run
    assert isinstance(trajectory, Trajectory)
    assert trajectory.names == tuple(f"step {step}" for step in range(run.steps + 1))
    assert repr(trajectory) == f"{run!r}.trajectory"
    for name in run.base:
        assert torch.equal(trajectory.checkpoints[0].read(name), run.base[name])
        assert torch.equal(trajectory.checkpoints[-1].read(name), run.tuned[name])


def test_what_is_no_strategy_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^Expected SearchStrategy but got runs=Finetune\("):
        trajectories(runs=Finetune())  # type: ignore[arg-type]
