"""State dicts of tiny models, under the names that the known families use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from pytest_subnet.strategies.arguments import check_flag, check_strategy, drawn_dtype
from pytest_subnet.strategies.names import FAMILIES, MOST_PARTS, Sizes, shapes_of
from pytest_subnet.strategies.words import SEEDS, STARTS, choose_words, spread

if TYPE_CHECKING:
    import torch

STORED = ("bfloat16", "float16", "float32")
"""The dtypes that models are trained and kept in."""

_DTYPES = st.sampled_from(STORED)

_FAMILIES = st.sampled_from(list(FAMILIES))
_SIDES = st.integers(1, 8)
_LAYERS = st.integers(0, 2)
_EXPERTS = st.integers(1, 3)
# One draw for all that may be left out, and for the head: a byte each, of which one in so many is
# none, so that most models are whole, any part can be left out, and 1 is the least that is there.
_PRESENCE = st.binary(min_size=MOST_PARTS + 1, max_size=MOST_PARTS + 1)
_ABSENT = 16


@st.composite
def shapes_by_name(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], str, str]:
    """Draw the shapes of a tiny model by name, and which tensor is tied to which, or two blanks."""
    family = FAMILIES[draw(_FAMILIES)]
    sizes = Sizes(
        hidden=draw(_SIDES),
        inner=draw(_SIDES),
        vocabulary=draw(_SIDES),
        layers=draw(_LAYERS),
        experts=draw(_EXPERTS),
    )
    head, *parts = draw(_PRESENCE)
    shapes = shapes_of(family, sizes, [bool(byte % _ABSENT) for byte in parts])
    is_tied = head % 2 == 0
    if head % _ABSENT and not is_tied:
        shapes[family.head] = shapes[family.embedding]
    return shapes, *((family.head, family.embedding) if head % _ABSENT and is_tied else ("", ""))


_SHAPES = shapes_by_name()


@st.composite
def state_dicts(  # noqa: D417 - nobody passes `draw`
    draw: st.DrawFn,
    *,
    dtypes: st.SearchStrategy[torch.dtype | str] | None = None,
    allow_nan: bool = False,
    allow_infinity: bool = False,
) -> dict[str, torch.Tensor]:
    """A strategy for state dicts of tiny decoder-only models, as Llama, GPT-2, NeoX or Mixtral.

    A name says as much as in a real model: attention, also fused, feed-forward parts, experts and
    their router, norms, biases, embedding and head. Most models are whole; of others, parts are
    left out. A head that is tied to the embedding is the same tensor. Every tensor has at least one
    entry. State dicts shrink towards an embedding of one entry that is zero, and nothing else.

    Args:
        dtypes: in which dtype a model is, one for all of it, as `torch.dtype` or by name; None:
            bfloat16, float16 or float32.
        allow_nan: whether entries may be NaN.
        allow_infinity: whether they may be infinite, where the dtype has infinities.

    Raises:
        InvalidArgument: an argument is no strategy or no bool, or `dtypes` drew what is no dtype.

    >>> from hypothesis import given
    >>> from safetensors.torch import load, save
    >>> @given(state_dicts(dtypes=st.just("bfloat16")))
    ... def test_saving_keeps_every_name(weights):
    ...     assert load(save({n: w.clone() for n, w in weights.items()})).keys() == weights.keys()
    >>> test_saving_keeps_every_name()
    """
    check_strategy("dtypes", dtypes)
    check_flag("allow_nan", allow_nan)
    check_flag("allow_infinity", allow_infinity)
    dtype = drawn_dtype(draw(_DTYPES if dtypes is None else dtypes))
    shapes, head, embedding = draw(_SHAPES)
    choice = choose_words(dtype, allow_nan=allow_nan, allow_infinity=allow_infinity)
    size = sum(math.prod(shape) for shape in shapes.values())
    drawn = choice.words(draw(choice.some))
    words = spread(choice, drawn, size, draw(SEEDS), start=draw(STARTS))
    weights = {}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        # A copy: each tensor has memory of its own, as in a model.
        weights[name] = choice.storage.tensor(words[start:end].copy(), shape)
        start = end
    if head:
        weights[head] = weights[embedding]
    return weights
