"""`update_movement` against plain torch, and its result."""

import json
import math

import pytest
import torch

from pytest_subnet import PairMismatchError, SelectionError, open_pair, update_movement

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_measures_as_plain_torch_does(pair_of, dtype):
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(37, 19, generator=generator, dtype=torch.float64).to(dtype)
    step = torch.randn(37, 19, generator=generator, dtype=torch.float64) * 0.01
    tuned = (base.double() + step).to(dtype)
    (row,) = update_movement(pair_of({"w.weight": base}, {"w.weight": tuned})).per_tensor
    change = tuned.double() - base.double()
    assert row.updated == int((base != tuned).sum())
    assert row.max_change == float(change.abs().max())
    assert row.change_norm == pytest.approx(float(change.norm()), rel=1e-5)
    assert row.base_norm == pytest.approx(float(base.double().norm()), rel=1e-5)
    assert row.tuned_norm == pytest.approx(float(tuned.double().norm()), rel=1e-5)
    assert row.relative_change == pytest.approx(
        float(change.norm() / base.double().norm()), rel=1e-5
    )


def test_norms_and_distances_are_those_of_the_finite_entries(pair_of):
    base = torch.tensor([[3.0, float("nan"), 1.0], [4.0, 1.0, float("inf")]])
    tuned = torch.tensor([[3.5, 1.0, float("-inf")], [4.0, 1.0, 2.0]])
    (row,) = update_movement(pair_of({"w.weight": base}, {"w.weight": tuned})).per_tensor
    assert (row.updated, row.nonfinite_base, row.nonfinite_tuned) == (4, 2, 1)
    assert (row.max_change, row.change_norm) == (0.5, 0.5)
    assert row.base_norm == pytest.approx(math.sqrt(9 + 1 + 16 + 1))
    assert row.tuned_norm == pytest.approx(math.sqrt(3.5**2 + 1 + 16 + 1 + 4))


def test_swapped_sides_are_seen_in_norms_and_counts(pair_of):
    base = {"w.weight": torch.tensor([1.0, 1.0, float("nan")])}
    tuned = {"w.weight": torch.tensor([2.0, 1.0, 1.0])}
    one, other = update_movement(pair_of(base, tuned)), update_movement(pair_of(tuned, base))
    assert one.updated == other.updated == 2
    assert (one.nonfinite_base, one.nonfinite_tuned) == (1, 0)
    assert (other.nonfinite_base, other.nonfinite_tuned) == (0, 1)
    assert one.max_relative_change > other.max_relative_change


def test_buffers_and_integer_tensors_are_included_in_model_order():
    base = {"a.weight": torch.ones(2), "b.steps": torch.zeros(3, dtype=torch.int64)}
    tuned = {"a.weight": torch.ones(2) * 2, "b.steps": torch.ones(3, dtype=torch.int64)}
    base |= {"c.inv_freq": torch.ones(2), "d.weight": torch.ones(1)}
    tuned |= {"c.inv_freq": torch.ones(2), "d.weight": torch.ones(1)}
    result = update_movement(open_pair(base, tuned))
    assert [(each.name, each.updated) for each in result.per_tensor] == [
        ("a.weight", 2),
        ("b.steps", 3),
        ("c.inv_freq", 0),
        ("d.weight", 0),
    ]
    assert (result.moved, result.updated, result.numel) == (2, 5, 8)
    assert (result.coverage.tensors, result.coverage.tensors_total) == (4, 4)
    assert result.dtype == "f32+i64"


def test_a_change_from_all_zero_has_no_relative_size(pair_of):
    base = {"lora_B.weight": torch.zeros(4, 2), "still.weight": torch.zeros(4)}
    tuned = {"lora_B.weight": torch.ones(4, 2), "still.weight": torch.zeros(4)}
    result = update_movement(pair_of(base, tuned))
    assert [each.relative_change for each in result.per_tensor] == [math.inf, 0.0]
    assert result.max_relative_change == math.inf
    assert result.to_dict()["max_relative_change"] is None
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("before", "after", "relative"),
    [
        (1e200, 2e200, math.inf),  # squares overflow
        (1e200, 1e200, 0.0),
        (1e-200, 2e-200, math.inf),  # squares of the base underflow
        (1.0, 1.0 + 2**-52, pytest.approx(2**-52)),
    ],
)
def test_a_relative_change_that_cannot_be_told_is_infinite_and_never_zero(
    pair_of, before, after, relative
):
    base = {"w.weight": torch.full((2,), before, dtype=torch.float64)}
    tuned = {"w.weight": torch.full((2,), after, dtype=torch.float64)}
    (row,) = update_movement(pair_of(base, tuned)).per_tensor
    assert row.relative_change == relative


