"""Arguments that cannot be meant are refused by name, before anything is read."""

import re
from fractions import Fraction

import numpy as np
import pytest

from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_limit,
    check_message,
    check_range,
    check_tolerance,
)
from pytest_subnet.scan import Tolerance

NAN = float("nan")


@pytest.mark.parametrize(
    "value", [0, 1, 0.0, 1.0, 0.7, np.float32(0.5), np.int64(1), Fraction(1, 3)]
)
def test_a_fraction_is_any_real_number_from_zero_to_one(value):
    check_fraction("at_least", value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.1, "at_least=-0.1 is not a fraction in [0, 1]"),
        (NAN, "at_least=nan is not a fraction in [0, 1]"),
        (float("inf"), "at_least=inf is not a fraction in [0, 1]"),
        (100.5, "at_least=100.5 is not a fraction in [0, 1]"),
        (70, "at_least=70 is not a fraction in [0, 1]; 70% is at_least=0.7"),
        (1.5, "at_least=1.5 is not a fraction in [0, 1]; 1.5% is at_least=0.015"),
    ],
)
def test_what_is_no_fraction_is_refused_with_what_was_probably_meant(value, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        check_fraction("at_least", value)


@pytest.mark.parametrize("value", [True, False, np.True_, "0.7", None, [0.7], 0.7j])
@pytest.mark.parametrize("check", [check_fraction, check_limit])
def test_what_is_no_number_is_a_type_error(check, value):
    with pytest.raises(TypeError) as caught:
        check("max_spread", value)
    assert str(caught.value) == f"max_spread={value!r} is not a number"


@pytest.mark.parametrize("bounds", [(0.5, None), (None, 0.5), (0.5, 0.5), (0, 1)])
def test_a_range_needs_one_bound_and_room(bounds):
    check_range(*bounds)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((None, None), "no bound: give at_least, at_most or both, or the assertion says nothing"),
        ((0.8, 0.7), "at_least=0.8 is above at_most=0.7: nothing can hold"),
        ((NAN, 0.7), "at_least=nan is not a fraction in [0, 1]"),
        ((0.1, 95), "at_most=95 is not a fraction in [0, 1]; 95% is at_most=0.95"),
    ],
)
def test_a_range_without_room_is_refused(bounds, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        check_range(*bounds)


@pytest.mark.parametrize("value", [-1e-9, NAN, float("inf"), 10**400])
def test_a_limit_is_finite_and_not_negative(value):
    check_limit("at_most", 0)
    check_limit("at_most", 1e9)
    with pytest.raises(ValueError, match=r"at_most=.* is not a finite number of at least 0"):
        check_limit("at_most", value)


def test_a_tolerance_is_one_of_two():
    assert check_tolerance(None, None) == Tolerance()
    assert check_tolerance(1e-5, None) == Tolerance(atol=1e-5)
    assert check_tolerance(None, 0) == Tolerance(rtol=0)
    with pytest.raises(ValueError, match=r"atol=1e-05 and rtol=0\.001: give at most one"):
        check_tolerance(1e-5, 1e-3)


@pytest.mark.parametrize(
    ("atol", "rtol", "error", "text"),
    [
        (-1e-5, None, ValueError, "atol=-1e-05 is not a finite number of at least 0"),
        (None, NAN, ValueError, "rtol=nan is not a finite number of at least 0"),
        (True, None, TypeError, "atol=True is not a number"),
        (None, "1e-3", TypeError, "rtol='1e-3' is not a number"),
    ],
)
def test_a_tolerance_that_is_none_is_refused(atol, rtol, error, text):
    with pytest.raises(error) as caught:
        check_tolerance(atol, rtol)
    assert str(caught.value) == text


def test_a_message_is_a_function_because_a_text_would_hide_the_numbers():
    check_message(None)
    check_message(str.upper)
    with pytest.raises(TypeError) as caught:
        check_message("the run is bad")
    assert str(caught.value) == (
        "message='the run is bad' is not a function from the default text to the text to raise"
    )
