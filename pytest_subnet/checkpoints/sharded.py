"""The index of a sharded checkpoint, shared by the formats that have one.

An index says which file holds which tensor. Files and index can disagree, and a file name can
lead outside the directory; both are found here, before anything is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.files import unreadable
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in the file `path`; `CheckpointError` when it is anything else."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{safe(path)} is not JSON ({safe(error)}); save it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{safe(path)} holds no JSON object; save it again")
    return value


def read_index(path: Path, suffixes: tuple[str, ...]) -> dict[str, list[str]]:
    """The shards an index names, each with the tensors it must hold.

    Args:
        path: the `*.index.json`.
        suffixes: how the name of a shard may end.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{safe(path)} has no weight_map, or an empty one; save it again")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                f"{safe(path)} points outside its directory: {safe(name)} in {safe(shard)}; "
                "a shard is a file beside its index, this checkpoint was not written by a trainer"
            )
        if not shard.endswith(suffixes):
            raise CheckpointError(
                f"{safe(path)} lists {safe(name)} in {safe(shard)}, which is no "
                f"{' or '.join(suffixes)} file"
            )
        shards.setdefault(shard, []).append(name)
    missing = [shard for shard in shards if not (path.parent / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{safe(path)} lists {len(shards)} shards, {len(missing)} missing: "
            f"{first_few(missing)}; copy or download them into {safe(path.parent)}"
        )
    return shards


def _is_plain(shard: str) -> bool:
    return bool(shard) and shard not in (".", "..") and not any(char in shard for char in "/\\:\0")


def check_shards(
    index: Path, expected: Mapping[str, Collection[str]], found: Mapping[str, Collection[str]]
) -> None:
    """Raise unless every shard holds exactly the tensors that the index says it holds."""
    for shard, names in expected.items():
        absent = sorted(set(names) - set(found[shard]))
        if absent:
            raise CheckpointError(
                f"{safe(index)} says that {safe(shard)} holds {first_few(absent)}, "
                "but it does not; save the checkpoint again"
            )
        extra = sorted(set(found[shard]) - set(names))
        if extra:
            raise CheckpointError(
                f"{safe(index.parent / shard)} holds {first_few(extra)}, which the index "
                f"{safe(index.name)} does not place there; save the checkpoint again"
            )
