"""The mask of an update: which entries of the base it touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.errors import CheckpointError, SelectionError
from pytest_subnet.masks.bits import packed_bytes, room_for_bits
from pytest_subnet.masks.update_mask import MaskTensor, Origin, Strata, UpdateMask
from pytest_subnet.pairs.selection import select
from pytest_subnet.scan.found import STRATA, rounded_to
from pytest_subnet.scan.masking import mark, stored_on_grid
from pytest_subnet.scan.tolerance import Tolerance
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.found import StrataCounts

_KEY = "masks"


def update_mask(
    pair: ModelPair,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> UpdateMask:
    """Find which entries the update of a pair touched.

    The bits are found in the scan: of a pair that was not measured yet, one reading serves the
    mask and every measure of it; one that was is read once more. Asking for the same mask again
    reads nothing, unless a side is live (a model in memory). Bits above 64 MB lie in a temporary
    file, never whole in memory. Buffers and integer tensors are left out. A NaN or Inf counts as
    updated unless both sides store the same bits.

    Args:
        pair: base and tuned.
        atol: |tuned - base| <= atol counts as not updated, in weight units; the paper's is 1e-5.
        rtol: |tuned - base| <= rtol * max(|base|, |tuned|) counts as not updated.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"norm"`, …).

    Returns:
        The mask, with the counts per stratum of tensors that are stored in 16 bits.

    Raises:
        SelectionError: a pattern matches nothing, or only buffers and integer tensors are left.
        PairMismatchError: a selected tensor does not align.
        CheckpointError: a side cannot be read, or changed since the pair was opened.
        TypeError: a tolerance that is no number.
        ValueError: both tolerances, or one that is negative or not finite.

    Source: arXiv 2505.11711, section 2.2 and appendix E (the index sets of changed parameters).

    >>> mask = update_mask(pair)
    >>> mask.count, mask.numel
    (4, 64)
    >>> mask["model.layers.0.mlp.up_proj.weight"][0].tolist()
    [True, True, True, True, False, False, False, False]
    """
    tolerance = Tolerance(atol, rtol)
    rows = select(pair, include, exclude, kinds).rows
    if not rows:
        raise SelectionError(
            "only buffers and integer tensors are selected, which a mask leaves out; "
            "assert_frozen and assert_updated compare them by bits"
        )
    with pair.lock:
        known = _masks_of(pair)
        mask = known.get((rows, tolerance))
        if mask is not None:
            pair.check_unchanged()
            return mask
        mask = _build(pair, rows, tolerance)
        if not (pair.base.is_live or pair.tuned.is_live):  # what is live can change unseen
            known[rows, tolerance] = mask
        return mask


def _masks_of(pair: ModelPair) -> dict[tuple[tuple[int, ...], Tolerance], UpdateMask]:
    known = pair.memory.setdefault(_KEY, {})
    if not isinstance(known, dict):
        raise TypeError(f"pair.memory[{_KEY!r}] is taken by {type(known).__name__}")
    return known


def _build(pair: ModelPair, rows: tuple[int, ...], tolerance: Tolerance) -> UpdateMask:
    tensors = [pair.tensors[row] for row in rows]
    starts = np.cumsum([0, *(packed_bytes(tensor.numel) for tensor in tensors)]).tolist()
    start_of = dict(zip(rows, starts, strict=False))
    store = room_for_bits(starts[-1])

    def write(row: int, word: int, words: NDArray[np.uint64]) -> None:
        store.write(start_of[row] + 8 * word, words.view(np.uint8))

    origin = Origin(
        pair.label,
        str(tolerance),
        _fingerprint_later(pair, "base", pair.base),
        _fingerprint_later(pair, "tuned", pair.tuned),
    )
    marked = mark(pair, rows, tolerance, write)
    covered = [
        MaskTensor(
            tensor.name,
            tensor.shape,
            rounded_to(tensor.dtype, tensor.tuned_dtype) or tensor.dtype,
            entries,
        )
        for tensor, entries in zip(tensors, marked.entries.tolist(), strict=True)
    ]
    return UpdateMask(covered, store, origin, CountedStrata(rows, tensors, marked.strata))


def _fingerprint_later(pair: ModelPair, side: str, checkpoint: Checkpoint) -> Callable[[], str]:
    """Takes the fingerprint of one side of `pair`, once for all of its masks.

    Of a live side it is taken at once: later, other weights may be there.
    """
    if checkpoint.is_live:
        fingerprint = checkpoint.fingerprint()
        return lambda: fingerprint
    identity = checkpoint.identity()
    key = f"{_KEY} {side}"

    def take() -> str:
        with pair.lock:
            known = pair.memory.get(key)
            if not isinstance(known, str):
                fingerprint = checkpoint.fingerprint()
                if checkpoint.identity() != identity:
                    raise CheckpointError(
                        f"{safe(checkpoint.label)} changed after the mask was made, and its "
                        "fingerprint was not taken before; save the mask before training goes on"
                    )
                known = pair.memory[key] = fingerprint
            return known

    return take


def _counted_as(tensor: TensorPair) -> str | None:
    """Of which dtype the strata of a tensor were counted; None where they could not be."""
    if tensor.dtype in STRATA:
        return tensor.dtype
    stored = tensor.base_dtype
    return stored if stored_on_grid(tensor.dtype, stored, tensor.tuned_dtype) else None


class CountedStrata(Mapping[str, Strata]):
    """Strata by tensor name, kept without their zeros until one is asked for."""

    def __init__(
        self, rows: Sequence[int], tensors: Sequence[TensorPair], counts: StrataCounts
    ) -> None:
        """Take `counts` of `tensors`, which are the tensors `rows` of their pair."""
        self._counts = counts
        self._of = {
            tensor.name: (row, STRATA[dtype])
            for row, tensor in zip(rows, tensors, strict=True)
            if (dtype := _counted_as(tensor)) is not None
        }

    def __getitem__(self, name: str) -> Strata:
        row, strata = self._of[name]
        first, last = np.searchsorted(self._counts.rows, [row, row + 1])
        which = self._counts.strata[first:last]
        dense = Strata(np.zeros(strata, np.int64), np.zeros(strata, np.int64))
        dense.population[which] = self._counts.population[first:last]
        dense.members[which] = self._counts.members[first:last]
        return dense

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)
