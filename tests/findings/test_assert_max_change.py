"""`assert_max_change`: no entry, or no tensor, further than a cap."""

import math

import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    assert_max_change,
    open_pair,
    update_movement,
)

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_it_holds_up_to_the_cap_and_returns_what_was_measured(pair_of, base, tuned):
    tuned[UP][0, 0] += 0.25
    pair = pair_of(base, tuned)
    assert assert_max_change(pair, at_most=0.25) == update_movement(pair)
    assert assert_max_change(pair, at_most=0.05, relative=True).max_change == 0.25


def test_an_entry_beyond_the_cap_fails(pair_of, base, tuned, fails_with):
    tuned[UP][0, 0] -= 0.25
    tuned[DOWN][0, 0] += 0.125
    pair = pair_of(base, tuned)
    with fails_with("""
        largest change 0.25 is above the allowed 0.1
          pair       base -> tuned   (same bits, bf16, 4/4 tensors, 100 entries)
          beyond     2 of 4 tensors
          worst      model.layers.0.mlp.up_proj.weight     0.25  (bf16[4,8])
                     model.layers.0.mlp.down_proj.weight  0.125  (bf16[8,4])
          usually    a learning rate too high, or a tensor that was initialised again
          to accept  leave the tensor out with exclude=, or at_most=0.25
    """):
        assert_max_change(pair, at_most=0.1)
    assert_max_change(pair, at_most=0.25)


def test_a_tensor_beyond_the_relative_cap_fails(pair_of, base, tuned, fails_with):
    tuned[UP][:] = 1.5
    pair = pair_of(base, tuned)
    with fails_with("""
        relative change 0.5 is above the allowed 0.1
          pair       base -> tuned   (same bits, bf16, 2/4 tensors, 64 entries)
          beyond     1 of 2 tensors
          worst      model.layers.0.mlp.up_proj.weight  0.5  (bf16[4,8])
          usually    a learning rate too high, or a tensor that was initialised again
          to accept  leave the tensor out with exclude=, or at_most=0.5
    """):
        assert_max_change(pair, at_most=0.1, relative=True, include="*proj*")


def test_swapped_sides_change_the_relative_verdict(pair_of, base, tuned):
    tuned[UP][:] = 2
    assert_max_change(pair_of(tuned, base), at_most=0.5, relative=True)
    with pytest.raises(AssertionError, match=r"\Arelative change 1 is above the allowed 0\.5"):
        assert_max_change(pair_of(base, tuned), at_most=0.5, relative=True)


def test_a_head_that_was_initialised_again_is_caught(pair_of):
    generator = torch.Generator().manual_seed(0)
    base = {"lm_head.weight": torch.randn(64, 32, generator=generator) * 0.02}
    again = {"lm_head.weight": torch.randn(64, 32, generator=generator) * 0.02}
    pair = pair_of(base, again)
    assert_max_change(pair, at_most=0.2)  # no single entry is far off: the whole is
    with pytest.raises(AssertionError, match=r"\Arelative change 1\.37 "):
        assert_max_change(pair, at_most=0.5, relative=True)


def test_numbers_that_look_alike_are_told_apart(pair_of):
    base = {"w.weight": torch.zeros(1, dtype=torch.float64)}
    tuned = {"w.weight": torch.tensor([0.10000001], dtype=torch.float64)}
    with pytest.raises(AssertionError) as caught:
        assert_max_change(pair_of(base, tuned), at_most=0.1)
    lines = str(caught.value).splitlines()
    assert lines[0] == "largest change 0.10000001 is above the allowed 0.1"
    assert lines[-1].endswith("at_most=0.11")


@pytest.mark.parametrize("value", [0.0124, 1 / 3, 123.456, 1e-30])
def test_what_is_offered_as_acceptable_is_accepted(pair_of, value):
    base = {"w.weight": torch.zeros(3, dtype=torch.float64)}
    tuned = {"w.weight": torch.full((3,), value, dtype=torch.float64)}
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError) as caught:
        assert_max_change(pair, at_most=0)
    limit = float(str(caught.value).rpartition("at_most=")[2])
    assert value <= assert_max_change(pair, at_most=limit).max_change <= limit < 1.1 * value


def test_an_infinite_relative_change_has_no_acceptable_cap(pair_of):
    pair = pair_of({"lora_B.weight": torch.zeros(2, 2)}, {"lora_B.weight": torch.ones(2, 2)})
    with pytest.raises(AssertionError) as caught:
        assert_max_change(pair, at_most=1, relative=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "relative change inf is above the allowed 1"
    assert lines[-1] == "  to accept  leave the tensor out with exclude="
    assert update_movement(pair).max_relative_change == math.inf


def test_what_is_not_finite_has_no_distance(pair_of, base, tuned):
    tuned[UP][0, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"\A1 NaN or Inf in tuned, 0 in base"):
        assert_max_change(pair_of(base, tuned), at_most=1e9)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_dtype_without_distances_that_moved_is_refused_and_never_passes(dtype):
    base = {"w.table": torch.zeros(4).to(dtype), "v.weight": torch.ones(4)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    assert_max_change(open_pair(base, tuned), at_most=0)
    tuned["w.table"] = torch.ones(4).to(dtype)
    pair = open_pair(base, tuned)
    with pytest.raises(SelectionError) as caught:
        assert_max_change(pair, at_most=1)
    assert str(caught.value) == (
        "no distance is known for the change of 1 selected tensor: "
        f"w.table ({str(dtype)[6:]}); leave them out with exclude=, assert_frozen and "
        "assert_updated compare them by bits"
    )
    assert_max_change(pair, at_most=1, exclude="*.table")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"at_most": -0.1}, ValueError),
        ({"at_most": float("nan")}, ValueError),
        ({"at_most": math.inf}, ValueError),
        ({"at_most": None}, TypeError),
        ({"at_most": True}, TypeError),
        ({"at_most": "0.1"}, TypeError),
        ({"at_most": 0.1, "message": "text"}, TypeError),
        ({"at_most": 0.1, "include": "*nothing*"}, SelectionError),
        ({"at_most": 0.1, "kinds": "router"}, SelectionError),
    ],
)
def test_misuse_is_an_error_and_no_verdict(pair_of, base, tuned, options, error):
    with pytest.raises(error):
        assert_max_change(pair_of(base, tuned), **options)


def test_a_tensor_that_was_dropped_is_an_error(pair_of, base, tuned):
    del tuned[UP]
    with pytest.raises(PairMismatchError, match="only base"):
        assert_max_change(pair_of(base, tuned), at_most=1)


def test_a_message_can_be_reworded_and_the_result_is_recorded(pair_of, base, tuned, recorded):
    tuned[UP][0, 0] = 9
    with pytest.raises(AssertionError, match=r"\Alr\? largest change 8 is above"):
        assert_max_change(pair_of(base, tuned), at_most=1, message=lambda text: "lr? " + text)
    assert [each.to_dict()["max_change"] for each in recorded] == [8.0]
