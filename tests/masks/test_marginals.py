"""How full rows and columns are: counted on packed bits, held to sums of the entries."""

import numpy as np
import pytest

from pytest_subnet import UpdateMask
from pytest_subnet.masks import marginals as module
from pytest_subnet.masks.marginals import marginals

SHAPES = [
    (1, 1),
    (5,),
    (3, 7),
    (300, 64),
    (2, 3, 65),
    (4100, 256),  # compiled; rows of four words
    (515, 5120),  # compiled; three pieces, of which none ends with a row
    (1100, 1000),  # large, and no whole words a row
    (1 << 20, 2),
]


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_the_sums_of_rows_and_columns(shape, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(module, "_kernel", lambda: None)
    random = np.random.default_rng(0)
    entries = random.random(shape) < random.random(shape[-1])
    rows, columns = marginals(UpdateMask.of({"w": entries}), "w")
    flat = entries.reshape(shape[0], -1)
    assert rows.tolist() == flat.sum(axis=1).tolist()
    assert columns.tolist() == flat.sum(axis=0).tolist()


@pytest.mark.parametrize("full", [True, False])
def test_counts_beyond_a_byte_are_carried(full):
    rows, columns = marginals(UpdateMask.of({"w": np.full((8193, 128), full)}), "w")
    assert set(rows.tolist()) == {128 * full}
    assert set(columns.tolist()) == {8193 * full}
