"""What holds of the runs, whatever the machine: the numbers themselves are in the table.

The checkpoints come from `python examples/algorithms/train.py .demo`.
"""

from pathlib import Path

import pytest
from runs import INSIDE, RUNS, TWICE

from pytest_subnet import (
    assert_finite,
    assert_mask_overlap,
    assert_same_structure,
    assert_updated,
    open_pair,
    update_mask,
    update_sparsity,
)

BASE = Path(".demo/base")
FOLDER = Path(".demo/algorithms")
RL = [name for name in RUNS if not name.startswith("sft")]


@pytest.mark.parametrize("name", RUNS)
def test_every_projection_took_part(name: str) -> None:
    """Nothing lost, nothing broken, and every matrix of the blocks moved."""
    pair = open_pair(BASE, FOLDER / name)
    assert_same_structure(pair)
    assert_finite(pair)
    assert_updated(pair, "*_proj.weight")


@pytest.mark.parametrize("name", RL)
def test_rl_moves_less_than_supervised_tuning_at_its_usual_rate(name: str) -> None:
    """The rates differ as well, which explains most of it: see `sft-at-rl-rate` in the table."""
    rl, sft = (open_pair(BASE, FOLDER / each) for each in (name, "sft-far"))
    assert update_sparsity(rl).sparsity > update_sparsity(sft).sparsity


@pytest.mark.parametrize("name", TWICE)
def test_two_seeds_move_much_the_same_part_by_the_papers_null(name: str) -> None:
    """Far above chance over the whole model, which small weights alone bring about."""
    first = open_pair(BASE, FOLDER / name)
    second = open_pair(BASE, FOLDER / f"{name}-second-seed")
    assert_mask_overlap(first, second, min_lift=1, null="pooled")


@pytest.mark.parametrize("name", INSIDE)
def test_training_inside_a_mask_leaves_the_rest_to_the_bit(name: str) -> None:
    """Weight decay, momentum and the trainer's own steps included."""
    mask = update_mask(open_pair(BASE, FOLDER / name))
    moved = update_mask(open_pair(BASE, FOLDER / f"{name}-inside"))
    assert moved.count > 0
    assert (moved - mask).count == 0
