"""What holds of the runs, whatever the machine: the numbers themselves are in the table.

The checkpoints come from `python examples/algorithms/train.py .demo`; the environment variable
`ALGORITHMS` names another folder than `.demo`.
"""

import os
import sys
from pathlib import Path

import pytest

from pytest_subnet import (
    assert_finite,
    assert_mask_overlap,
    assert_same_structure,
    assert_subnetwork_recovers,
    assert_updated,
    open_pair,
    update_mask,
    update_sparsity,
)

sys.path.append(str(Path(__file__).parent))

from runs import INSIDE, RUNS, TWICE

OUT = Path(os.environ.get("ALGORITHMS", ".demo"))
BASE, FOLDER = OUT / "base", OUT / "algorithms"
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


@pytest.mark.parametrize("name", [name for name in TWICE if name not in ("orpo", "sft-far")])
def test_two_seeds_move_much_the_same_part_by_the_papers_null(name: str) -> None:
    """Far above chance over the whole model; the table says what is left beyond the exponents.

    Where half of the weights move or more, as by ORPO and SFT, no overlap can be far above chance.
    """
    first = open_pair(BASE, FOLDER / name)
    second = open_pair(BASE, FOLDER / f"{name}-second-seed")
    assert_mask_overlap(first, second, min_lift=2, null="pooled")


@pytest.mark.parametrize("name", INSIDE)
def test_training_inside_a_mask_leaves_the_rest_to_the_bit(name: str) -> None:
    """In a loop of our own as in TRL's trainers."""
    mask = update_mask(open_pair(BASE, FOLDER / name))
    moved = update_mask(open_pair(BASE, FOLDER / f"{name}-inside"))
    assert moved.count > 0
    assert (moved - mask).count == 0


def test_training_inside_its_mask_gives_the_values_of_the_full_run() -> None:
    """To the bit in most of the mask, though DPO saw the same data in both runs and no more."""
    assert_subnetwork_recovers(
        FOLDER / "dpo", FOLDER / "dpo-inside", base=BASE, match_at_least=0.9, atol=0
    )
