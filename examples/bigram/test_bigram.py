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

from pytest_subnet import UpdateMask
from pytest_subnet.findings.subnetworks import (
    assert_subnetwork_necessary,
    assert_subnetwork_sufficient,
)

sys.path.append(str(Path(__file__).parent))

from bigrams import Text, correlation, negative_loss
from report import read_masks
from search import SEARCH, load

FOLDER = Path(os.environ.get("BIGRAM", ".demo")) / "bigram"


@pytest.fixture(scope="module")
def laboratory() -> tuple[PreTrainedModel, Text]:
    """The base and the text."""
    return load(FOLDER / "base")


@pytest.fixture
def mask() -> UpdateMask:
    """The bigram subnetwork."""
    return read_masks(FOLDER)["bigram"]


@pytest.fixture
def searched() -> None:
    """Skip what two steps of a search cannot show."""
    record = json.loads((FOLDER / "found" / "laboratory.json").read_text(encoding="utf-8"))
    if record["search"] != SEARCH:
        pytest.skip("searched for two steps only")


def test_it_is_one_of_attention_and_mlps(mask: UpdateMask) -> None:
    """Embeddings, head and norms are whole in every subnetwork here."""
    assert len(mask) == 21
    assert all(name.endswith("_proj.weight") for name in mask)


@pytest.mark.usefixtures("searched")
def test_it_is_sufficient(laboratory: tuple[PreTrainedModel, Text], mask: UpdateMask) -> None:
    """Its surprisals follow the bigram model's, those of random masks of its size do not."""
    model, text = laboratory
    assert_subnetwork_sufficient(
        (deepcopy(model), model),
        mask,
        partial(correlation, text=text),
        min_score=0.85,
        fill="zero",
    )


@pytest.mark.usefixtures("searched")
def test_it_is_necessary(laboratory: tuple[PreTrainedModel, Text], mask: UpdateMask) -> None:
    """Without it the model is worse at its text than without as many random entries."""
    model, text = laboratory
    assert_subnetwork_necessary(
        (deepcopy(model), model),
        mask,
        partial(negative_loss, text=text),
        min_drop=0.05,
        fill="zero",
    )
