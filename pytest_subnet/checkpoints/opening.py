"""From a source to its checkpoint: which format a path holds is found out by looking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from pytest_subnet.checkpoints import deepspeed, folders, hub, safetensors
from pytest_subnet.checkpoints.base import Checkpoint
from pytest_subnet.checkpoints.dcp import opening as dcp
from pytest_subnet.checkpoints.files import exists, names_in
from pytest_subnet.checkpoints.fsdp import opening as fsdp
from pytest_subnet.checkpoints.json_files import read_json
from pytest_subnet.checkpoints.remote.urls import is_url
from pytest_subnet.checkpoints.safetensors import SafetensorsCheckpoint
from pytest_subnet.checkpoints.sharded import series
from pytest_subnet.checkpoints.wording import looked_in, short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    Source: TypeAlias = (
        "str | os.PathLike[str] | torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint"
    )

_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
_TORCH_INDEX = ".bin.index.json"
_INDEXES = (safetensors.INDEX_SUFFIX, _TORCH_INDEX)
_ADAPTER = "adapter_model"

_FORMATS: tuple[tuple[Callable[[Sequence[str]], bool], Callable[[Path, str], Checkpoint]], ...] = (
    (fsdp.recognises, fsdp.open_directory),
    (dcp.recognises, dcp.open_directory),
    (deepspeed.recognises, deepspeed.open_directory),
)
"""What a directory is by the names in it, and how it is opened; the first that fits counts."""


def open_checkpoint(source: Source) -> Checkpoint:
    """Open the weights of one model; only headers are read.

    Args:
        source: a `.safetensors`, `.bin`, `.pt` or `.pth` file, an `*.index.json`, the `.metadata`
            of a distributed checkpoint, a directory that holds one of them, a hub id `"org/name"`
            or `"org/name@revision"` (downloaded), an address of safetensors (`hf://`, `https://`,
            `s3://`, `gs://`; read by ranges), an `nn.Module`, a mapping from names to tensors, or
            a `Checkpoint`, which is returned.

    Returns:
        The checkpoint: names, shapes and dtypes are known, data is read when asked for.

    Raises:
        CheckpointError: there is nothing to read, or it is damaged, inconsistent or unsafe.

    >>> checkpoint = open_checkpoint("base")
    >>> checkpoint.info("lm_head.weight").dtype
    'bfloat16'
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source))
    return _open_memory(source)


def _open_memory(source: object) -> Checkpoint:
    from collections.abc import Mapping

    from pytest_subnet.checkpoints.memory import TensorsCheckpoint, from_module, is_extra_state

    if isinstance(source, Mapping):
        label = f"{type(source).__name__} of tensors"
        tensors = {name: tensor for name, tensor in source.items() if not is_extra_state(name)}
        return TensorsCheckpoint(tensors, label=label, is_live=True)
    is_module = callable(getattr(source, "state_dict", None)) and hasattr(
        source, "named_parameters"
    )
    if is_module and not isinstance(source, type):
        return from_module(cast("torch.nn.Module", source), follow=True)
    raise TypeError(
        f"a checkpoint is a path, a hub id, a module or a mapping of tensors, "
        f"not {type(source).__name__}"
    )


def _open_path(source: str) -> Checkpoint:
    if not source:
        raise CheckpointError(
            "the path of the checkpoint is empty; is the variable for it not set?"
        )
    if is_url(source):
        from pytest_subnet.checkpoints.remote.opening import open_remote

        return open_remote(source)
    path = _expanded(source)
    if exists(path):
        return _open_directory(path, source) if path.is_dir() else _open_file(path, source)
    named = hub.parse_hub_id(source)
    if named is None:
        raise CheckpointError(
            f"no checkpoint at {short(source)}: there is no such path{looked_in(source)}"
        )
    return _open_directory(hub.download(*named), source)


def _expanded(source: str) -> Path:
    """The path absolute, so that a later change of directory does not lose it."""
    try:
        return Path(source).expanduser().absolute()
    except RuntimeError:  # `~name` of nobody: the path as it stands, which will not exist
        return Path(source).absolute()
    except FileNotFoundError:
        raise CheckpointError(
            f"cannot look for {short(source)}: the current directory was removed; change to one "
            "that is there, or pass an absolute path"
        ) from None


