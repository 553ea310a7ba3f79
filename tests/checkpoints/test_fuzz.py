"""Ten thousand damaged headers and indexes: only `CheckpointError`, and nothing false accepted.

What is accepted must be accepted by the format's own library, with the same names, shapes and
dtypes. Each case is made from its number alone: `damaged(Random(case), …)` makes it again.
"""

from __future__ import annotations

import copy
import json
import zipfile
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from pytest_subnet import Checkpoint, CheckpointError, open_checkpoint
from pytest_subnet.checkpoints.dtypes import BY_CODE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HEADERS, INDEXES, ARCHIVES = (2000, 8000), 2000, 400

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b.bias": torch.ones(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "mask": torch.tensor([True, False, True]),
    "step": torch.tensor(7),
}

ODD_VALUES: list[Any] = [
    *(None, True, False, [], [0], [-1], [True], [2.0], [2**62, 4], [2**40, 2**40, 0], [[1]], {}),
    *(0, 1, -1, 1.5, -0.0, 2**31, 2**63 - 1, 2**63, 2**64, 10**400, float("nan"), float("inf")),
    *("", "F32", "BF16", "F4", "F99", "C128", "a.weight", "__metadata__", "\ud800", "\x1b[2J"),
    *("../up.safetensors", "/etc/passwd", "C:\\x", "nul\0byte", "..", "model.safetensors"),
    *({"dtype": "F32"}, {"format": 3}, {"format": "pt"}),
]
TEXTS = [value for value in ODD_VALUES if isinstance(value, str)]
SNIPPETS = [
    *(b'"', b",", b":", b"[", b"]", b"{", b"}", b" ", b"\n", b"\0", b"-", b"-0", b".0", b"e9"),
    *(b"0", b"00", b"1", b"9" * 30, b"null", b"true", b"NaN", b"-Infinity", b"\xff"),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"[" * 300, b"[" * 5000),
    *(b'"shape":[0],', b'"x":1,', b'"x":[[[[]]]],', b'"a.weight":', b'"dtype":"F32",'),
]