def test_a_difference_beyond_the_largest_number_is_infinite(pair_of):
    largest = torch.finfo(torch.float64).max
    base = {"w.weight": torch.tensor([-largest], dtype=torch.float64)}
    result = update_movement(pair_of(base, {"w.weight": -base["w.weight"]}))
    assert result.max_change == math.inf
    assert result.to_dict()["max_change"] is None


@pytest.mark.parametrize("tolerance", [{}, {"atol": 0.0}, {"rtol": 0.0}])
def test_value_changes_leave_out_signs_of_zeros_and_what_is_not_finite(pair_of, tolerance):
    base = {"w.weight": torch.tensor([0.0, 0.0, -0.0, 1.0, float("nan")])}
    tuned = {"w.weight": torch.tensor([-0.0, 0.0, 0.0, 2.0, 1.0])}
    (row,) = update_movement(pair_of(base, tuned), **tolerance).per_tensor
    assert (row.changed, row.zero_sign_flips, row.value_changes) == (4, 2, 1)


def test_the_result_is_frozen_plain_and_one_line(pair_of, base, tuned):
    tuned[UP][0] = 1.5
    result = update_movement(pair_of(base, tuned), include="*proj*")
    assert repr(result) == (
        "UpdateMovement(moved=1 of 2 tensors, updated=8 of 64, max_change=0.5, same bits, bf16)"
    )
    with pytest.raises(AttributeError):
        result.per_tensor = ()
    numbers = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert numbers.pop("max_relative_change") == pytest.approx(0.25)
    assert numbers == {
        "finding": "update_movement",
        "moved": 1,
        "updated": 8,
        "sparsity": 0.875,
        "density": 0.125,
        "zero_sign_flips": 0,
        "nonfinite_base": 0,
        "nonfinite_tuned": 0,
        "max_change": 0.5,
        "pair": "base -> tuned",
        "tolerance": "same bits",
        "dtype": "bf16",
        "tensors": 2,
        "tensors_total": 4,
        "numel": 64,
        "notes": [],
    }


def test_the_table_is_text_with_every_tensor(pair_of, base, tuned):
    tuned[UP][0] = 1.5
    assert update_movement(pair_of(base, tuned), include="*proj*").table() == "\n".join(
        [
            "UpdateMovement(moved=1 of 2 tensors, updated=8 of 64, max_change=0.5, same bits, "
            "bf16)",
            "  pair       base -> tuned   (same bits, bf16, 2/4 tensors, 64 entries)",
            "",
            "tensor                               kind         entries    updated    density"
            "    max change    relative    not finite",
            "-----------------------------------  ---------  ---------  ---------  ---------"
            "  ------------  ----------  ------------",
            "model.layers.0.mlp.down_proj.weight  down_proj         32          0      0.00%"
            "             0           0             0",
            "model.layers.0.mlp.up_proj.weight    up_proj           32          8     25.00%"
            "           0.5        0.25             0",
        ]
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"atol": 1e-5, "rtol": 1e-3}, ValueError),
        ({"atol": -1.0}, ValueError),
        ({"rtol": True}, TypeError),
        ({"include": "*nothing*"}, SelectionError),
        ({"exclude": "*"}, SelectionError),
        ({"kinds": "router"}, SelectionError),
    ],
)
def test_misuse_is_an_error(pair_of, base, tuned, options, error):
    with pytest.raises(error):
        update_movement(pair_of(base, tuned), **options)


def test_a_tensor_that_does_not_align_is_an_error_where_it_is_selected(pair_of, base, tuned):
    tuned[DOWN] = tuned[DOWN].T.contiguous()
    pair = pair_of(base, tuned)
    with pytest.raises(PairMismatchError, match="reshaped"):
        update_movement(pair)
    notes = update_movement(pair, include=UP).coverage.notes
    assert notes == ("1 tensor left out that cannot be compared",)
