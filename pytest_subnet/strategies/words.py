"""Entries as the words that a dtype stores: drawn as bits, so that every value can come up.

A few words are drawn and spread over a tensor of any size: that is fast, and shrinks to few entries
that are not the fill.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

# Now, not in a draw: Hypothesis fails a test whose draws are slow.
import torch
from hypothesis import strategies as st
from numpy.random import default_rng

from pytest_subnet.checkpoints.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Words: TypeAlias = NDArray[np.unsignedinteger]

MOST_WORDS = 8
"""How many words are drawn for one tensor, at most."""

SEEDS = st.integers(0, 2**8 - 1)
"""How words are spread; 0 lays them one after the other. Few, as each costs examples to shrink."""

STARTS = st.integers(0, 2**10 - 1)
"""Where the first word is laid, as parts of the way, whatever the size."""

_MANTISSA = {
    "bfloat16": 7,
    "float16": 10,
    "float32": 23,
    "float64": 52,
    "float8_e5m2": 2,
    "float8_e5m2fnuz": 2,
    "float8_e4m3fn": 3,
    "float8_e4m3fnuz": 3,
    "float8_e8m0fnu": 0,
}
_NAN_ONLY = {  # these have no infinities, and only these words are no numbers
    "float8_e5m2fnuz": (0x80,),
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e4m3fnuz": (0x80,),
    "float8_e8m0fnu": (0xFF,),
}
_SIMPLE = (0.0, 1.0, 2.0, 0.5, -1.0, -0.0, 3.0, 0.1, math.inf, -math.inf, math.nan)


class Storage(NamedTuple):
    """How a dtype stores its entries.

    Attributes:
        dtype: its name.
        bits: of a word.
        mantissa: how many of them are the mantissa; 0 for what has none.
        unsigned: the numpy dtype of a word.
    """

    dtype: str
    bits: int
    mantissa: int
    unsigned: np.dtype[np.unsignedinteger]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def tensor(self, words: Words, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of these words, which it keeps."""
        return torch.from_numpy(words).view(self.torch_dtype).reshape(shape)

    def words(self, tensor: torch.Tensor) -> Words:
        """A copy of the words of a tensor, in row order."""
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        return flat.numpy().view(self.unsigned).copy()


@functools.cache
def storage_of(dtype: str) -> Storage:
    """How `dtype` stores its entries."""
    bits = 8 * DTYPES[dtype].itemsize
    return Storage(dtype, bits, _MANTISSA.get(dtype, 0), np.dtype(f"u{bits // 8}"))


class WordChoice(NamedTuple):
    """Which words a tensor is made of.

    Words are drawn as ranks, so that any shrinks towards the simple ones.

    Attributes:
        storage: of the tensor.
        simple: words of values that a reader knows, the simplest first; the first is the fill.
        refused: the kinds of words that are not wanted.
        some: draws the ranks of up to eight.
        few: draws the ranks of up to four.
        one_or_more: likewise, but of at least one.
    """

    storage: Storage
    simple: tuple[int, ...]
    refused: frozenset[str]
    some: st.SearchStrategy[list[int]]
    few: st.SearchStrategy[list[int]]
    one_or_more: st.SearchStrategy[list[int]]

    def words(self, ranks: Sequence[int]) -> list[int]:
        """The words of these ranks."""
        known = len(self.simple)
        return [self.simple[rank] if rank < known else self._word(rank - known) for rank in ranks]

    def _word(self, word: int) -> int:
        word %= 2**self.storage.bits  # the ranks may have been drawn for a wider dtype
        is_refused = self.refused and _kind(self.storage, word) in self.refused
        return self.simple[word % len(self.simple)] if is_refused else word


