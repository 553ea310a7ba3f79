"""`assert_finite`: neither NaN nor Inf on either side."""

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_finite,
    open_pair,
    update_movement,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
NAN, INF = float("nan"), float("inf")


def test_it_holds_and_returns_what_was_measured(pair_of, base, tuned):
    tuned[UP][0] = torch.finfo(torch.bfloat16).max
    pair = pair_of(base, tuned)
    assert assert_finite(pair) == update_movement(pair)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("side", [0, 1])
def test_one_entry_on_one_side_is_found(pair_of, value, dtype, side):
    sides = [{"w.weight": torch.ones(5, 7, dtype=dtype)} for _ in range(2)]
    sides[side]["w.weight"][4, 6] = value
    counts = "0 NaN or Inf in tuned, 1 in base", "1 NaN or Inf in tuned, 0 in base"
    with pytest.raises(AssertionError) as caught:
        assert_finite(pair_of(*sides))
    assert str(caught.value).splitlines()[0] == counts[side]


def test_the_message_says_where_on_which_side(pair_of, base, tuned, fails_with):
    base[DOWN][0, 0] = tuned[DOWN][0, 0] = NAN
    tuned[UP][:] = INF
    with fails_with("""
        33 NaN or Inf in tuned, 1 in base
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          worst      model.layers.0.mlp.up_proj.weight    32 in tuned  0 in base  (bf16[4,8])
                     model.layers.0.mlp.down_proj.weight   1 in tuned  1 in base  (bf16[8,4])
          usually    a diverged run, or a cast to a dtype with a smaller range (bf16 to f16)
          to accept  leave the tensors out with exclude=
    """):
        assert_finite(pair_of(base, tuned))
    assert assert_finite(pair_of(base, tuned), exclude="*proj*").nonfinite_tuned == 0


def test_a_buffer_that_is_infinite_by_design_can_be_left_out(pair_of, base, tuned):
    for side in (base, tuned):
        side["model.layers.0.attn.masked_bias"] = torch.tensor([-INF])
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError, match=r"\A1 NaN or Inf in tuned, 1 in base"):
        assert_finite(pair)
    assert_finite(pair, exclude="*.masked_bias")


def test_integers_are_finite(pair_of):
    base = {"m.table": torch.tensor([2**62, -1])}
    assert_finite(pair_of(base, {"m.table": torch.tensor([-(2**63), 2**63 - 1])}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_a_dtype_in_which_nothing_is_counted_is_refused_and_never_passes(dtype):
    base = {"w.weight": torch.ones(4).to(dtype), "v.weight": torch.ones(4)}
    pair = open_pair(base, {name: tensor.clone() for name, tensor in base.items()})
    with pytest.raises(SelectionError) as caught:
        assert_finite(pair)
    assert str(caught.value) == (
        f"NaN and Inf are not counted in 1 selected tensor: w.weight ({str(dtype)[6:]}); leave "
        "them out with exclude=, assert_frozen and assert_updated compare them by bits"
    )
    assert_finite(pair, exclude="w.*")


def test_a_cast_that_overflows_is_not_finite(pair_of):
    base = {"w.weight": torch.tensor([1.0, 70000.0], dtype=torch.bfloat16)}
    through_half = {"w.weight": base["w.weight"].half().bfloat16()}
    with pytest.raises(AssertionError, match=r"\A1 NaN or Inf in tuned, 0 in base"):
        assert_finite(pair_of(base, through_half))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"include": "*nothing*"}, SelectionError),
        ({"exclude": "*"}, SelectionError),
        ({"kinds": []}, SelectionError),
        ({"message": "text"}, TypeError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, options, error):
    with pytest.raises(error):
        assert_finite(pair_of(base, tuned), **options)


def test_a_tensor_that_was_dropped_is_an_error(pair_of, base, tuned):
    del tuned[UP]
    with pytest.raises(PairMismatchError, match="only base"):
        assert_finite(pair_of(base, tuned))


def test_a_message_can_be_reworded_and_the_result_is_recorded(pair_of, base, tuned, recorded):
    tuned[UP][0, 0] = NAN
    with pytest.raises(AssertionError, match=r"\Adiverged: 1 NaN or Inf in tuned"):
        assert_finite(pair_of(base, tuned), message=lambda text: "diverged: " + text)
    assert [each.to_dict()["nonfinite_tuned"] for each in recorded] == [1]
