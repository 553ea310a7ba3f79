"""Weights in memory: a module, or a mapping from names to tensors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint, TensorInfo, run_of_rows
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
        for name, tensor in tensors.items():
            _check_usable(label, name, tensor)
        self._tensors = dict(tensors)
        if not self._tensors:
            raise CheckpointError(f"{safe(label)} holds no tensors; was it saved or built empty?")
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
        self._flat: tuple[Hashable, torch.Tensor] | None = None

    def names(self) -> Sequence[str]:
        """All tensor names, in the order of the mapping."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the tensor as it was when this was made."""
        try:
            return self._infos[name]
        except KeyError:
            raise self.unknown(name) from None

    def view(self, name: str) -> Buffer:
        """All bytes where they are; a copy only where they do not lie in row order."""
        flat = self._bytes(name)
        return flat.numpy() if flat.device.type == "cpu" else flat

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy bytes, from a device if need be."""
        import torch

        self.check_range(name, start, len(buffer))
        if not len(buffer):
            return
        part = self._bytes(name)[start : start + len(buffer)]
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(part)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor `name`, or some of its rows, where it is: a view, not a copy."""
        start, count = run_of_rows(self.info(name), rows)
        tensor = self._tensors[name].detach()
        return tensor if rows is None else tensor[start : start + count]

    def identity(self) -> Hashable:
        """Where each tensor is, and how often torch has written to it."""
        return tuple((name, *_state(tensor)) for name, tensor in self._tensors.items())

    def tensor(self, name: str) -> torch.Tensor:
        """The very tensor that is called `name`, autograd and all."""
        return self._tensors[name]

    def _bytes(self, name: str) -> torch.Tensor:
        import torch

        self.info(name)
        tensor = self._tensors[name].detach()
        if not in_row_order(tensor):
            # Pieces of one tensor are asked for one after the other: keep the copy of the last.
            # Threads may ask for different ones: what is kept is only used if it is the right one.
            key = (name, *_state(tensor))
            kept = self._flat
            if kept is None or kept[0] != key:
                kept = self._flat = (key, tensor.resolve_conj().resolve_neg().contiguous())
            tensor = kept[1]
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
        if name.rpartition(".")[2] != "_extra_state"  # settings of a module, not weights
    }
    names = _bare_names(list(state))
    buffers = bare.named_buffers(remove_duplicate=False)
    as_dict = getattr(getattr(bare, "config", None), "to_dict", None)
    config = as_dict() if callable(as_dict) else {}
    return TensorsCheckpoint(
        {names[name]: tensor for name, tensor in state.items()},
        label=type(bare).__name__,
        config=config if isinstance(config, dict) else {},
        buffers={names[name] for name, _ in buffers if name in names},
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


def _check_usable(label: str, name: object, tensor: object) -> None:
    """Raise unless `tensor` has a name and plain data."""
    import torch

    where = f"{safe(name)} of {safe(label)}"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{where} is {type(tensor).__name__}, not a tensor under a name; pass a state_dict"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise CheckpointError(f"{where} has no shape yet; run the model once on an input first")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CheckpointError(
            f"{where} is stored as {_storage_kind(tensor)}; only dense tensors can be compared, "
            "convert it with .to_dense(), .dequantize() or .to_padded_tensor()"
        )
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"{where} is {tensor.dtype}, which cannot be compared; cast it first")
    if not _has_data(tensor):
        raise CheckpointError(
            f"{where} has no data here: it is on the meta device, sharded or freed; "
            "load or gather the whole weights first"
        )


def _storage_kind(tensor: torch.Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    return str(tensor.dtype if tensor.is_quantized else tensor.layout)


def _has_data(tensor: torch.Tensor) -> bool:
    # The storage is asked first: asking a fake tensor for its address is an error of its own.
    if tensor.untyped_storage().device.type == "meta":
        return False
    return tensor.numel() == 0 or tensor.data_ptr() != 0


def in_row_order(tensor: torch.Tensor) -> bool:
    """Whether the bytes of `tensor` lie in memory one after the other, as they are to be read."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor is and how often it was written to, which changes when it does."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _shared(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    first: dict[Hashable, str] = {}
    ties = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        known = first.setdefault(place, name)
        if known != name:
            ties[name] = known
    return ties
