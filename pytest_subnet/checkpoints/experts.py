"""The experts of a block, stored in one tensor, shown as one matrix an expert.

transformers 5 holds `experts.gate_up_proj` `[experts, 2 * intermediate, hidden]` and
`experts.down_proj` `[experts, hidden, intermediate]` in memory and saves a matrix an expert:
`experts.3.gate_proj.weight`, or `experts.3.w1.weight` in some families. Each of these is a run of
rows of the fused tensor, so that nothing is copied to show it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.base import TensorInfo, run_of_rows
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.view import CheckpointView

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import torch

    from pytest_subnet.checkpoints.base import Buffer, Checkpoint, Extent

FUSED_FROM = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
"""Which matrices of an expert, one below the other, a fused tensor holds, by the families' names.

So transformers 5.23 fuses every family that has a matrix an expert on disk: a test goes through all
of them. It is written down here so that files are compared without transformers.
"""
_HOW = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
_MAPPING = "transformers.conversion_mapping"


class Part(NamedTuple):
    """One matrix of one expert.

    Attributes:
        name: as which it is shown.
        fused: the tensor that holds it.
        expert: its number there.
        first: its first row in what the fused tensor holds of the expert.
        shape: its rows and columns.
    """

    name: str
    fused: str
    expert: int
    first: int
    shape: tuple[int, int]


def parts_of(fused: TensorInfo, matrices: Sequence[str]) -> Iterator[Part]:
    """The matrices of each expert in a fused tensor, in storage order.

    Args:
        fused: a tensor of three dimensions, whose second one is a multiple of how many they are.
        matrices: their names, as in `FUSED_FROM`.

    >>> fused = TensorInfo("mlp.experts.gate_up_proj", (2, 6, 4), "bfloat16", 96)
    >>> [(part.name, part.first, part.shape) for part in parts_of(fused, ["w1", "w3"])][:2]
    [('mlp.experts.0.w1.weight', 0, (3, 4)), ('mlp.experts.0.w3.weight', 3, (3, 4))]
    """
    experts, rows, columns = fused.shape
    height = rows // len(matrices)
    experts_of_block = fused.name.rpartition(".")[0]
    for expert in range(experts):
        for number, matrix in enumerate(matrices):
            name = f"{experts_of_block}.{expert}.{matrix}.weight"
            yield Part(name, fused.name, expert, number * height, (height, columns))


def fused_otherwise(model_type: object) -> bool:
    """Whether transformers, where it is loaded, fuses the experts of a family in another way.

    A model in memory has loaded it; nothing is imported for files.

    >>> fused_otherwise("qwen3_moe")
    False
    """
    mapping_of = getattr(sys.modules.get(_MAPPING), "get_checkpoint_conversion_mapping", None)
    if mapping_of is None or not isinstance(model_type, str):  # another transformers has other ways
        return False
    for conversion in mapping_of(model_type) or ():
        operations = getattr(conversion, "operations", ())
        for target in conversion.target_patterns if operations else ():
            leaf = target.rpartition(".")[2]
            sources = [
                source.removesuffix(".weight").rpartition(".")[2]
                for source in conversion.source_patterns
            ]
            if "experts." in target and leaf in FUSED_FROM:
                how = [type(operation).__name__ for operation in operations]
                if tuple(sources) not in FUSED_FROM[leaf] or how not in _HOW:
                    return True
    return False


class ExpertsCheckpoint(CheckpointView):
    """A checkpoint in which some fused tensors are shown as one matrix an expert."""

    def __init__(self, inner: Checkpoint, parts: Mapping[str, Collection[Part]]) -> None:
        """Show the fused tensors that are the keys of `parts` as these."""
        super().__init__(inner)
        self._infos: dict[str, TensorInfo] = {}
        self._parts: dict[str, tuple[Part, int]] = {}
        self.ties: dict[str, str] = {}
        for name in inner.names():
            info = inner.info(name)
            if name not in parts:
                self._infos[name] = info
                continue
            _, rows, columns = info.shape
            row_bytes = columns * DTYPES[info.dtype].itemsize
            for part in parts[name]:
                nbytes = part.shape[0] * row_bytes
                self._infos[part.name] = TensorInfo(part.name, part.shape, info.dtype, nbytes)
                self._parts[part.name] = part, (part.expert * rows + part.first) * row_bytes
        for name, source in inner.ties.items():
            if name in parts and source in parts:
                both = zip(parts[name], parts[source], strict=True)
                self.ties.update((one.name, other.name) for one, other in both)
            elif name not in parts and source not in parts:
                self.ties[name] = source

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """Where the bytes lie in the fused tensor's file; None when it is in memory."""
        self.check_range(name, start, nbytes)
        stored, offset = self._place(name)
        return self._inner.extents(stored, offset + start, nbytes)

    def view(self, name: str) -> Buffer | None:
        """The bytes where they are in the fused tensor; None when it is not in memory."""
        nbytes = self.info(name).nbytes
        stored, offset = self._place(name)
        whole = self._inner.view(stored)
        return None if whole is None else whole[offset : offset + nbytes]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read bytes of the fused tensor."""
        self.check_range(name, start, len(buffer))
        stored, offset = self._place(name)
        self._inner.read_into(stored, offset + start, buffer)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """As of any checkpoint; of a tensor in memory a view, where it is."""
        if name not in self._parts:
            return self._inner.read(name, rows)
        if self.directory is not None:
            return super().read(name, rows)
        start, count = run_of_rows(self.info(name), rows)
        part, _ = self._parts[name]
        expert = self._inner.read(part.fused, slice(part.expert, part.expert + 1))[0]
        return expert[part.first + start : part.first + start + count]

    def _place(self, name: str) -> tuple[str, int]:
        """The tensor behind `name`, and at which of its bytes this one starts."""
        if name in self._parts:
            part, offset = self._parts[name]
            return part.fused, offset
        return self.info(name).name, 0
