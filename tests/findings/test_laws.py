"""Laws that every measure obeys, whatever the weights are."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import (
    assert_frozen,
    assert_update_sparsity,
    assert_updated,
    open_pair,
    update_movement,
    update_sparsity,
)

law = settings(max_examples=60, deadline=None, derandomize=True, database=None)
any_bound = pytest.mark.filterwarnings("ignore::pytest_subnet.VacuousBoundWarning")

WORDS = st.integers(0, 0xFFFF)
SPECIAL = st.sampled_from([0x0000, 0x8000, 0x3F80, 0x3F81, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0x0001])


@st.composite
def pairs(draw, words=SPECIAL | WORDS):
    """Two to four small bfloat16 tensors on both sides, some of their entries equal."""
    base, tuned = {}, {}
    for number in range(draw(st.integers(2, 4))):
        shape = draw(st.sampled_from([(1,), (3,), (2, 3), (4, 1)]))
        before = draw(st.lists(words, min_size=math.prod(shape), max_size=math.prod(shape)))
        after = [draw(words) if draw(st.booleans()) else word for word in before]
        name = f"model.layers.{number}.{draw(st.sampled_from(['up_proj', 'norm']))}.weight"
        base[name], tuned[name] = (tensor_of(side, shape) for side in (before, after))
    return base, tuned


def tensor_of(words, shape):
    signed = [word - (1 << 16) if word >> 15 else word for word in words]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).reshape(shape)


def finite(words):
    return words.filter(lambda word: word & 0x7F80 != 0x7F80)


@law
@given(pairs())
def test_density_and_sparsity_are_shares_that_add_up_to_one(sides):
    result = update_sparsity(open_pair(*sides))
    for each in (result, *result.per_tensor):
        assert 0 <= each.sparsity <= 1
        assert each.density + each.sparsity == pytest.approx(1, abs=1e-15)


@law
@given(pairs())
def test_the_pooled_sparsity_is_the_mean_of_the_tensors_weighted_by_their_entries(sides):
    result = update_sparsity(open_pair(*sides))
    weighted = sum(each.sparsity * each.numel for each in result.per_tensor)
    assert result.sparsity == pytest.approx(weighted / result.numel)


@law
@given(pairs())
def test_swapping_the_sides_changes_no_count(sides):
    base, tuned = sides
    for tolerance in ({}, {"atol": 1e-5}, {"rtol": 1e-2}):
        one = update_sparsity(open_pair(base, tuned), **tolerance)
        other = update_sparsity(open_pair(tuned, base), **tolerance)
        assert one.updated_under == other.updated_under
        assert one.zero_sign_flips == other.zero_sign_flips


@law
@given(pairs(), st.lists(st.floats(0, 1e30), min_size=2, max_size=4))
def test_a_larger_tolerance_never_finds_more(sides, tolerances):
    pair = open_pair(*sides)
    counts = [update_sparsity(pair, atol=atol).updated for atol in sorted(tolerances)]
    assert counts == sorted(counts, reverse=True)
    assert update_sparsity(pair).updated >= counts[0]


@law
@given(pairs())
def test_without_a_tolerance_only_the_signs_of_zeros_are_more_than_other_values(sides):
    pair = open_pair(*sides)
    result = update_sparsity(pair)
    assert update_sparsity(pair, atol=0).updated == result.updated - result.zero_sign_flips
    assert update_sparsity(pair, rtol=0).updated == result.updated - result.zero_sign_flips


@law
@given(pairs())
def test_what_is_included_and_what_is_excluded_add_up(sides):
    pair = open_pair(*sides)
    one = update_sparsity(pair, include="*.0.*")
    other = update_sparsity(pair, exclude="*.0.*")
    whole = update_sparsity(pair)
    for number in ("updated", "numel", "zero_sign_flips", "nonfinite"):
        assert getattr(one, number) + getattr(other, number) == getattr(whole, number)


@law
@given(pairs())
def test_frozen_holds_where_nothing_was_updated_and_only_there(sides):
    pair = open_pair(*sides)
    for each in update_movement(pair).per_tensor:
        assert holds(assert_frozen, pair, each.name) == (each.updated == 0)
        if each.updated == 0:
            assert not holds(assert_updated, pair, each.name)


@law
@given(pairs(finite(SPECIAL | WORDS)))
def test_updated_holds_where_a_finite_value_changed_and_only_there(sides):
    base, tuned = sides
    pair = open_pair(base, tuned)
    for name in base:
        differs = bool((base[name] != tuned[name]).any())
        assert holds(assert_updated, pair, name) == differs


@law
@given(pairs())
def test_both_measures_count_the_same(sides):
    pair = open_pair(*sides)
    sparsity, movement = update_sparsity(pair), update_movement(pair)
    counted = tuple(each._replace(expected_sparsity=None) for each in sparsity.per_tensor)
    assert counted == movement.per_tensor
    assert (sparsity.updated, sparsity.sparsity) == (movement.updated, movement.sparsity)
    json.dumps([sparsity.to_dict(), movement.to_dict()], allow_nan=False)


@any_bound
@law
@given(pairs(), st.floats(0, 1))
def test_a_bound_holds_when_the_sparsity_is_on_its_side_of_it(sides, bound):
    pair = open_pair(*sides)
    sparsity = update_sparsity(pair).sparsity
    options = {"allow_identical": True}
    assert holds(assert_update_sparsity, pair, at_least=bound, **options) == (sparsity >= bound)
    assert holds(assert_update_sparsity, pair, at_most=bound, **options) == (sparsity <= bound)


@any_bound
@law
@given(pairs(), st.floats(0, 1))
def test_a_bound_that_a_failure_offers_holds(sides, bound):
    pair = open_pair(*sides)
    for name in ("at_least", "at_most"):
        try:
            assert_update_sparsity(pair, **{name: bound}, allow_identical=True)
        except AssertionError as error:
            last = str(error).splitlines()[-1]
            if last.startswith("  to accept"):
                offered = float(last.rpartition(f"{name}=")[2])
                assert 0 < offered < 1
                assert_update_sparsity(pair, **{name: offered}, allow_identical=True)


@law
@given(pairs())
def test_nothing_moved_is_said_where_no_value_differs(sides):
    base, tuned = sides
    same = all(
        bool(((base[name] == tuned[name]) | same_bits(base[name], tuned[name])).all())
        for name in base
    )
    assert update_sparsity(open_pair(base, tuned)).nothing_moved == same


def same_bits(one, other):
    return one.view(torch.int16) == other.view(torch.int16)


def holds(judge, *arguments, **options):
    try:
        judge(*arguments, **options)
    except AssertionError:
        return False
    return True
