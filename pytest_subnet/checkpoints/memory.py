"""Weights in memory: a module, or a mapping from names to tensors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint, TensorInfo, run_of_rows
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

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
        shows_buffers: bool = False,
        shows_ties: bool = False,
        is_live: bool = False,
    ) -> None:
        """Refuse what has no plain data.

        Args:
            tensors: by name; kept as they are, not copied.
            label: how messages name the checkpoint.
            config: the model's configuration as plain JSON.
            buffers: the names of buffers.
            shows_buffers: whether what is not among `buffers` is certainly a weight.
            shows_ties: whether tied tensors still share their storage, as in a module.
            is_live: whether the caller goes on to hold the tensors.
        """
        self.shows_buffers = shows_buffers
        self.shows_ties = shows_ties
        self.is_live = is_live
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
                _dtype(tensor),
                tensor.numel() * tensor.element_size(),
            )
            for name, tensor in self._tensors.items()
        }
        self.ties = _shared(self._tensors)

    def names(self) -> Sequence[str]:
        """All tensor names, in the order of the mapping."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of the tensor as it was when this was made."""
        try:
            return self._infos[name]
        except KeyError:
            raise self.unknown(name) from None

    def view(self, name: str) -> Buffer | None:
        """All bytes where they are; a copy, or None on the CPU, where they are not in row order."""
        tensor = self.tensor(name).detach()
        if in_row_order(tensor):
            flat = _bytes(tensor)
            return flat.numpy() if flat.device.type == "cpu" else flat
        return None if tensor.device.type == "cpu" else _bytes(_in_row_order(tensor))

    def address(self, name: str) -> tuple[torch.device, int] | None:
        """Of the tensor itself."""
        tensor = self.tensor(name)
        return (tensor.device, tensor.data_ptr()) if in_row_order(tensor) else None

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Copy bytes, from a device if need be."""
        import torch

        self.check_range(name, start, len(buffer))
        if not len(buffer):
            return
        tensor = self.tensor(name).detach()
        if not in_row_order(tensor):
            tensor, start = _rows_around(tensor, start, len(buffer))
        part = _bytes(tensor)[start : start + len(buffer)]
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(part)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor `name`, or some of its rows, where it is: a view, not a copy."""
        start, count = run_of_rows(self.info(name), rows)
        tensor = self.tensor(name).detach()
        return tensor if rows is None else tensor[start : start + count]

    def identity(self) -> Hashable:
        """Where each tensor is, and how often torch has written to it."""
        return tuple((name, *_state(tensor)) for name, tensor in self._tensors.items())

    def tensor(self, name: str) -> torch.Tensor:
        """The very tensor that is called `name`, autograd and all."""
        info, tensor = self.info(name), self._tensors[name]
        if tuple(tensor.shape) != info.shape or _dtype(tensor) != info.dtype:
            raise CheckpointError(
                f"{safe(name)} of {safe(self.label)} has another shape or dtype than when it was "
                "opened; open it again"
            )
        return tensor


