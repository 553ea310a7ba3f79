"""Writing a checkpoint anew with some of its tensors edited: safetensors, a piece at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import names_in
from pytest_subnet.checkpoints.folders import is_state
from pytest_subnet.checkpoints.json_files import is_text
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_subnet.checkpoints import Checkpoint, TensorInfo

    Edited = Callable[[str], "Iterable[memoryview] | None"]
    """The new bytes of a tensor in row order, in pieces; None where it stays."""

_SHARD_BYTES = 5_000_000_000
"""As transformers cuts a model into files."""

_PIECE = 8 * 1024 * 1024
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Ends of the names of what belongs to a model besides its weights: config, tokenizer."""


class _Placed(NamedTuple):
    """A file to write: its name, what it holds, its header."""

    name: str
    tensors: tuple[TensorInfo, ...]
    header: bytes


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `output` when the block ends, and not before.

    Raises:
        CheckpointError: there is something at `output`, or it cannot be written.
    """
    _refuse_taken(output)
    partial = output.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        try:
            yield partial
            _refuse_taken(output)  # a rename would replace a directory that is empty
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint to {safe(output)}: {error.strerror or error}; give a "
            "path in a directory that is there, can be written to and has room"
        ) from error


def _refuse_taken(output: Path) -> None:
    if not output.name or "\0" in output.name:
        raise CheckpointError(f"{short(output)!r} names no directory that could be written")
    if os.path.lexists(output):
        raise CheckpointError(
            f"{safe(output)} is there already, and nothing is written over it; give another path "
            "or remove it"
        )


def write_weights(
    checkpoint: Checkpoint,
    names: Iterable[str],
    directory: Path,
    edited: Edited,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write tensors of `checkpoint` as safetensors into `directory`, with an index.

    Args:
        checkpoint: where what is not edited is copied from, byte for byte.
        names: of the tensors to write.
        directory: where; empty.
        edited: asked for each name once, in the order of writing.
        shard_bytes: how large a file may become that holds more than one tensor.
    """
    files = _place([checkpoint.info(name) for name in names], shard_bytes)
    for file in files:
        with open(directory / file.name, "xb") as target:
            target.write(file.header)
            for info in file.tensors:
                for piece in edited(info.name) or _copied(checkpoint, info):
                    target.write(piece)
            target.flush()
            os.fsync(target.fileno())  # the directory's name must not outlive the bytes
    weights = {info.name: file.name for file in files for info in file.tensors}
    total = sum(info.nbytes for file in files for info in file.tensors)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        _write_json(directory / "model.safetensors.index.json", index)


def _place(infos: list[TensorInfo], shard_bytes: int) -> list[_Placed]:
    for info in infos:
        if not is_text(info.name) or info.name == "__metadata__" or not DTYPES[info.dtype].code:
            raise CheckpointError(
                f"{short(info.name)} ({info.dtype}) cannot be written: safetensors has no such "
                "name or dtype; rename or cast the tensor"
            )
    shards: list[list[TensorInfo]] = []
    filled = shard_bytes
    for info in infos:
        if not shards or filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += info.nbytes
    placed = []
    for number, shard in enumerate(shards, 1):
        # Wide dtypes first, so that every entry lies at a multiple of its size.
        ordered = sorted(shard, key=lambda info: -DTYPES[info.dtype].itemsize)
        several = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        placed.append(_Placed(f"model{several}.safetensors", tuple(ordered), _header(ordered)))
    return placed


def _header(infos: list[TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in infos:
        start, end = end, end + info.nbytes
        header[info.name] = {
            "dtype": DTYPES[info.dtype].code,
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _copied(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[memoryview]:
    piece = memoryview(bytearray(min(info.nbytes, _PIECE)))
    for start in range(0, info.nbytes, _PIECE):
        part = piece[: min(_PIECE, info.nbytes - start)]
        checkpoint.read_into(info.name, start, part)
        yield part


def copy_beside(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy config and tokenizer of `checkpoint` into `directory`.

    Files of a trainer, indexes of weights, adapters and code are left where they are.

    Raises:
        CheckpointError: one is a link that leads elsewhere than into the checkpoint.
    """
    source = checkpoint.directory
    for name in [] if source is None else names_in(source):
        there = Path(source or "", name)
        wanted = name.endswith(_BESIDE) and not name.endswith(".index.json")
        if not wanted or is_state(name) or name.startswith("adapter_"):
            continue
        if stat.S_ISREG(there.stat().st_mode):  # a pipe has no end
            _refuse_foreign(there)
            shutil.copyfile(there, directory / name)
    if checkpoint.config and not (directory / "config.json").exists():
        _write_json(directory / "config.json", dict(checkpoint.config))


def _refuse_foreign(path: Path) -> None:
    """Raise for a link out of the checkpoint: what it copied might be anything of its reader's."""
    home = path.parent.resolve()
    # The hub's cache keeps files as links into `blobs`, beside `snapshots`.
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(each) for each in homes):
        raise CheckpointError(
            f"{safe(path)} is a link that leads out of the checkpoint; put the file itself there"
        )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
