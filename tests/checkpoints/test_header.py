"""Headers of safetensors files, held against the library that defines the format."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, open_checkpoint
from pytest_subnet.checkpoints.dtypes import BY_CODE
from pytest_subnet.checkpoints.header import read_header

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHT = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def entry(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_says_what_the_library_says(tmp_path: Path, storable: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(storable, path, metadata={"format": "pt"})
    header = read_header(path)
    with safe_open(path, "pt") as theirs:
        assert list(header.tensors) == theirs.offset_keys()
        for name, (info, _) in header.tensors.items():
            part = theirs.get_slice(name)
            assert info.name == name
            assert list(info.shape) == part.get_shape()
            assert info.dtype == BY_CODE[part.get_dtype()].name
            tensor = theirs.get_tensor(name)
            assert info.dtype == str(tensor.dtype).removeprefix("torch.")
            assert info.nbytes == tensor.numel() * tensor.element_size()
            assert info.numel == tensor.numel()


def test_offsets_are_where_the_library_reads(
    tmp_path: Path, storable: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(storable, path)
    raw = path.read_bytes()
    with safe_open(path, "pt") as theirs:
        for name, (info, offset) in read_header(path).tensors.items():
            there = theirs.get_tensor(name).reshape(-1).view(torch.uint8)
            assert raw[offset : offset + info.nbytes] == bytes(there.tolist())


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_knows_the_size_of_every_dtype(
    tmp_path: Path, write_raw: Callable[..., Path], code: str
) -> None:
    dtype = BY_CODE[code]
    assert torch.empty(1, dtype=getattr(torch, dtype.name)).element_size() == dtype.itemsize
    assert getattr(torch, dtype.name).is_floating_point == dtype.floating
    size = 3 * dtype.itemsize
    path = write_raw(tmp_path / "one.safetensors", {"a": entry(code, [3], 0, size)}, bytes(size))
    (info, _) = read_header(path).tensors["a"]
    with safe_open(path, "pt") as theirs:
        assert getattr(torch, info.dtype) == theirs.get_tensor("a").dtype


def test_reads_no_data(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    size = 2**40
    path = write_raw(tmp_path / "huge.safetensors", {"a": entry("F32", [size // 4], 0, size)})
    start = path.stat().st_size
    os.truncate(path, start + size)  # a hole: nothing on disk
    assert read_header(path).tensors["a"] == (("a", (size // 4,), "float32", size), start)


def test_digest_is_of_the_header_alone(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("other", 2.0)):
        save_file({"a": torch.full((2,), value)}, tmp_path / name)
    save_file({"b": torch.ones(2)}, tmp_path / "third")
    one, other, third = (read_header(tmp_path / n).digest for n in ("one", "other", "third"))
    assert one == other != third


def _offsets(code: str, shape: list[Any], start: Any, end: Any, nbytes: int) -> str:
    return f"a is {code}{shape}, {nbytes} bytes, but its offsets are {start} to {end}"


REFUSED = [
    # (header, bytes of data, what is wrong)
    ({"a": entry("F32", [2, 3], 0, 25)}, 25, _offsets("F32", [2, 3], 0, 25, 24)),
    ({"a": entry("F32", [2, 3], -24, 0)}, 0, _offsets("F32", [2, 3], -24, 0, 24)),
    ({"a": entry("F32", [0], True, True)}, 1, _offsets("F32", [0], True, True, 0)),
    ({"a": entry("F32", [6], 0.0, 24.0)}, 24, _offsets("F32", [6], 0.0, 24.0, 24)),
    ({"a": WEIGHT}, 20, "a ends at byte 24 of its data, which has 20"),
    ({"a": WEIGHT}, 32, "its last 8 bytes belong to no tensor"),
    ({"a": entry("F32", [1], 4, 8)}, 8, "4 bytes before a belong to no tensor"),
    ({"a": WEIGHT, "b": entry("F32", [6], 20, 44)}, 44, "the bytes of b overlap those of a"),
    ({"a": WEIGHT, "b": entry("F32", [6], 0, 24)}, 24, "the bytes of b overlap those of a"),
    ({"a": entry("Q4", [6], 0, 24)}, 24, "a has the unknown dtype 'Q4'"),
    ({"a": entry("C128", [1], 0, 16)}, 16, "a has the unknown dtype 'C128'"),
    ({"a": entry("f32", [6], 0, 24)}, 24, "a has the unknown dtype 'f32'"),
    *(
        ({"a": entry("U8", shape, 0, 1)}, 1, f"a has the impossible shape {shape}")
        for shape in ([True], [1.0], [-1, -1], [None], ["1"], [[1]], [2**62, 4], [2**63])
    ),
    (
        b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}',
        0,
        "a has the impossible shape [-0.0]",
    ),
    *(
        ({"a": odd}, 24, "a is not given as exactly dtype, shape and data_offsets")
        for odd in (
            None,
            [0, 24],
            {"dtype": "F32", "shape": [6]},
            {**WEIGHT, "data_offsets": [0, 12, 24]},
            {**WEIGHT, "shape": 6},
            {**WEIGHT, "dtype": 5},
        )
    ),
    ([WEIGHT], 24, "its header is not a JSON object"),
    (b"", 0, "its header is not JSON (Expecting value: line 1 column 1 (char 0))"),
    (b'{"a":', 0, "its header is not JSON (Expecting value: line 1 column 6 (char 5))"),
    *(
        ({"__metadata__": odd, "a": WEIGHT}, 24, "its __metadata__ is not a map of strings")
        for odd in ("pt", {"format": 1}, {"x": "\ud800"}, {"\ud800": "x"})
    ),
    ({"\ud800": WEIGHT}, 24, "the name \\ud800 is not valid Unicode"),
]


@pytest.mark.parametrize(("header", "data", "what"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refuses_what_the_library_refuses(
    tmp_path: Path,
    write_raw: Callable[..., Path],
    refusal: Callable[[Any], str],
    header: Any,
    data: int,
    what: str,
) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(data))
    assert refusal(path) == f"{path} is truncated or corrupt: {what}; save or download it again"
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        # A field of tomorrow could change what the bytes mean; the library overlooks it.
        ({**WEIGHT, "x": 1}, "a is not given as exactly dtype, shape and data_offsets"),
        (entry("U8", [0, 2**63], 0, 0), f"a has the impossible shape [0, {2**63}]"),
        (entry("U8", [1] * 65, 0, 1), "a has a shape of 65 dimensions"),
        (entry("U8", [1] * 10**6, 0, 1), "a has a shape of 1,000,000 dimensions"),
    ],
    ids=["field", "entries", "65 dimensions", "a million dimensions"],
)
def test_refuses_what_the_library_overlooks(
    tmp_path: Path,
    write_raw: Callable[..., Path],
    refusal: Callable[[Any], str],
    entry: Any,
    what: str,
) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": entry}, bytes(entry["data_offsets"][1]))
    with safe_open(path, "pt") as theirs:
        assert theirs.offset_keys() == ["a"]
    assert refusal(path) == f"{path} is truncated or corrupt: {what}; save or download it again"


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "it has only 0 bytes"),
        (b"\x10\0\0", "it has only 3 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "its header needs 100 bytes, the file has 2"),
    ],
)
def test_refuses_a_file_cut_in_its_header(
    tmp_path: Path, refusal: Callable[[Any], str], raw: bytes, what: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert refusal(path) == (f"{path} is truncated or corrupt: {what}; save or download it again")


@pytest.mark.parametrize("raw", [b"<!DOCTYPE html>", b"PK\x03\x04 a zip file", b"\xff" * 20])
def test_refuses_another_format(tmp_path: Path, refusal: Callable[[Any], str], raw: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    assert refusal(path) == (
        f"{path} is not a safetensors file (its first bytes are {raw[:8]!r}); "
        "was an error page or another format saved under this name?"
    )


def test_refuses_a_git_lfs_pointer(tmp_path: Path, refusal: Callable[[Any], str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 24\n")
    assert refusal(path) == (
        f"{path} is a Git LFS pointer, not weights; run `git lfs pull` in its repository"
    )


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_refuses_entries_smaller_than_a_byte(
    tmp_path: Path, write_raw: Callable[..., Path], refusal: Callable[[Any], str], code: str
) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": entry(code, [8], 0, 4)}, bytes(4))
    assert refusal(path) == (
        f"{path}: a is stored as {code}, less than a byte an entry; "
        "dequantise it first (compressed-tensors and transformers can)"
    )


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (f'{{"a":{json.dumps(WEIGHT)},"b":1,"a":{json.dumps(WEIGHT)}}}', "a"),
        ('{"a":{"dtype":"F32","shape":[6],"shape":[2,3],"data_offsets":[0,24]}}', "shape"),
        (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{json.dumps(WEIGHT)}}}', "x"),
    ],
)
def test_refuses_a_name_that_occurs_twice(
    tmp_path: Path,
    write_raw: Callable[..., Path],
    refusal: Callable[[Any], str],
    header: str,
    name: str,
) -> None:
    path = write_raw(tmp_path / "model.safetensors", header.encode(), bytes(24))
    assert refusal(path) == (
        f"{path} lists {name} twice in its header; which one counts cannot be known, save it again"
    )


@pytest.mark.parametrize("raw", [b'{"x":' * 100_000, b"[" * 1_000_000])
def test_refuses_endless_nesting(
    tmp_path: Path, write_raw: Callable[..., Path], refusal: Callable[[Any], str], raw: bytes
) -> None:
    path = write_raw(tmp_path / "model.safetensors", raw)
    assert "its header is not JSON (maximum recursion depth exceeded" in refusal(path)


def test_message_about_endless_values_is_short(
    tmp_path: Path, write_raw: Callable[..., Path], refusal: Callable[[Any], str]
) -> None:
    header = {"n" * 1_000_000: entry("F32", [1] * 64, 0, 10**4000)}
    text = refusal(write_raw(tmp_path / "model.safetensors", header))
    assert "nnn… is F32[1, 1, 1, " in text
    assert len(text) < 1500


def test_names_are_shown_escaped(
    tmp_path: Path, write_raw: Callable[..., Path], refusal: Callable[[Any], str]
) -> None:
    header = {"\x1b[2J\nall tests passed": entry("F32", [1], 0, 8)}
    text = refusal(write_raw(tmp_path / "model.safetensors", header, bytes(8)))
    assert "\\x1b[2J\\nall tests passed is F32[1], 4 bytes" in text


def test_accepts_what_the_library_accepts(tmp_path: Path, write_raw: Callable[..., Path]) -> None:
    raw = b' {"b":%s, "\xc3\xa9":%s, "__metadata__":null}   ' % (
        json.dumps(entry("BF16", [3], 1, 7)).encode(),  # at an odd offset
        json.dumps(entry("U8", [1], 0, 1)).encode(),
    )
    path = write_raw(tmp_path / "model.safetensors", raw, bytes(7))
    with safe_open(path, "pt") as theirs:
        assert list(read_header(path).tensors) == theirs.offset_keys() == ["é", "b"]


def test_file_that_shrinks_while_its_header_is_read_is_refused(
    tmp_path: Path, write_raw: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"a": WEIGHT}, bytes(24))
    before = path.stat().st_size
    os.truncate(path, 30)
    from pytest_subnet.checkpoints import header

    as_before = header.stamp(path)._replace(size=before)
    monkeypatch.setattr(header, "stamp", lambda _: as_before)
    with pytest.raises(CheckpointError, match="it shrank while its header was read"):
        read_header(path)


def test_as_many_dimensions_as_torch_works_with_are_read(
    tmp_path: Path, write_raw: Callable[..., Path]
) -> None:
    header = {"a": entry("F32", [1] * 64, 0, 4)}
    path = write_raw(tmp_path / "model.safetensors", header, torch.ones(1).numpy().tobytes())
    assert open_checkpoint(path).read("a").dim() == 64
