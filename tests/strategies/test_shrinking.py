"""A failing property shrinks to the minimal entry within 200 examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from pytest_subnet import update_sparsity
from pytest_subnet.strategies import model_pairs, tensors, update_masks, updates


def shrunk(strategy, holds, start, within=200):
    """What a property shrinks to, in so many examples from its first failure on."""
    seen = []

    @seed(start)
    @settings(
        max_examples=1000,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(value):
        seen.append((value, holds(value)))
        assert seen[-1][1]

    with pytest.raises(AssertionError):
        check()
    first = [held for _, held in seen].index(False)
    assert len(seen) - first <= within
    return [value for value, held in seen if not held][-1]


@pytest.mark.parametrize("start", range(5))
def test_no_entry_moved(start):
    pair = shrunk(model_pairs(), lambda pair: update_sparsity(pair).updated == 0, start)

    assert repr(pair) == (
        "<ModelPair drawn model -> sparse update, 1 of 1 entry moved: "
        "model.embed_tokens.weight[0, 0] 0.0 to 1.0: 1 tensor>"
    )


@pytest.mark.parametrize("start", range(5))
def test_no_entry_is_nan(start):
    tensor = shrunk(tensors(), lambda tensor: not tensor.double().isnan().any(), start)

    assert tensor.shape == ()
    assert tensor.isnan()


def test_no_entry_is_other_than_zero_in_a_shape_that_is_given():
    matrices = tensors(dtypes=st.just("bfloat16"), shapes=st.just((8, 8)))

    matrix = shrunk(matrices, lambda matrix: not matrix.any(), 0)

    assert sorted(matrix.flatten().tolist()) == [0.0] * 63 + [1.0]


@pytest.mark.parametrize("start", range(3))
def test_no_update_has_two_directions(start):
    # Four numbers must go down together, and keep two directions.
    update = shrunk(updates(), lambda update: (update.rank or 0) < 2, start, within=400)

    assert torch.equal(update.base, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert torch.equal(update.tuned, torch.eye(2, dtype=torch.bfloat16) / 64)


@pytest.mark.parametrize("start", range(3))
def test_no_entry_is_in_a_mask(start):
    mask = shrunk(update_masks(), lambda mask: not mask, start)

    assert repr(mask) == "<UpdateMask drawn: 1 of 1 entries of 1 tensor (density 1)>"
