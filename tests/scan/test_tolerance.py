"""Tolerances: at most one, sensible, and written as messages name them."""

from __future__ import annotations

import math

import pytest

from pytest_subnet.scan import DEFAULT_TOLERANCES, PAPER, SAME_BITS, Tolerance


def test_by_default_only_equal_bits_are_the_same() -> None:
    assert Tolerance() == SAME_BITS
    assert SAME_BITS.same_bits
    assert not Tolerance(atol=0.0).same_bits
    assert not Tolerance(rtol=0.0).same_bits


def test_same_bits_and_the_paper_are_counted_in_every_scan() -> None:
    assert list(DEFAULT_TOLERANCES) == [SAME_BITS, Tolerance(atol=1e-5)]


def test_at_most_one_may_be_given() -> None:
    with pytest.raises(ValueError, match=r"atol=1e-05 and rtol=0\.001: give at most one"):
        Tolerance(atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("keyword", ["atol", "rtol"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, 10**400])
def test_a_tolerance_is_a_finite_number_of_at_least_zero(keyword: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{keyword}={value} is not a finite number of at least 0"):
        Tolerance(**{keyword: value})


@pytest.mark.parametrize("keyword", ["atol", "rtol"])
@pytest.mark.parametrize("value", [True, "1e-5", b"1", [1e-5], 1j])
def test_a_tolerance_is_a_number(keyword: str, value: object) -> None:
    with pytest.raises(TypeError) as failed:
        Tolerance(**{keyword: value})
    assert str(failed.value) == f"{keyword}={value!r} is not a number"


@pytest.mark.parametrize(
    ("tolerance", "text"),
    [(SAME_BITS, "same bits"), (PAPER, "atol=1e-05"), (Tolerance(rtol=0.001), "rtol=0.001")],
)
def test_as_messages_name_it(tolerance: Tolerance, text: str) -> None:
    assert str(tolerance) == text


@pytest.mark.parametrize("value", [1e-5, 1.0000001e-5, 0.1, 1 / 3, 0.0])
def test_two_tolerances_have_two_names(value: float) -> None:
    assert float(str(Tolerance(atol=value)).removeprefix("atol=")) == value
