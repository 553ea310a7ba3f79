"""What a scan found of a pair, as reports take it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.reports.measured import finite, tensor_name, text
from pytest_subnet.scan.counters import BASE_SQUARES, DELTA_SQUARES
from pytest_subnet.scan.gathering import ledger
from pytest_subnet.scan.tolerance import PAPER, SAME_BITS
from pytest_subnet.text import redacted, safe, short_dtype

if TYPE_CHECKING:
    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.reports.run import Side
    from pytest_subnet.reports.session import PairTable, Row


def table_of(pair: ModelPair) -> PairTable:
    """All that was scanned of `pair`, buffers and integer tensors apart."""
    known = ledger(pair)
    changed, beyond = known.updated(SAME_BITS).tolist(), known.updated(PAPER).tolist()
    peaks, norms = known.peaks.tolist(), np.sqrt(known.sums).tolist()
    rows: dict[int, Row] = {}
    for row in known.scanned.tolist():
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
        "key": "",
        "pair": redacted(pair.label),
        "base": _side(pair.base),
        "tuned": _side(pair.tuned),
        "notes": [text(note) for note in pair.notes],
        "total": sum(tensor.is_weight for tensor in pair.tensors),
        "rows": rows,
        "read": known.read,
        "taken": known.taken,
    }


def _side(checkpoint: Checkpoint) -> Side:
    return {"label": safe(redacted(checkpoint.label)), "fingerprint": checkpoint.known_fingerprint}
