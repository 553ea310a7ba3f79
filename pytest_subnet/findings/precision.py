"""How much of a sparse update storage alone explains (see docs/findings/precision.md).

All of it are estimates from a sample of the base: the beginning of every 64th block of 16,384
entries of a large model, so that a scan of the whole pair takes hardly longer for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.bounds import check_limit
from pytest_subnet.findings.rounding import (
    GAPS,
    ROUNDED,
    densities,
    sides,
    solve_step_sizes,
    strata,
    strata_count,
    visible,
)
from pytest_subnet.scan.counters import DELTA_SQUARES
from pytest_subnet.scan.gathering import ledger
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.scan.tolerance import Tolerance

Master: TypeAlias = Literal["bfloat16", "float16", "float32"]
"""As what an optimiser keeps the weights to which it adds its steps."""

_BLOCK, _TAKEN = 16384, 2048
"""Entries of a block, and how many of its first ones are looked at."""

_EVERY, _LEAST = 64, 4
"""Every how many blocks of a large model, and blocks of each tensor if it has them."""

_SMALL = 1 << 23
"""Entries up to which a model is small: every block of it is looked into."""

_KEY = "precision"
_SMALLEST_RELATIVE_GAP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def expected_densities(
    pair: ModelPair, rows: Sequence[int], tolerance: Tolerance
) -> list[float | None]:
    """The density of each tensor to expect of an unstructured update of the same energy.

    The tensors must have been counted: the energy is the Σ(tuned - base)² that a scan found.

    Args:
        pair: base and tuned.
        rows: which tensors.
        tolerance: under which an entry counts as updated.

    Returns:
        An estimate for each row. None where the dtype is not rounded to 16 bits; where the base was
        cast, so that its weights were not on the grid when the update came; where an `rtol` is wide
        enough to hide stored steps; and where the change has no finite energy.
    """
    known = [row for row in rows if _is_rounded(pair.tensors[row], tolerance)]
    expected = dict.fromkeys(rows, None) | dict(
        zip(known, _expected(pair, known, tolerance.atol or 0.0), strict=True)
    )
    return [expected[row] for row in rows]


def _is_rounded(tensor: TensorPair, tolerance: Tolerance) -> bool:
    if tensor.dtype not in ROUNDED or tensor.base_dtype != tensor.dtype:
        return False
    return tolerance.rtol is None or tolerance.rtol < _SMALLEST_RELATIVE_GAP[tensor.dtype]


def _expected(pair: ModelPair, rows: Sequence[int], atol: float) -> list[float | None]:
    if not rows:
        return []
    counts = _gaps(pair, rows)
    energies = ledger(pair).sums[list(rows), DELTA_SQUARES]
    energies = energies / [pair.tensors[row].numel for row in rows]
    moved = (energies > 0) & np.isfinite(energies)
    result = np.where(energies == 0, 0.0, np.nan)
    solved = solve_step_sizes(counts[moved], energies[moved])
    result[moved] = densities(counts[moved], solved, atol)
    return [None if np.isnan(each) else float(each) for each in result]


def _gaps(pair: ModelPair, rows: Sequence[int]) -> NDArray[np.int64]:
    """How often each gap occurs around the weights of the base, sampled once for each tensor."""
    with pair.lock:
        known = pair.memory.setdefault(_KEY, {})
        if not isinstance(known, dict):
            raise TypeError(f"pair.memory[{_KEY!r}] is taken by {type(known).__name__}")
        if pair.base.is_live:  # what was sampled may have been written to
            known.clear()
        missing = [row for row in rows if row not in known]
        if missing:
            tensors = [pair.tensors[row] for row in missing]
            wanted = [(each.base_name, each.dtype, each.numel) for each in tensors]
            every = _every(each.numel for each in pair.tensors)
            known.update(zip(missing, sample_gaps(pair.base, wanted, every), strict=True))
            pair.check_unchanged()
        return np.stack([known[row] for row in rows])


def _every(numels: Iterable[int]) -> int:
    """Every how many blocks of a model with tensors of these sizes to look into."""
    return max(1, min(_EVERY, sum(numels) // _SMALL))


def sample_gaps(
    checkpoint: Checkpoint, tensors: Sequence[tuple[str, str, int]], every: int
) -> Iterator[NDArray[np.int64]]:
    """How often each gap occurs around the weights of some tensors, as `sides` counts them.

    Args:
        checkpoint: where they are.
        tensors: name, dtype (one of `ROUNDED`) and how many entries from the first on.
        every: look into every how many blocks.
    """
    with FileReader() as reader:
        for name, dtype, numel in tensors:
            words = _sample(checkpoint, reader, name, numel, every)
            population = np.bincount(strata(words, dtype), minlength=strata_count(dtype))
            yield sides(population, dtype)


def _sample(
    checkpoint: Checkpoint, reader: FileReader, name: str, numel: int, every: int
) -> NDArray[np.uint16]:
    blocks = -(-numel // _BLOCK)
    starts = range(0, numel, _BLOCK * max(1, min(every, blocks // _LEAST)))
    counts = [min(_TAKEN, numel - start) for start in starts]
    words = np.empty(sum(counts), np.uint16)
    memory, done = words.view(np.uint8).data, 0
    found = checkpoint.extents(name, 0, 2 * numel)
    for start, count in zip(starts, counts, strict=True):
        into = memory[done : done + 2 * count]
        if found is not None and len(found) == 1:
            reader.read_into(found[0].path, found[0].offset + 2 * start, into)
        else:
            checkpoint.read_into(name, 2 * start, into)
        done += 2 * count
    return words


def movable_shares(
    pair: ModelPair, names: Iterable[str], step_sizes: Sequence[float]
) -> list[float]:
    """Estimate which share of some tensors' weights one step of each size can move at all.

    Args:
        pair: base and tuned.
        names: of tensors; those that are not rounded to 16 bits are left out.
        step_sizes: |step| added to the stored weights, in weight units.

    Returns:
        A share for each step size; none where no tensor is rounded.
    """
    wanted = set(names)
    rows = [
        row
        for row, each in enumerate(pair.tensors)
        if each.name in wanted and each.dtype in ROUNDED and each.base_dtype == each.dtype
    ]
    if not rows:
        return []
    numels = [pair.tensors[row].numel for row in rows]
    counts = _weighted(iter(_gaps(pair, rows)), numels)
    if not counts.any():  # no weight is finite
        return []
    return [visible(counts, each, float32_master=False) for each in step_sizes]


def visible_share(checkpoint: Source, step_size: float, *, master: Master = "bfloat16") -> float:
    """Estimate which share of the weights one optimiser step of a given size can move at all.

    A 16-bit weight keeps its value unless the step takes it over half the gap to its neighbour.
    From float32 masters the stored weight follows with probability step / gap. An Adam step is
    about as long as the learning rate.

    Args:
        checkpoint: the weights before the step, as `open_checkpoint` takes them; those stored in
            bfloat16 or float16 are counted, from a sample of every 64th block.
        step_size: |step|, in weight units.
        master: to what the step is added: the stored 16-bit weights themselves, or float32 copies
            of them.

    Returns:
        Fraction in [0, 1], both directions of the step taken to be as likely.

    Raises:
        SelectionError: no weight is stored in the 16 bits that are meant.
        CheckpointError: the checkpoint cannot be read.
        ValueError: `step_size` negative or not finite, or an unknown `master`.

    Source: arXiv 2511.08567, appendix E; 2602.03839. Both use |w|/256, which is not exact.

    >>> visible_share("base", 1e-6) < visible_share("base", 1e-6, master="float32") < 0.05
    True
    """
    check_limit("step_size", step_size)
    if master not in get_args(Master):
        names = ", ".join(map(repr, get_args(Master)))
        raise ValueError(f"master={master!r} is not one of {names}")
    opened = open_checkpoint(checkpoint)
    dtypes = ROUNDED if master == "float32" else (master,)
    infos = [
        opened.info(name)
        for name in opened.names()
        if name not in opened.ties and name not in opened.buffers
    ]
    wanted = [info for info in infos if info.dtype in dtypes and info.numel]
    if not wanted:
        stored = ", ".join(sorted({info.dtype for info in infos if DTYPES[info.dtype].floating}))
        raise SelectionError(
            f"{safe(opened.label)} stores no weight as {' or '.join(dtypes)} "
            f"(it has {stored or 'no floats'}); only 16 bits hide steps of this kind"
        )
    numels = [info.numel for info in wanted]
    tensors = [(info.name, info.dtype, info.numel) for info in wanted]
    counts = _weighted(sample_gaps(opened, tensors, _every(numels)), numels)
    if not counts.any():
        raise SelectionError(f"{safe(opened.label)} holds only NaN and Inf, which no step moves")
    return visible(counts, step_size, float32_master=master == "float32")


def _weighted(counts: Iterator[NDArray[np.int64]], numels: Sequence[int]) -> NDArray[np.float64]:
    """Samples of several tensors as one, each counting for all of its tensor."""
    total = np.zeros(GAPS)
    for each, numel in zip(counts, numels, strict=True):
        total += each * (numel / max(each.sum(), 1))
    return total
