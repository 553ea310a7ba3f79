"""What was decomposed of a base, kept by its content: a trajectory pays for its base once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import torch

    from pytest_subnet.findings.update_matrices import Matrix
    from pytest_subnet.pairs import ModelPair

Parts: TypeAlias = "tuple[torch.Tensor, ...]"

_BYTES = 128 * 1024**2
"""What is kept in memory; the least recently used goes first."""

_kept: OrderedDict[Hashable, Parts] = OrderedDict()
_lock = threading.Lock()


def remembered(
    pair: ModelPair, matrix: Matrix, what: tuple[Hashable, ...], make: Callable[[], Parts]
) -> Parts:
    """What `make` gives for the base of `matrix`, or what it gave for the same content before.

    Args:
        pair: whose base it is.
        matrix: of which matrix.
        what: what is made, with all it depends on but the content: `("basis", 64)`.
        make: makes it; its tensors are not to be written to.
    """
    tensor = pair.tensors[matrix.row]
    content = pair.base.fingerprint(tensor.base_name)
    key = (content, matrix.at, matrix.shape, tensor.dtype, *what)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    made = make()
    with _lock:
        _kept[key] = made
        while len(_kept) > 1 and sum(map(_nbytes, _kept.values())) > _BYTES:
            _kept.popitem(last=False)
    return made


def _nbytes(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts)
