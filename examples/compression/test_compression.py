"""What has to hold of a compressed layer: it is small, it has its structure, it does its work.

The checkpoint comes from `python examples/compression/compress.py .demo`; the environment variable
`COMPRESSION` names another folder than `.demo`.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pytest_subnet import assert_displacement_rank

sys.path.append(str(Path(__file__).parent))

from compress import LAYER, RANK

FOLDER = Path(os.environ.get("COMPRESSION", ".demo")) / "compression" / "compressed"


@pytest.fixture
def rows() -> dict[str, dict[str, float]]:
    """Numbers and losses of the model with each layer in its place."""
    return json.loads((FOLDER / "numbers.json").read_text(encoding="utf-8"))


def test_it_is_small(rows: dict[str, dict[str, float]]) -> None:
    """More than 3.5 times fewer numbers, as in the paper."""
    assert rows["as it was"]["numbers"] > 3.5 * rows["low displacement rank"]["numbers"]


def test_it_is_structured() -> None:
    """Retrained, too; to cut a rectangle out of a square costs two ranks at most."""
    matrix = load_file(FOLDER / "layer.safetensors")[f"{LAYER}.weight"]
    assert_displacement_rank(matrix, max_rank=RANK + 2)


def test_the_loss_is_near_what_it_was(rows: dict[str, dict[str, float]]) -> None:
    """Within a twentieth, once the layer was retrained; without the layer it is a fifth more."""
    assert rows["low displacement rank"]["retrained"] < 1.05 * rows["as it was"]["loss"]


def test_the_layer_is_worth_its_numbers(rows: dict[str, dict[str, float]]) -> None:
    """No better than no layer at all would pass the gate above in a model that does not need it."""
    compressed = rows["low displacement rank"]
    assert compressed["retrained"] < rows["left out"]["loss"]
    assert compressed["retrained"] < compressed["loss"]
