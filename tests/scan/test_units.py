"""Work units: every entry exactly once, in pieces that can be read and compared anywhere."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pytest_subnet import ModelPair, open_checkpoint, open_pair
from pytest_subnet.checkpoints import Extent
from pytest_subnet.scan import units
from pytest_subnet.scan.units import ScanUnit, cut

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Tensor(NamedTuple):
    """What `cut` asks of a tensor of a pair."""

    base_name: str
    tuned_name: str
    numel: int
    dtype: str
    base_dtype: str
    tuned_dtype: str


class Line:
    """A checkpoint whose tensors lie in files in the order of `sizes`, or nowhere at all."""

    def __init__(self, sizes: dict[str, tuple[str, int]], *, in_files: bool = True) -> None:
        self.in_files = in_files
        self.where = {}
        ends: dict[str, int] = {}
        for name, (path, nbytes) in sizes.items():
            self.where[name] = (path, ends.get(path, 8))
            ends[path] = ends.get(path, 8) + nbytes

    def extents(self, name: str, start: int, nbytes: int) -> tuple[Extent, ...] | None:
        path, offset = self.where[name]
        return (Extent(path, offset + start, nbytes),) if self.in_files else None


class Pair(NamedTuple):
    """What `cut` asks of a pair."""

    tensors: list[Tensor]
    base: Line
    tuned: Line


DTYPES = [("bfloat16",) * 3, ("float32",) * 3, ("bfloat16", "float32", "bfloat16"), ("int8",) * 3]
SIZES = {"bfloat16": 2, "float32": 4, "int8": 1}
NAMES = list("abcdefgh")


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    tensors = [
        Tensor(name, name.upper(), draw(st.integers(1, 100)), *draw(st.sampled_from(DTYPES)))
        for name in NAMES[: draw(st.integers(1, 8))]
    ]

    def line(name: str, dtype: str) -> Line:
        in_order = draw(st.permutations(tensors))
        return Line(
            {
                getattr(t, name): (draw(st.sampled_from("12")), t.numel * SIZES[getattr(t, dtype)])
                for t in in_order
            },
            in_files=draw(st.booleans()),
        )

    return Pair(tensors, line("base_name", "base_dtype"), line("tuned_name", "tuned_dtype"))


@given(pair=pairs(), room=st.sampled_from([16, 64, 100]), data=st.data())
@settings(derandomize=True, deadline=None, database=None, max_examples=200)
def test_every_entry_is_in_exactly_one_unit(pair: Pair, room: int, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(range(len(pair.tensors))), unique=True).map(sorted))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", room)
        found = cut(pair, rows)
    seen = [
        (segment.row, entry)
        for unit in found
        for segment in unit.segments
        for entry in range(segment.start, segment.start + segment.count)
    ]
    assert sorted(seen) == [(row, e) for row in rows for e in range(pair.tensors[row].numel)]
    assert [unit.number for unit in found] == list(range(len(found)))
    for unit in found:
        check_unit(pair, unit, room)
    for unit, following in pairwise(found):
        if unit[2:5] == following[2:5]:  # of the same dtypes: no room was left
            widest = max(SIZES[dtype] for dtype in unit[2:5])
            assert unit.count + following.segments[0].count > room // widest


def check_unit(pair: Pair, unit: ScanUnit, room: int) -> None:
    assert len({segment.row for segment in unit.segments}) == len(unit.segments)
    for segment in unit.segments:
        tensor = pair.tensors[segment.row]
        assert tensor[:2] == (segment.base_name, segment.tuned_name)
        assert tensor[3:] == (unit.dtype, unit.base_dtype, unit.tuned_dtype)
    for side, extents in (("base", unit.base), ("tuned", unit.tuned)):
        itemsize = SIZES[getattr(unit, f"{side}_dtype")]
        assert unit.count * itemsize <= room
        line = getattr(pair, side)
        if not line.in_files:
            assert extents is None
            continue
        wanted = [
            (path, offset + segment.start * itemsize + byte)
            for segment in unit.segments
            for path, offset in [line.where[getattr(segment, f"{side}_name")]]
            for byte in range(segment.count * itemsize)
        ]
        given = [(path, offset + byte) for path, offset, size in extents for byte in range(size)]
        assert given == wanted
        for one, two in pairwise(extents):
            assert (one.path, one.offset + one.nbytes) != (two.path, two.offset)
    assert unit.nbytes == unit.count * (SIZES[unit.base_dtype] + SIZES[unit.tuned_dtype])


def test_bytes_of_another_file_are_another_run_even_if_the_offsets_meet() -> None:
    tensors = [Tensor(name, name, 4, "int8", "int8", "int8") for name in "abc"]
    line = Line({"a": ("1", 4), "b": ("2", 4), "c": ("2", 4)})
    (unit,) = cut(Pair(tensors, line, line), [0, 2])
    assert unit.base == (Extent("1", 8, 4), Extent("2", 12, 4))


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


def shapes(cuts: list[ScanUnit]) -> list[list[tuple[int, int, int]]]:
    return [[(s.row, s.start, s.count) for s in unit.segments] for unit in cuts]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelPair]:
    """A pair on disk whose units hold 64 bytes a side."""
    monkeypatch.setattr(units, "UNIT_BYTES", 64)

    def make(base: dict[str, torch.Tensor], **options: object) -> ModelPair:
        tuned = {name: tensor + 1 for name, tensor in base.items()}
        return open_pair(write(tmp_path / "b", base), write(tmp_path / "t", tuned), **options)

    return make


def test_small_neighbours_share_a_unit_and_are_one_run_of_bytes(
    small: Callable[..., ModelPair],
) -> None:
    pair = small({name: torch.zeros(3) for name in "abcd"})
    (unit,) = cut(pair, range(4))
    assert shapes([unit]) == [[(row, 0, 3) for row in range(4)]]
    ((path, _, nbytes),) = unit.base
    assert (path, nbytes) == (str(pair.base.directory / "model.safetensors"), 48)
    assert len(unit.tuned) == 1


def test_rows_left_out_leave_gaps_in_the_bytes(small: Callable[..., ModelPair]) -> None:
    pair = small({name: torch.zeros(3) for name in "abcd"})
    (unit,) = cut(pair, [0, 2, 3])
    assert [extent.nbytes for extent in unit.base] == [12, 24]


def test_large_tensors_are_split(small: Callable[..., ModelPair]) -> None:
    pair = small({"a": torch.zeros(3), "b": torch.zeros(40)})
    assert shapes(cut(pair, range(2))) == [[(0, 0, 3)], [(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)]]


def test_another_dtype_starts_another_unit(small: Callable[..., ModelPair]) -> None:
    pair = small({"a": torch.zeros(3), "b": torch.zeros(3).bfloat16(), "c": torch.zeros(3)})
    found = cut(pair, range(3))
    by_dtype = {pair.tensors[unit.segments[0].row].dtype: unit.dtype for unit in found}
    assert by_dtype == {"float32": "float32", "bfloat16": "bfloat16"}
    assert sum(len(unit.segments) for unit in found) == 3


def test_a_unit_of_different_dtypes_fits_the_wider(small: Callable[..., ModelPair]) -> None:
    pair = small({"a": torch.zeros(40).bfloat16()}, as_dtype="float64")
    assert {unit.count for unit in cut(pair, [0])} == {8}
    assert {(u.dtype, u.base_dtype) for u in cut(pair, [0])} == {("float64", "bfloat16")}


def test_the_common_rows_of_a_vocabulary_are_a_prefix_on_both_sides(tmp_path: Path) -> None:
    name = "embed_tokens.weight"
    base = write(tmp_path / "b", {name: torch.zeros(6, 4)})
    tuned = write(tmp_path / "t", {name: torch.zeros(8, 4), "norm.weight": torch.zeros(1)})
    (unit,) = cut(open_pair(base, tuned, vocab="common"), [0])
    assert [extent.nbytes for extent in (*unit.base, *unit.tuned)] == [96, 96]


def test_shards_are_runs_of_their_own(tmp_path: Path) -> None:
    def sharded(directory: Path, fill: float) -> Path:
        directory.mkdir()
        shard_of = {"a": "1.safetensors", "b": "2.safetensors"}
        for name, shard in shard_of.items():
            save_file({name: torch.full((3,), fill)}, directory / shard)
        index = f'{{"weight_map": {shard_of}}}'.replace("'", '"')
        (directory / "model.safetensors.index.json").write_text(index)
        return directory

    pair = open_pair(sharded(tmp_path / "b", 0.0), sharded(tmp_path / "t", 1.0))
    (unit,) = cut(pair, range(2))
    assert [extent.path[-13:] for extent in unit.base] == ["1.safetensors", "2.safetensors"]


def test_weights_in_memory_have_no_extents() -> None:
    base = open_checkpoint({"a": torch.zeros(3)})
    (unit,) = cut(open_pair(base, {"a": torch.ones(3)}), [0])
    assert (unit.base, unit.tuned) == (None, None)


def test_a_unit_holds_names_and_numbers_only(small: Callable[..., ModelPair]) -> None:
    for unit in cut(small({"a": torch.zeros(40)}), [0]):
        data = pickle.dumps(unit)
        assert b"torch" not in data
        assert pickle.loads(data) == unit


def test_nothing_to_cut(small: Callable[..., ModelPair]) -> None:
    assert cut(small({"a": torch.zeros(3)}), []) == []
