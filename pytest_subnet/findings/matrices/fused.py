"""Matrices that are several in one: attention's queries, keys and values, a gate beside its up.

A rotation of the whole says nothing of its parts, so they are taken apart before they are measured,
by the layout of the model that the config names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_THIRDS = {"c_attn": 1, "Wqkv": 0, "in_proj_weight": 0}
"""Queries, keys and values one after the other, by the axis they lie along."""

_INTERLEAVED = ("query_key_value",)
"""A query, a key and a value for each head in turn."""

_HALVES = ("gate_up_proj",)


class Part(NamedTuple):
    """One matrix in a fused one.

    Attributes:
        name: what it is called: `"q"`, `"k"`, `"v"`, `"gate"`, `"up"`; empty for all of it.
        axis: along which it lies.
        runs: which rows or columns, in order.
    """

    name: str
    axis: int
    runs: tuple[range, ...]

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Its entries of the fused matrix."""
        import torch

        if not self.name:
            return matrix
        index = torch.tensor([number for run in self.runs for number in run])
        return matrix.index_select(self.axis, index.to(matrix.device))

    def shape(self, whole: tuple[int, int]) -> tuple[int, int]:
        """Its shape, of a fused matrix of shape `whole`."""
        if not self.name:
            return whole
        length = sum(map(len, self.runs))
        return (length, whole[1]) if self.axis == 0 else (whole[0], length)


WHOLE = Part("", 0, ())


def parts_of(
    name: str, shape: tuple[int, int], config: Mapping[str, object]
) -> tuple[Part, ...] | None:
    """The matrices that a fused one is made of.

    Args:
        name: of the tensor, as its checkpoint calls it.
        shape: `(m, n)`.
        config: the model's; says how many heads there are.

    Returns:
        One part for a matrix that is none of several; None where it is, and how is not known.

    >>> parts_of("h.0.attn.c_attn.weight", (8, 24), {})[1]
    Part(name='k', axis=1, runs=(range(8, 16),))
    """
    words = name.split(".")
    for word, axis in _THIRDS.items():
        if word in words:
            return _in_turn("qkv", _sizes(shape[axis], config) or (shape[axis] // 3,) * 3, axis)
    if any(word in words for word in _INTERLEAVED):
        return _interleaved(shape[0], config)
    if "qkv_proj" in words:
        sizes = _sizes(shape[0], config)
        return None if sizes is None else _in_turn("qkv", sizes, 0)
    if any(word in words for word in _HALVES) and shape[0] % 2 == 0:
        half = shape[0] // 2
        return Part("gate", 0, (range(half),)), Part("up", 0, (range(half, 2 * half),))
    return (WHOLE,)


def _in_turn(names: str, sizes: tuple[int, ...], axis: int) -> tuple[Part, ...]:
    parts, start = [], 0
    for name, length in zip(names, sizes, strict=True):
        parts.append(Part(name, axis, (range(start, start + length),)))
        start += length
    return tuple(parts)


def _sizes(total: int, config: Mapping[str, object]) -> tuple[int, int, int] | None:
    """Rows of queries, keys and values; None where the config does not say, or does not fit."""
    heads = _number(config, "num_attention_heads", "n_head", "n_heads")
    groups = _number(config, "num_key_value_heads") or heads
    if heads is None or groups is None or total % (heads + 2 * groups):
        return None
    width = total // (heads + 2 * groups)
    return heads * width, groups * width, groups * width


def _interleaved(total: int, config: Mapping[str, object]) -> tuple[Part, ...] | None:
    heads = _number(config, "num_attention_heads", "n_head")
    # Falcon's newer decoders and multi-query heads lie otherwise.
    if heads is None or total % (3 * heads) or config.get("multi_query") or _grouped(config, heads):
        return None
    width = total // (3 * heads)
    return tuple(
        Part(
            name,
            0,
            tuple(
                range((3 * head + at) * width, (3 * head + at + 1) * width) for head in range(heads)
            ),
        )
        for at, name in enumerate("qkv")
    )


def _grouped(config: Mapping[str, object], heads: int) -> bool:
    groups = _number(config, "num_key_value_heads", "num_kv_heads")
    return bool(config.get("new_decoder_architecture")) or groups not in (None, heads)


def _number(config: Mapping[str, object], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
