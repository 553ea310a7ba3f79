"""Torch files: `pytorch_model.bin` and other pickles of tensors, one file or shards with an index.

Loading is always `weights_only=True`: a pickle that asks for code is refused, and no switch turns
that off. The tensors are memory-mapped, so that opening reads no data.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import stamp, unreadable
from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.checkpoints.sharded import check_shards, read_index
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    import torch

INDEX_SUFFIX = ".bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")
_NESTED = ("state_dict", "model", "module")  # where Lightning, trainers and DeepSpeed put weights


class TorchCheckpoint(TensorsCheckpoint):
    """Weights in files written by `torch.save`."""

    def __init__(self, path: Path, *, label: str, config: Mapping[str, object]) -> None:
        """Map the files.

        Args:
            path: a file written by `torch.save`, or a `.bin.index.json`.
            label: how messages name the checkpoint.
            config: its `config.json`.
        """
        if path.name.endswith(INDEX_SUFFIX):
            expected = read_index(path, SUFFIXES)
            files = {shard: path.parent / shard for shard in expected}
            self._stamps = [stamp(file) for file in (path, *files.values())]
            parts = {shard: _load(file) for shard, file in files.items()}
            check_shards(path, expected, parts)
            tensors = {name: tensor for part in parts.values() for name, tensor in part.items()}
        else:
            self._stamps = [stamp(path)]
            tensors = _load(path)
        super().__init__(tensors, label=label, config=config)
        self.directory = path.parent

    def identity(self) -> Hashable:
        return tuple(stamp(known.path) for known in self._stamps)


def _load(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from None
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = safe(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CheckpointError(
            f"{safe(path)} is truncated or corrupt ({reason}); save or download it again"
        ) from None
    return _tensors(path, loaded)


def _refusal(path: Path, reason: str) -> str:
    marker = "Unsupported global: GLOBAL "
    if marker not in reason:
        return (
            f"{safe(path)} is not a checkpoint that weights-only loading can read "
            f"({safe(reason.splitlines()[0])}); save it again, best as safetensors"
        )
    needed = reason.split(marker, 1)[1].split()[0]
    return (
        f"refusing to unpickle {safe(path)}: it needs `{safe(needed)}`, which is not a tensor class; "
        "a checkpoint holds weights only, save it again as safetensors"
    )


def _tensors(path: Path, loaded: object) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(loaded, dict):
        found = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        if found and all(isinstance(name, str) for name in found):
            return found
        for key in _NESTED:
            if isinstance(loaded.get(key), dict):
                return _tensors(path, loaded[key])
    raise CheckpointError(
        f"{safe(path)} holds {safe(type(loaded).__name__)}, not a mapping from names to tensors; "
        "pass the file with the model's state_dict"
    )
