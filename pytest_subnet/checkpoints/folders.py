"""A trainer's output folder: which of its subfolders is the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import names_in, stamp, unreadable
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_STEP = re.compile(r"(?:checkpoint-|global_step_|iter_|step-)([0-9]{1,18})", re.ASCII)
_LATEST = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt")
"""Where verl and Megatron, and where SkyRL, keep the number of the last step."""
_STATE = (".", "training_args", "optimizer", "scheduler", "scaler", "rng_state", "trainer_state")


def is_state(name: str) -> bool:
    """Whether a file is a trainer's own state, or hidden (some systems add `._name` files)."""
    return name == "data.pt" or name.startswith(_STATE)


def whole_weights(present: Sequence[str]) -> list[str]:
    """Those of the names in a directory that are weights as transformers would load them.

    >>> whole_weights(["config.json", "model.safetensors", "optimizer.bin", "rank_0.pt"])
    ['model.safetensors']
    """
    suffixes = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    return [name for name in present if name.endswith(suffixes) and not is_state(name)]


def model_directory(directory: Path, present: Sequence[str]) -> Path | None:
    """The one subfolder that is the model of a folder without weights of its own.

    Args:
        directory: what a trainer wrote: one step of it, or all of a run.
        present: the names in it, sorted.

    Returns:
        The subfolder, which may again be a folder of this kind; None when there is none.

    Raises:
        CheckpointError: there are several, or a file names one that is not there.

    >>> from pathlib import Path
    >>> import shutil
    >>> _ = shutil.copytree("base", "run/checkpoint-500")
    >>> model_directory(Path("run"), ["checkpoint-500"]).name
    'checkpoint-500'
    """
    models = [path for path in map(directory.joinpath, present) if _is_model(path)]
    if len(models) > 1:
        names = first_few([path.name for path in models])
        raise CheckpointError(
            f"{safe(directory)} holds {len(models)} models: {names}; pass one of them"
        )
    if models:
        exported = models[0] / "huggingface"
        return exported if _holds_weights(exported) else models[0]
    steps = _steps(directory, present)
    named = [name for name in _LATEST if name in present]
    if named:
        return _latest(directory / named[0], steps)
    if len(steps) > 1:
        raise CheckpointError(
            f"{safe(directory)} holds {len(steps)} checkpoints of a run: {first_few(steps, 5)}; "
            f"pass one of them, as {safe(directory / steps[-1])}, or all to open_trajectory"
        )
    return directory / steps[0] if steps else None


def _is_model(path: Path) -> bool:
    """Whether a trainer puts the model of a step into a subfolder of this name, and did."""
    if path.name in ("actor", "policy"):  # verl, SkyRL
        return _holds_weights(path) or _holds_weights(path / "huggingface")
    if path.name == "huggingface":
        return _holds_weights(path)
    return path.name == "pytorch_model_fsdp_0" and path.is_dir()  # accelerate


def _holds_weights(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    present = names_in(directory)
    return bool(whole_weights(present)) or any(
        name.startswith("model_world_size_") for name in present
    )


def _steps(directory: Path, present: Sequence[str]) -> list[str]:
    """The names of the folders of steps, in their order."""
    numbers = {name: int(match[1]) for name in present if (match := _STEP.fullmatch(name))}
    return sorted(
        (name for name in numbers if (directory / name).is_dir()), key=numbers.__getitem__
    )


def _latest(path: Path, steps: Sequence[str]) -> Path:
    """The folder of the step that the file `path` names."""
    try:
        stamp(path)  # to open a pipe would wait for ever
        with open(path, "rb") as file:
            text = file.read(64).decode("ascii", "replace").strip()
    except OSError as error:
        raise unreadable(path, error) from error
    wanted = []
    if re.fullmatch("[0-9]{1,18}", text):  # nothing else: a name may lead anywhere
        wanted = [f"global_step_{int(text)}", f"iter_{int(text):07d}"]
    elif text == "release":  # Megatron's name for a model that was converted
        wanted = [text]
    found = [name for name in wanted if (path.parent / name).is_dir()]
    if len(found) == 1:
        return path.parent / found[0]
    there = f"there are {first_few(steps, 5)}" if steps else "there are none"
    if found:
        there = f"there are both {' and '.join(found)}"
    raise CheckpointError(
        f"{safe(path)} says {short(text) or 'nothing'}, which is not one step of this folder: "
        f"{there}; pass the folder of one step"
    )
