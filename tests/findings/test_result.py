"""What all results have in common."""

import math

import pytest
import torch

from pytest_subnet import (
    assert_even_sparsity,
    assert_finite,
    assert_frozen,
    assert_max_change,
    assert_update_sparsity,
    assert_updated,
    open_pair,
    update_movement,
    update_sparsity,
)
from pytest_subnet.findings.common.result import Coverage, Movement, reworded
from pytest_subnet.scan import SAME_BITS, Tolerance, gathering


def coverage(**changes):
    values = {
        "pair": "base -> tuned",
        "tolerance": SAME_BITS,
        "dtype": "bf16",
        "tensors": 339,
        "tensors_total": 340,
        "numel": 7_615_616_512,
        "notes": (),
    }
    return Coverage(**values | changes)


def test_what_a_number_was_measured_on_is_one_line():
    assert coverage().rows() == [
        ("pair", "base -> tuned   (same bits, bf16, 339/340 tensors, 7,615,616,512 entries)")
    ]


def test_one_is_singular_and_notes_follow():
    covered = coverage(
        tolerance=Tolerance(atol=1e-5), tensors=1, tensors_total=1, numel=1, notes=("one", "two")
    )
    assert covered.rows() == [
        ("pair", "base -> tuned   (atol=1e-05, bf16, 1/1 tensor, 1 entry)"),
        ("note", "one"),
        ("", "two"),
    ]


def test_several_dtypes_are_joined_each_once():
    base = {"a.weight": torch.ones(2), "b.weight": torch.ones(2).bfloat16()}
    base |= {"c.weight": torch.ones(2).bfloat16(), "d.weight": torch.ones(2).half()}
    tuned = {name: tensor * 2 for name, tensor in base.items()}
    assert update_sparsity(open_pair(base, tuned)).dtype == "bf16+f16+f32"


def test_what_was_gathered_is_never_read_again(pair_of, base, tuned, monkeypatch):
    tuned["model.norm.weight"][:2] = 2
    pair = pair_of(base, tuned)
    measured = update_sparsity(pair)

    def scan(*_):
        raise AssertionError("the pair was read again")

    monkeypatch.setattr(gathering, "scan", scan)
    assert update_sparsity(pair) == measured
    assert assert_update_sparsity(pair, at_least=0.9, atol=1e-5).updated == 2
    assert_even_sparsity(pair, max_spread=0, allow_identical=True)
    assert_updated(pair, "*norm*", at_least=0.5)
    assert_frozen(pair, "*", exclude="*norm*")
    assert_finite(pair)
    assert_max_change(pair, at_most=1)
    counted = tuple(each._replace(expected_sparsity=None) for each in measured.per_tensor)
    assert update_movement(pair).per_tensor == counted


def test_only_what_is_selected_is_read(pair_of, base, tuned, monkeypatch):
    read = []
    scan = gathering.scan
    monkeypatch.setattr(
        gathering,
        "scan",
        lambda pair, rows, *rest: read.append(len(rows)) or scan(pair, rows, *rest),
    )
    pair = pair_of(base, tuned)
    update_movement(pair, include="*norm*")
    update_movement(pair)
    assert read == [1, 3]


def movement(**changes):
    values = {
        "name": "w.weight",
        "shape": (2, 5),
        "dtype": "bfloat16",
        "layer": None,
        "kind": "w",
        "numel": 10,
        "updated": 3,
        "changed": 3,
        "zero_sign_flips": 0,
        "nonfinite_base": 0,
        "nonfinite_tuned": 0,
        "max_change": 0.5,
        "change_norm": 1.0,
        "base_norm": 4.0,
        "tuned_norm": 4.0,
    }
    return Movement(**values | changes)


@pytest.mark.parametrize("updated", range(11))
def test_shares_are_rounded_once(updated):
    each = movement(updated=updated)
    assert each.density == float(f"{updated / 10}")
    assert each.sparsity == float(f"{(10 - updated) / 10}")


@pytest.mark.parametrize(
    ("changes", "relative"),
    [
        ({}, 0.25),
        ({"change_norm": 0.0, "max_change": 0.0}, 0.0),
        ({"base_norm": 0.0}, math.inf),
        ({"base_norm": 0.0, "change_norm": 0.0, "max_change": 0.0}, 0.0),
        ({"change_norm": 0.0}, 0.125),  # its square underflowed: at least the largest entry
        ({"change_norm": math.inf}, math.inf),
        ({"change_norm": math.inf, "base_norm": math.inf}, math.inf),
        ({"base_norm": math.inf}, math.inf),
    ],
)
def test_a_relative_change_is_a_number_or_infinite(changes, relative):
    assert movement(**changes).relative_change == relative


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({}, True),
        ({"updated": 0, "changed": 0, "max_change": 0.0}, False),
        ({"zero_sign_flips": 3, "max_change": 0.0}, False),
        ({"zero_sign_flips": 2}, True),
        ({"updated": 0, "max_change": 1e-9}, False),  # within the tolerance
        ({"nonfinite_tuned": 3, "max_change": 0.0}, False),
        ({"dtype": "int64", "max_change": 0.0}, True),
        ({"dtype": "float8_e4m3fn", "max_change": 0.0}, True),
    ],
)
def test_a_tensor_moved_where_values_changed_other_than_into_nan_or_inf(changes, moved):
    assert movement(**changes).moved == moved


def test_a_message_must_give_a_text():
    assert reworded("text", None) == "text"
    assert reworded("text", str.upper) == "TEXT"
    with pytest.raises(TypeError, match="message gave NoneType instead of a text for:\nnumbers"):
        reworded("numbers", lambda text: None)
