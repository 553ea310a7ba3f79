"""Masks to hold an update's against: the largest weights, the principal ones, and chance."""

from __future__ import annotations

import hashlib
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.arithmetic import plain_arithmetic
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import CheckpointError, SelectionError
from pytest_subnet.masks.algebra import from_words
from pytest_subnet.masks.bits import pack
from pytest_subnet.masks.update_mask import Origin, Strata, UpdateMask
from pytest_subnet.scan.found import STRATA, stratum_of
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.base import TensorInfo
    from pytest_subnet.checkpoints.opening import Source

    Flags = NDArray[np.bool_]

_WORDS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32, "float64": np.uint64}
_INFINITY = {
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float32": 0x7F80_0000,
    "float64": 0x7FF0_0000_0000_0000,
}
_LARGEST_EXACT = 2048  # on the short side: eigenvectors take a few seconds
_OVERSAMPLED = 16
_SETTLED = 1e-6
_MOST_STEPS = 200
_DRAWN = 1 << 20
_BINS = 1 << 16


def magnitude_mask(checkpoint: Source, fraction: float, *, largest: bool = True) -> UpdateMask:
    """Choose the largest (or smallest) weights of each matrix by magnitude.

    Of every weight of two or more dimensions, `round(fraction * entries)` entries; among equal
    magnitudes those that come first in row order; an Inf is larger than any number. Tied tensors
    are taken once.

    Args:
        checkpoint: anything `open_checkpoint` takes; read tensor by tensor.
        fraction: of each matrix's entries, in (0, 1).
        largest: False chooses the smallest magnitudes.

    Returns:
        The mask, with the counts per stratum of tensors that are stored in 16 bits.

    Raises:
        CheckpointError: it cannot be read, or a matrix holds NaN or float8.
        SelectionError: it has no matrix, or none of which `fraction` is an entry.
        TypeError: `fraction` is no number.
        ValueError: `fraction` outside (0, 1).

    Source: arXiv 2511.08567, section 4 (low-magnitude masks).

    >>> mask = magnitude_mask("base", 0.10)
    >>> mask.info("model.layers.0.self_attn.q_proj.weight").entries
    410
    """
    _check_fraction(fraction)
    opened = open_checkpoint(checkpoint)

    def choose(info: TensorInfo, words: NDArray[np.unsignedinteger]) -> Flags:
        magnitudes = words & words.dtype.type(np.iinfo(words.dtype).max >> 1)
        if (magnitudes > _INFINITY[info.dtype]).any():
            raise CheckpointError(
                f"{safe(info.name)} of {safe(opened.label)} holds NaN, which is neither large nor "
                "small; save the checkpoint without it"
            )
        return _extreme(magnitudes, round(fraction * info.numel), largest=largest)

    which = "largest" if largest else "smallest"
    return _chosen(opened, fraction, choose, f"the {which} {fraction:.4g}")


def principal_mask(checkpoint: Source, fraction: float, *, rank: int, seed: int = 0) -> UpdateMask:
    """Choose the entries of each matrix that carry most of its leading singular directions.

    They are the `round(fraction * entries)` largest, by magnitude, of the matrix's best
    approximation of rank `rank`. Tensors of more than two dimensions are taken as matrices of their
    first by the others. Up to 2,048 on the short side the singular vectors are exact to the
    rounding of float32 (float64 for float64). Beyond, they are found by randomised subspace
    iteration until the leading singular values settle, to 1e-6 from one step to the next: where the
    spectrum has no gap behind `rank`, another seed then chooses one or two in a hundred entries
    otherwise.

    Args:
        checkpoint: anything `open_checkpoint` takes; read tensor by tensor.
        fraction: of each matrix's entries, in (0, 1).
        rank: of the approximation; at least 1. Matrices of a lower rank are taken as they are.
        seed: of the randomised iteration; the same seed gives the same mask.

    Returns:
        The mask, with the counts per stratum of tensors that are stored in 16 bits.

    Raises:
        CheckpointError: it cannot be read, or a matrix holds NaN, Inf or float8.
        SelectionError: it has no matrix, or none of which `fraction` is an entry.
        TypeError: `fraction` is no number, or `rank` or `seed` no whole number.
        ValueError: `fraction` outside (0, 1), `rank` below 1, or a negative seed.

    Source: arXiv 2511.08567, section 4 (principal weights).

    >>> mask = principal_mask("base", 0.10, rank=4)
    >>> mask.info("model.layers.0.self_attn.q_proj.weight").entries
    410
    """
    _check_fraction(fraction)
    rank, seed = _whole("rank", rank, 1), _whole("seed", seed, 0)
    opened = open_checkpoint(checkpoint)

    def choose(info: TensorInfo, words: NDArray[np.unsignedinteger]) -> Flags:
        if (words & words.dtype.type(_INFINITY[info.dtype]) == _INFINITY[info.dtype]).any():
            raise CheckpointError(
                f"{safe(info.name)} of {safe(opened.label)} holds NaN or Inf, and has no singular "
                "values; save the checkpoint without them"
            )
        matrix = _values(words, info.dtype).reshape(info.shape[0], -1)
        approximation = _low_rank(matrix, rank, _random(seed, info.name))
        magnitudes = np.abs(approximation.reshape(-1))
        keys = magnitudes.view(np.uint32 if magnitudes.itemsize == 4 else np.uint64)
        return _extreme(keys, round(fraction * info.numel), largest=True)

    return _chosen(opened, fraction, choose, f"the principal {fraction:.4g} (rank {rank})")


