"""Updates of one matrix, held to what they say of themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet import open_pair, update_sparsity
from pytest_subnet.strategies import updates
from pytest_subnet.strategies.moving import rounded
from pytest_subnet.strategies.words import storage_of

FEW = settings(max_examples=60, database=None, deadline=None)
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(tensor):
    return tensor.contiguous().view(WORDS[tensor.element_size()])


@FEW
@given(updates())
def test_the_mask_is_where_the_bits_differ(update):
    assert torch.equal(update.mask, words(update.base) != words(update.tuned))
    assert update.mask.any() or update.kind == "rounded"
    assert update.base.isfinite().all()
    assert update.tuned.isfinite().all()
    assert update.base.data_ptr() != update.tuned.data_ptr()


@FEW
@given(updates(shapes=st.just((6, 5))))
def test_the_measure_finds_the_mask(update):
    pair = open_pair({"weight": update.base}, {"weight": update.tuned})

    assert update_sparsity(pair).updated == update.mask.sum()


@FEW
@given(updates(kinds=("low-rank",)))
def test_the_rank_is_exact(update):
    change = update.tuned.double() - update.base.double()

    assert update.rank == torch.linalg.matrix_rank(change)


@FEW
@given(updates(kinds=("dense",)))
def test_a_dense_update_moves_every_entry(update):
    assert update.mask.all()


@FEW
@given(updates(kinds=("rounded",)))
def test_what_was_swallowed_did_not_move_and_is_not_zero(update):
    assert not (update.swallowed & update.mask).any()
    assert not (update.swallowed & (update.base == 0)).any()


def test_rounding_swallows_a_quarter_of_a_step_and_not_a_whole_one():
    base = torch.tensor([1.0, 1.0, 3.0e38], dtype=torch.bfloat16)
    storage = storage_of("bfloat16")
    found = [rounded(base, storage, seed) for seed in range(50)]

    assert torch.equal(found[0][1], torch.tensor([True, True, False]))
    assert {(tuned[0] != 1).item() for tuned, _ in found} == {True, False}
    assert all(tuned.isfinite().all() for tuned, _ in found)


def test_kinds_are_a_strategy_or_a_tuple():
    for kinds in (st.just("dense"), ("dense",)):
        assert find(updates(kinds=kinds), lambda update: True, settings=FEW).kind == "dense"


@pytest.mark.parametrize("kind", ["sparse", "low-rank", "dense"])
def test_nothing_is_swallowed_where_nothing_is_rounded(kind):
    @FEW
    @given(updates(kinds=(kind,)))
    def check(update):
        assert update.kind == kind
        assert not update.swallowed.any()
        assert (update.rank is None) == (kind != "low-rank")

    check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kinds": ()},
            "Expected a tuple of some of 'sparse', 'low-rank', 'dense', 'rounded' but got kinds=()",
        ),
        (
            {"kinds": "dense"},
            "Expected a tuple of some of 'sparse', 'low-rank', 'dense', 'rounded' but got "
            "kinds='dense'",
        ),
        (
            {"kinds": st.just("none")},
            "kinds drew 'none', which is not one of sparse, low-rank, dense, rounded",
        ),
        (
            {"dtypes": st.just(torch.int8)},
            "dtypes drew torch.int8, which is not one of bfloat16, float16, float32, float64",
        ),
        (
            {"shapes": st.just((2, 0))},
            "shapes drew (2, 0), which is not the shape of 2 sides of at least 1",
        ),
    ],
)
def test_wrong_arguments_are_refused_when_it_draws(arguments, message):
    strategy = updates(**arguments)

    with pytest.raises(InvalidArgument) as caught:
        find(strategy, lambda update: True, settings=FEW)

    assert str(caught.value) == message
