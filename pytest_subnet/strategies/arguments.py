"""What strategies are given, checked when they draw, as Hypothesis does."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

T = TypeVar("T")

DRAWABLE = tuple(name for name in DTYPES if not name.startswith("complex"))
"""The dtypes that tensors are drawn in."""


def check_strategy(name: str, value: object) -> None:
    """Raise unless the argument `name` is None or a strategy."""
    if value is not None and not isinstance(value, SearchStrategy):
        raise InvalidArgument(
            f"Expected a strategy but got {name}={safe(repr(value))} "
            f"(type={safe(type(value).__name__)}); st.just(...) makes one of a value"
        )


def check_flag(name: str, value: object) -> None:
    """Raise unless the argument `name` is True or False."""
    if not isinstance(value, bool):
        raise InvalidArgument(
            f"Expected bool but got {name}={safe(repr(value))} (type={safe(type(value).__name__)})"
        )


def check_kinds(kinds: object, known: Iterable[str]) -> None:
    """Raise unless `kinds` is a strategy or a collection of some of the `known` ones."""
    known = tuple(known)
    if isinstance(kinds, SearchStrategy) or (
        isinstance(kinds, list | tuple)
        and kinds
        and all(isinstance(kind, str) and kind in known for kind in kinds)
    ):
        return
    raise InvalidArgument(
        f"Expected a tuple of some of {', '.join(map(repr, known))} but got "
        f"kinds={safe(repr(kinds))}"
    )


def sampled(choices: SearchStrategy[T] | Sequence[T]) -> SearchStrategy[T]:
    """What to draw from, where a list of choices may stand for the strategy that samples it."""
    return choices if isinstance(choices, SearchStrategy) else st.sampled_from(choices)


def drawn_name(argument: str, value: object, known: Collection[str]) -> str:
    """One of some `known` names, which the strategy `argument` drew."""
    if isinstance(value, str) and value in known:
        return value
    raise InvalidArgument(
        f"{argument} drew {safe(repr(value))}, which is not one of {', '.join(known)}"
    )


def drawn_dtype(value: object, known: Collection[str] = DRAWABLE) -> str:
    """The name of a dtype that the strategy `dtypes` drew: a `torch.dtype` or already a name."""
    name = str(value).removeprefix("torch.")
    return name if name in known else drawn_name("dtypes", value, known)


def drawn_shape(value: object, *, dims: int | None = None) -> tuple[int, ...]:
    """A shape that the strategy `shapes` drew.

    Args:
        value: what it drew.
        dims: how many sides it must have; None for any number, of which each may be 0.
    """
    sides = tuple(value) if isinstance(value, list | tuple) else (None,)
    least = 0 if dims is None else 1
    if (
        all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
        and all(side >= least for side in sides if side is not None)
        and dims in (None, len(sides))
    ):
        return tuple(side for side in sides if side is not None)
    wanted = "a shape" if dims is None else f"the shape of {dims} sides of at least 1"
    raise InvalidArgument(f"shapes drew {safe(repr(value))}, which is not {wanted}")
