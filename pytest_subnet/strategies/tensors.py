"""Tensors of any dtype, out of the bits that it stores."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.strategies.arguments import (
    DRAWABLE,
    check_flag,
    check_strategy,
    drawn_dtype,
    drawn_shape,
)
from pytest_subnet.strategies.words import MOST_WORDS, SEEDS, choose_words, spread, storage_of
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_subnet.strategies.words import Words

_FLOATING = st.sampled_from([name for name in DRAWABLE if "float" in name])
_SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)


@st.composite
def tensors(  # noqa: D417 - nobody passes `draw`
    draw: st.DrawFn,
    *,
    dtypes: st.SearchStrategy[torch.dtype | str] | None = None,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
    allow_nan: bool = True,
    allow_infinity: bool = True,
    allow_subnormal: bool = True,
    elements: st.SearchStrategy[float] | None = None,
) -> torch.Tensor:
    """A strategy for tensors, on the CPU and without gradient.

    Entries are the bits that a dtype stores, so every NaN, both zeros and the subnormal numbers of
    16 and 8 bits come up. At most nine words are drawn; a tensor of any size repeats them, and in
    16 bits and more varies the low half of their mantissas. Tensors shrink towards no sides,
    zeros, and few other entries, which shrink to 1.

    Args:
        dtypes: of which dtypes, as `torch.dtype` or by name; None: the floating ones that
            safetensors stores, bfloat16 first.
        shapes: of which shapes; None: up to three sides of up to 12 entries, none included.
        allow_nan: whether entries may be NaN.
        allow_infinity: whether they may be infinite, where the dtype has infinities.
        allow_subnormal: whether they may be subnormal numbers.
        elements: numbers to take as entries, rounded to the dtype; None: bits, as above.

    Raises:
        InvalidArgument: an argument is no strategy or no bool, a strategy drew what is no dtype,
            no shape or no number of the dtype, or `elements` came with an `allow_` of False.

    >>> from hypothesis import given
    >>> @given(tensors(allow_nan=False))
    ... def test_no_update_is_zero(tensor):
    ...     assert torch.equal(tensor, tensor.clone())
    >>> test_no_update_is_zero()
    """
    check_strategy("dtypes", dtypes)
    check_strategy("shapes", shapes)
    check_strategy("elements", elements)
    flags = {
        "allow_nan": allow_nan,
        "allow_infinity": allow_infinity,
        "allow_subnormal": allow_subnormal,
    }
    for name, value in flags.items():
        check_flag(name, value)
        if elements is not None and not value:
            raise InvalidArgument(f"Cannot have {name}=False with elements; draw none of these")
    dtype = drawn_dtype(draw(_FLOATING if dtypes is None else dtypes))
    shape = drawn_shape(draw(_SHAPES if shapes is None else shapes))
    size = math.prod(shape)
    if elements is None:
        choice = choose_words(dtype, **flags)
        words = spread(choice, choice.words(draw(choice.some)), size, draw(SEEDS))
        return choice.storage.tensor(words, shape)
    numbers = draw(st.lists(elements, min_size=1, max_size=MOST_WORDS))
    fill, *drawn = _stored(numbers, dtype).tolist()
    choice = choose_words(dtype)._replace(simple=(fill,))
    words = spread(choice, drawn, size, draw(SEEDS), noise=False)
    return choice.storage.tensor(words, shape)


def _stored(numbers: Sequence[float], dtype: str) -> Words:
    """The words of numbers, rounded to `dtype`."""
    import torch

    storage = storage_of(dtype)
    for number in numbers:
        if not isinstance(number, int | float):
            raise InvalidArgument(
                f"elements drew {safe(repr(number))} (type={safe(type(number).__name__)}), "
                "which is not a number"
            )
    if not storage.torch_dtype.is_floating_point:
        least, most = (0, 1) if dtype == "bool" else _range(storage.torch_dtype)
        for number in numbers:
            if not math.isfinite(number) or number not in range(least, most + 1):
                raise InvalidArgument(f"elements drew {number!r}, which {dtype} cannot store")
        return np.array([int(number) % 2**storage.bits for number in numbers], storage.unsigned)
    stored = torch.tensor(numbers, dtype=torch.float64).to(storage.torch_dtype)
    for number, back in zip(numbers, stored.tolist(), strict=True):
        if math.isfinite(number) and not math.isfinite(back):
            raise InvalidArgument(f"elements drew {number!r}, which {dtype} stores as {back!r}")
    return storage.words(stored)


def _range(dtype: torch.dtype) -> tuple[int, int]:
    import torch

    limits = torch.iinfo(dtype)
    return limits.min, limits.max
