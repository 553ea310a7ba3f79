"""Trajectories: checkpoints of one run, in order."""

from pytest_subnet.trajectories.opening import open_trajectory
from pytest_subnet.trajectories.selection import select_everywhere
from pytest_subnet.trajectories.trajectory import Trajectory

__all__ = ["Trajectory", "open_trajectory", "select_everywhere"]
