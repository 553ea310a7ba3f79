"""A failing property shrinks to the minimal entry within 200 examples."""

from __future__ import annotations

import numpy as np
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


def moved(pair):
    """The names of the tensors that moved."""
    return [each.name for each in update_sparsity(pair).per_tensor if each.updated]


@pytest.mark.slow
@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("lm_head.weight", "lm_head.weight[0, 0]"),
        ("q_proj", "model.layers.0.self_attn.q_proj.weight[0, 0]"),
        ("norm.weight", "model.norm.weight[0]"),
    ],
)
def test_a_tensor_that_is_named_has_not_moved(part, name, start):
    pair = shrunk(model_pairs(), lambda pair: not any(part in each for each in moved(pair)), start)

    assert repr(pair) == (
        f"<ModelPair drawn model -> sparse update, 1 of 2 entries moved: {name} 0.0 to 1.0: "
        "2 tensors>"
    )


def directions(pair):
    """The highest rank of what became of a tensor."""
    ranks = [0]
    for tensor in pair.tensors:
        base = pair.base.read(tensor.base_name).double().numpy()
        tuned = pair.tuned.read(tensor.tuned_name).double().numpy()[: len(base)]
        ranks += [np.linalg.matrix_rank(tuned - base)] if base.ndim == 2 else []
    return max(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(4))
def test_no_model_moved_in_two_directions(start):
    pair = shrunk(model_pairs(), lambda pair: directions(pair) < 2, start)

    assert repr(pair) == (
        "<ModelPair drawn model -> sparse update, 2 of 4 entries moved: "
        "model.embed_tokens.weight[0, 0] 0.0 to 1.0; model.embed_tokens.weight[1, 1] 0.0 to 1.0: "
        "1 tensor>"
    )


@pytest.mark.parametrize("start", range(5))
def test_no_matrix_moved_in_two_directions(start):
    def holds(update):
        return torch.linalg.matrix_rank(update.tuned.double() - update.base.double()) < 2

    update = shrunk(updates(), holds, start)

    assert torch.equal(update.base, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert torch.equal(update.tuned, torch.eye(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("start", range(5))
def test_no_entry_is_nan(start):
    tensor = shrunk(tensors(), lambda tensor: not tensor.double().isnan().any(), start)

    assert tensor.shape == ()
    assert tensor.isnan()


def test_no_entry_is_other_than_zero_in_a_shape_that_is_given():
    matrices = tensors(dtypes=st.just("bfloat16"), shapes=st.just((8, 8)))

    matrix = shrunk(matrices, lambda matrix: not matrix.any(), 0)

    assert sorted(matrix.flatten().tolist()) == [0.0] * 63 + [1.0]


@pytest.mark.parametrize("start", range(5))
def test_no_low_rank_update_has_two_directions(start):
    update = shrunk(updates(), lambda update: (update.rank or 0) < 2, start)

    assert torch.equal(update.base, torch.zeros(2, 2, dtype=torch.bfloat16))
    assert torch.equal(update.tuned, torch.eye(2, dtype=torch.bfloat16) / 64)


@pytest.mark.parametrize("start", range(3))
def test_no_entry_is_in_a_mask(start):
    mask = shrunk(update_masks(), lambda mask: not mask, start)

    assert repr(mask) == "<UpdateMask drawn: 1 of 1 entries of 1 tensor (density 1)>"
