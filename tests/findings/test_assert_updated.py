"""`assert_updated`: every selected tensor moved, and by enough."""

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_frozen,
    assert_updated,
    open_pair,
    update_movement,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_it_holds_and_returns_what_was_measured(pair_of, base, tuned):
    tuned[UP][0], tuned[DOWN][0, 0] = 2, 2
    pair = pair_of(base, tuned)
    assert assert_updated(pair, "*proj*") == update_movement(pair, include="*proj*")
    assert assert_updated(pair, "*up_proj*", at_least=0.25).density == 0.25
    assert assert_updated(pair, "*proj*", at_least=0.01).moved == 2


def test_a_tensor_that_stood_still_fails(pair_of, base, tuned, fails_with):
    tuned[UP][0] = 2
    pair = pair_of(base, tuned)
    with fails_with("""
        3 of 4 tensors did not move
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          updated    8 / 100   in 1 of 4 tensors
          worst      model.embed_tokens.weight            0 / 32  (bf16[8,4])
                     model.layers.0.mlp.down_proj.weight  0 / 32  (bf16[8,4])
                     model.norm.weight                     0 / 4  (bf16[4])
          resolution bf16 stores no step below 0.002 at |w| = 1 (rms) without float32 masters
                     a step can move, of these, 0.00% at 1e-06, 0.00% at 1e-05, 0.00% at 1e-04
          usually    no gradient reaches them (a LoRA A while its B is zero), the optimiser does not
                     own them, or each step is smaller than the storage dtype resolves
          to accept  leave the tensors out with exclude=
    """):
        assert_updated(pair, "*")


def test_a_tensor_that_moved_too_little_fails_with_a_bound_that_holds(
    pair_of, base, tuned, fails_with
):
    tuned[UP][0, 0], tuned[DOWN][0] = 2, 2
    pair = pair_of(base, tuned)
    with fails_with("""
        density 3.12% is below the required 12.50% in 1 of 2 tensors
          pair       base -> tuned   (same bits, bf16, 2/4 tensors, 64 entries)
          updated    5 / 64   in 2 of 2 tensors
          worst      model.layers.0.mlp.up_proj.weight  3.12% updated  (bf16[4,8])
          resolution bf16 stores no step below 0.002 at |w| = 1 (rms) without float32 masters
                     a step can move, of these, 0.00% at 1e-06, 0.00% at 1e-05, 0.00% at 1e-04
          usually    no gradient reaches them (a LoRA A while its B is zero), the optimiser does not
                     own them, or each step is smaller than the storage dtype resolves
          to accept  leave the tensors out with exclude=, or at_least=0.031
    """):
        assert_updated(pair, "*proj*", at_least=0.125)
    assert_updated(pair, "*proj*", at_least=0.031)


def test_still_and_sparse_tensors_are_both_mentioned(pair_of, base, tuned):
    tuned[UP][0, 0] = 2
    with pytest.raises(AssertionError) as caught:
        assert_updated(pair_of(base, tuned), "*proj*", at_least=0.5)
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 of 2 tensors did not move"
    assert "  too little 1 more, below the required 50.00%" in lines


def test_zeros_that_only_changed_sign_did_not_move(fails_with):
    base = {"w.weight": torch.zeros(4)}
    pair = open_pair(base, {"w.weight": torch.tensor([0.0, -0.0, -0.0, 0.0])})
    with fails_with("""
        1 of 1 tensor did not move
          pair       dict of tensors -> dict of tensors   (same bits, f32, 1/1 tensor, 4 entries)
          updated    2 / 4   in 1 of 1 tensor
          worst      w.weight  2 / 4  only signs of zeros  (f32[4])
          usually    no gradient reaches them (a LoRA A while its B is zero), the optimiser does not
                     own them, or each step is smaller than the storage dtype resolves
          to accept  leave the tensors out with exclude=
    """):
        assert_updated(pair, "*")
    pair = open_pair(base, {"w.weight": torch.tensor([0.0, -0.0, -0.0, 1.0])})
    assert_updated(pair, "*", at_least=0.25)
    with pytest.raises(AssertionError, match=r"density 25\.00% is below the required 50\.00%"):
        assert_updated(pair, "*", at_least=0.5)


@pytest.mark.parametrize("tolerance", [{}, {"atol": 1e-5}, {"rtol": 1e-3}])
def test_a_tensor_in_which_only_nan_appeared_did_not_move(tolerance):
    base = {"w.weight": torch.tensor([0.0, 0.0, 1.0, 1.0])}
    tuned = {"w.weight": torch.tensor([-0.0, -0.0, float("nan"), 1.0])}
    with pytest.raises(AssertionError) as caught:
        assert_updated(open_pair(base, tuned), "*", **tolerance)
    assert str(caught.value).startswith("1 of 1 tensor did not move\n")
    assert "  only NaN or Inf  (f32[4])" in str(caught.value)


def test_nan_beside_a_value_that_moved_is_no_movement():
    base, tuned = torch.zeros(100), torch.full((100,), float("nan"))
    tuned[0] = 1
    pair = open_pair({"w.weight": base}, {"w.weight": tuned})
    assert_updated(pair, "*", at_least=0.01)
    with pytest.raises(AssertionError, match=r"density 1\.00% is below the required 99\.00%"):
        assert_updated(pair, "*", at_least=0.99)


