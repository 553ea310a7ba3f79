"""Torch files: `pytorch_model.bin` and other pickles of tensors, one file or shards with an index.

Loading is always `weights_only=True`: a pickle that asks for code is refused, and no switch turns
that off. The tensors are memory-mapped, so that opening reads no data; files older than torch 1.6
cannot be mapped and are read whole.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeGuard, TypeVar

from pytest_subnet.checkpoints.base import Extent
from pytest_subnet.checkpoints.files import (
    FileStamp,
    check_stamp,
    read_unchanged,
    refuse_pointer,
    stamp,
    unreadable,
)
from pytest_subnet.checkpoints.memory import TensorsCheckpoint, in_row_order, is_extra_state
from pytest_subnet.checkpoints.opcodes import HeavyTupleError, look_over
from pytest_subnet.checkpoints.sharded import check_shards, read_index
from pytest_subnet.checkpoints.stamped import StampedCheckpoint
from pytest_subnet.checkpoints.wording import broken, short
from pytest_subnet.checkpoints.zip_records import mapped_from, read_records, refuse_compressed
from pytest_subnet.errors import CheckpointError
from pytest_subnet.held import without_warnings
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from pytest_subnet.checkpoints.base import Buffer

INDEX_SUFFIX = ".bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")
LoadedT = TypeVar("LoadedT")

_ZIP = b"PK\x03\x04"
_OLD_PICKLES = 5  # before torch 1.6: a number, the protocol, the machine, what was saved, its keys
_NESTED = ("state_dict", "model", "module")  # where Lightning, trainers and DeepSpeed put weights
# What trainers save beside them: tensors in it are no weights.
_TRAINER_STATE = re.compile(r"optim|sched|scaler|rng|random|callbacks|loops|hyper_parameters")

# What torch says of a DTensor before, and after, `torch.distributed.tensor` was imported.
_SHARDED = re.compile(r"torch\.distributed\.tensor|_rebuild_wrapper_subclass")


class TorchCheckpoint(StampedCheckpoint):
    """Weights in files written by `torch.save`."""

    def __init__(self, path: Path, *, label: str, config: Mapping[str, object]) -> None:
        """Map the files.

        Args:
            path: a file written by `torch.save`, or a `.bin.index.json`.
            label: how messages name the checkpoint.
            config: its `config.json`.
        """
        index: list[FileStamp] = []
        if path.name.endswith(INDEX_SUFFIX):
            index = [stamp(path)]
            expected = read_index(path, SUFFIXES)
            parts = {shard: _load(path.parent / shard) for shard in expected}
            check_shards(path, expected, {shard: part.tensors for shard, part in parts.items()})
        else:
            parts = {path.name: _load(path)}
        self._stamps = (*index, *(part.stamp for part in parts.values()))
        self._files = {name: part.stamp for part in parts.values() for name in part.tensors}
        self._places = {
            name: (part.stamp, tensor.data_ptr() - part.mapped_from)
            for part in parts.values()
            if part.mapped_from is not None
            for name, tensor in part.tensors.items()
            if tensor.numel() and in_row_order(tensor)
        }
        tensors = {name: tensor for part in parts.values() for name, tensor in part.tensors.items()}
        self._tensors = TensorsCheckpoint(tensors, label=str(path))
        self._infos = {name: self._tensors.info(name) for name in self._tensors.names()}
        self.label = label
        self.config = config
        self.ties = self._tensors.ties
        self.buffers = frozenset()
        self.directory = path.parent

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """The run of bytes in the file; None where the file does not hold them in row order."""
        self.check_range(name, start, nbytes)
        place = self._places.get(name)
        return None if place is None else (Extent(place[0].path, place[1] + start, nbytes),)

    def view(self, name: str) -> Buffer | None:
        """The bytes in memory of what cannot be read from the file by its offset."""
        self.info(name)
        if name in self._places:
            return None
        with as_opened(self._files[name]):
            return self._tensors.view(name)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read bytes from the file, which must be as it was when it was opened."""
        self.check_range(name, start, len(buffer))
        place = self._places.get(name)
        if place is None:
            with as_opened(self._files[name]):
                self._tensors.read_into(name, start, buffer)
        else:
            read_unchanged(place[0], place[1] + start, buffer)


@contextmanager
def as_opened(known: FileStamp) -> Iterator[None]:
    """Guard a read through the mapping: to touch a file that was cut short ends the process."""
    check_stamp(known)
    yield
    check_stamp(known)


class _Loaded(NamedTuple):
    """One file: its tensors, and the address its first byte is mapped to, where it is mapped."""

    stamp: FileStamp
    tensors: dict[str, torch.Tensor]
    mapped_from: int | None


def _load(path: Path) -> _Loaded:
    known, (loaded, base) = load_file(path, _unpickle)
    return _Loaded(known, tensors_in(path, loaded), base)