def _open_directory(directory: Path, label: str) -> Checkpoint:
    """The checkpoint in `directory`; safetensors first, as transformers would take it."""
    present = names_in(directory)
    for recognises, open_format in _FORMATS:
        if recognises(present):
            return open_format(directory, label)
    _refuse_adapter(directory, present)
    for index_suffix, suffixes, preferred in (
        (safetensors.INDEX_SUFFIX, (".safetensors",), "model.safetensors"),
        (_TORCH_INDEX, _TORCH_SUFFIXES, "pytorch_model.bin"),
    ):
        chosen = _choose(directory, present, index_suffix, suffixes, preferred)
        if chosen is not None:
            checkpoint = _open_file(chosen, label)
            deepspeed.refuse_ungathered(directory, present, checkpoint)
            return checkpoint
    model = folders.model_directory(directory, present)
    if model is not None:
        return _open_directory(model, f"{label.rstrip('/')}/{model.relative_to(directory)}")
    found = f"it holds {first_few(present, 5)}" if present else "it is empty"
    raise CheckpointError(
        f"{safe(label)} has no weights: {found}; looked for *.safetensors, *.bin and *.pt with or "
        "without an index and for *.distcp with .metadata; did the trainer save the model into "
        "another directory?"
    )


def _refuse_adapter(directory: Path, present: list[str]) -> None:
    """Raise if what would be read is not the model that transformers makes of the directory."""
    weights = [
        name
        for name in present
        if name.endswith((".safetensors", *_TORCH_SUFFIXES, *_INDEXES))
        and not folders.is_state(name)
    ]
    adapters = [name for name in weights if name.startswith(_ADAPTER)]
    weights = [name for name in weights if name not in adapters]
    if adapters and weights:
        raise CheckpointError(
            f"{safe(directory)} holds a model and an adapter: {first_few([*weights, *adapters])}; "
            "which of them counts cannot be known, merge them (merge_and_unload, then "
            "save_pretrained), remove one, or pass the file that counts"
        )
    if adapters or ("adapter_config.json" in present and not weights):
        raise CheckpointError(
            f"{safe(directory)} is a PEFT adapter, not a whole model; compare it with its base by "
            "open_pair(base, adapter), or open it on its base with open_adapter(adapter, base)"
        )


def _choose(
    directory: Path, present: list[str], index_suffix: str, suffixes: tuple[str, ...], single: str
) -> Path | None:
    indexes = [name for name in present if name.endswith(index_suffix)]
    files = [name for name in present if name.endswith(suffixes) and not folders.is_state(name)]
    if len(indexes) > 1 or (indexes and single in files):
        both = [*indexes, *([single] if single in files else [])]
        raise CheckpointError(
            f"{safe(directory)} holds two checkpoints: {first_few(both)}; "
            "remove the stale one, or pass the file that counts"
        )
    if indexes:
        return directory / indexes[0]
    shards = [name for name in files if series(name) is not None]
    if single in files and shards:
        raise CheckpointError(
            f"{safe(directory)} holds two checkpoints: {single} and {first_few(shards)}; "
            "remove the stale one, or pass the file that counts"
        )
    if single in files:
        return directory / single
    if len(files) > 1:
        raise CheckpointError(
            f"{safe(directory)} holds {plural(len(files), 'weight file')} and no index: "
            f"{first_few(files)}; copy its *{index_suffix} beside them, or pass one file"
        )
    if not files:
        return None
    shard = series(files[0])
    if shard is not None and shard[1] > 1:
        raise CheckpointError(
            f"{safe(directory)} holds {safe(files[0])}, one of {shard[1]} shards, and no index; "
            f"copy the others and their *{index_suffix} beside it"
        )
    return directory / files[0]


def _open_file(path: Path, label: str) -> Checkpoint:
    if dcp.is_file_of(path.name):
        return dcp.open_file(path, label)
    config_path = path.parent / "config.json"
    config = read_json(config_path) if exists(config_path) else {}
    if path.name.endswith((".safetensors", safetensors.INDEX_SUFFIX)):
        return SafetensorsCheckpoint(path, label=label, config=config)
    if path.name.endswith((*_TORCH_SUFFIXES, _TORCH_INDEX)):
        from pytest_subnet.checkpoints.torch_files import TorchCheckpoint

        return TorchCheckpoint(path, label=label, config=config)
    raise CheckpointError(
        f"{safe(path)} is in no format that can be read; "
        "pass a .safetensors, .bin, .pt or .pth file, an *.index.json, a .metadata or a directory"
    )
