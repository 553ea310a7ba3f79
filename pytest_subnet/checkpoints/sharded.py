"""The index of a sharded checkpoint, shared by the formats that have one.

An index says which file holds which tensor. Files and index can disagree, and a file name can
lead outside the directory; both are found here, before anything is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import exists, names_in
from pytest_subnet.checkpoints.json_files import read_json
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from pytest_subnet.checkpoints.remote.urls import RemoteFile

_NUMBERED = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)(?P<suffix>\.\w+)", re.ASCII)


def read_index(path: Path, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """The shards an index names, each with the tensors it must hold.

    Args:
        path: the `*.index.json`.
        suffixes: how the name of a shard may end.
    """
    shards = shards_in(path, read_json(path, unique=True), suffixes)
    _check_present(path, shards)
    _check_listed(path, shards)
    return shards


def shards_in(
    path: Path | str, index: Mapping[str, object], suffixes: tuple[str, ...]
) -> dict[str, list[str]]:
    """The same from what the index says, without a look at the files."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{safe(path)} has no weight_map, or an empty one; save it again")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if isinstance(shard, str) and not _is_plain(shard):
            raise CheckpointError(
                f"{safe(path)} points outside its directory: {short(name)} in {short(shard)}; "
                "a shard is a file beside its index, this checkpoint was not written by a trainer"
            )
        if not isinstance(shard, str) or not shard.endswith(suffixes):
            raise CheckpointError(
                f"{safe(path)} lists {short(name)} in {short(shard)}, which is no "
                f"{' or '.join(suffixes)} file; save the checkpoint again"
            )
        shards.setdefault(shard, []).append(name)
    return shards


def _check_present(path: Path, shards: Collection[str]) -> None:
    missing = [shard for shard in shards if not exists(path.parent / shard)]
    if missing:
        raise CheckpointError(
            f"{safe(path)} lists {plural(len(shards), 'shard')}, {len(missing)} missing: "
            f"{first_few([short(shard) for shard in missing])}; copy or download them into "
            f"{safe(path.parent)}"
        )


def _check_listed(path: Path, shards: Collection[str]) -> None:
    """Raise if a file beside the index belongs to its series and would be left out."""
    refuse_unlisted(path, shards, names_in(path.parent))


def refuse_unlisted(path: Path | str, shards: Collection[str], beside: Collection[str]) -> None:
    """Raise if one of the names `beside` an index belongs to its series and would be left out."""
    listed = {series(shard) for shard in shards} - {None}
    extra = [name for name in beside if name not in shards and series(name) in listed]
    if extra:
        raise CheckpointError(
            f"{safe(path)} does not list {first_few(extra)}, which belongs to the same series; its "
            "tensors would be left out, save the checkpoint again or remove the file"
        )


def series(file_name: str) -> tuple[str, int, str] | None:
    """What the numbered shards of one save have in common; None for any other file.

    >>> series("model-00002-of-00003.safetensors"), series("model.safetensors")
    (('model', 3, '.safetensors'), None)
    """
    match = _NUMBERED.fullmatch(file_name)
    return (match["stem"], int(match["count"]), match["suffix"]) if match else None


def _is_plain(shard: str) -> bool:
    return bool(shard) and shard not in (".", "..") and not any(char in shard for char in "/\\:\0")


def check_shards(
    index: Path | RemoteFile,
    expected: Mapping[str, Collection[str]],
    found: Mapping[str, Collection[str]],
) -> None:
    """Raise unless every shard holds exactly the tensors that the index says it holds."""
    for shard, names in expected.items():
        absent = _missing_from(found[shard], names)
        if absent:
            raise CheckpointError(
                f"{safe(index)} says that {safe(shard)} holds {absent}, "
                "but it does not; save the checkpoint again"
            )
        extra = _missing_from(names, found[shard])
        if extra:
            raise CheckpointError(
                f"{safe(index.parent / shard)} holds {extra}, which the index "
                f"{safe(index.name)} does not place there; save the checkpoint again"
            )


def _missing_from(there: Collection[str], wanted: Collection[str]) -> str:
    return first_few([short(name) for name in sorted(set(wanted) - set(there))])
