"""Weights as compressed-tensors stores them: codes, scales and the scheme in config.json."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_subnet.checkpoints.base import TensorInfo
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.recent import Recent
from pytest_subnet.checkpoints.view import CheckpointView
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_subnet.checkpoints.base import Buffer, Checkpoint, Extent

_PARAMETERS = frozenset(
    {
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    }
)
_OF_CACHE = frozenset({"k_scale", "v_scale", "q_scale"})
_SHAPE = "weight_shape"


def is_parameter(name: str) -> bool:
    """Whether a tensor is a part of a compressed weight.

    >>> is_parameter("mlp.up_proj.weight_packed"), is_parameter("mlp.up_proj.weight")
    (True, False)
    """
    return name.rpartition(".")[2] in _PARAMETERS


class CompressedCheckpoint(CheckpointView):
    """Compressed weights as the values that they stand for, in float32.

    Their library dequantises one matrix at a time; it is kept while others of its pieces are read.
    """

    def __init__(self, inner: Checkpoint) -> None:
        """Find the parts of each weight, by headers; the shape of a packed one is itself a tensor.

        Raises:
            CheckpointError: a part is missing or belongs to nothing, or the library does not know
                the scheme.
        """
        super().__init__(inner)
        self._converter = _converter(inner)
        self._reading = str(self._converter.quant_config)
        self._parts = _parts(inner, self._converter)
        hidden = {part for parts in self._parts.values() for part in parts}
        self._infos: dict[str, TensorInfo] = {}
        self._stored: dict[str, str] = {}
        for name in inner.names():
            module, _, leaf = name.rpartition(".")
            if name in self._parts:
                info = TensorInfo(f"{module}.weight", self._shape(name), "float32", 0)
                self._infos[info.name] = info._replace(nbytes=4 * info.numel)
                self._stored[info.name] = name
            elif name not in hidden and leaf not in _OF_CACHE:
                self._infos[name] = inner.info(name)
        self._made: Recent[torch.Tensor] = Recent()
        self.notes = (
            *inner.notes,
            f"{safe(inner.label)}: dequantised by compressed-tensors to float32: which weights "
            "moved is partly the quantiser's doing",
        )

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """Where a tensor that is stored as it is lies; None for others."""
        self.info(name)
        return None if name in self._stored else self._inner.extents(name, start, nbytes)

    def view(self, name: str) -> Buffer | None:
        """A tensor in memory that is stored as it is; None for others."""
        self.info(name)
        return None if name in self._stored else self._inner.view(name)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Dequantise the matrix, or take it from what was dequantised last."""
        self.check_range(name, start, len(buffer))
        if name not in self._stored:
            self._inner.read_into(name, start, buffer)
            return
        if not len(buffer):
            return
        import torch

        made = self._made.get(name, self.info(name).nbytes, lambda: self._dequantise(name))
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(made[start : start + len(buffer)])

    def _dequantise(self, name: str) -> torch.Tensor:
        """The bytes of a weight in float32."""
        import torch

        stored = self._stored[name]
        tensors = {part: self._inner.read(part) for part in (stored, *self._parts[stored])}
        with _in_our_words(f"{short(stored)} of {safe(self.label)}"):
            made = self._converter.process(tensors).get(name)
        if (
            made is None
            or made.dtype != torch.float32
            or tuple(made.shape) != self.info(name).shape
        ):
            raise CheckpointError(
                f"compressed-tensors does not dequantise {short(stored)} of {safe(self.label)} as "
                "its config.json says it is quantised; save the checkpoint again"
            )
        flat: torch.Tensor = made.cpu().contiguous().reshape(-1).view(torch.uint8)
        return flat

    def _shape(self, name: str) -> tuple[int, ...]:
        """What the shape of a weight is once it is dequantised."""
        module = name.rpartition(".")[0]
        parts = self._parts[name]
        info = self._inner.info(name)
        if f"{module}.{_SHAPE}" in parts:
            numbers = self._inner.info(f"{module}.{_SHAPE}")
            is_pair = numbers.shape == (2,) and not DTYPES[numbers.dtype].floating
            stated = self._inner.read(numbers.name).tolist() if is_pair else []
            if (
                len(stated) == len(info.shape) == 2
                and stated[0] == info.shape[0]
                and info.shape[1] <= stated[1] <= 32 * info.shape[1]
            ):
                return stated[0], stated[1]
            raise CheckpointError(
                f"{short(numbers.name)} of {safe(self.label)} is {short(stated)}, which is not "
                f"what {spell_tensor(info.dtype, info.shape)} holds; save the checkpoint again"
            )
        if not name.endswith("_packed"):
            return info.shape
        import torch

        empty = {
            part: torch.empty(
                self._inner.info(part).shape,
                dtype=getattr(torch, self._inner.info(part).dtype),
                device="meta",
            )
            for part in (name, *parts)
        }
        with _in_our_words(f"{short(name)} of {safe(self.label)}"):
            return tuple(self._converter.process(empty)[f"{module}.weight"].shape)


def _converter(inner: Checkpoint) -> Any:
    """The library's dequantiser for the scheme in config.json."""
    if inner.directory is None:
        raise CheckpointError(
            f"{safe(inner.label)} is not in a directory; how its weights are compressed stands in "
            "the config.json beside them, pass the directory"
        )
    import torch
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

    with _in_our_words(f"{safe(inner.directory)}/config.json"):
        return CompressedTensorsDequantizer(os.fspath(inner.directory), dtype=torch.float32)


def _parts(inner: Checkpoint, converter: Any) -> dict[str, list[str]]:
    """What belongs to each compressed weight; `CheckpointError` where something is left over."""
    names = dict.fromkeys(inner.names())
    label = safe(inner.label)
    parts: dict[str, list[str]] = {}
    for name in names:
        needed = sorted(converter.get_dependencies(name))
        missing = [part for part in needed if part not in names]
        is_plain = not is_parameter(name) and inner.info(name).dtype in ARITHMETIC
        if not needed or (is_plain and len(missing) == len(needed)):
            continue  # a scheme may cover all modules: those without scales are not compressed
        if missing:
            raise CheckpointError(
                f"{label} lacks {_few(missing)}, without which {short(name)} cannot be "
                "dequantised; save or download it again"
            )
        parts[name] = needed
    used = set(parts).union(*parts.values())
    orphans = [name for name in names if is_parameter(name) and name not in used]
    if orphans:
        raise CheckpointError(
            f"{label} has parts of compressed weights that nothing uses by the scheme in its "
            f"config.json: {_few(orphans)}; dequantise it with the tool that wrote it, save it in "
            "bfloat16 and pass that"
        )
    twice = [
        shown
        for name in parts
        for shown in [f"{name.rpartition('.')[0]}.weight"]
        if shown != name and shown in names
    ]
    if twice:
        raise CheckpointError(
            f"{label} has {_few(twice)} both compressed and plain; which one counts cannot be "
            "known, save it again"
        )
    return parts


@contextmanager
def _in_our_words(what: str) -> Iterator[None]:
    """Turn what the library raises for damaged files into the one error that we raise."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        AssertionError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"compressed-tensors cannot make anything of {what} ({short(reason)}); dequantise it "
            "with the tool that wrote it, save it in bfloat16 and pass that"
        ) from error


def _few(names: Sequence[str]) -> str:
    return first_few([short(name) for name in names])
