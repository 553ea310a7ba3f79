"""Safetensors that lie elsewhere, read where they are: the headers, and what is selected of them.

A pair of which one kind of matrix is asked for costs the bytes of that kind. Nothing is downloaded
as a whole and nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from pytest_subnet.checkpoints.base import Checkpoint, Extent, TensorInfo
from pytest_subnet.checkpoints.collector import collector_at_rest
from pytest_subnet.checkpoints.header import header_length, tensors_in
from pytest_subnet.checkpoints.json_files import DuplicateNameError, parse_unique
from pytest_subnet.checkpoints.remote import ranges
from pytest_subnet.checkpoints.remote.ranges import AbsentError, Look, RefusedError, changed, look
from pytest_subnet.checkpoints.remote.urls import RemoteFile, identifies, is_url, masked
from pytest_subnet.checkpoints.sharded import check_shards, refuse_unlisted, shards_in
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_ELSEWHERE = ("pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_config.json")
_OTHER_FILES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".distcp", ".json", ".zip", ".tar", ".gz")
_AT_ONCE = 8
"""Small requests under way at the same time: a checkpoint of 163 shards opens in seconds."""

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class RemoteCheckpoint(Checkpoint):
    """Weights in safetensors files at an address, of which only what is asked for is fetched."""

    def __init__(
        self, headers: Sequence[_Header], index: RemoteFile | None, *, label: str, config: object
    ) -> None:
        """Take what the headers say; `open_remote` reads them.

        Args:
            headers: of each file of weights.
            index: the index that names them, if there is one.
            label: how messages name the checkpoint.
            config: its `config.json`.
        """
        self.label = label
        self.config = config if isinstance(config, dict) else {}
        self.ties = {}
        self.buffers = frozenset()
        weights = [header.file for header in headers]
        self._files = (*([] if index is None else [index]), *weights)
        self._digests = tuple(header.digest for header in headers)
        self._where: dict[str, tuple[TensorInfo, RemoteFile, int]] = {
            name: (info, header.file, offset)
            for header in headers
            for name, (info, offset) in header.tensors.items()
        }
        if not self._where:
            raise CheckpointError(f"{weights[0]} holds no tensors; was the model saved empty?")
        unknown = [file.name for file in self._files if file.version is None]
        self._opening = uuid.uuid4().hex if unknown else ""
        if unknown:
            self.notes = (
                f"{safe(label)}: the server tells neither etag nor date of {first_few(unknown)}, "
                "so that a change while it was read would not have been noticed",
            )

    def names(self) -> Sequence[str]:
        """All tensor names, shard by shard in the order of their bytes."""
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        """What the header says of `name`."""
        try:
            return self._where[name][0]
        except KeyError:
            raise self.unknown(name) from None

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent]:
        """The one run of bytes that any part of a tensor is; its path is an address."""
        self.check_range(name, start, nbytes)
        _, file, offset = self._where[name]
        return (Extent(file, offset + start, nbytes),)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fetch bytes of the file, which must be as it was when its header was read."""
        self.check_range(name, start, len(buffer))
        _, file, offset = self._where[name]
        ranges.read_into(file, offset + start, buffer)
        if not file.is_http:  # over http each answer says of which version it is
            _check_same(file)

    def identity(self) -> Hashable:
        """Address, size and etag or date of each file as they are now, and what its header was.

        Where a server gives neither etag nor date, no two openings have the same identity.
        """
        now = _at_once(_look_again, self._files)
        return tuple(map(_stamp, now)), self._digests, self._opening

    def identity_when_opened(self) -> Hashable:
        """The same as it was when the headers were read."""
        return tuple(map(_stamp, self._files)), self._digests, self._opening

    def check_unchanged(self) -> None:
        """Raise if a file is another one than when its header was read."""
        _at_once(_check_same, self._files)


