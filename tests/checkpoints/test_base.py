"""The contract of every checkpoint, and that all formats keep it alike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn

from pytest_subnet import Checkpoint, CheckpointError, open_checkpoint
from pytest_subnet.checkpoints import Extent, TensorInfo, base

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]


class Smallest(Checkpoint):
    """A format that knows only what it must."""

    def __init__(self, tensors: Tensors, **attributes: Any) -> None:
        self.label, self.config, self.ties, self.buffers = "smallest", {}, {}, frozenset()
        self.__dict__.update(attributes)
        self.tensors = tensors
        self.calls: list[tuple[str, int, int]] = []

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise self.unknown(name)
        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        return TensorInfo(name, tuple(tensor.shape), dtype, tensor.nbytes)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.calls.append((name, start, len(buffer)))
        raw = self.tensors[name].contiguous().reshape(-1).view(torch.uint8)
        buffer[:] = bytes(raw[start : start + len(buffer)].tolist())

    def identity(self) -> Hashable:
        return id(self)


def test_cannot_be_made_without_its_four_methods() -> None:
    with pytest.raises(TypeError, match=r"identity.*info.*names.*read_into"):
        Checkpoint()  # type: ignore[abstract]


def test_bytes_lie_nowhere_unless_a_format_says_so() -> None:
    checkpoint = Smallest({"a": torch.ones(2)})
    assert checkpoint.extents("a", 0, 8) is None
    assert checkpoint.view("a") is None
    assert not checkpoint.shows_ties
    assert checkpoint.directory is None


@pytest.mark.parametrize("rows", [None, slice(None), slice(1, 4), slice(-2, None), slice(4, 99)])
def test_reads_every_dtype_from_bytes(
    every_dtype: Tensors, same_bits: Same, rows: slice | None
) -> None:
    checkpoint = Smallest(every_dtype)
    for name, tensor in every_dtype.items():
        if rows is None:
            assert same_bits(checkpoint.read(name), tensor)
        elif tensor.dim():
            assert same_bits(checkpoint.read(name, rows), tensor[rows])


def test_reads_only_the_rows_asked_for() -> None:
    checkpoint = Smallest({"a": torch.arange(20.0).reshape(5, 4)})
    checkpoint.read("a", slice(2, 4))
    checkpoint.read("a", slice(3, 1))
    assert checkpoint.calls == [("a", 2 * 16, 2 * 16)]


def test_what_is_read_can_be_written_to_and_is_a_copy() -> None:
    tensor = torch.zeros(3)
    read = Smallest({"a": tensor}).read("a")
    read.add_(1)
    assert torch.equal(tensor, torch.zeros(3))


def test_rows_with_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="has a step; only whole runs of rows can be read"):
        Smallest({"a": torch.ones(4)}).read("a", slice(0, 4, 2))


def test_rows_of_a_single_number_are_refused() -> None:
    checkpoint = Smallest({"a": torch.tensor(1.0)})
    assert checkpoint.read("a") == 1
    with pytest.raises(ValueError, match="a is a single number and has no rows"):
        checkpoint.read("a", slice(0, 1))


@pytest.mark.parametrize(("start", "count"), [(0, 8), (8, 0), (3, 5), (0, 0)])
def test_range_within_a_tensor_is_accepted(start: int, count: int) -> None:
    Smallest({"a": torch.ones(2)}).check_range("a", start, count)


@pytest.mark.parametrize(("start", "count"), [(0, 9), (8, 1), (9, 0), (-1, 1)])
def test_range_outside_a_tensor_is_refused(start: int, count: int) -> None:
    with pytest.raises(CheckpointError, match="a of smallest has 8 bytes; bytes "):
        Smallest({"a": torch.ones(2)}).check_range("a", start, count)


def test_fingerprint_of_a_tensor_is_xxh3_of_its_bytes() -> None:
    tensor = torch.arange(7, dtype=torch.int16)
    expected = xxhash.xxh3_128_hexdigest(bytes(tensor.view(torch.uint8).tolist()))
    assert Smallest({"a": tensor}).fingerprint("a") == expected


def test_fingerprint_does_not_depend_on_the_pieces_that_are_hashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Smallest({"a": torch.arange(1000.0)}).fingerprint()
    monkeypatch.setattr(base, "_HASH_PIECE", 333)
    checkpoint = Smallest({"a": torch.arange(1000.0)})
    assert checkpoint.fingerprint() == whole
    assert len(checkpoint.calls) == 13


def test_fingerprint_does_not_depend_on_the_order_of_names() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    first = Smallest({"a": one, "b": other}).fingerprint()
    assert Smallest({"b": other, "a": one}).fingerprint() == first


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(1)},
        {"c": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0, 3.0])},
        {"a": torch.tensor([1.0, -2.0])},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0], dtype=torch.float64)},
    ],
)
def test_fingerprint_tells_contents_apart(other: Tensors) -> None:
    known = Smallest({"a": torch.tensor([1.0, 2.0])}).fingerprint()
    assert Smallest(other).fingerprint() != known


def test_fingerprint_counts_a_tied_tensor_once() -> None:
    tensor = torch.ones(2)
    once = Smallest({"embed": tensor}).fingerprint()
    assert Smallest({"embed": tensor, "head": tensor}).fingerprint() != once
    tied = Smallest({"embed": tensor, "head": tensor}, ties={"head": "embed"})
    assert tied.fingerprint() == once


def test_unknown_name_offers_the_nearest_and_escapes() -> None:
    checkpoint = Smallest({"model.embed": torch.ones(1)}, label="evil\x1b[2J")
    assert str(checkpoint.unknown("model.embet")) == (
        "evil\\x1b[2J has no tensor model.embet; did you mean model.embed?"
    )
    assert str(checkpoint.unknown("\n")) == "evil\\x1b[2J has no tensor \\n"
    assert repr(checkpoint) == "<Smallest evil\\x1b[2J: 1 tensors>"


def test_info_counts_entries() -> None:
    assert TensorInfo("a", (2, 3), "float32", 24).numel == 6
    assert TensorInfo("a", (), "float32", 4).numel == 1
    assert TensorInfo("a", (0, 3), "float32", 0).numel == 0


@pytest.fixture
def sources(tmp_path: Path, storable: Tensors) -> dict[str, Any]:
    """The same tensors in every format, each written by the library it belongs to."""
    for folder in ("one", "shards", "bin"):
        (tmp_path / folder).mkdir()
    save_file(storable, tmp_path / "one" / "model.safetensors")
    save_torch_state_dict(storable, tmp_path / "shards", max_shard_size=200)
    torch.save(storable, tmp_path / "bin" / "pytorch_model.bin")
    halves = {
        f"part{i}.bin": dict(list(storable.items())[i::2]) for i in range(2)
    }  # names of no series
    (tmp_path / "halves").mkdir()
    for shard, tensors in halves.items():
        torch.save(tensors, tmp_path / "halves" / shard)
    index = {"weight_map": {n: shard for shard, tensors in halves.items() for n in tensors}}
    (tmp_path / "halves" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return {
        "one file": tmp_path / "one",
        "shards": tmp_path / "shards",
        "torch file": tmp_path / "bin",
        "torch shards": tmp_path / "halves",
        "mapping": storable,
        "module": module_of(storable),
    }


def module_of(tensors: Tensors) -> nn.Module:
    """A module that holds `tensors` as parameters and buffers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        if tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(leaf, tensor)
    return root


