"""`assert_update_sparsity`: its verdict and every word of its failures."""

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_update_sparsity,
    update_sparsity,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_it_holds_and_returns_what_was_measured(pair_of, base, tuned):
    tuned[UP][0] = 2
    pair = pair_of(base, tuned)
    assert assert_update_sparsity(pair, at_least=0.9, at_most=0.95) == update_sparsity(pair)
    assert assert_update_sparsity(pair, at_least=0.92, at_most=0.92).updated == 8


@pytest.mark.parametrize("updated", range(1, 10))
def test_a_bound_equal_to_the_sparsity_holds(pair_of, updated):
    base = {"w.weight": torch.ones(10)}
    tuned = {"w.weight": torch.ones(10)}
    tuned["w.weight"][:updated] = 2
    bound = float(f"0.{10 - updated}")  # 1 - 9/10 is below 0.1 in floating point
    assert_update_sparsity(pair_of(base, tuned), at_least=bound, at_most=bound)


def test_too_dense_says_what_moved_where_and_what_would_pass(pair_of, base, tuned, fails_with):
    tuned[UP][:, :7] = 2
    tuned[DOWN][0, 0] = 2
    pair = pair_of(base, tuned)
    with fails_with("""
        update sparsity 71.00% is below the required 80.00%
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          updated    29 / 100   (density 29.00%)
          also       atol=1e-05: 71.00% unchanged
          rounding   alone would leave about 36.50% unchanged (estimate)
          worst      model.layers.0.mlp.up_proj.weight     12.50% unchanged  (bf16[4,8])
                     model.layers.0.mlp.down_proj.weight   96.88% unchanged  (bf16[8,4])
                     model.embed_tokens.weight            100.00% unchanged  (bf16[8,4])
                     … 1 more
          usually    a higher learning rate, another optimiser, or more steps than before
          to accept  at_least=0.71
    """):
        assert_update_sparsity(pair, at_least=0.8)
    assert_update_sparsity(pair, at_least=0.71)


def test_too_sparse_shows_all_that_was_counted(pair_of, base, tuned, fails_with):
    tuned[UP][0, 0] += 2**-7
    base[DOWN][0, 0], tuned[DOWN][0, 0] = 0.0, -0.0
    base[DOWN][1, 0] = tuned[DOWN][1, 0] = float("nan")
    tuned[DOWN][1, 1] = float("inf")
    base["model.steps"] = torch.zeros(3, dtype=torch.int64)
    tuned["model.steps"] = torch.ones(3, dtype=torch.int64)
    pair = pair_of(base, tuned)
    with fails_with("""
        update sparsity 98.00% is above the allowed 90.00%
          pair       base -> tuned   (atol=1e-05, bf16, 4/4 tensors, 100 entries)
          updated    2 / 100   (density 2.00%)
          also       same bits: 97.00% unchanged
          zeros      1 zero only changed sign
          not finite 2 in tuned, 1 in base
          apart      1 tensor (buffers, integers), 1 moved
          rounding   alone would leave about 96.54% unchanged (estimate)
          worst      model.embed_tokens.weight            100.00% unchanged  (bf16[8,4])
                     model.norm.weight                    100.00% unchanged  (bf16[4])
                     model.layers.0.mlp.down_proj.weight   96.88% unchanged  (bf16[8,4])
                     … 1 more
          usually    too small a learning rate for the storage dtype, too few steps, or parts
                     that the optimiser does not own
          to accept  at_most=0.98
    """):
        assert_update_sparsity(pair, at_most=0.9, atol=1e-5)
    assert_update_sparsity(pair, at_most=0.98, atol=1e-5)


def test_a_run_that_saved_its_base_again_fails_whatever_the_bound(pair_of, base, tuned, fails_with):
    pair = pair_of(base, tuned)
    with fails_with("""
        nothing moved: base and tuned hold the same values
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          updated    0 / 100   (density 0.00%)
          also       atol=1e-05: 100.00% unchanged
          usually    the base was saved again, an adapter was not merged, no optimiser step was
                     made, or each was smaller than half a step of the storage dtype
          to accept  allow_identical=True
    """):
        assert_update_sparsity(pair, at_least=0)
    with pytest.raises(AssertionError, match=r"\Anothing moved"):
        assert_update_sparsity(pair, at_most=1, atol=1e-5)
    assert assert_update_sparsity(pair, at_least=1, allow_identical=True).nothing_moved