def open_remote(source: str) -> Checkpoint:
    """Open the safetensors at an address; only headers are fetched.

    Args:
        source: of one `.safetensors` file, of an `*.safetensors.index.json`, or of a directory that
            holds `model.safetensors.index.json` or `model.safetensors`: `hf://org/name[@revision]`
            with an optional directory or file after it, `https://…`, `s3://…`, `gs://…`, or any
            other address that an installed filesystem of fsspec reads.

    Returns:
        The checkpoint; its label shows neither password nor query of the address.

    Raises:
        CheckpointError: there is nothing to read, or it is damaged, inconsistent or in a format
            that is read from disk only.
    """
    given = RemoteFile(source)
    _check_address(given)
    if given.scheme == "hf":
        from pytest_subnet.checkpoints.remote.hub_listing import list_repository

        place, files = list_repository(given)
        return _open(place, _Listed(files), label=masked(given.address))
    return _open(given, _Probed(), label=masked(given.address))


def _check_address(given: RemoteFile) -> None:
    import fsspec

    if "::" in given.address:
        raise CheckpointError(
            f"{given} chains filesystems, which would keep copies; pass the address of the files "
            "themselves"
        )
    known = {"hf", "http", "https", *fsspec.available_protocols()}
    if given.scheme not in known or not is_url(given.address):
        raise CheckpointError(
            f"{given} is no address that can be read; hf://, https://, s3:// and gs:// can, and "
            "what else fsspec has a filesystem for"
        )
    if given.name.endswith(_OTHER_FILES) and not given.name.endswith(".safetensors.index.json"):
        raise CheckpointError(
            f"{given} is no safetensors file, and other formats are only read from disk; download "
            "it first and pass the path"
        )


class _Probed:
    """A place whose files can only be asked for one by one."""

    def look(self, file: RemoteFile) -> Look:
        """A first look; `AbsentError` if there is no such file."""
        return look(file)

    def beside(self, directory: RemoteFile) -> list[str]:
        """What there is of `_ELSEWHERE`."""
        return [
            name
            for name, found in zip(
                _ELSEWHERE, _at_once(self._has, [directory / n for n in _ELSEWHERE]), strict=True
            )
            if found
        ]

    def _has(self, file: RemoteFile) -> bool:
        return not isinstance(_try_look(self, file), AbsentError)


class _Listed:
    """A place whose files are known."""

    def __init__(self, files: Mapping[str, RemoteFile]) -> None:
        self._files = files

    def look(self, file: RemoteFile) -> Look:
        """A first look; `AbsentError` if there is no such file."""
        if file.address not in self._files:
            raise AbsentError(
                f"{file} does not exist: the repository has no such file; check its name"
            )
        return look(self._files[file.address])

    def beside(self, directory: RemoteFile) -> list[str]:
        """All names in a directory."""
        start = f"{directory.address}/"
        return sorted(
            address.removeprefix(start)
            for address in self._files
            if address.startswith(start) and "/" not in address.removeprefix(start)
        )


class _Header(NamedTuple):
    """The tensors of one file, in the order of their bytes, and where each one starts."""

    file: RemoteFile
    tensors: Mapping[str, tuple[TensorInfo, int]]
    digest: str


def _open(place: RemoteFile, store: _Probed | _Listed, *, label: str) -> RemoteCheckpoint:
    if place.name.endswith((".safetensors", ".safetensors.index.json")):
        chosen = store.look(place)
    else:
        chosen = _choose(place, store, label)
    directory = chosen.file.parent
    if chosen.file.name.endswith(".json"):
        index: RemoteFile | None = chosen.file
        headers = _shards(chosen.file, store)
    else:
        index = None
        headers = _headers([chosen])
    return RemoteCheckpoint(headers, index, label=label, config=_config(directory, store))


def _choose(directory: RemoteFile, store: _Probed | _Listed, label: str) -> Look:
    """The file to open in a directory."""
    names = (_INDEX, _SINGLE, _ADAPTER)
    answers = _at_once(lambda name: _try_look(store, directory / name), names)
    found = {n: a for n, a in zip(names, answers, strict=True) if isinstance(a, Look)}
    if _ADAPTER in found:
        raise CheckpointError(
            f"{safe(label)} holds a PEFT adapter ({_ADAPTER}), which is only read from disk; "
            "download it first and pass the directory"
        )
    if len(found) == 2:
        raise CheckpointError(
            f"{safe(label)} holds two checkpoints: {first_few(list(found))}; "
            "remove the stale one, or pass the file that counts"
        )
    for one in found.values():
        return one
    for answer in answers:
        if isinstance(answer, RefusedError):
            raise answer
    beside = store.beside(directory)
    what = f"it holds {first_few(beside, 5)}" if beside else "nothing else was found there either"
    raise CheckpointError(
        f"{safe(label)} has no weights that can be read from afar: it has neither {_INDEX} nor "
        f"{_SINGLE}, {what}; other formats are only read from disk, download it first and pass the "
        "directory"
    )


