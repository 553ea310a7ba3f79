"""What has to hold of many tasks in one network: none is forgotten, each keeps to what is its own.

The run comes from `python examples/supermasks/learn.py .demo`; the environment variable
`SUPERMASKS` names another folder than `.demo`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pytest_subnet import (
    Supermasks,
    Trajectory,
    assert_mask_density,
    assert_masks_exclusive,
    assert_previous_masks_frozen,
    assert_updates_exclusive,
    open_trajectory,
)

sys.path.append(str(Path(__file__).parent))

from learn import KEPT, network

FOLDER = Path(os.environ.get("SUPERMASKS", ".demo")) / "supermasks" / "learnt"


@pytest.fixture(scope="module")
def run() -> Trajectory:
    """The network before any task, and after each."""
    return open_trajectory(FOLDER / "run")


@pytest.fixture(scope="module")
def masks(run: Trajectory) -> Supermasks:
    """The masks, on the weights after the last task."""
    model = network()
    model.load_state_dict(load_file(FOLDER / "run" / run.names[-1] / "model.safetensors"))
    return Supermasks.load(FOLDER / "masks", model)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The numbers behind the table."""
    return json.loads((FOLDER / "numbers.json").read_text(encoding="utf-8"))


def test_no_task_is_forgotten(rows: list[dict[str, Any]]) -> None:
    """The outputs of every task were the same to the bit whenever they were looked at again."""
    assert [row[method]["forgotten"] for row in rows for method in ("SupSup", "ExSSNeT")] == [0] * 6


def test_what_is_trained_is_exclusive(masks: Supermasks) -> None:
    """Masks overlap; of what each task may train nothing is another's."""
    trained = {task: mask for task, mask in masks.exclusive.items() if mask}
    assert_masks_exclusive(trained)
    with pytest.raises(AssertionError, match="masks share"):
        assert_masks_exclusive(masks)


def test_each_task_moved_what_is_its_own(run: Trajectory, masks: Supermasks) -> None:
    """And trained weights did move, as long as there were any left."""
    assert_updates_exclusive(run, masks)
    assert_previous_masks_frozen(run, masks)


def test_densities(masks: Supermasks) -> None:
    """Exact in every layer, to the nearest whole entry."""
    for mask in masks.values():
        assert_mask_density(mask, at_least=KEPT, at_most=KEPT)


def test_capacity_is_used_up_as_chance_would(rows: list[dict[str, Any]]) -> None:
    """Masks that are learnt share more than random ones: what is used stays below 1 − (1 − ρ)^T."""
    for row in rows:
        tasks = len(row["ExSSNeT"]["exclusive"])
        assert row["ExSSNeT"]["used"] < 1 - (1 - row["density"]) ** tasks + 0.01


def test_the_network_learns(rows: list[dict[str, Any]]) -> None:
    """Ten classes: far better than one in ten, on digits that were held out."""
    for row in rows:
        for method in ("SupSup", "ExSSNeT"):
            learnt = row[method]
            assert sum(learnt["right"]) > 0.5 * learnt["of"] * len(learnt["right"])
