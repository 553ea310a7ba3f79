"""Bounds that nothing can fail: a warning at their line, where the assertion passed."""

import copy
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from pytest_subnet import (
    UpdateMask,
    VacuousBoundWarning,
    assert_even_sparsity,
    assert_mask_overlap,
    assert_max_change,
    assert_step_sparsity,
    assert_subnetwork_recovers,
    assert_update_dynamics,
    assert_update_rank,
    assert_update_sparsity,
    assert_updated,
    open_pair,
    open_trajectory,
)

BELOW = "is no bound, nothing is below 0; say what is too little: a number above 0"
ABOVE = "is no bound, nothing is above 1; say what is too much: a number below 1"
STEPS = [
    {"up_proj.weight": torch.tensor([[number, 0.0], [0.0, number]]), "q_proj.weight": torch.eye(2)}
    for number in (0.0, 1.0, 2.0)
]


@pytest.fixture
def pair():
    return open_pair(STEPS[0], STEPS[1])


@pytest.fixture
def run():
    return open_trajectory(STEPS)


def masks():
    return (
        UpdateMask.of({"w.weight": [[True, True, False], [False, False, False]]}),
        UpdateMask.of({"w.weight": [[False, True, True], [False, False, False]]}),
    )


def recovers(**more):
    base, full, sub = ({"w": torch.tensor([float(n), 0.0])} for n in (0, 2, 1))
    return assert_subnetwork_recovers(full, sub, base=base, atol=1e-5, **more)


def warned(judge, *arguments, **bounds):
    """What is warned of, whatever filters are set."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        judge(*arguments, **bounds)
    assert {each.category for each in caught} <= {VacuousBoundWarning}
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("judge", "bounds", "said"),
    [
        (assert_update_sparsity, {"at_least": 0}, f"at_least=0 {BELOW}"),
        (assert_update_sparsity, {"at_least": 0.0, "at_most": 0.9}, f"at_least=0.0 {BELOW}"),
        (assert_update_sparsity, {"at_most": 1}, f"at_most=1 {ABOVE}"),
        (assert_update_sparsity, {"at_least": 0.5, "at_most": 1.0}, f"at_most=1.0 {ABOVE}"),
        (assert_even_sparsity, {"max_spread": 1}, f"max_spread=1 {ABOVE}"),
        (assert_update_rank, {"at_least": 0, "include": "*up*"}, f"at_least=0 {BELOW}"),
    ],
)
def test_of_a_pair(pair, judge, bounds, said):
    assert warned(judge, pair, **bounds) == [f"{judge.__name__}: {said}"]


def test_of_tensors(pair):
    said = [f"assert_updated: at_least=0 {BELOW}"]

    assert warned(assert_updated, pair, "*up*", at_least=0) == said
    assert warned(assert_updated, pair, "*up*") == []  # asks for one updated entry


def test_of_a_run(run):
    def said(*bounds):
        return [f"assert_update_dynamics: {each}" for each in bounds]

    dynamics = assert_update_dynamics
    assert warned(dynamics, run, min_never=0) == said(f"min_never=0 {BELOW}")
    assert warned(dynamics, run, max_cancelled=1) == said(f"max_cancelled=1 {ABOVE}")
    assert warned(dynamics, run, max_final=1) == said(f"max_final=1 {ABOVE}")
    assert warned(dynamics, run, level_by=1, band=1) == said(f"band=1 {ABOVE}")
    assert warned(dynamics, run, min_never=0, max_final=1) == said(
        f"min_never=0 {BELOW}", f"max_final=1 {ABOVE}"
    )
    assert warned(assert_step_sparsity, run, at_least=0) == [
        f"assert_step_sparsity: at_least=0 {BELOW}"
    ]


def test_of_masks():
    def said(bound):
        return [f"assert_mask_overlap: {bound}"]

    a, b = masks()
    bare = {"null": None}
    assert warned(assert_mask_overlap, a, b, min_lift=0) == said(f"min_lift=0 {BELOW}")
    assert warned(assert_mask_overlap, a, b, max_jaccard=1) == said(f"max_jaccard=1 {ABOVE}")
    assert warned(assert_mask_overlap, a, b, min_jaccard=0, **bare) == said(
        f"min_jaccard=0 {BELOW}"
    )
    assert warned(assert_mask_overlap, a, b, min_one_sided=0, **bare) == said(
        f"min_one_sided=0 {BELOW}"
    )


def test_of_a_subnetwork():
    assert warned(recovers, match_at_least=0) == [
        f"assert_subnetwork_recovers: match_at_least=0 {BELOW}"
    ]


def test_bounds_that_can_fail_are_none(pair, run):
    a, b = masks()
    assert warned(assert_update_sparsity, pair, at_least=1e-9, at_most=1 - 1e-9) == []
    assert warned(assert_even_sparsity, pair, max_spread=0.99) == []
    assert warned(assert_update_dynamics, run, level_by=1.0, band=0.5) == []
    assert warned(assert_update_dynamics, run, max_final=0.9) == []  # band is not asked for
    assert warned(assert_mask_overlap, a, b, min_kappa=0) == []  # kappa can be below 0
    assert warned(assert_max_change, pair, at_most=1) == []  # in weight units, no share
    assert warned(assert_max_change, pair, at_most=1e30, include="q_proj*", relative=True) == []
    assert warned(recovers, match_at_least=0, score=lambda source: 1.0) == []  # the score decides


def test_the_opposite_ends_are_bounds(pair):
    same = open_pair(STEPS[1], copy.deepcopy(STEPS[1]))
    assert warned(assert_update_sparsity, same, at_least=1, allow_identical=True) == []
    assert warned(assert_even_sparsity, same, max_spread=0, allow_identical=True) == []


def test_an_assertion_that_fails_anyway_warns_of_nothing():
    same = open_pair(STEPS[1], copy.deepcopy(STEPS[1]))
    for judge, bounds in (
        (assert_update_sparsity, {"at_least": 0}),
        (assert_even_sparsity, {"max_spread": 1}),
        (assert_update_rank, {"at_least": 0}),
    ):
        with pytest.raises(AssertionError, match="moved"):
            judge(same, **bounds)


@pytest.mark.parametrize("nothing", [0, 0.0, -0.0, Fraction(0), np.float32(0), np.int64(0)])
def test_any_zero_is_zero(pair, nothing):
    assert warned(assert_update_sparsity, pair, at_least=nothing) == [
        f"assert_update_sparsity: at_least={nothing!r} {BELOW}"
    ]


def test_it_is_raised_at_the_users_line(pair, run):
    a, b = masks()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_update_sparsity(pair, at_least=0)
        assert_updated(pair, "*up*", at_least=0)
        assert_update_rank(pair, at_least=0, include="*up*")
        assert_step_sparsity(run, at_least=0)
        assert_mask_overlap(a, b, max_jaccard=1)
    assert [each.filename for each in caught] == [__file__] * 5
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert [lines[each.lineno - 1].strip().partition("(")[0] for each in caught] == [
        "assert_update_sparsity",
        "assert_updated",
        "assert_update_rank",
        "assert_step_sparsity",
        "assert_mask_overlap",
    ]


def test_it_is_an_error_where_that_is_asked(pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error", VacuousBoundWarning)
        with pytest.raises(VacuousBoundWarning, match="at_least=0 is no bound"):
            assert_update_sparsity(pair, at_least=0)
