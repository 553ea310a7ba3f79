"""Numbers that can be told apart, and suggested bounds that hold when they are pasted."""

import math

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from pytest_subnet.findings.common.result import Movement
from pytest_subnet.findings.common.wording import (
    bound_above,
    bound_below,
    limit_above,
    number_against,
    share_against,
    worst,
)
from pytest_subnet.findings.recovery.counts import Recovered

law = settings(deadline=None, derandomize=True, database=None)
shares = st.floats(0, 1)


@law
@given(shares)
@example(0.004)
@example(1 - 2**-53)
@example(5e-324)
@example(0.29)
def test_a_suggested_lower_bound_holds_and_says_something(share):
    assume(share > 0)
    assert 0 < float(bound_below(share)) <= share


@law
@given(shares)
@example(0.996)
@example(1 - 2**-53)
@example(5e-324)
@example(0.57)
def test_a_suggested_upper_bound_holds_and_says_something(share):
    assume(share < 1)
    assert share <= float(bound_above(share)) < 1


@law
@given(shares)
def test_a_suggested_bound_is_close(share):
    assume(0 < share < 1)
    left = min(share, 1 - share)
    assert share - float(bound_below(share)) <= 0.1 * left + 0.01 * (left > 0.1)
    assert float(bound_above(share)) - share <= 0.1 * left + 0.01 * (left > 0.1)


def test_no_bound_is_suggested_where_only_an_empty_one_would_hold():
    assert bound_below(0.0) is None
    assert bound_above(1.0) is None
    assert limit_above(math.inf) is None


@pytest.mark.parametrize("value", [0.29, 0.57, 0.07, 0.1])
def test_two_digits_that_are_already_there_are_kept(value):
    assert bound_below(value) == bound_above(value) == repr(value)


@law
@given(st.floats(0, 1.7976931348623157e308))
@example(1.7976931348623157e308)
@example(5e-324)
def test_a_suggested_limit_holds_and_is_close(value):
    limit = float(limit_above(value))
    assert value <= limit < math.inf
    assert limit <= value * 1.1 + 5e-324


@law
@given(shares, shares)
@example(0.699999, 0.7)
@example(0.999999, 0.9)
@example(1e-9, 0.5)
@example(0.0, 1.0)
@example(0.7, math.nextafter(0.7, 1))
def test_a_share_is_told_apart_from_its_bound_and_from_all_and_nothing(share, bound):
    assume(share != bound)
    value, required = share_against(share, bound)
    assert value != required
    assert (share == 0) == (float(value.rstrip("%")) == 0) or "e-" in value
    assert share == 1 or not value.startswith("100.")


@pytest.mark.parametrize(
    ("share", "bound", "texts"),
    [
        (0.7184, 0.8, ("71.84%", "80.00%")),
        (0.699999, 0.7, ("69.9999%", "70.0000%")),
        (0.99999, 0.5, ("99.999%", "50.000%")),
        (1.0, 0.99, ("100.00%", "99.00%")),
        (0.0, 0.001, ("0.00%", "0.10%")),
    ],
)
def test_a_share_has_two_decimals_and_more_where_needed(share, bound, texts):
    assert share_against(share, bound) == texts


@law
@given(st.floats(0), st.floats(0, allow_infinity=False))
def test_a_number_is_told_apart_from_its_bound(value, bound):
    assume(value != bound)
    assert len(set(number_against(value, bound))) == 2


def movement(name, shape=(2, 2), updated=1):
    return Movement(
        name, shape, "bfloat16", None, "mlp", 4, updated, updated, 0, 0, 0, 1.0, 1.0, 1.0, 1.0
    )


def test_the_worst_rows_are_columns():
    tensors = [movement("a.weight", updated=4), movement("longer.weight", (1, 4)), movement("b")]
    rows = worst(tensors, lambda each: (f"{each.updated / 4:.0%}", "x"))
    assert rows == [
        ("worst", "a.weight       100%  x  (bf16[2,2])"),
        ("", "longer.weight   25%  x  (bf16[1,4])"),
        ("", "b               25%  x  (bf16[2,2])"),
    ]


def test_the_worst_may_be_anything_with_a_name_a_dtype_and_a_shape():
    each = Recovered("w", (2,), "float32", 2, 2, 1, 2, 1, 1, 0, 0)
    rows = worst([each], lambda tensor: (f"{tensor.regained} regained",))
    assert rows == [("worst", "w  1 regained  (f32[2])")]


def test_rows_beyond_the_worst_are_counted():
    rows = worst([movement(str(i)) for i in range(1234)], lambda each: ("1",))
    assert rows[-1] == ("", "… 1,231 more")
    assert len(rows) == 4


def test_names_of_tensors_are_escaped():
    assert worst([movement("\x1b[31mred\n")], lambda each: ("1",)) == [
        ("worst", r"\x1b[31mred\n  1  (bf16[2,2])")
    ]
