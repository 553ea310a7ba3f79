"""`assert_even_sparsity`: no matrix further than this from all matrices together."""

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_even_sparsity,
    update_sparsity,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_it_holds_and_returns_what_was_measured(pair_of, base, tuned):
    tuned[UP][:2], tuned[DOWN][:4] = 2, 2
    pair = pair_of(base, tuned)
    result = assert_even_sparsity(pair, max_spread=0.4)
    assert result == update_sparsity(pair)
    assert result.spread == 1 / 3
    assert result.to_dict()["spread"] == 1 / 3


@pytest.mark.parametrize("updated", [(2, 4), (3, 5), (7, 9), (1, 3)])
def test_a_bound_equal_to_the_spread_holds(pair_of, updated):
    base = {name: torch.ones(2, 5) for name in ("a.weight", "b.weight")}
    tuned = {name: torch.ones(2, 5) for name in base}
    for tensor, count in zip(tuned.values(), updated, strict=True):
        tensor.view(-1)[:count] = 2
    # In floating point 0.8 - 0.7 is above 0.1.
    assert assert_even_sparsity(pair_of(base, tuned), max_spread=0.1).spread == 0.1


def test_a_matrix_that_stood_still_among_others_is_uneven(pair_of, base, tuned, fails_with):
    tuned[UP][:], tuned[DOWN][:4] = 2, 2
    pair = pair_of(base, tuned)
    with fails_with("""
        a matrix is 50.00 points off, allowed 15.00 points
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          updated    48 / 100   (density 48.00%)
          also       atol=1e-05: 52.00% unchanged
          rounding   alone would leave about 36.18% unchanged (estimate)
          pooled     50.00% unchanged over 3 matrices
          worst      model.embed_tokens.weight            100.00%  +50.00 points  (bf16[8,4])
                     model.layers.0.mlp.up_proj.weight      0.00%  -50.00 points  (bf16[4,8])
                     model.layers.0.mlp.down_proj.weight   50.00%  +0.00 points   (bf16[8,4])
          usually    a part that is frozen, or trained at another learning rate
          to accept  leave the part out with exclude=, or max_spread=0.5
    """):
        assert_even_sparsity(pair, max_spread=0.15)
    assert_even_sparsity(pair, max_spread=0.5)
    assert_even_sparsity(pair, max_spread=0.25, exclude="*embed*")


def test_what_is_offered_as_acceptable_is_accepted(pair_of):
    shapes = {"a.weight": (3, 7), "b.weight": (11, 13), "c.weight": (1, 997)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tuned["b.weight"][0] = 1
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError) as caught:
        assert_even_sparsity(pair, max_spread=0)
    assert_even_sparsity(pair, max_spread=float(str(caught.value).rpartition("max_spread=")[2]))


def test_norms_have_no_say(pair_of, base, tuned):
    for name in (UP, DOWN, EMBED):
        tuned[name][:1] = 2
    spread = assert_even_sparsity(pair_of(base, tuned), max_spread=0.09).spread
    tuned[NORM][:] = 2
    assert assert_even_sparsity(pair_of(base, tuned), max_spread=0.09).spread == spread


def test_matrices_that_stood_still_are_not_even_because_a_norm_moved(
    pair_of, base, tuned, fails_with
):
    tuned[NORM][0] = 2
    pair = pair_of(base, tuned)
    with fails_with("""
        no matrix moved: base and tuned hold the same values
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          updated    1 / 100   (density 1.00%)
          also       atol=1e-05: 99.00% unchanged
          usually    the base was saved again, an adapter was not merged, no optimiser step was
                     made, or each was smaller than half a step of the storage dtype
          to accept  allow_identical=True
    """):
        assert_even_sparsity(pair, max_spread=0.5)
    assert assert_even_sparsity(pair, max_spread=0, allow_identical=True).spread == 0


def test_fewer_than_two_matrices_cannot_be_judged(pair_of, base, tuned):
    tuned[UP][0] = 2
    pair = pair_of(base, tuned)
    assert update_sparsity(pair, include=[UP, NORM]).spread is None
    with pytest.raises(SelectionError) as caught:
        assert_even_sparsity(pair, max_spread=0.5, include=[UP, NORM])
    assert str(caught.value) == (
        "evenness compares matrices with each other, and 1 tensor of 2 selected has "
        "two or more dimensions"
    )
    with pytest.raises(SelectionError, match="and 0 tensors of 1 selected have two or more"):
        assert_even_sparsity(pair, max_spread=0.5, include=NORM)


def test_a_matrix_that_is_missing_is_never_left_out_silently(pair_of, base, tuned):
    del tuned[DOWN]
    with pytest.raises(PairMismatchError, match="only base"):
        assert_even_sparsity(pair_of(base, tuned), max_spread=1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_spread": 15}, ValueError),
        ({"max_spread": -0.1}, ValueError),
        ({"max_spread": float("nan")}, ValueError),
        ({"max_spread": None}, TypeError),
        ({"max_spread": True}, TypeError),
        ({"max_spread": 0.1, "atol": 1e-5, "rtol": 1e-5}, ValueError),
        ({"max_spread": 0.1, "message": "text"}, TypeError),
        ({"max_spread": 0.1, "include": "*nothing*"}, SelectionError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, options, error):
    with pytest.raises(error):
        assert_even_sparsity(pair_of(base, tuned), **options)


def test_the_spread_is_recorded_also_when_the_assertion_fails(pair_of, base, tuned, recorded):
    tuned[UP][:] = 2
    with pytest.raises(AssertionError, match=r"\Aspread of"):
        assert_even_sparsity(
            pair_of(base, tuned), max_spread=0.1, message=lambda text: "spread of a run\n" + text
        )
    assert [each.to_dict()["spread"] for each in recorded] == [2 / 3]