def random_mask_like(mask: UpdateMask, *, seed: int) -> UpdateMask:
    """Draw a mask at random with as many entries in each tensor as another.

    Every set of that many entries is equally likely. What is drawn for a tensor depends on `seed`,
    its name, its size and its count alone, not on the other tensors.

    Args:
        mask: gives tensors and counts; its bits are not read.
        seed: a whole number of at least 0.

    Returns:
        The mask; its strata are unknown.

    Raises:
        TypeError: `mask` is no mask, or `seed` no whole number.
        ValueError: a negative seed.

    >>> random_mask_like(update_mask(pair), seed=0).count
    4
    """
    if not isinstance(mask, UpdateMask):
        raise TypeError(
            f"mask is an UpdateMask, not {type(mask).__name__}; pass UpdateMask.load(path) of a "
            "file, or update_mask(pair) of a pair"
        )
    seed = _whole("seed", seed, 0)

    def words(name: str) -> Iterator[NDArray[np.uint64]]:
        tensor = mask.info(name)
        return _drawn(tensor.numel, tensor.entries, lambda: _random(seed, name))

    tensors = [(each.name, each.shape, each.dtype) for each in mask.tensors]
    return from_words(tensors, words, Origin(f"random like {mask.origin.what} (seed {seed})"))


def _chosen(
    checkpoint: Checkpoint,
    fraction: float,
    choose: Callable[[TensorInfo, NDArray[np.unsignedinteger]], Flags],
    what: str,
) -> UpdateMask:
    """The mask of what `choose` flags of every matrix of `checkpoint`."""
    infos = {info.name: info for info in _matrices(checkpoint)}
    _check_chooses(fraction, list(infos.values()), checkpoint)
    strata: dict[str, Strata] = {}

    def words(name: str) -> Iterator[NDArray[np.uint64]]:
        info = infos[name]
        data = bytearray(info.nbytes)
        checkpoint.read_into(name, 0, memoryview(data))
        entries = np.frombuffer(data, _WORDS[info.dtype])
        flags = choose(info, entries)
        if info.dtype in STRATA:
            strata[name] = _counted(entries, flags, STRATA[info.dtype])
        yield pack(flags).view(np.uint64)

    tensors = [(info.name, info.shape, info.dtype) for info in infos.values()]
    origin = Origin(f"{what} of {safe(checkpoint.label)}", base=checkpoint.fingerprint)
    return from_words(tensors, words, origin, strata)


def _counted(entries: NDArray[np.uint16], flags: Flags, size: int) -> Strata:
    """Strata of one matrix, a piece at a time: what they are counted from is four times as wide."""
    counts = Strata(np.zeros(size, np.int64), np.zeros(size, np.int64))
    for start in range(0, entries.size, _DRAWN):
        piece = slice(start, start + _DRAWN)
        each = stratum_of(entries[piece], size)
        counts.population[:] += np.bincount(each, minlength=size)
        counts.members[:] += np.bincount(each[flags[piece]], minlength=size)
    return counts


