"""A state dict on disk, in one of the formats that the package reads, by who owns the format."""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.errors import SubnetError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    Tensors = Mapping[str, torch.Tensor]

_RANKS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedCheckpoint:
    """Tensors, written to a directory of their own when its path is asked for.

    The directory is removed when this object is. A checkpoint that was drawn lives to the end of
    the example at least, so that its path alone may be kept until then.

    Args:
        format: `"safetensors"` (one file), `"sharded"` (safetensors in two files, with their
            index), `"bin"` (`pytorch_model.bin`), `"dcp"` (torch's distributed checkpoint) or
            `"fsdp"` (the `.pt` files of two ranks, as verl saves them).
        tensors: by name. Of those that are one tensor, a head and the embedding it is tied to, the
            first is written, as transformers does; `.tensors` holds what is written.

    Raises:
        ValueError: an unknown format, or no tensors.

    >>> saved = SavedCheckpoint(format="dcp", tensors={"weight": torch.ones(2)})
    >>> open_checkpoint(saved.path).info("weight").shape
    (2,)
    """

    format: str
    tensors: Tensors

    def __post_init__(self) -> None:
        """Refuse what cannot be written."""
        if self.format not in FORMATS:
            raise ValueError(f"format={safe(repr(self.format))} is not one of {', '.join(FORMATS)}")
        if not self.tensors:
            raise ValueError("tensors is empty: there is nothing to write")
        object.__setattr__(self, "tensors", _apart(self.tensors))

    @cached_property
    def path(self) -> Path:
        """The directory; `open_checkpoint` takes it."""
        directory = Path(tempfile.mkdtemp(prefix="subnet-"))
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        FORMATS[self.format](self.tensors, directory)
        return directory


def _apart(tensors: Tensors) -> Tensors:
    """Each tensor once, under its first name and in memory of its own."""
    written: dict[int, str] = {}
    for name, tensor in tensors.items():
        written.setdefault(id(tensor), name)
    return {name: tensors[name].detach().clone().contiguous() for name in written.values()}


def _write_safetensors(tensors: Tensors, directory: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})


def _write_sharded(tensors: Tensors, directory: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    half = sum(tensor.nbytes for tensor in tensors.values()) // 2
    save_torch_state_dict(dict(tensors), directory, max_shard_size=max(half, 1))


def _write_bin(tensors: Tensors, directory: Path) -> None:
    import torch

    torch.save(dict(tensors), directory / "pytorch_model.bin")


def _write_dcp(tensors: Tensors, directory: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        save(dict(tensors), checkpoint_id=directory, no_dist=True)


def _write_fsdp(tensors: Tensors, directory: Path) -> None:
    """Each rank's file, one after the other, in a process group that sends nothing."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise SubnetError(
            "a checkpoint of FSDP cannot be written here, as torch's process group of this process "
            "is in use; leave it out: checkpoints(formats=['safetensors', 'dcp'])"
        )
    excepthook = sys.excepthook
    for rank in range(_RANKS):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=_RANKS)
        try:
            mesh = init_device_mesh("cpu", (_RANKS,), mesh_dim_names=("fsdp",))
            shards = {name: _shard(tensor, rank, mesh) for name, tensor in tensors.items()}
            torch.save(shards, directory / f"model_world_size_{_RANKS}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
            sys.excepthook = excepthook  # a process group puts its rank before every traceback


def _shard(
    tensor: torch.Tensor, rank: int, mesh: torch.distributed.device_mesh.DeviceMesh
) -> torch.Tensor:
    """The rows of a rank; a scalar is on every one."""
    from torch.distributed.tensor import DTensor, Shard

    if not tensor.ndim:
        return tensor
    rows = -(-len(tensor) // _RANKS)
    return DTensor.from_local(
        tensor[rank * rows : (rank + 1) * rows].clone(),
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


FORMATS: dict[str, Callable[[Tensors, Path], None]] = {
    "safetensors": _write_safetensors,
    "sharded": _write_sharded,
    "bin": _write_bin,
    "dcp": _write_dcp,
    "fsdp": _write_fsdp,
}
