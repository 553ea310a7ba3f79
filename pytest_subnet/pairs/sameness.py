"""Whether base and tuned are one thing: comparing it with itself says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import FileStamp
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.errors import PairMismatchError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs.model_pair import TensorPair


def refuse_same(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raise `PairMismatchError` if both are one object, or the same files by whatever names."""
    if base is tuned or base.identity() == tuned.identity():
        raise _error(base, tuned)
    files = set(_weight_files(base.identity()))
    if files and files == set(_weight_files(tuned.identity())):
        raise _error(base, tuned)


def refuse_shared(base: Checkpoint, tuned: Checkpoint, tensors: Sequence[TensorPair]) -> None:
    """Raise `PairMismatchError` if every aligned tensor is one piece of memory on both sides.

    Some of them may be: frozen parts that two models share.
    """
    if not isinstance(base, TensorsCheckpoint) or not isinstance(tuned, TensorsCheckpoint):
        return
    if tensors and all(
        _place(base, tensor.base_name) == _place(tuned, tensor.tuned_name) for tensor in tensors
    ):
        raise _error(base, tuned)


def _error(base: Checkpoint, tuned: Checkpoint) -> PairMismatchError:
    labels = dict.fromkeys((safe(base.label), safe(tuned.label)))
    return PairMismatchError(
        f"base and tuned are the same: {' and '.join(labels)}; comparing a thing with itself says "
        "nothing. Was the path given twice, or a model kept without a copy (copy.deepcopy it, or "
        "clone each tensor of its state_dict)?"
    )


def _weight_files(identity: object) -> Iterator[tuple[int, int]]:
    """Device and inode of each file in an identity: links to one file have one of them."""
    if isinstance(identity, FileStamp):
        if not identity.path.endswith(".json"):  # an index may be copied beside linked shards
            yield identity.device, identity.inode
    elif isinstance(identity, tuple):
        for part in identity:
            yield from _weight_files(part)


def _place(checkpoint: TensorsCheckpoint, name: str) -> tuple[object, int]:
    tensor = checkpoint.tensor(name)
    return tensor.device, tensor.data_ptr()