def load_file(path: Path, unpickle: Callable[[Path, bool], LoadedT]) -> tuple[FileStamp, LoadedT]:
    """The stamp of a file of `torch.save`, and what `unpickle` makes of it.

    Args:
        path: the file.
        unpickle: takes the path, and whether it is a zip file, which can be mapped. Whatever it
            raises becomes an error with the name of the file.
    """
    known = stamp(path)
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_ZIP) + 4)
        if not head:
            broken(path, "it is empty")
        refuse_pointer(path, head)
        is_zip = head.startswith(_ZIP)
        _look_over(path, is_zip)
        return known, unpickle(path, is_zip)
    except CheckpointError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        _refuse(path, head, str(error))
    except Exception as error:
        # A damaged byte can lead zipfile and torch to any exception there is.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        _refuse_sharded(path, reason)
        broken(path, short(reason))


def _look_over(path: Path, is_zip: bool) -> None:
    """Raise where loading would take for ever."""
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                for record in archive.infolist():
                    # torch finds it in any case of letters, and unpacks it.
                    if record.filename.partition("/")[2].lower() == "data.pkl":
                        refuse_compressed(path, record)
                        look_over(archive.read(record))
        else:
            with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as raw:
                look_over(raw, pickles=_OLD_PICKLES)
    except HeavyTupleError:
        raise CheckpointError(
            f"refusing to unpickle {safe(path)}: tuples are nested in it so that to look at one "
            "could take for ever, which torch does not write; save it again as safetensors"
        ) from None
    except pickle.UnpicklingError:
        pass  # torch stops at the same byte, and says why


def _unpickle(path: Path, is_zip: bool) -> tuple[object, int | None]:
    return _map(path) if is_zip else (_read(path), None)


def _map(path: Path) -> tuple[object, int | None]:
    """What a zip file holds, memory-mapped, and the address its first byte is mapped to."""
    import torch

    records = read_records(path)
    mapped: dict[int, int] = {}

    def keep(storage: Any, _location: str) -> Any:  # an UntypedStorage; torch's stubs disagree
        if storage.nbytes():
            mapped[storage.data_ptr()] = storage.nbytes()
        return storage

    with without_warnings():  # of pickle protocols that it reads all the same
        loaded: object = torch.load(path, map_location=keep, weights_only=True, mmap=True)
    base = mapped_from(path, records, mapped)
    return loaded, base if records.native else None


def _read(path: Path) -> object:
    import torch

    with without_warnings():  # as above
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    return loaded


def _refuse(path: Path, head: bytes, reason: str) -> NoReturn:
    """Raise the error for a pickle that weights-only loading refused for `reason`."""
    _refuse_sharded(path, reason)
    blocked = re.search(r"GLOBAL ([\w.]+)", reason)
    if blocked is not None:
        raise CheckpointError(
            f"refusing to unpickle {safe(path)}: it needs `{short(blocked[1])}`, which is not a "
            "tensor class; a checkpoint holds weights only, save it again as safetensors"
        )
    if head.startswith(_ZIP):
        broken(path, "its list of tensors is not what torch.save writes")
    raise CheckpointError(
        f"{safe(path)} is not a torch file (its first bytes are {head!r}); "
        "was an error page or another format saved under this name?"
    )


def _refuse_sharded(path: Path, reason: str) -> None:
    """Raise if torch failed for `reason` because the file holds parts of tensors."""
    if _SHARDED.search(reason):
        raise CheckpointError(
            f"{safe(path)} holds sharded tensors (DTensor), of which one file is only a part; pass "
            "the directory that holds model_world_size_N_rank_R.pt of all ranks, or save whole "
            "tensors (DTensor.full_tensor)"
        )


def tensors_in(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    """The weights in what was loaded: itself, or what trainers put under a known key."""
    for _ in range(len(_NESTED)):  # a pickle can hold itself: look only so deep
        if not isinstance(loaded, dict):
            break
        nested = [key for key in _NESTED if isinstance(loaded.get(key), dict)]
        if len(nested) != 1:
            state = {key: value for key, value in loaded.items() if not is_extra_state(key)}
            _refuse_further(path, [key for key, value in state.items() if _holds_more(value)])
            return {key: value for key, value in state.items() if _is_tensor(value)}
        beside = [
            key
            for key, value in loaded.items()
            if not (isinstance(key, str) and _TRAINER_STATE.search(key))
            and key != nested[0]
            and (_is_tensor(value) or _holds_more(value))
        ]
        _refuse_further(path, [nested[0], *beside] if beside else [])
        loaded = loaded[nested[0]]
    raise CheckpointError(
        f"{safe(path)} holds {safe(type(loaded).__name__)}, not a mapping from names to tensors; "
        "pass the file with the model's state_dict"
    )


def _refuse_further(path: Path, keys: Sequence[object]) -> None:
    """Settings beside the weights are left out, further tensors never."""
    if keys:
        raise CheckpointError(
            f"{safe(path)} holds tensors under {first_few([short(key) for key in keys])}; which of "
            "them are the weights cannot be known, save the model's state_dict alone"
        )


def _is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_more(value: object) -> bool:
    """Whether there is a tensor in the containers that `value` is made of, however deep."""
    left, seen = [value], set()
    while left:
        each = left.pop()
        if id(each) in seen or not isinstance(each, dict | list | tuple | set):
            continue
        seen.add(id(each))
        inner = list(each.values() if isinstance(each, dict) else each)
        if any(_is_tensor(part) for part in inner):
            return True
        left += inner
    return False
