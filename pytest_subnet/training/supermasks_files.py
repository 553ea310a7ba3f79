"""Supermasks as files: a mask and its scores a task, and one that says in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_subnet.atomic import write_bytes, write_text
from pytest_subnet.checkpoints.json_files import is_text, read_json
from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError, SubnetError
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.text import safe

if TYPE_CHECKING:
    import os

    import torch

    from pytest_subnet.training.supermasks import Supermasks

FORMAT = "pytest-subnet supermasks"
VERSION = 1
_INDEX = "supermasks.json"
_REMEDY = "save them again, or copy the directory again"

Masks = TypeVar("Masks", bound="Supermasks")


def save(masks: Supermasks, directory: str | os.PathLike[str]) -> None:
    """As `Supermasks.save`."""
    from safetensors.torch import save as as_safetensors

    for task in masks:
        if not is_text(task):
            raise CheckpointError(f"cannot write the task {safe(task)}: it is not valid Unicode")
    folder = Path(directory)
    files: dict[str, str] = {}
    index = {
        "format": FORMAT,
        "version": VERSION,
        "density": masks.density,
        "seed": masks._seed,
        "keep_scores": masks._keeps_scores,
        "weights": [each.name for each in masks._layers],
        "model": open_checkpoint(masks.model).fingerprint(),
        "tasks": list(masks),
        "files": files,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, task in enumerate(masks):
            written = [_mask_file(folder, number)]
            masks[task].save(written[0])
            if task in masks._scores:
                written.append(_scores_file(folder, number))
                write_bytes(written[1], as_safetensors(masks._scores[task]))
            files.update({path.name: open_checkpoint(path).fingerprint() for path in written})
        write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(
            f"cannot write supermasks to {safe(folder)}: "
            f"{getattr(error, 'strerror', None) or error}; give a directory that can be written to "
            "and has room"
        ) from error


def load(cls: type[Masks], directory: str | os.PathLike[str], model: torch.nn.Module) -> Masks:
    """As `Supermasks.load`."""
    folder = Path(directory)
    index = _index(folder)
    tasks, weights = index["tasks"], index["weights"]
    try:
        masks = cls(
            model,
            density=index["density"],
            include=[_quoted(name) for name in weights],
            seed=index["seed"],
            keep_scores=index["keep_scores"],
        )
    except (SubnetError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the supermasks in {safe(folder)} do not fit the model: {error}"
        ) from error
    if open_checkpoint(model).fingerprint() != index["model"]:
        raise CheckpointError(
            f"the supermasks in {safe(folder)} were saved with other weights than the model has; "
            "load the weights first that were saved beside them"
        )
    for number, task in enumerate(tasks):
        path = _as_saved(_mask_file(folder, number), index["files"])
        mask = UpdateMask.load(path)
        wanted = [(each.name, tuple(each.weight.shape), each.kept) for each in masks._layers]
        if [(each.name, each.shape, each.entries) for each in mask.tensors] != wanted:
            raise CheckpointError(
                f"{safe(path)} is a mask of other tensors, or of another density, than the "
                f"supermasks; {_REMEDY}"
            )
        masks._add_mask(task, mask)
        if masks._keeps_scores:
            path = _as_saved(_scores_file(folder, number), index["files"])
            masks._scores[task] = _scores(path, wanted)
    return masks


def _index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    index = read_json(path, unique=True)
    if index.get("format") != FORMAT:
        raise CheckpointError(f"{safe(path)} is no index of supermasks; pass what save wrote")
    if index.get("version") != VERSION:
        raise CheckpointError(
            f"{safe(path)} is of version {short(index.get('version'))}, this pytest-subnet reads "
            f"version {VERSION}; install the one that wrote it"
        )
    match index:
        case {
            "density": int() | float(),
            "seed": int(),
            "keep_scores": bool(),
            "model": str(),
            "weights": list(weights),
            "tasks": list(tasks),
            "files": dict(),
        } if all(isinstance(each, str) and each for each in (*weights, *tasks)):
            pass
        case _:
            raise CheckpointError(f"{safe(path)} is corrupt: a key is missing or wrong; {_REMEDY}")
    if not weights or len(set(tasks)) != len(tasks):
        raise CheckpointError(f"{safe(path)} is corrupt: no weights, or a task twice; {_REMEDY}")
    return index


def _as_saved(path: Path, files: dict[str, object]) -> Path:
    """`path`, which holds what was saved: masks of two tasks exchanged would fit as well."""
    if open_checkpoint(path).fingerprint() != files.get(path.name):
        raise CheckpointError(f"{safe(path)} is not the file that was saved; {_REMEDY}")
    return path


def _scores(path: Path, wanted: list[tuple[str, tuple[int, ...], int]]) -> dict[str, torch.Tensor]:
    stored = open_checkpoint(path)
    for name, shape, _ in wanted:
        if name not in stored.names() or stored.info(name)[1:3] != (shape, "float32"):
            raise CheckpointError(f"{safe(path)} has no float32 scores of {safe(name)}; {_REMEDY}")
    return {name: stored.read(name).clone() for name, _, _ in wanted}


def _quoted(name: str) -> str:
    """A glob that matches the name alone."""
    return "".join(f"[{each}]" if each in "*?[" else each for each in name)


def _mask_file(folder: Path, number: int) -> Path:
    return folder / f"mask-{number + 1:04}.safetensors"


def _scores_file(folder: Path, number: int) -> Path:
    return folder / f"scores-{number + 1:04}.safetensors"
