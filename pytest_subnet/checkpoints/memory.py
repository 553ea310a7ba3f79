"""Weights in memory: a module, or a mapping from names to tensors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint, TensorInfo
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    import torch

    from pytest_subnet.checkpoints.base import Buffer

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a name that torch's wrappers add, and that say nothing about the model."""


class TensorsCheckpoint(Checkpoint):
    """Weights that torch already holds: on the CPU, mapped from a file, or on a device.

    Names that share one storage, shape and place are ties: the first one keeps the tensor.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        label: str,
        config: Mapping[str, object] | None = None,
        buffers: Collection[str] = (),
        shows_ties: bool = False,
    ) -> None:
        """Refuse what has no plain data.

        Args:
            tensors: by name; kept as they are, not copied.
            label: how messages name the checkpoint.
            config: the model's configuration as plain JSON.
            buffers: the names of buffers.
            shows_ties: whether tied tensors still share their storage, as in a module.
        """
        self.shows_ties = shows_ties
        self.label = label
        self.config = config or {}
        self.buffers = frozenset(buffers)
        self._tensors = {
            name: tensor for name, tensor in tensors.items() if _usable(label, name, tensor)
        }
        if not self._tensors:
            raise CheckpointError(f"{safe(label)} holds no tensors")
        self._infos = {
            name: TensorInfo(
                name,
                tuple(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                tensor.numel() * tensor.element_size(),
            )
            for name, tensor in self._tensors.items()
        }
        self.ties = _shared(self._tensors)
        self._flat: tuple[str, torch.Tensor] | None = None

    def names(self) -> Sequence[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise self.unknown(name) from None

    def view(self, name: str) -> Buffer:
        flat = self._bytes(name)
        return flat.numpy() if flat.device.type == "cpu" else flat

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        part = self._bytes(name)[start : start + len(buffer)]
        if len(part) != len(buffer):
            raise CheckpointError(f"{safe(name)} of {safe(self.label)} has no byte {start:,}")
        buffer[:] = memoryview(part.cpu().numpy())

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor `name`, or some of its rows, where it is: a view, not a copy."""
        self.info(name)
        tensor = self._tensors[name].detach()
        return tensor if rows is None or tensor.dim() == 0 else tensor[rows]

    def identity(self) -> Hashable:
        return tuple(
            (name, tensor.data_ptr(), tensor._version) for name, tensor in self._tensors.items()
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The very tensor that is called `name`, autograd and all."""
        return self._tensors[name]

    def _bytes(self, name: str) -> torch.Tensor:
        import torch

        self.info(name)
        tensor = self._tensors[name].detach()
        if not tensor.is_contiguous():
            # Pieces of one tensor are asked for one after the other: keep the copy of the last.
            if self._flat is None or self._flat[0] != name:
                self._flat = (name, tensor.contiguous())
            tensor = self._flat[1]
        return tensor.reshape(-1).view(torch.uint8)


def from_module(module: torch.nn.Module) -> TensorsCheckpoint:
    """The weights and persistent buffers of `module`, under the names of the bare model.

    Looks through `torch.compile` and `DistributedDataParallel`; parts of names that wrappers
    inside the model add are dropped where the names stay distinct.
    """
    bare = unwrapped(module)
    state = {
        name: tensor
        for name, tensor in bare.state_dict(keep_vars=True).items()
        if not name.endswith("_extra_state")
    }
    names = _bare_names(list(state))
    buffers = {names[name] for name, _ in bare.named_buffers() if name in names}
    config = getattr(bare, "config", None)
    as_dict = getattr(config, "to_dict", None)
    return TensorsCheckpoint(
        {names[name]: tensor for name, tensor in state.items()},
        label=type(bare).__name__,
        config=as_dict() if callable(as_dict) else {},
        buffers=buffers,
        shows_ties=True,
    )


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers."""
    import torch

    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(
            module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel
        ):
            inner = module.module
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def _bare_names(names: list[str]) -> dict[str, str]:
    bare = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names
    }
    taken = Counter(bare.values())
    return {name: short if taken[short] == 1 else name for name, short in bare.items()}


def _usable(label: str, name: object, tensor: object) -> bool:
    import torch

    where = f"{safe(name)} of {safe(label)}"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{where} is {type(tensor).__name__}, not a tensor under a name")
    if tensor.is_meta:
        raise CheckpointError(f"{where} is on the meta device and has no data; load the weights first")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f"{where} is stored as {tensor.layout}; only dense tensors can be compared, "
            "convert it with .to_dense() or .dequantize()"
        )
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"{where} is {tensor.dtype}, which cannot be compared; cast it first")
    return True


def _shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    ties = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        known = first.setdefault(place, name)
        if known != name:
            ties[name] = known
    return ties