def test_nan_beside_a_value_that_moved_within_the_tolerance_is_no_movement():
    base, tuned = torch.zeros(100), torch.zeros(100)
    tuned[0], tuned[1] = 1e-9, float("nan")
    with pytest.raises(AssertionError, match="1 of 1 tensor did not move"):
        assert_updated(open_pair({"w.weight": base}, {"w.weight": tuned}), "*", atol=1e-5)


def test_integer_tensors_move_by_bits(pair_of):
    base = {"m.num_batches_tracked": torch.tensor(7), "m.table": torch.zeros(4, dtype=torch.int32)}
    tuned = {"m.num_batches_tracked": torch.tensor(8), "m.table": torch.zeros(4, dtype=torch.int32)}
    pair = pair_of(base, tuned)
    result = assert_updated(pair, "*tracked", at_least=1)
    assert (result.updated, result.max_change) == (1, 0)
    with pytest.raises(AssertionError, match=r"\A1 of 2 tensors did not move"):
        assert_updated(pair, "*")


def test_what_moved_within_a_tolerance_did_not_move(pair_of, base, tuned):
    tuned[UP] += 2**-7
    pair = pair_of(base, tuned)
    assert_updated(pair, UP)
    with pytest.raises(AssertionError, match=r"atol=0\.01, .*\n  updated    0 / 32 "):
        assert_updated(pair, UP, atol=0.01)


@pytest.mark.parametrize(
    ("dtype", "size", "hint"),
    [
        (torch.float16, 1.0, "f16 stores no step below 0.00024 at |w| = 1 (rms)"),
        (torch.bfloat16, 0.02, "bf16 stores no step below 3.9e-05 at |w| = 0.02 (rms)"),
        (torch.bfloat16, 0.0, None),
        (torch.float32, 1.0, None),
        (torch.int32, 1, None),
    ],
)
def test_the_resolution_of_a_16_bit_dtype_is_shown(dtype, size, hint):
    base = {"w.weight": torch.full((4,), size, dtype=dtype)}
    with pytest.raises(AssertionError) as caught:
        assert_updated(open_pair(base, {"w.weight": base["w.weight"].clone()}), "*")
    lines = [line for line in str(caught.value).splitlines() if "resolution" in line]
    assert len(lines) == (hint is not None)
    assert all(hint in line for line in lines)


def test_which_share_a_step_can_move_is_that_of_the_tensors_that_did_not():
    base = {"a.weight": torch.ones(64, 64).bfloat16(), "b.weight": torch.ones(64, 64).bfloat16()}
    base["b.weight"][::2] = 2.0**-12  # half a gap is 9.5e-7 above it, and half of that below
    tuned = {"a.weight": base["a.weight"] + 1, "b.weight": base["b.weight"].clone()}
    with pytest.raises(AssertionError) as caught:
        assert_updated(open_pair(base, tuned), "*")
    expected = "a step can move, of these, 50.00% at 1e-06, 50.00% at 1e-05, 50.00% at 1e-04"
    assert expected in str(caught.value)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_step_below_the_resolution_is_never_stored(dtype, bits):
    """Below |w| / 2^(bits + 1) a step rounds back from every value of the dtype."""
    words = torch.arange(1, 1 << 15, dtype=torch.int16).view(dtype)
    weight = words[words.isfinite() & (words >= torch.finfo(dtype).tiny)].double()
    step = weight / 2 ** (bits + 1) * (1 - 1e-9)
    for moved in (weight + step, weight - step):
        assert torch.equal(moved.to(torch.float64).to(dtype), weight.to(dtype))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"at_least": 5}, ValueError),
        ({"at_least": -0.1}, ValueError),
        ({"at_least": float("nan")}, ValueError),
        ({"at_least": True}, TypeError),
        ({"at_least": "0.5"}, TypeError),
        ({"atol": 1e-5, "rtol": 1e-5}, ValueError),
        ({"message": "text"}, TypeError),
        ({"exclude": "*"}, SelectionError),
        ({"exclude": "*nothing*"}, SelectionError),
        ({"kinds": "router"}, SelectionError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, options, error):
    with pytest.raises(error):
        assert_updated(pair_of(base, tuned), "*", **options)


def test_a_pattern_that_matches_nothing_is_an_error(pair_of, base, tuned):
    with pytest.raises(SelectionError, match=r"include='\*lora_B\*' matches none of 4 tensors"):
        assert_updated(pair_of(base, tuned), "*lora_B*")


def test_a_tensor_that_was_dropped_is_an_error(pair_of, base, tuned):
    del tuned[NORM]
    with pytest.raises(PairMismatchError, match=r"only base +model\.norm\.weight"):
        assert_updated(pair_of(base, tuned), "*")


def test_a_message_can_be_reworded(pair_of, base, tuned):
    with pytest.raises(AssertionError, match=r"\Astep 3: 4 of 4 tensors did not move"):
        assert_updated(pair_of(base, tuned), "*", message=lambda text: "step 3: " + text)


def test_the_result_is_recorded_also_when_the_assertion_fails(pair_of, base, tuned, recorded):
    with pytest.raises(AssertionError):
        assert_updated(pair_of(base, tuned), "*")
    assert [(each.to_dict()["finding"], each.moved) for each in recorded] == [
        ("update_movement", 0)
    ]


def test_frozen_and_updated_never_both_hold(pair_of, base, tuned):
    tuned[UP][0, 0] = 2
    pair = pair_of(base, tuned)
    for name in base:
        verdicts = []
        for judge in (assert_frozen, assert_updated):
            try:
                verdicts.append(bool(judge(pair, name)))
            except AssertionError:
                verdicts.append(False)
        assert sum(verdicts) == 1
