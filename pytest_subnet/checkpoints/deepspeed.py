"""DeepSpeed ZeRO directories: recognised, and answered with what makes weights of them.

What ZeRO stores are flat float32 partitions, which DeepSpeed's own script puts together; it needs
pickles of its own classes, and is not repeated here.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, NoReturn

from pytest_subnet.checkpoints.files import exists, names_in, stamp, unreadable
from pytest_subnet.checkpoints.folders import whole_weights
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, printable, safe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pytest_subnet.checkpoints.base import Checkpoint

_SCRIPT = "zero_to_fp32.py"
_TAG = re.compile(r"global_step([0-9]{1,18})", re.ASCII)
_STATES = {"optimizer": "_optim_states.pt", "model": "_model_states.pt"}
_LONGEST_TAG = 200


def recognises(present: Sequence[str]) -> bool:
    """Whether names in a directory are those of a ZeRO checkpoint, without whole weights beside it.

    >>> recognises(["global_step500", "latest", "zero_to_fp32.py"])
    True
    >>> recognises(["global_step500", "latest", "model.safetensors", "zero_to_fp32.py"])
    False
    """
    return _is_zero(present) and not whole_weights(present)


def open_directory(directory: Path, label: str) -> Checkpoint:
    """Raise with the command that makes weights of what is in `directory`.

    Raises:
        CheckpointError: always.
    """
    _refuse(directory, f"{safe(label)} is a DeepSpeed ZeRO checkpoint")


def refuse_ungathered(directory: Path, present: Sequence[str], checkpoint: Checkpoint) -> None:
    """Raise if whole weights beside a ZeRO checkpoint are but the names that ZeRO-3 leaves.

    Args:
        directory: where they are.
        present: the names in it.
        checkpoint: the whole weights.

    Raises:
        CheckpointError: one of its tensors is empty; it says which command makes weights.
    """
    if not _is_zero(present):
        return
    empty = [name for name in checkpoint.names() if checkpoint.info(name).shape == (0,)]
    if empty:
        _refuse(
            directory,
            f"{safe(checkpoint.label)} was saved by ZeRO-3 without gathering: {len(empty):,} of "
            f"{plural(len(checkpoint.names()), 'tensor')} are empty, among them {short(empty[0])}; "
            "the weights are in its DeepSpeed ZeRO checkpoint",
        )


def _is_zero(present: Sequence[str]) -> bool:
    return (
        _SCRIPT in present
        or ("latest" in present and any(_TAG.fullmatch(name) for name in present))
        or any(name.endswith(tuple(_STATES.values())) for name in present)
    )


def _refuse(directory: Path, verdict: str) -> NoReturn:
    """Raise with what was found and with the command to run first."""
    present = names_in(directory)
    if any(name.endswith(tuple(_STATES.values())) for name in present):
        root, tag = directory.parent, directory.name  # the folder of one step was passed
    else:
        root, tag = directory, _tag(directory, present)
    states = names_in(root / tag) if tag and (root / tag).is_dir() else []
    counts = {
        kind: sum(name.endswith(suffix) for name in states) for kind, suffix in _STATES.items()
    }
    found = " and ".join(plural(count, f"{kind} shard") for kind, count in counts.items() if count)
    where = f"in {short(tag)}/" if tag else "and no folder of a step"
    if not counts["optimizer"]:
        raise CheckpointError(
            f"{verdict}, with {found or 'no shards'} {where}; its weights are put together from "
            "optimizer shards (*_optim_states.pt), which are missing: on multi-node runs each node "
            "keeps its own, copy those of all nodes there"
        )
    script = _SCRIPT if exists(root / _SCRIPT) else "-m deepspeed.utils.zero_to_fp32"
    command = (
        f"cd {shlex.quote(str(root))} && python {script} . out --safe_serialization "
        f"--tag {shlex.quote(tag)}"
    )
    raise CheckpointError(
        f"{verdict}, with {found} {where}; run `{printable(command)}`, which needs deepspeed, then "
        f"pass {printable(str(root / 'out'))}: it holds float32 masters, which are to be compared "
        "with as_dtype= the dtype that is served"
    )


def _tag(root: Path, present: Sequence[str]) -> str:
    """The folder of the step that counts: the one that `latest` names, else the last."""
    if "latest" in present:
        tag = _read_latest(root / "latest")
        if tag not in present:
            raise CheckpointError(
                f"{safe(root / 'latest')} names {short(tag) or 'nothing'}, but DeepSpeed's folder "
                f"of that name is not beside it; there is {first_few(present, 5)}: was the save, "
                "or the copy, cut short?"
            )
        return tag
    steps = {int(match[1]): name for name in present if (match := _TAG.fullmatch(name))}
    return steps[max(steps)] if steps else ""


def _read_latest(path: Path) -> str:
    """The tag in the file `latest`, which is a name and never a path."""
    try:
        stamp(path)  # to open a pipe would wait for ever
        with open(path, "rb") as file:
            tag = file.read(_LONGEST_TAG + 1).decode("utf-8", "replace").strip()
    except OSError as error:
        raise unreadable(path, error) from error
    if tag in (".", "..") or len(tag) > _LONGEST_TAG or any(char in tag for char in "/\\:\0"):
        raise CheckpointError(
            f"{safe(path)} points outside its directory: {short(tag)}; the tag of a step is a "
            "folder beside it, this checkpoint was not written by DeepSpeed"
        )
    return tag
