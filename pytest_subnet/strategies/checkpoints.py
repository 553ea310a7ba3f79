"""Checkpoints on disk, in every format that is quickly written."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.control import cleanup
from hypothesis.errors import InvalidArgument

from pytest_subnet.strategies.arguments import drawn_name, sampled
from pytest_subnet.strategies.saved_checkpoints import FORMATS, SavedCheckpoint
from pytest_subnet.strategies.state_dicts import state_dicts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


def checkpoints(
    *,
    formats: st.SearchStrategy[str] | Sequence[str] = tuple(FORMATS),
    tensors: st.SearchStrategy[Mapping[str, torch.Tensor]] | None = None,
) -> st.SearchStrategy[SavedCheckpoint]:
    """A strategy for `SavedCheckpoint`: a state dict, written to disk in a drawn format.

    Each draw is in a temporary directory of its own, which is there until the example is over and
    for as long as the object is kept. Checkpoints shrink as `formats` do, of a list towards its
    first, and as their tensors do.

    Args:
        formats: of `"safetensors"`, `"sharded"`, `"bin"`, `"dcp"`, `"fsdp"`, as a strategy or a
            list.
        tensors: what is written; None: `state_dicts()`.

    Returns:
        A strategy. What libraries import when they first write is imported when it is made.

    Raises:
        InvalidArgument: `formats` is empty or holds one that is unknown, or `tensors` is no
            strategy.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=5, deadline=None)
    ... @given(checkpoints())
    ... def test_names(saved):
    ...     assert sorted(open_checkpoint(saved.path).names()) == sorted(saved.tensors)
    >>> test_names()
    """
    listed = () if isinstance(formats, st.SearchStrategy) else _listed(formats)
    if tensors is None:
        tensors = state_dicts()
    if not isinstance(tensors, st.SearchStrategy):
        raise InvalidArgument(
            f"Expected SearchStrategy but got tensors={tensors!r} (type={type(tensors).__name__})"
        )
    for each in listed or FORMATS:
        _write_once(each)
    return _written(sampled(formats), tensors)


def _listed(formats: Sequence[str]) -> Sequence[str]:
    """The formats of a list, of which each is known."""
    if isinstance(formats, str) or not hasattr(formats, "__len__"):
        raise InvalidArgument(f"formats={formats!r} is neither a strategy nor a list")
    if not formats:
        raise InvalidArgument("formats is empty: there is nothing to draw from")
    for each in formats:
        if each not in FORMATS:
            raise InvalidArgument(f"formats: {each!r} is not one of {', '.join(FORMATS)}")
    return formats


@functools.cache
def _write_once(format: str) -> None:
    """What takes seconds the first time, which Hypothesis would call a draw that is too slow."""
    import torch

    saved = SavedCheckpoint(format=format, tensors={"weight": torch.zeros(2)})
    assert saved.path.is_dir()


@st.composite
def _written(
    draw: st.DrawFn,
    formats: st.SearchStrategy[str],
    tensors: st.SearchStrategy[Mapping[str, torch.Tensor]],
) -> SavedCheckpoint:
    """Draw and write: the time it takes is that of the draw, not of the test."""
    format = drawn_name("formats", draw(formats), FORMATS)
    saved = SavedCheckpoint(format=format, tensors=draw(tensors))
    assert saved.path.is_dir()
    cleanup(lambda: _let_go(saved))
    return saved


def _let_go(saved: SavedCheckpoint) -> None:
    """Nothing: `saved` and its directory are held until this is called, at the example's end."""