def _matrices(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    none = True
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if (
            len(info.shape) < 2
            or not info.numel
            or name in checkpoint.ties
            or name in checkpoint.buffers
            or not DTYPES[info.dtype].floating
        ):
            continue
        if info.dtype not in ARITHMETIC:
            raise CheckpointError(
                f"{safe(name)} of {safe(checkpoint.label)} is {info.dtype}, whose entries mean "
                "nothing without their scales; dequantise it first"
            )
        none = False
        yield info
    if none:
        raise SelectionError(
            f"{safe(checkpoint.label)} has no weight of two or more dimensions to choose from"
        )


def _extreme(keys: NDArray[np.unsignedinteger], count: int, *, largest: bool) -> Flags:
    """Flags of the `count` largest (or smallest) keys; of equal ones the first."""
    if not largest:
        keys = ~keys
    if not count:
        return np.zeros(keys.size, np.bool_)
    limit = np.partition(keys, keys.size - count)[keys.size - count]
    flags = np.asarray(keys > limit, np.bool_)
    missing = count - int(np.count_nonzero(flags))
    flags[np.flatnonzero(keys == limit)[:missing]] = True
    return flags


def _values(words: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.floating]:
    """Stored words as float32, or float64 for float64."""
    from pytest_subnet.scan.casts import cast_array

    target = "float64" if dtype == "float64" else "float32"
    stored = words.view(np.uint8)
    values = stored if dtype == target else cast_array(stored, dtype, target)
    return values.view(target)


@plain_arithmetic()
def _low_rank(
    matrix: NDArray[np.floating], rank: int, random: np.random.Generator
) -> NDArray[np.floating]:
    """The best approximation of that rank: rows projected onto the leading singular vectors."""
    import torch

    if rank >= min(matrix.shape):
        return matrix
    weights = torch.from_numpy(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        weights = weights.T
    leading = _leading_exact if weights.shape[0] <= _LARGEST_EXACT else _leading_randomised
    left = leading(weights, rank, random)
    approximation = left @ (left.T @ weights)
    if matrix.shape[0] > matrix.shape[1]:
        approximation = approximation.T
    return np.asarray(approximation.numpy())


def _leading_exact(weights: Tensor, rank: int, _: np.random.Generator) -> Tensor:
    """Left singular vectors as eigenvectors of the Gram matrix, whose squares need float64."""
    import torch

    rows = weights.shape[0]
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    for columns in torch.split(
        weights, max(1, _DRAWN // rows), dim=1
    ):  # wide ones take much memory
        wide = columns.double()
        gram.addmm_(wide, wide.T)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].to(weights.dtype)


def _leading_randomised(weights: Tensor, rank: int, random: np.random.Generator) -> Tensor:
    """Left singular vectors by subspace iteration (arXiv 0909.4061, 4.4 and 5.1) until they settle.

    What is watched are the leading singular values: without a gap behind them a fixed number of
    steps leaves vectors of the whole neighbourhood.
    """
    import torch

    size = min(2 * rank + _OVERSAMPLED, *weights.shape)  # weights have no gap after rank
    drawn = torch.from_numpy(random.standard_normal((weights.shape[1], size)))
    basis = torch.linalg.qr(weights @ drawn.to(weights.dtype)).Q
    known = torch.zeros(rank, dtype=weights.dtype)
    for _ in range(_MOST_STEPS):
        basis, triangle = torch.linalg.qr(weights @ torch.linalg.qr(weights.T @ basis).Q)
        values = torch.linalg.svdvals(triangle)[:rank]
        if ((values - known).abs() <= _SETTLED * values).all():
            break
        known = values
    inside, _values, _right = torch.linalg.svd(basis.T @ weights, full_matrices=False)
    leading: Tensor = basis @ inside[:, :rank]
    return leading


def _random(seed: int, name: str) -> np.random.Generator:
    """Random numbers of one tensor's own."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.PCG64([seed, int.from_bytes(digest, "little")]))


def _drawn(
    numel: int, count: int, random: Callable[[], np.random.Generator]
) -> Iterator[NDArray[np.uint64]]:
    """The bits of `count` of `numel` entries, each such set equally likely.

    Every entry draws a number below 65,536, twice the same; those with the lowest numbers are
    taken. Of those with the number at which the count is reached, some are chosen. So a tensor is
    never whole in memory.
    """
    drawn = np.zeros(_BINS, np.int64)
    for numbers in _numbers(numel, random()):
        drawn += np.bincount(numbers, minlength=_BINS)
    reached = np.cumsum(drawn)
    limit = int(np.searchsorted(reached, count))  # the first number at which it is reached
    wanted = count - int(reached[limit] - drawn[limit])
    choice = random().spawn(1)[0].choice(int(drawn[limit]), wanted, replace=False, shuffle=False)
    chosen = np.zeros(int(drawn[limit]), np.bool_)
    chosen[choice] = True
    done = 0
    for numbers in _numbers(numel, random()):
        flags = numbers < limit
        at_limit = np.flatnonzero(numbers == limit)
        flags[at_limit] = chosen[done : done + at_limit.size]
        done += at_limit.size
        yield pack(flags).view(np.uint64)


def _numbers(numel: int, random: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
    for start in range(0, numel, _DRAWN):
        yield random.integers(0, _BINS, min(_DRAWN, numel - start), np.uint16)


def _check_fraction(fraction: float) -> None:
    if not _is_a(Real, fraction):
        raise TypeError(
            f"fraction={fraction!r} is not a number; pass the share of each matrix's entries, as "
            "in 0.1"
        )
    if not 0 < fraction < 1:  # also NaN
        raise ValueError(f"fraction={fraction!r} is not between 0 and 1, both excluded")


def _check_chooses(fraction: float, infos: Sequence[TensorInfo], checkpoint: Checkpoint) -> None:
    """Raise if `fraction` of every matrix is no entry at all."""
    largest = max(infos, key=lambda info: info.numel)
    if not round(fraction * largest.numel):
        raise SelectionError(
            f"fraction={fraction!r} chooses no entry of {safe(checkpoint.label)}: its largest "
            f"matrix, {safe(largest.name)}, has {largest.numel:,}; pass more than "
            f"0.5 / {largest.numel}"
        )


def _whole(name: str, value: int, least: int) -> int:
    if not _is_a(Integral, value):
        raise TypeError(
            f"{name}={value!r} is not a whole number; pass one of at least {least}, as in "
            f"{name}={least}"
        )
    if value < least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")
    return int(value)


def _is_a(number: type, value: object) -> bool:
    return isinstance(value, number) and not isinstance(value, bool)
