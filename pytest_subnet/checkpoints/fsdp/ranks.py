"""What the file of one rank says: which part of each tensor it holds, and where in the file.

What the pickle says of how a tensor is split is held against the shape of the part, and later
against what the other ranks say; anything else in it is not looked at.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.checkpoints.wording import broken, short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.held import without_warnings
from pytest_subnet.text import plural, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from pytest_subnet.checkpoints.files import FileStamp
    from pytest_subnet.checkpoints.memory import TensorsCheckpoint

_MERGE = "merge the shards with the tool of the trainer that wrote them, and pass the result"


class Whole(NamedTuple):
    """What every rank must say alike of one tensor.

    Attributes:
        dtype: of the whole and of every part.
        shape: of the whole tensor.
        mesh: how many ranks there are along each axis of the device mesh; () for a plain tensor,
            of which every rank holds a copy.
        split: for each of these axes, the dimension of the tensor that is split along it; None
            where each rank along the axis holds the same.
    """

    dtype: str
    shape: tuple[int, ...]
    mesh: tuple[int, ...] = ()
    split: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        """As a message shows it."""
        how = [f"Shard({dim})" if dim is not None else "Replicate" for dim in self.split]
        mesh = "x".join(map(str, self.mesh))
        placed = f" as {', '.join(how)} on a mesh of {mesh}" if self.mesh else ", not sharded"
        return f"{spell_tensor(self.dtype, self.shape)}{placed}"


class Part(NamedTuple):
    """What one rank holds of a tensor: its shape, and where in the file it lies in row order."""

    shape: tuple[int, ...]
    offset: int | None


class Rank(NamedTuple):
    """One file; in `odd` what does not lie in it in row order."""

    stamp: FileStamp
    wholes: dict[str, Whole]
    parts: dict[str, Part]
    odd: TensorsCheckpoint | None


def place_in_mesh(rank: int, mesh: Sequence[int]) -> tuple[int, ...]:
    """The place of `rank` in a mesh in which ranks are numbered row by row."""
    place = []
    for size in reversed(mesh):
        rank, along = divmod(rank, size)
        place.append(along)
    return tuple(reversed(place))


def read_rank(path: Path, rank: int, world: int) -> Rank:
    """What the file `path` says, which must be that of `rank` in a run of `world`; no data is read.

    Raises:
        CheckpointError: it is damaged, unsafe, another rank's, or splits a tensor in a way that is
            not known.
    """
    from pytest_subnet.checkpoints.memory import TensorsCheckpoint, in_row_order
    from pytest_subnet.checkpoints.torch_files import load_file, tensors_in
    from pytest_subnet.checkpoints.zip_records import mapped_from_some, read_records

    def unpickle(path: Path, is_zip: bool) -> tuple[Any, ...]:
        records = read_records(path) if is_zip else None
        tensors = tensors_in(path, _load(path, is_zip))
        wholes = {name: _whole(path, name, tensors[name], rank, world) for name in tensors}
        parts = {name: _local(path, name, tensor) for name, tensor in tensors.items()}
        TensorsCheckpoint(parts, label=str(path))  # refuses what has no plain data
        base = None
        if records is not None and records.native:
            storages = [part.untyped_storage() for part in parts.values() if part.numel()]
            mapped = {storage.data_ptr(): storage.nbytes() for storage in storages}
            base = mapped_from_some(path, records, mapped)
        return wholes, parts, base

    known, (wholes, parts, base) = load_file(path, unpickle)
    if world > 1 and not any(whole.mesh for whole in wholes.values()):
        raise CheckpointError(
            f"{safe(path)} holds plain tensors only, no DTensor that says which part of the model "
            "it is; if every rank holds the whole model, pass this file"
        )
    offsets = {
        name: part.data_ptr() - base
        for name, part in parts.items()
        if base is not None and part.numel() and in_row_order(part)
    }
    odd = {name: part for name, part in parts.items() if part.numel() and name not in offsets}
    return Rank(
        known,
        wholes,
        {name: Part(tuple(part.shape), offsets.get(name)) for name, part in parts.items()},
        TensorsCheckpoint(odd, label=str(path)) if odd else None,
    )


def _load(path: Path, is_zip: bool) -> object:
    import torch

    if not torch.distributed.is_available():
        raise CheckpointError(
            f"{safe(path)} needs a build of torch with torch.distributed, which this one lacks"
        )
    # Without it weights-only loading refuses every DTensor.
    import torch.distributed.tensor

    with _quiet():
        loaded: object = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """No word of process groups, which a mesh misses when it is loaded: nothing here needs them."""
    logger = logging.getLogger("torch.distributed.device_mesh")

    def refuse(_: logging.LogRecord) -> bool:
        return False

    with ExitStack() as stack:
        stack.enter_context(without_warnings())  # of pickle protocols that it reads all the same
        logger.addFilter(refuse)
        stack.callback(logger.removeFilter, refuse)
        yield


def _whole(path: Path, name: str, tensor: torch.Tensor, rank: int, world: int) -> Whole:
    """What the pickle says of the whole tensor, as far as it can be checked."""
    from torch.distributed.tensor import DTensor

    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Whole(dtype, shape)
    spec: Any = tensor._spec
    mesh = tuple(spec.mesh.shape)
    split = tuple(_dim(path, name, each, len(shape)) for each in spec.placements)
    _check_ints(path, name, mesh, shape)
    if len(split) != len(mesh):
        broken(path, f"{short(name)} has {len(split)} placements on a mesh of {len(mesh)} axes")
    if math.prod(mesh) != world:
        raise CheckpointError(
            f"{safe(path)} holds {short(name)} on a mesh of {'x'.join(map(str, mesh))}, which are "
            f"not the {plural(world, 'rank')} of this checkpoint; {_MERGE}"
        )
    dims = [dim for dim in split if dim is not None]
    if len(set(dims)) != len(dims):
        raise CheckpointError(
            f"{safe(path)} holds {short(name)} as {Whole(dtype, shape, mesh, split)}, split twice "
            f"along one dimension; {_MERGE}"
        )
    place = spec.mesh.get_coordinate()
    if place is None or tuple(place) != place_in_mesh(rank, mesh):
        raise CheckpointError(
            f"{safe(path)} was not written by rank {rank}: its mesh of {'x'.join(map(str, mesh))} "
            f"puts it at {short(place)}, not at {place_in_mesh(rank, mesh)}; was the file renamed, "
            "or copied from another rank?"
        )
    return Whole(dtype, shape, mesh, split)


def _check_ints(path: Path, name: str, mesh: tuple[Any, ...], shape: tuple[Any, ...]) -> None:
    for what, least, numbers in (("mesh", 1, mesh), ("shape", 0, shape)):
        if not all(type(number) is int and number >= least for number in numbers):
            broken(path, f"the {what} of {short(name)} is {short(numbers)}")


def _dim(path: Path, name: str, placement: object, dims: int) -> int | None:
    """The dimension of a `Shard`; None for `Replicate`; any other placement is refused."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import Placement

    if type(placement) is Replicate:
        return None
    if type(placement) is not Shard:
        known = isinstance(placement, Placement)
        what = short(repr(placement)) if known else safe(type(placement).__name__)
        raise CheckpointError(
            f"{safe(path)} holds {short(name)} as {what}, a placement that cannot be put together "
            f"here; {_MERGE}"
        )
    dim: Any = placement.dim
    if type(dim) is not int or not 0 <= dim < dims:
        broken(path, f"{short(name)} of {plural(dims, 'dimension')} is split along {short(dim)}")
    return dim


def _local(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a tensor, which must be a plain one of its dtype and dimensions."""
    import torch
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # then it is the part itself, and no node of a graph
        part = DTensor.to_local(tensor)
    if type(part) is not torch.Tensor or (part.dtype, part.dim()) != (tensor.dtype, tensor.dim()):
        broken(path, f"the part of {short(name)} is not a plain tensor of its dtype and dimensions")
    return part