class ModuleCheckpoint(TensorsCheckpoint):
    """The weights of a module, which are refused once the module has others in their place."""

    def __init__(
        self, opened: TensorsCheckpoint, module: torch.nn.Module, names: Mapping[str, str]
    ) -> None:
        """Remember where in the module each tensor is.

        Args:
            opened: its tensors.
            module: without its wrappers.
            names: what the names of its state dict are in `opened`.
        """
        self.__dict__.update(opened.__dict__)
        own = {
            name: _memory(tensor)
            for named in (module.named_parameters, module.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }
        place_of = {memory: name for name, memory in own.items()}
        self._module = module
        self._paths: dict[str, list[str]] = {}
        for name, known in names.items():
            # A hook of the state dict may rename tensors. What it makes itself is nowhere else.
            memory = _memory(self._tensors[known])
            place = name if own.get(name) == memory else place_of.get(memory)
            if place is not None:
                self._paths[known] = place.split(".")

    def identity(self) -> Hashable:
        """Where each tensor of the module is now, and how often torch has written to it."""
        now = ((name, self._now(name)) for name in self._tensors)
        return tuple((name, *((0, 0) if each is None else _state(each))) for name, each in now)

    def tensor(self, name: str) -> torch.Tensor:
        """The very tensor that is called `name`; refused if the module has another one now."""
        tensor = super().tensor(name)
        now = self._now(name)
        # A new parameter around the same memory is no other tensor: it holds what was opened.
        if now is not tensor and (now is None or now.data_ptr() != tensor.data_ptr()):
            raise CheckpointError(
                f"{safe(name)} of {safe(self.label)} was replaced or removed after the model was "
                "opened; open the model again"
            )
        return tensor

    def _now(self, name: str) -> torch.Tensor | None:
        """What the module has under `name`; None when there is nothing any more."""
        *path, leaf = self._paths.get(name) or [""]
        if not leaf:
            return self._tensors[name]
        module = self._module
        for part in path:
            inner = module._modules.get(part)
            if inner is None:
                return None
            module = inner
        parameter = module._parameters.get(leaf)
        return module._buffers.get(leaf) if parameter is None else parameter


def from_module(
    module: torch.nn.Module,
    *,
    follow: bool = False,
    take: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> TensorsCheckpoint:
    """The weights and persistent buffers of `module`, under the names of the bare model.

    Looks through `torch.compile` and `DistributedDataParallel`; parts of names that wrappers
    inside the model add are dropped where the names stay distinct. A parameter is never left out,
    even if a hook keeps it from being saved.

    Args:
        module: the model.
        follow: refuse tensors that the module has since replaced; otherwise they are kept.
        take: what to take of each tensor, by its name here; None takes all of it.
    """
    bare = unwrapped(module)
    label = type(bare).__name__
    try:
        everything = dict(bare.state_dict(keep_vars=True))
    except Exception as error:  # a state_dict or a hook of the user's own
        raise CheckpointError(
            f"the state_dict of {safe(label)} cannot be had ({type(error).__name__}: "
            f"{safe(error)}); pass a mapping of its tensors, as dict(model.named_parameters())"
        ) from error
    state = {name: tensor for name, tensor in everything.items() if not is_extra_state(name)}
    state |= _unsaved(bare, state)
    names = _bare_names(list(state))
    buffers = bare.named_buffers(remove_duplicate=False)
    tensors = {names[name]: tensor for name, tensor in state.items()}
    opened = TensorsCheckpoint(
        {name: take(name, tensor) for name, tensor in tensors.items()} if take else tensors,
        label=label,
        config=_config(bare),
        buffers={names[name] for name, _ in buffers if name in names},
        shows_buffers=True,
        shows_ties=True,
        is_live=True,
    )
    return ModuleCheckpoint(opened, bare, names) if follow else opened


def _config(module: torch.nn.Module) -> dict[str, object]:
    """The model's configuration as plain JSON; empty where it has none of the usual form."""
    as_dict = getattr(getattr(module, "config", None), "to_dict", None)
    try:
        config = as_dict() if callable(as_dict) else None
    except Exception:  # a `to_dict` that is not that of transformers
        return {}
    return config if isinstance(config, dict) else {}


def _memory(tensor: torch.Tensor) -> Hashable:
    """Which piece of memory a tensor is, also where there is none behind it yet."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def is_extra_state(name: object) -> bool:
    """Whether torch keeps settings of a module under `name`: what they are is the module's matter.

    >>> is_extra_state("layers.0.attention._extra_state"), is_extra_state("layers.0.weight")
    (True, False)
    """
    return isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"


def _unsaved(module: torch.nn.Module, state: Mapping[str, object]) -> dict[str, torch.Tensor]:
    """The parameters that hooks took out of the state dict: training moves them all the same."""
    import torch

    known = {id(value) for value in state.values()}
    left: dict[str, torch.Tensor] = {
        name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if id(parameter) not in known and name not in state
    }
    if left:  # a hook may have split one into parts, which still share its memory
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        left = {
            name: parameter
            for name, parameter in left.items()
            if parameter.untyped_storage()._cdata not in storages
        }
    return left


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
    if _dtype(tensor) not in DTYPES:
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


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def in_row_order(tensor: torch.Tensor) -> bool:
    """Whether the bytes of `tensor` lie in memory one after the other, as they are to be read."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row order, where they are."""
    import torch

    # Not reshape: of a single entry that keeps any stride.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _rows_around(tensor: torch.Tensor, start: int, nbytes: int) -> tuple[torch.Tensor, int]:
    """A copy in row order of what holds some bytes of `tensor`, and where in it they start.

    It is not kept for the next piece: torch does not tell of every write to a tensor.
    """
    while tensor.ndim:
        row = tensor[0].numel() * tensor.element_size()
        first, last = start // row, -(-(start + nbytes) // row)
        start -= first * row
        if last - first > 1 or tensor.ndim == 1:
            tensor = tensor[first:last]
            break
        tensor = tensor[first]
    return _in_row_order(tensor), start


def _in_row_order(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, where `tensor` itself is not."""
    return tensor.resolve_conj().resolve_neg().contiguous()


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
