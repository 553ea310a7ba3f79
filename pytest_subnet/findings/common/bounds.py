"""What an argument of an assertion may be; a wrong one is an error that names it."""

from __future__ import annotations

import sys
import warnings
from numbers import Real

from pytest_subnet.errors import VacuousBoundWarning
from pytest_subnet.scan.tolerance import Tolerance


def check_fraction(name: str, value: float) -> None:
    """Raise unless `value` is a number in [0, 1]."""
    _check_number(name, value)
    if not 0 <= value <= 1:  # also NaN
        hint = f"; {value:g}% is {name}={value / 100:g}" if 1 < value <= 100 else ""
        raise ValueError(f"{name}={value!r} is not a fraction in [0, 1]{hint}")


def check_range(at_least: float | None, at_most: float | None) -> None:
    """Raise unless there is a bound, both are fractions, and they leave room between them."""
    for name, value in (("at_least", at_least), ("at_most", at_most)):
        if value is not None:
            check_fraction(name, value)
    if at_least is None and at_most is None:
        raise ValueError("no bound: give at_least, at_most or both, or the assertion says nothing")
    if at_least is not None and at_most is not None and at_least > at_most:
        raise ValueError(f"at_least={at_least!r} is above at_most={at_most!r}: nothing can hold")


def check_limit(name: str, value: float) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    _check_number(name, value)
    limit = value if isinstance(value, int) else float(value)  # numpy's float32 would overflow
    if not (limit >= 0 and limit <= sys.float_info.max):  # also NaN, and integers beyond a float
        raise ValueError(f"{name}={value!r} is not a finite number of at least 0")


def check_tolerance(atol: float | None, rtol: float | None) -> Tolerance:
    """The tolerance that is meant; raise for two of them and for what is none."""
    return Tolerance(atol, rtol)


def check_message(message: object) -> None:
    """Raise unless `message` can reword a failure; a text of its own would hide the numbers."""
    if message is not None and not callable(message):
        raise TypeError(
            f"message={message!r} is not a function from the default text to the text to raise"
        )


def warn_of_vacuous(assertion: str, **bounds: float | None) -> None:
    """Warn at the user's line of bounds that nothing could have failed; for one that passed.

    Called by the assertion itself, last: where it fails, there is nothing to be warned of.

    Args:
        assertion: its name.
        bounds: shares in [0, 1] and other numbers of at least 0, by the name of their keyword;
            `max_…`, `at_most` and `band` are limits from above, all others from below.
    """
    __tracebackhide__ = True
    for name, value in bounds.items():
        from_above = name.startswith(("max_", "at_most", "band"))
        if value is None or value != (1 if from_above else 0):
            continue
        if from_above:
            why = "nothing is above 1; say what is too much: a number below 1"
        else:
            why = "nothing is below 0; say what is too little: a number above 0"
        text = f"{assertion}: {name}={value!r} is no bound, {why}"
        warnings.warn(text, VacuousBoundWarning, stacklevel=3)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is not a number")