def test_all_formats_agree(sources: dict[str, Any], storable: Tensors, same_bits: Same) -> None:
    opened = {kind: open_checkpoint(source) for kind, source in sources.items()}
    prints = {checkpoint.fingerprint() for checkpoint in opened.values()}
    assert prints == {Smallest(storable).fingerprint()}
    for kind, checkpoint in opened.items():
        assert sorted(checkpoint.names()) == sorted(storable), kind
        for name, tensor in storable.items():
            assert checkpoint.info(name) == opened["one file"].info(name), (kind, name)
            assert same_bits(checkpoint.read(name), tensor), (kind, name)
            assert checkpoint.fingerprint(name) == opened["mapping"].fingerprint(name)
    assert len({checkpoint.identity() for checkpoint in opened.values()}) == len(opened)


def test_all_formats_give_the_same_bytes_at_odd_ranges(
    sources: dict[str, Any], storable: Tensors
) -> None:
    opened = [open_checkpoint(source) for source in sources.values()]
    for name, tensor in storable.items():
        raw = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        for start in {0, min(1, len(raw)), len(raw) // 2, max(len(raw) - 1, 0)}:
            stop = max(start, len(raw) - 2)
            for checkpoint in opened:
                buffer = bytearray(stop - start)
                checkpoint.read_into(name, start, memoryview(buffer))
                assert buffer == raw[start:stop]


def test_extents_follow_each_other_in_files(sources: dict[str, Any]) -> None:
    for kind in ("one file", "shards", "torch file", "torch shards"):
        checkpoint = open_checkpoint(sources[kind])
        name = "of_bfloat16.weight"
        whole, part = (checkpoint.extents(name, start, 30 - start) or () for start in (0, 7))
        assert part == (Extent(whole[0].path, whole[0].offset + 7, 23),)
        assert checkpoint.directory == sources[kind]
