"""How much of a sparse update storage alone explains (see docs/findings/precision.md).

All of it are estimates. Of a large model they rest on a sample of the base, pages of 2,048 entries
at places drawn at random, so that a scan of the whole pair takes hardly longer for it.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.checkpoints.remote.urls import is_url
from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_limit
from pytest_subnet.findings.rank.rounding import (
    GAPS,
    densities,
    gaps_around,
    solve_step_sizes,
    visible,
)
from pytest_subnet.scan.counters import DELTA_SQUARES
from pytest_subnet.scan.found import STRATA, rounded_to
from pytest_subnet.scan.gathering import ledger
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.scan.tolerance import Tolerance

Master: TypeAlias = Literal["bfloat16", "float16", "float32"]
"""As what an optimiser keeps the weights to which it adds its steps."""

_PAGE = 2048
"""Entries that are read together: 4 KB."""

_EVERY = 512
"""One page in how many is read of a large tensor."""

_FEWEST, _ENOUGH, _SHARED = 4, 64, 1 << 14
"""At least so many pages of each tensor: enough of them, unless so many tensors share a total."""

_MANY = 4096
"""Tensors above which those of one sort share their sample."""

_SMALL = 1 << 23
"""Entries up to which a model is small: all of it is read."""

_AT_ONCE = 32
"""Pages that are asked of a server at a time."""

_PIECE = 1 << 20
"""Entries that are looked at together."""

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
    if not _is_on_grid(tensor):
        return False
    return tolerance.rtol is None or tolerance.rtol < _SMALLEST_RELATIVE_GAP[tensor.base_dtype]


def _is_on_grid(tensor: TensorPair) -> bool:
    """Whether the base lay on the 16-bit grid to which its update was rounded."""
    dtype = tensor.base_dtype
    return dtype in STRATA and rounded_to(tensor.dtype, tensor.tuned_dtype) == dtype


def _expected(pair: ModelPair, rows: Sequence[int], atol: float) -> list[float | None]:
    if not rows:
        return []
    counts, of = _gaps(pair, rows)
    energies = ledger(pair).sums[list(rows), DELTA_SQUARES]
    energies = energies / [pair.tensors[row].numel for row in rows]
    moved = (energies > 0) & np.isfinite(energies)
    result = np.where(energies == 0, 0.0, np.nan)
    solved = solve_step_sizes(counts, energies[moved], of[moved])
    result[moved] = densities(counts, solved, of[moved], atol)
    return [None if each != each else each for each in result.tolist()]  # NaN alone is not itself


def _gaps(pair: ModelPair, rows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """How often each gap occurs around the weights of the base, sampled once for each tensor.

    Where there are thousands of tensors, those of one kind, shape and dtype share their sample.

    Returns:
        Int64 `[samples, GAPS]`, and for each row which sample is its own.
    """
    with pair.lock:
        known = pair.memory.setdefault(_KEY, {})
        if not isinstance(known, dict):
            raise TypeError(f"pair.memory[{_KEY!r}] is taken by {type(known).__name__}")
        if pair.base.is_live:  # what was sampled may have been written to
            known.clear()
        alone = len(pair.tensors) <= _MANY
        keys = [row if alone else _sort(pair.tensors[row]) for row in rows]
        missing = {key: [row] for key, row in zip(keys, rows, strict=True) if key not in known}
        if missing and alone:
            least = _least_pages([each.numel for each in pair.tensors])
            known.update(_sampled(pair, missing, least))
        elif missing:
            known.update(_sampled(pair, _members(pair, missing), _FEWEST))
        if missing:
            pair.check_unchanged()
        place = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        of = np.array([place[key] for key in keys], np.intp)
        return np.stack([known[key] for key in place]), of


def _sort(tensor: TensorPair) -> Hashable:
    return tensor.kind, tensor.shape, tensor.base_dtype


def _members(pair: ModelPair, sorts: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    """The tensors that stand for each sort: some, from the first to the last."""
    found: dict[Hashable, list[int]] = {sort: [] for sort in sorts}
    for row, tensor in enumerate(pair.tensors):
        if _is_on_grid(tensor) and (sort := _sort(tensor)) in found:
            found[sort].append(row)
    return {sort: rows[:: -(-len(rows) // _ENOUGH)] for sort, rows in found.items()}


def _sampled(
    pair: ModelPair, wanted: Mapping[Hashable, Sequence[int]], least: int | None
) -> Iterator[tuple[Hashable, NDArray[np.int64]]]:
    """For each key, what the samples of its tensors add up to."""
    tensors = [pair.tensors[row] for rows in wanted.values() for row in rows]
    counts = sample_gaps(
        pair.base, [(each.base_name, each.base_dtype, each.numel) for each in tensors], least
    )
    ends = np.cumsum([len(rows) for rows in wanted.values()])
    yield from zip(wanted, (part.sum(axis=0) for part in np.split(counts, ends[:-1])), strict=True)


def _least_pages(numels: Sequence[int]) -> int | None:
    """How many pages to read at least of each tensor of a model; None: all."""
    if sum(numels) <= _SMALL:
        return None
    return max(_FEWEST, min(_ENOUGH, _SHARED // len(numels)))


def sample_gaps(
    checkpoint: Checkpoint, tensors: Sequence[tuple[str, str, int]], least: int | None
) -> NDArray[np.int64]:
    """How often each gap occurs around the weights of some tensors, as `gaps_around` counts them.

    Args:
        checkpoint: where they are.
        tensors: name, dtype (one of `STRATA`) and how many entries from the first on.
        least: how many pages of each to read at least; None reads all.

    Returns:
        Int64 `[tensors, GAPS]`.
    """
    gaps = np.zeros((len(tensors), GAPS), np.int64)
    with FileReader() as reader:
        for dtype in dict.fromkeys(dtype for _, dtype, _ in tensors):
            rows = np.array([row for row, each in enumerate(tensors) if each[1] == dtype])
            wanted = [(tensors[row][0], tensors[row][2]) for row in rows]
            for words, places, lengths in _words(checkpoint, reader, wanted, least):
                firsts = np.flatnonzero(np.diff(places, prepend=-1))  # a tensor's runs are together
                counted = np.add.reduceat(gaps_around(words, lengths, dtype), firsts)
                gaps[rows[places][firsts]] += counted
    return gaps


def _runs(name: str, shape: Sequence[int], numel: int, least: int | None) -> list[tuple[int, int]]:
    """First entry and length of what is read of a tensor: all of it, or some runs.

    Weights differ in scale by row and by column, and a fixed distance between runs can meet the
    same ones again and again. So the rows of the runs are drawn, one in each of as many equal
    parts, and so are their columns, which go with the rows in random order. The draw depends on
    the name and the size alone.
    """
    if least is None or numel <= least * _PAGE:
        return [(start, min(_PIECE, numel - start)) for start in range(0, numel, _PIECE)]
    seed = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    parts = max(least, numel // (_EVERY * _PAGE))
    random = np.random.default_rng(list(seed))
    width = shape[-1]
    places = (np.arange(parts) + random.random(parts)) / parts
    columns = random.permutation((np.arange(parts) + random.random(parts)) / parts)
    rows = (places * (numel // width)).astype(np.int64)
    starts = rows * width + (columns * width).astype(np.int64)
    return [(start, _PAGE) for start in np.minimum(starts, numel - _PAGE).tolist()]


def _words(
    checkpoint: Checkpoint,
    reader: FileReader,
    tensors: Sequence[tuple[str, int]],
    least: int | None,
) -> Iterator[tuple[NDArray[np.uint16], list[int], list[int]]]:
    """What runs of 16-bit tensors store, up to `_PIECE` entries at a time.

    Yields the words, and for each run in them which tensor it is of and how long it is.
    """
    buffer = np.empty(_PIECE, np.uint16)
    memory = buffer.view(np.uint8).data
    places: list[int] = []
    lengths: list[int] = []
    jobs: list[tuple[str, int, memoryview]] = []
    filled = 0
    for place, (name, numel) in enumerate(tensors):
        found = checkpoint.extents(name, 0, 2 * numel)
        for start, count in _runs(name, checkpoint.info(name).shape, numel, least):
            if filled + count > _PIECE:
                _fetch(reader, jobs)
                yield buffer[:filled], places, lengths
                places, lengths, filled, jobs = [], [], 0, []
            into = memory[2 * filled : 2 * (filled + count)]
            one = found[0] if found is not None and len(found) == 1 else None
            run = checkpoint.extents(name, 2 * start, 2 * count) if one is None else None
            if one is not None:
                jobs.append((one.path, one.offset + 2 * start, into))
            elif run is not None and len(run) == 1:
                jobs.append((run[0].path, run[0].offset, into))
            else:
                checkpoint.read_into(name, 2 * start, into)
            places.append(place)
            lengths.append(count)
            filled += count
    if filled:
        _fetch(reader, jobs)
        yield buffer[:filled], places, lengths


def _fetch(reader: FileReader, jobs: Sequence[tuple[str, int, memoryview]]) -> None:
    """Read some runs of files; many at a time where most of it is waiting for a server."""
    if not jobs or not is_url(jobs[0][0]):
        for job in jobs:
            reader.read_into(*job)
        return
    with ThreadPoolExecutor(min(_AT_ONCE, len(jobs))) as pool:
        for _ in pool.map(lambda job: reader.read_into(*job), jobs):
            pass


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
        row for row, each in enumerate(pair.tensors) if each.name in wanted and _is_on_grid(each)
    ]
    if not rows:
        return []
    numels = [pair.tensors[row].numel for row in rows]
    samples, of = _gaps(pair, rows)
    counts = _weighted(samples[of], numels)
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
            bfloat16 or float16 are counted, above eight million from a sample of each tensor.
        step_size: |step|, in weight units.
        master: to what the step is added: the stored 16-bit weights themselves, or float32 copies
            of them.

    Returns:
        Fraction in [0, 1], both directions of the step taken to be as likely.

    Raises:
        SelectionError: no weight is stored in the 16 bits that are meant.
        CheckpointError: the checkpoint cannot be read.
        ValueError: `step_size` negative or not finite, or an unknown `master`.

    Source: the half gap follows from the format. 2602.03839 is said to use |w|/256 (second-hand),
    which is not exact.

    >>> visible_share("base", 1e-6) < visible_share("base", 1e-6, master="float32") < 0.05
    True
    """
    check_limit("step_size", step_size)
    if master not in get_args(Master):
        names = ", ".join(map(repr, get_args(Master)))
        raise ValueError(f"master={master!r} is not one of {names}")
    opened = open_checkpoint(checkpoint)
    dtypes = tuple(STRATA) if master == "float32" else (master,)
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
    counts = _weighted(sample_gaps(opened, tensors, _least_pages(numels)), numels)
    if not counts.any():
        raise SelectionError(f"{safe(opened.label)} holds only NaN and Inf, which no step moves")
    return visible(counts, step_size, float32_master=master == "float32")


def _weighted(counts: NDArray[np.int64], numels: Sequence[int]) -> NDArray[np.float64]:
    """Samples of several tensors as one, each counting for all of its tensor."""
    total = np.zeros(GAPS)
    for each, numel in zip(counts, numels, strict=True):
        total += each * (numel / max(each.sum(), 1))
    return total