def damaged(random: Random, document: dict[str, Any]) -> bytes:
    """The JSON `document`, with up to two faults in what it says and two in how it is written."""
    faulty = copy.deepcopy(document)
    for _ in range(random.randint(0, 2)):
        damage_value(random, faulty)
    raw = json.dumps(faulty, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(random.choice((0, 0, 1, 2))):
        raw = damaged_bytes(random, raw)
    return raw


def damage_value(random: Random, document: dict[str, Any]) -> None:
    """Change, drop, move or add one value anywhere in `document`."""
    places = list(places_in(document))
    if not places:
        return
    (holder, key), (other, elsewhere) = random.choice(places), random.choice(places)
    value = copy.deepcopy(random.choice([holder[key], *ODD_VALUES]))
    match random.randrange(5):
        case 0:
            holder[key] = value
        case 1:
            del holder[key]
        case 2:
            step = random.choice((-8, -2, -1, 1, 2, 8, 2**32))
            holder[key] = holder[key] + step if type(holder[key]) is int else value
        case 3:
            pair = copy.deepcopy((other[elsewhere], holder[key]))
            holder[key], other[elsewhere] = pair
        case _ if isinstance(holder, list):
            holder.insert(key, value)
        case _:
            holder[random.choice([*holder, *TEXTS])] = value


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everywhere a value stands: its container and its key."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places_in(value[key])


def damaged_bytes(random: Random, raw: bytes) -> bytes:
    """`raw` with one run of bytes lost, repeated, replaced or cut off."""
    start = random.randrange(len(raw) + 1)
    stop = min(len(raw), start + random.choice((1, 1, 1, 2, 8, 64)))
    part = raw[start:stop]
    replacement = random.choice(
        [
            b"",
            part + part,
            random.randbytes(len(part)),
            bytes(byte ^ (1 << random.randrange(8)) for byte in part),
            random.choice(SNIPPETS),
            random.choice(SNIPPETS) + part,
        ]
    )
    return raw[:start] + replacement + (raw[stop:] if random.random() < 0.9 else b"")


def overwrite(path: Path, raw: bytes) -> None:
    """Replace what is in `path`; some file systems flush a file that is first cut to nothing."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(raw)
        file.truncate()


def content(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor; their data must be there to be read."""
    for name in checkpoint.names():
        checkpoint.fingerprint(name)
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    return {info.name: (info.shape, info.dtype) for info in infos}


def ours(source: Path, case: int) -> dict[str, tuple[tuple[int, ...], str]] | None:
    """What we find in `source`; None when it is refused, in one clean line."""
    try:
        return content(open_checkpoint(source))
    except CheckpointError as error:
        text = str(error)
        assert text.isprintable(), case
        assert len(text) < 1500, case
        return None


def theirs(path: Path) -> dict[str, tuple[tuple[int, ...], str]] | None:
    """What the format's own library finds in a safetensors file; None when it refuses it."""
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            return {
                name: (tuple(part.get_shape()), BY_CODE[part.get_dtype()].name)
                for name, part in parts.items()
            }
    except SafetensorError:
        return None


def header_of(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file as its library writes it."""
    raw = save(tensors, metadata={"format": "pt"})
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


@pytest.mark.parametrize(
    "headers", [range(HEADERS[0]), pytest.param(range(*HEADERS), marks=pytest.mark.slow)]
)
def test_damaged_headers(tmp_path: Path, headers: range) -> None:
    header, data = header_of(TENSORS)
    path = tmp_path / "model.safetensors"
    accepted = 0
    for case in headers:
        random = Random(case)
        raw = damaged(random, header)
        length = len(raw)
        if random.random() < 0.1:
            length = random.choice((0, 1, max(length - 1, 0), length + 1, 2**31, 2**64 - 1))
        cut = random.randrange(len(data) + 1) if random.random() < 0.1 else len(data)
        overwrite(path, length.to_bytes(8, "little") + raw + data[:cut])
        found = ours(path, case)
        accepted += found is not None
        if found is not None:
            assert found == theirs(path), case
    # The damage is neither too light nor too heavy.
    assert len(headers) // 20 < accepted < len(headers) // 2


def test_damaged_indexes(tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    root.mkdir()
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for number, (name, tensor) in enumerate(TENSORS.items()):
        shards[list(shards)[number % 2]][name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, root / shard)
    save_file(TENSORS, tmp_path / "up.safetensors")  # there to be found
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 44}, "weight_map": weight_map}
    expected = {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in TENSORS.items()
    }
    accepted = 0
    for case in range(INDEXES):
        path = root / "model.safetensors.index.json"
        overwrite(path, damaged(Random(case), index))
        found = ours(root, case)
        accepted += found is not None
        assert found in (None, expected), case
    assert INDEXES // 20 < accepted < INDEXES // 2


def record_starts(raw: bytes) -> list[int]:
    """Where the parts of a zip file begin, its directory among them."""
    starts = []
    for mark in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"):
        at = raw.find(mark)
        while at >= 0:
            starts.append(at)
            at = raw.find(mark, at + 1)
    return starts


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # of torch, when it is asked
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_damaged_torch_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    starts = record_starts(whole) if kind == "zip" else [0]
    accepted = 0
    for case in range(ARCHIVES):
        random = Random(case)
        raw = whole
        for _ in range(random.choice((1, 1, 2))):
            if random.random() < 0.5:
                raw = damaged_bytes(random, raw)
            else:  # in the pickle or beside a record's start, where the meaning is
                start = random.choice(starts) + random.randrange(200)
                raw = raw[:start] + random.randbytes(random.choice((1, 2, 4))) + raw[start + 1 :]
        overwrite(path, raw)
        found = ours(path, case)
        accepted += found is not None
        if found is not None:
            assert found == torch_finds(path, mapped=kind == "zip"), case
    assert accepted > ARCHIVES // 50


def torch_finds(path: Path, *, mapped: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    return {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor)
    }


def test_damage_is_the_same_every_time() -> None:
    document = {"a": [1, 2], "b": {"c": "d"}}
    make: Callable[[int], bytes] = lambda case: damaged(Random(case), document)  # noqa: E731
    assert [make(case) for case in range(50)] == [make(case) for case in range(50)]
    assert len({make(case) for case in range(50)}) > 20


def test_oracle_refuses_what_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    assert theirs(path) == content(open_checkpoint(path))
    path.write_bytes(path.read_bytes()[:-1])
    assert theirs(path) is None
    assert not zipfile.is_zipfile(path)
