"""What a bound may be; a wrong one is a `ValueError` that names it."""

from __future__ import annotations

import math


def check_fraction(name: str, value: float | None) -> None:
    """Raise unless `value` is None or a number in [0, 1]."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is not a number")
    if not 0 <= value <= 1:  # also NaN
        hint = f"; {value:g}% is {name}={value / 100:g}" if 1 < value <= 100 else ""
        raise ValueError(f"{name}={value!r} is not a fraction in [0, 1]{hint}")


def check_range(at_least: float | None, at_most: float | None) -> None:
    """Raise unless there is a bound, both are fractions, and they leave room between them."""
    check_fraction("at_least", at_least)
    check_fraction("at_most", at_most)
    if at_least is None and at_most is None:
        raise ValueError("no bound: give at_least, at_most or both, or the assertion says nothing")
    if at_least is not None and at_most is not None and at_least > at_most:
        raise ValueError(f"at_least={at_least!r} is above at_most={at_most!r}: nothing can hold")


def check_limit(name: str, value: float) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is not a number")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} is not a finite number of at least 0")
