"""What a scan found of a pair, as reports take it: plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, TypedDict

from pytest_subnet.reports.measured import finite, tensor_name, text
from pytest_subnet.text import plural, redacted, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.errors import Problem
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.reports.run import Side

Row: TypeAlias = tuple[
    int | None, str, str, int, int, int, str, str, float | None, float | None, float | None
]
"""Of one tensor: layer, kind, dtype, entries, entries with other bits, entries beyond 1e-5, name,
shape, largest change, norm of the change, norm of the base; None for what is no number."""


class PairTable(TypedDict):
    """What was scanned of one pair; plain types, for xdist.

    Attributes:
        key: tells the pair from every other, in every worker; empty where there is no other.
        pair: `base -> tuned`; safe to print.
        base: the checkpoint before.
        tuned: the checkpoint after.
        notes: what a reader of the numbers must know.
        total: tensors in the pair, buffers and integer tensors apart.
        rows: by the tensor's number in the pair.
        read: how many tensors were read, by every worker.
        taken: how many were not, because the scan cache had their counts.
    """

    key: str
    pair: str
    base: Side
    tuned: Side
    notes: list[str]
    total: int
    rows: dict[int, Row]
    read: int
    taken: int


def table_of(pair: ModelPair, notes: Iterable[str] = (), key: str = "") -> PairTable:
    """All that was scanned of `pair`, buffers and integer tensors apart.

    Args:
        pair: scanned, in part or whole; nothing is read for this.
        notes: what is to be said besides the pair's own notes.
        key: tells the pair from every other of its run.
    """
    # Deferred: the plugin imports this module, and a suite without a pair needs no numpy.
    import numpy as np

    from pytest_subnet.scan.counters import BASE_SQUARES, DELTA_SQUARES
    from pytest_subnet.scan.gathering import ledger
    from pytest_subnet.scan.tolerance import PAPER, SAME_BITS

    known = ledger(pair)
    scanned = known.scanned.tolist()
    rows: dict[int, Row] = {}
    if scanned:
        changed, beyond = known.updated(SAME_BITS).tolist(), known.updated(PAPER).tolist()
        peaks, norms = known.peaks.tolist(), np.sqrt(known.sums).tolist()
        for row in scanned:
            tensor = pair.tensors[row]
            if tensor.is_weight:
                rows[row] = (
                    tensor.layer,
                    tensor_name(tensor.kind),
                    short_dtype(tensor.dtype),
                    tensor.numel,
                    changed[row],
                    beyond[row],
                    tensor_name(tensor.name),
                    "×".join(map(str, tensor.shape)),
                    finite(peaks[row]),
                    finite(norms[row][DELTA_SQUARES]),
                    finite(norms[row][BASE_SQUARES]),
                )
    return {
        "key": key,
        "pair": redacted(pair.label),
        "base": _side(pair.base),
        "tuned": _side(pair.tuned),
        "notes": [text(note) for note in (*pair.notes, *notes)],
        "total": sum(tensor.is_weight for tensor in pair.tensors),
        "rows": rows,
        "read": known.read,
        "taken": known.taken,
    }


def left_out(problems: Sequence[Problem]) -> list[str]:
    """The note on tensors that could not be compared; none where all could."""
    if not problems:
        return []
    return [f"{plural(len(problems), 'tensor')} not compared: no partner, or another shape"]


def _side(checkpoint: Checkpoint) -> Side:
    # A fingerprint takes a reading of the whole: it is shown where someone asked for it before.
    label = safe(redacted(checkpoint.label))
    return {"label": label, "fingerprint": checkpoint.known_fingerprint}