@functools.cache
def choose_words(
    dtype: str,
    *,
    allow_nan: bool = False,
    allow_infinity: bool = False,
    allow_subnormal: bool = True,
) -> WordChoice:
    """The words of `dtype` that may be drawn; every one that is allowed can come up."""
    storage = storage_of(dtype)
    allowed = {"nan": allow_nan, "infinity": allow_infinity, "subnormal": allow_subnormal}
    refused = frozenset(kind for kind, is_allowed in allowed.items() if not is_allowed)
    simple = tuple(word for word in _simple_words(storage) if _kind(storage, word) not in refused)
    last = len(simple) - 1
    ranks = st.integers(0, last)
    if dtype != "bool":  # the simple words come up as often as all words together
        ranks |= st.integers(0, last + 2**storage.bits)
    return WordChoice(
        storage,
        simple,
        refused,
        st.lists(ranks, max_size=MOST_WORDS),
        st.lists(ranks, max_size=MOST_WORDS // 2),
        st.lists(ranks, min_size=1, max_size=MOST_WORDS // 2),
    )


def _simple_words(storage: Storage) -> list[int]:
    """The words of values that a reader knows, and of the limits of the dtype."""
    dtype = storage.torch_dtype
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        wanted = [*_SIMPLE, limits.max, limits.tiny, limits.smallest_normal * limits.eps]
        values = torch.tensor(wanted, dtype=torch.float64)
        stored = values.to(dtype)
        back = stored.double()
        # 0.1 is the one that is meant to be rounded.
        fits = (back == values) | (back.isnan() & values.isnan()) | (values == 0.1)
        words = storage.words(stored[fits])
    elif storage.dtype == "bool":
        return [0, 1]
    else:
        known = torch.iinfo(dtype)
        numbers = [0, 1, 2, 3, *([-1] if known.min else []), known.max, known.min]
        return list(dict.fromkeys(number % 2**storage.bits for number in numbers))
    return list(dict.fromkeys(int(word) for word in words))


def _kind(storage: Storage, word: int) -> str:
    """`nan`, `infinity`, `subnormal` or any other."""
    if storage.dtype in _NAN_ONLY and word in _NAN_ONLY[storage.dtype]:
        return "nan"
    if storage.dtype not in _MANTISSA or storage.dtype == "float8_e8m0fnu":
        return ""
    exponents = 2 ** (storage.bits - 1 - storage.mantissa) - 1
    exponent = (word >> storage.mantissa) & exponents
    mantissa = word & (2**storage.mantissa - 1)
    if exponent == 0:
        return "subnormal" if mantissa else ""
    if exponent == exponents and storage.dtype not in _NAN_ONLY:
        return "nan" if mantissa else "infinity"
    return ""


def spread(
    choice: WordChoice,
    drawn: Sequence[int],
    size: int,
    seed: int,
    *,
    start: int = 0,
    noise: bool = True,
) -> Words:
    """As many words as asked for, out of the few that were drawn and the fill.

    Args:
        choice: what they were drawn from; its first simple word is the fill.
        drawn: the words.
        size: how many entries.
        seed: 0 lays them one after the other and fills up; any other draws for every entry.
        start: where the first of them is laid, one of `STARTS`.
        noise: whether the low half of the mantissa is drawn too, where there is such a seed, so
            that a large tensor has more values than were drawn.
    """
    storage = choice.storage
    fill = choice.simple[0]
    if not seed:
        words = np.full(size, fill, storage.unsigned)
        first = start * size >> 10
        at = (first + np.arange(min(len(drawn), size))) % max(size, 1)
        words[at] = np.array(drawn[:size], storage.unsigned)
        return words
    random = default_rng(seed)
    known = np.array([fill, *drawn], storage.unsigned)
    words = known[random.integers(0, len(known), size)]
    low = storage.mantissa // 2
    if noise and storage.bits > 8 and low:
        # Zeros, subnormal numbers and what is not finite stay what they are.
        exponents = np.array(2 ** (storage.bits - 1) - 2**storage.mantissa, storage.unsigned)
        exponent = words & exponents
        noisy = (exponent != 0) & (exponent != exponents)
        words[noisy] ^= random.integers(0, 2**low, int(noisy.sum()), storage.unsigned)
    return words
