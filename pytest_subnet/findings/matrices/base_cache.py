"""What was decomposed of a base, kept by its content: a trajectory pays for its base once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.scan.gathering import ledger
from pytest_subnet.scan.kept_files import KeptFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import torch

    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.pairs import ModelPair

Parts: TypeAlias = "tuple[torch.Tensor, ...]"

PARTS_VERSION = 1
"""To be raised when something is decomposed otherwise: nothing that was kept is found then."""

_BYTES = 128 * 1024**2
"""What is kept in memory; the least recently used goes first."""

_DISK_BYTES = 1024**3
"""What is kept in the directory of a cache, likewise: 64 directions of each matrix of 1 B weights
take some 600 MB."""

_kept: OrderedDict[Hashable, Parts] = OrderedDict()
_lock = threading.Lock()


def remembered(
    pair: ModelPair, matrix: Matrix, what: tuple[Hashable, ...], make: Callable[[], Parts]
) -> Parts:
    """What `make` gives for the base of `matrix`, or what it gave for the same content before.

    Kept in memory, and for other processes in the directory where the counts of the pair are.

    Args:
        pair: whose base it is.
        matrix: of which matrix.
        what: what is made, with all it depends on but the content: `("basis", 64)`.
        make: makes it; its tensors are not to be written to.

    Raises:
        CheckpointError: the base changed meanwhile.
    """
    tensor = pair.tensors[matrix.row]
    content, device = _content(pair, tensor.base_name), _device(pair, tensor.base_name)
    key = (content, matrix.at, matrix.shape, tensor.dtype, device, *what)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    files = _files(pair)
    made = None if files is None else _load(files, key, device)
    if made is None:
        # Laid out alike wherever they come from: products then have the same last bits.
        made = tuple(part.contiguous() for part in make())
        pair.check_unchanged()  # else it may be of other content than its key says
        if files is not None:
            _store(files, key, made)
    with _lock:
        _kept[key] = made
        while len(_kept) > 1 and sum(map(_nbytes, _kept.values())) > _BYTES:
            _kept.popitem(last=False)
    return made


def _content(pair: ModelPair, name: str) -> str:
    """What tells the content of a tensor of the base from any other; read once a pair."""
    if pair.base.is_live:  # torch does not tell of every write
        return pair.base.fingerprint(name)
    known = pair.memory.setdefault("base contents", {})
    assert isinstance(known, dict)
    if name not in known:
        known[name] = pair.base.fingerprint(name)
    found: str = known[name]
    return found


def _device(pair: ModelPair, name: str) -> str:
    """Where parts are: the pair's device, or where a live base is."""
    if pair.device is not None:
        return pair.device
    return str(pair.base.read(name, slice(0, 1)).device) if pair.base.is_live else "cpu"


def _nbytes(parts: Parts) -> int:
    return sum(part.numel() * part.element_size() for part in parts)


def _files(pair: ModelPair) -> KeptFiles | None:
    place = ledger(pair).cache.place
    return None if place is None else KeptFiles(place[0] / "bases", _DISK_BYTES)


def _load(files: KeptFiles, key: tuple[Hashable, ...], device: str) -> Parts | None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = files.load(_name(key))
    if data is None:
        return None
    try:
        found = load(data)
        names = sorted(found, key=lambda name: int(name.partition(".")[0]))
    except (SafetensorError, ValueError):
        return None
    return tuple(found[each].to("cpu" if each.endswith(".cpu") else device) for each in names)


def _store(files: KeptFiles, key: tuple[Hashable, ...], parts: Parts) -> None:
    from safetensors.torch import save

    # A copy each: what shares memory cannot be saved.
    named = {f"{i}.{part.device.type}": part.cpu().clone() for i, part in enumerate(parts)}
    files.store(_name(key), save(named))


def _name(key: tuple[Hashable, ...]) -> str:
    spelt = repr((key, PARTS_VERSION)).encode("utf-8", "surrogatepass")
    return f"{hashlib.sha256(spelt).hexdigest()}.safetensors"
