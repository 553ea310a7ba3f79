"""What has to hold of the bigram subnetwork: enough for what it does, needed, and not by chance.

The masks come from `python examples/bigram/train.py .demo`; the environment variable `BIGRAM` names
another folder than `.demo`.
"""

import json
import os
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pytest_subnet import (
    UpdateMask,
    assert_mask_concentration,
    assert_mask_overlap,
    assert_subnetwork_necessary,
    assert_subnetwork_sufficient,
)

sys.path.append(str(Path(__file__).parent))

from bigrams import Text, correlation, negative_loss
from report import alignments, magnitudes, read_masks, under
from search import SEARCH, load, with_random_blocks

FOLDER = Path(os.environ.get("BIGRAM", ".demo")) / "bigram"


@pytest.fixture(scope="module")
def searched() -> None:
    """Skip what two steps of a search cannot show."""
    record = json.loads((FOLDER / "found" / "laboratory.json").read_text(encoding="utf-8"))
    if record["search"] != SEARCH:
        pytest.skip("searched for two steps only")


@pytest.fixture(scope="module")
def laboratory(searched: None) -> tuple[PreTrainedModel, Text]:
    """The base and the text."""
    return load(FOLDER)


@pytest.fixture(scope="module")
def masks() -> dict[str, UpdateMask]:
    """The subnetworks, by name."""
    return read_masks(FOLDER)


@pytest.fixture(scope="module")
def mask(masks: dict[str, UpdateMask]) -> UpdateMask:
    """The bigram subnetwork."""
    return masks["bigram"]


def test_it_is_one_of_attention_and_mlps(mask: UpdateMask) -> None:
    """Embeddings, head and norms are whole in every subnetwork here."""
    assert len(mask) == 21
    assert all(name.endswith("_proj.weight") for name in mask)


def test_it_is_sufficient(laboratory: tuple[PreTrainedModel, Text], mask: UpdateMask) -> None:
    """Its surprisals follow the bigram model's, those of random masks of its size do not."""
    model, text = laboratory
    assert_subnetwork_sufficient(
        (deepcopy(model), model),
        mask,
        partial(correlation, text=text),
        min_score=0.92,
        fill="zero",
    )


def test_it_is_necessary(laboratory: tuple[PreTrainedModel, Text], mask: UpdateMask) -> None:
    """Without it the model is worse at its text than without as many random entries."""
    model, text = laboratory
    assert_subnetwork_necessary(
        (deepcopy(model), model),
        mask,
        partial(negative_loss, text=text),
        min_drop=0.5,
        fill="zero",
    )


def test_it_takes_what_training_made_of_the_blocks(
    laboratory: tuple[PreTrainedModel, Text], masks: dict[str, UpdateMask]
) -> None:
    """In random blocks the same search finds none that is as near to the bigram model."""
    model, text = laboratory
    control = under(with_random_blocks(model), masks["random"])
    assert correlation(control, text) < correlation(under(model, masks["bigram"]), text) - 0.1


@pytest.mark.usefixtures("searched")
def test_it_lies_in_the_last_mlp_first_of_all(mask: UpdateMask) -> None:
    """In the paper it is the first one. Every search here ends there, so it says little."""
    assert_mask_concentration(mask, "*.layers.2.mlp.*", plurality=True, min_lift=1.3)


def test_it_overlaps_with_what_pruning_keeps_and_with_the_largest_weights(
    laboratory: tuple[PreTrainedModel, Text], masks: dict[str, UpdateMask]
) -> None:
    """By more than masks that were drawn with as many entries in each matrix."""
    model, _ = laboratory
    bigram = masks["bigram"]
    assert_mask_overlap(bigram, masks["pruning"], null="matrix", min_lift=1.5)
    assert_mask_overlap(bigram, magnitudes(model, bigram), null="matrix", min_lift=2)


def test_its_first_block_turns_from_the_current_token_to_the_next(
    laboratory: tuple[PreTrainedModel, Text], mask: UpdateMask
) -> None:
    """Activations leave the current token's direction, and near the next one's."""
    model, text = laboratory
    embedded, turned, *_ = alignments(under(model, mask), text)
    assert turned.current < embedded.current - 0.3
    assert turned.following > embedded.following + 0.05