def test_zeros_that_only_changed_sign_are_nothing_moved(pair_of, fails_with):
    base = {"w.weight": torch.zeros(4)}
    pair = pair_of(base, {"w.weight": -base["w.weight"]})
    with fails_with("""
        nothing moved: base and tuned hold the same values
          pair       base -> tuned   (same bits, f32, 1/1 tensor, 4 entries)
          updated    4 / 4   (density 100.00%)
          also       atol=1e-05: 100.00% unchanged
          zeros      4 zeros only changed sign
          usually    the base was saved again, an adapter was not merged, no optimiser step was
                     made, or each was smaller than half a step of the storage dtype
          to accept  allow_identical=True
    """):
        assert_update_sparsity(pair, at_least=0)


def test_a_pair_that_moved_less_than_the_tolerance_did_move(pair_of):
    base = {"w.weight": torch.full((4, 4), 2.0**-12, dtype=torch.bfloat16)}
    tuned = {"w.weight": (base["w.weight"].view(torch.int16) + 1).view(torch.bfloat16)}
    result = assert_update_sparsity(pair_of(base, tuned), at_least=0.7, atol=1e-5)
    assert (result.sparsity, result.nothing_moved) == (1.0, False)


@pytest.mark.parametrize(
    ("updated", "bound"),
    [
        (1, {"at_most": 0.5}),
        (999, {"at_least": 0.5}),
        (1000, {"at_least": 0.1}),
        (0, {"at_most": 0.9}),
    ],
)
def test_what_is_offered_as_acceptable_is_accepted(pair_of, updated, bound):
    base = {"w.weight": torch.zeros(1000)}
    tuned = {"w.weight": torch.zeros(1000)}
    tuned["w.weight"][:updated] = 1
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError) as caught:
        assert_update_sparsity(pair, **bound, allow_identical=True)
    last = str(caught.value).splitlines()[-1]
    if updated in (0, 1000):  # only at_least=0 or at_most=1 would hold, which say nothing
        assert not last.startswith("  to accept")
    else:
        name, _, value = last.removeprefix("  to accept  ").partition("=")
        assert_update_sparsity(pair, **{name: float(value)})


def test_a_message_can_be_reworded(pair_of, base, tuned):
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError) as caught:
        assert_update_sparsity(pair, at_least=0.5, message=lambda text: f"run 7: {text}")
    assert str(caught.value).startswith("run 7: nothing moved")


def test_notes_on_casts_and_rows_left_out_are_in_the_message(pair_of):
    base = {"model.embed_tokens.weight": torch.ones(8, 4)}
    tuned = {"model.embed_tokens.weight": torch.ones(10, 4, dtype=torch.bfloat16) * 2}
    pair = pair_of(base, tuned, vocab="common", as_dtype="bfloat16")
    with pytest.raises(AssertionError) as caught:
        assert_update_sparsity(pair, at_least=0.5)
    first, *others = pair.notes
    assert len(others) == 1
    assert str(caught.value).splitlines()[1:4] == [
        "  pair       base -> tuned   (same bits, bf16, 1/1 tensor, 32 entries)",
        f"  note       {first}",
        f"             {others[0]}",
    ]


def test_a_tensor_that_is_missing_is_never_left_out_silently(pair_of, base, tuned):
    tuned[UP][0] = 2
    del tuned[DOWN]
    pair = pair_of(base, tuned)
    with pytest.raises(PairMismatchError, match=r"only base +model\.layers\.0\.mlp\.down_proj"):
        assert_update_sparsity(pair, at_least=0.5)
    result = assert_update_sparsity(pair, at_least=0.5, exclude=DOWN)
    assert result.coverage.notes == ("1 tensor left out that cannot be compared",)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, ValueError),
        ({"at_least": 80}, ValueError),
        ({"at_least": 0.8, "at_most": 0.7}, ValueError),
        ({"at_least": True}, TypeError),
        ({"at_least": 0.8, "atol": 1e-5, "rtol": 1e-3}, ValueError),
        ({"at_least": 0.8, "message": "text"}, TypeError),
        ({"at_least": 0.8, "include": "*nothing*"}, SelectionError),
        ({"at_least": 0.8, "exclude": "*nothing*"}, SelectionError),
        ({"at_least": 0.8, "include": []}, SelectionError),
        ({"at_least": 0.8, "kinds": "router"}, SelectionError),
        ({"at_least": 0.8, "include": "*up*", "exclude": "*proj*"}, SelectionError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, options, error):
    with pytest.raises(error):
        assert_update_sparsity(pair_of(base, tuned), **options)


def test_the_result_is_recorded_also_when_the_assertion_fails(pair_of, base, tuned, recorded):
    with pytest.raises(AssertionError):
        assert_update_sparsity(pair_of(base, tuned), at_least=0.5)
    assert [each.to_dict()["finding"] for each in recorded] == ["update_sparsity"]