def _try_look(store: _Probed | _Listed, file: RemoteFile) -> Look | AbsentError:
    try:
        return store.look(file)
    except AbsentError as error:
        return error


def _shards(index: RemoteFile, store: _Probed | _Listed) -> list[_Header]:
    expected = shards_in(index, _json(index, unique=True), (".safetensors",))
    files = [index.parent / shard for shard in expected]
    answers = _at_once(lambda file: _try_look(store, file), files)
    missing = [
        shard
        for shard, answer in zip(expected, answers, strict=True)
        if isinstance(answer, AbsentError)
    ]
    if missing:
        raise CheckpointError(
            f"{index} lists {plural(len(expected), 'shard')}, {len(missing)} missing: "
            f"{first_few([short(shard) for shard in missing])}; upload them beside it"
        )
    if isinstance(store, _Listed):
        refuse_unlisted(index, expected, store.beside(index.parent))
    headers = _headers([answer for answer in answers if isinstance(answer, Look)])
    found = dict(zip(expected, (header.tensors for header in headers), strict=True))
    check_shards(index, expected, found)
    return headers


def _headers(looks: Sequence[Look]) -> list[_Header]:
    import xxhash

    raws = _at_once(_raw_header, looks)
    with collector_at_rest():
        return [
            _Header(one.file, tensors_in(one.file, raw, _size(one)), xxhash.xxh3_128_hexdigest(raw))
            for one, raw in zip(looks, raws, strict=True)
        ]


def _raw_header(one: Look) -> bytes:
    if one.head.startswith(b"version "):
        raise CheckpointError(
            f"{one.file} is a Git LFS pointer, not weights; pass the address of the file itself "
            "(on the hub /resolve/ instead of /raw/)"
        )
    raw = bytearray(header_length(one.file, one.head, _size(one)))
    ranges.read_into(one.file, len(one.head), memoryview(raw))
    return bytes(raw)


def _size(one: Look) -> int:
    return one.file.size or 0


def _config(directory: RemoteFile, store: _Probed | _Listed) -> dict[str, object]:
    file = directory / "config.json"
    try:
        store.look(file)
        return _json(file)
    except AbsentError:
        return {}


def _json(file: RemoteFile, *, unique: bool = False) -> dict[str, object]:
    """The JSON object at an address, as `read_json` takes it from a file."""
    raw = ranges.read_whole(file)
    try:
        value = parse_unique(raw) if unique else json.loads(raw.decode("utf-8"))
    except DuplicateNameError as error:
        raise CheckpointError(
            f"{file} lists {short(error)} twice; which one counts cannot be known, save it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({short(error)}); save it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object; save it again")
    return value


def _stamp(file: RemoteFile) -> tuple[str, int | None, str | None, str]:
    """What a cache may keep of a file: no secret, and enough to tell it from any other.

    An etag that identifies it and the path say which file it is. A date or a size do not, where the
    query chooses the file; the query itself may hold a secret.
    """
    known = identifies(file.version, file.size)
    secret = "" if known else hashlib.sha256(file.address.encode()).hexdigest()[:16]
    return masked(file.address), file.size, file.version, secret


def _look_again(file: RemoteFile) -> RemoteFile:
    """The file as it is now; what the hub has at a commit stays."""
    return file if file.scheme == "hf" else look(RemoteFile(file.address)).file


def _check_same(file: RemoteFile) -> None:
    now = _look_again(file)
    if (now.size, now.version) != (file.size, file.version):
        raise changed(file)


def _at_once(work: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> list[ResultT]:
    """`work` of each item, in their order, a few at a time: most of it is waiting."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items))) as pool:
        return list(pool.map(work, items))
