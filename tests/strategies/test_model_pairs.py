"""Pairs of models in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet import assert_finite, update_sparsity
from pytest_subnet.strategies import model_pairs, state_dicts
from pytest_subnet.strategies.model_pairs import _selected

FEW = settings(max_examples=60, database=None, deadline=None)
MANY = settings(FEW, max_examples=500)


def moved(pair):
    """How many entries have other bits, counted by hand."""
    return sum(
        int((before[:rows].view(word) != after[:rows].view(word)).sum())
        for tensor in pair.tensors
        for before in [pair.base.read(tensor.base_name)]
        for after in [pair.tuned.read(tensor.tuned_name)]
        for word in [{2: torch.int16, 4: torch.int32}[before.element_size()]]
        for rows in [tensor.shape[0]]
    )


@FEW
@given(model_pairs())
def test_pairs_align_and_count(pair):
    assert pair.problems == ()
    assert update_sparsity(pair).updated == moved(pair)
    assert_finite(pair)


@pytest.mark.parametrize("kind", ["sparse", "low-rank", "dense", "rounded"])
def test_something_moved_unless_it_may_not(kind):
    @FEW
    @given(model_pairs(kinds=(kind,), allow_identical=False))
    def check(pair):
        assert moved(pair)
        assert kind in repr(pair)

    check()


@FEW
@given(model_pairs(kinds=("dense",), allow_identical=False, allow_grown_vocab=False))
def test_a_dense_update_moves_all_of_a_tensor_or_nothing(pair):
    moved_of = {each.name: each.updated / each.numel for each in update_sparsity(pair).per_tensor}

    assert set(moved_of.values()) <= {0, 1}


@FEW
@given(model_pairs(kinds=("low-rank",), allow_grown_vocab=False))
def test_a_low_rank_update_moves_nothing_but_matrices(pair):
    moved_in = {len(each.shape) for each in update_sparsity(pair).per_tensor if each.updated}

    assert moved_in <= {2} or moved(pair) == 1


def test_which_tensors_move_is_drawn():
    names = ["embed", "q_proj", "norm", "head"]
    selected = [_selected(number, names) for number in range(64)]

    assert selected[:3] == [{"embed"}, {"head"}, {"q_proj", "norm", "head"}]
    assert all(selected)
    assert set(names) in selected
    assert {"embed", "norm"} in selected
    assert all(_selected(number, ["embed"]) == {"embed"} for number in range(64))
    # One that moves also moves when others have gone.
    assert all(
        name in _selected(number, [name, "embed"])
        for number in range(3, 64)
        for name in selected[number]
    )


def test_a_tie_stays_a_tie():
    pair = find(model_pairs(allow_identical=False), lambda pair: pair.tied, settings=MANY)

    ((head, embedding),) = pair.tied.items()
    assert pair.tuned.read(head).data_ptr() == pair.tuned.read(embedding).data_ptr()


def test_a_vocabulary_grows_unless_it_may_not():
    def grew(pair):
        return any("rows" in note for note in pair.notes)

    pair = find(model_pairs(), grew, settings=MANY)

    name = "model.embed_tokens.weight"
    assert pair.tuned.info(name).shape[0] > pair.base.info(name).shape[0]
    given(model_pairs(allow_grown_vocab=False))(
        FEW(lambda pair: None if not grew(pair) else 1 / 0)
    )()


def test_a_model_of_ones_own_is_tuned():
    model = torch.nn.Linear(3, 2)
    steps = {**model.state_dict(), "steps": torch.tensor([7])}
    before = {name: each.clone() for name, each in steps.items()}

    @FEW
    @given(model_pairs(bases=st.just(steps), allow_identical=False))
    def check(pair):
        assert [each.name for each in pair.tensors] == ["weight", "bias", "steps"]
        assert torch.equal(pair.tuned.read("steps"), torch.tensor([7]))

    check()
    assert all(torch.equal(before[name], steps[name]) for name in steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"bases": {"weight": torch.ones(2)}},
            "Expected a strategy but got bases={'weight': tensor([1., 1.])} (type=dict); "
            "st.just(...) makes one of a value",
        ),
        ({"bases": st.just({})}, "bases drew {}, which is no mapping of tensors"),
        (
            {"bases": st.just({"\x1b": 1})},
            "bases drew '\\x1b' with int, which is no tensor under a name",
        ),
        (
            {"bases": st.just({"steps": torch.tensor([1])}), "allow_identical": False},
            "bases drew a model without an entry that can move; use allow_identical=True",
        ),
        (
            {"kinds": ("none",)},
            "Expected a tuple of some of 'sparse', 'low-rank', 'dense', 'rounded' but got "
            "kinds=('none',)",
        ),
        (
            {"allow_grown_vocab": None},
            "Expected bool but got allow_grown_vocab=None (type=NoneType)",
        ),
    ],
)
def test_wrong_arguments_are_refused_when_it_draws(arguments, message):
    strategy = model_pairs(**arguments)

    with pytest.raises(InvalidArgument) as caught:
        find(strategy, lambda pair: True, settings=FEW)

    assert str(caught.value) == message


def test_a_repr_is_the_call():
    assert repr(model_pairs(bases=state_dicts())) == "model_pairs(bases=state_dicts())"
