"""Masks of tiny models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.strategies.arguments import check_strategy, drawn_shape
from pytest_subnet.strategies.state_dicts import shapes_by_name
from pytest_subnet.strategies.words import SEEDS
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHAPES = shapes_by_name().map(lambda drawn: drawn[0])
_DENSITIES = st.floats(0, 1, allow_subnormal=False)


@st.composite
def update_masks(  # noqa: D417 - nobody passes `draw`
    draw: st.DrawFn,
    *,
    shapes: st.SearchStrategy[Mapping[str, tuple[int, ...]]] | None = None,
    densities: st.SearchStrategy[float] | None = None,
) -> UpdateMask:
    """A strategy for masks, each tensor of a density of its own.

    Every density can come up for every tensor: chance that is counted over the whole model is far
    off for such masks, and by matrix it is not. Masks shrink towards one empty tensor of one entry.

    Args:
        shapes: what to cover, mappings from names to shapes; None: the shapes of `state_dicts()`.
            Two masks over the same tensors share it: `st.shared(...)`.
        densities: drawn once for each tensor: the share of its entries that are in the mask,
            rounded to whole entries; None: any from 0 to 1.

    Raises:
        InvalidArgument: an argument is no strategy, `shapes` drew no mapping from names to shapes
            or an empty one, or `densities` drew what is no share.

    >>> from hypothesis import given
    >>> @given(update_masks())
    ... def test_no_entry_is_in_a_mask_and_outside(mask):
    ...     assert not mask & ~mask and (mask | ~mask).count == mask.numel
    >>> test_no_entry_is_in_a_mask_and_outside()
    """
    check_strategy("shapes", shapes)
    check_strategy("densities", densities)
    sizes = _drawn_shapes(draw(_SHAPES if shapes is None else shapes))
    seed = draw(SEEDS)
    random = np.random.default_rng(seed) if seed else None
    density = _DENSITIES if densities is None else densities
    return UpdateMask.of(
        {
            name: _entries(_drawn_density(draw(density)), shape, random)
            for name, shape in sizes.items()
        },
        what="drawn",
    )


def _entries(
    density: float, shape: tuple[int, ...], random: np.random.Generator | None
) -> NDArray[np.bool_]:
    """The first entries, or any where there is a generator, so many that the density is met."""
    size = math.prod(shape)
    entries = np.arange(size) < round(density * size)
    return (entries if random is None else random.permutation(entries)).reshape(shape)


def _drawn_shapes(shapes: object) -> dict[str, tuple[int, ...]]:
    if not isinstance(shapes, Mapping) or not shapes or not all(map(_is_name, shapes)):
        raise InvalidArgument(
            f"shapes drew {safe(repr(shapes))}, which is no mapping from names to shapes"
        )
    return {name: drawn_shape(shape) for name, shape in shapes.items()}


def _is_name(name: object) -> bool:
    return isinstance(name, str)


def _drawn_density(density: object) -> float:
    if not isinstance(density, int | float) or not 0 <= density <= 1:
        raise InvalidArgument(f"densities drew {safe(repr(density))}, which is not within [0, 1]")
    return float(density)
