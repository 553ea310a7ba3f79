"""Mask files: what is saved comes back, any reader can open it, and no damage is believed."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.numpy import load_file

from pytest_subnet import (
    CheckpointError,
    UpdateMask,
    magnitude_mask,
    open_checkpoint,
    open_pair,
    update_mask,
)
from pytest_subnet.masks import bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

quick = settings(derandomize=True, deadline=None, database=None, max_examples=50)
ENTRIES = arrays(np.bool_, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))


@pytest.fixture(scope="module")
def sides() -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    base = {
        "a.weight": torch.randn(9, 15, generator=generator).bfloat16(),
        "b.weight": torch.randn(70, generator=generator).half(),
        "c.weight": torch.randn(3, 5, generator=generator),
    }
    return base, {name: torch.where(each > 0, each * 2, each) for name, each in base.items()}


@pytest.fixture(scope="module")
def mask(sides: tuple[dict[str, torch.Tensor], ...]) -> UpdateMask:
    return update_mask(open_pair(*sides), atol=1e-3)


@pytest.fixture(scope="module")
def saved(mask: UpdateMask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("masks") / "mask.safetensors"
    mask.save(path)
    return path


def check_equal(one: UpdateMask, other: UpdateMask) -> None:
    assert one.tensors == other.tensors
    for name in one.names():
        np.testing.assert_array_equal(one[name], other[name])
        known, read = one.strata(name), other.strata(name)
        assert (known is None) == (read is None)
        if known is not None and read is not None:
            np.testing.assert_array_equal(known.population, read.population)
            np.testing.assert_array_equal(known.members, read.members)
    origins = [
        (each.origin.what, each.origin.tolerance, each.origin.base, each.origin.tuned)
        for each in (one, other)
    ]
    assert origins[0] == origins[1]


def test_what_was_saved_comes_back(
    mask: UpdateMask, saved: Path, sides: tuple[dict[str, torch.Tensor], ...]
) -> None:
    loaded = UpdateMask.load(saved)
    check_equal(mask, loaded)
    assert loaded.origin.tolerance == "atol=0.001"
    assert [loaded.origin.base, loaded.origin.tuned] == [
        open_checkpoint(side).fingerprint() for side in sides
    ]
    assert [each.dtype for each in loaded.tensors] == ["bfloat16", "float16", "float32"]
    check_equal(~mask & mask, ~loaded & loaded)


@quick
@given(entries=st.dictionaries(st.text(max_size=5), ENTRIES, min_size=1, max_size=4))
def test_any_mask_comes_back(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    mask = UpdateMask.of(entries, what="a\nb\x1b[31m \\ ü")
    mask.save(str(path))
    check_equal(mask, UpdateMask.load(path))
    with safe_open(path, "np") as file:
        assert len(file.keys()) == len(entries)


def test_the_library_reads_the_file(mask: UpdateMask, saved: Path) -> None:
    tensors = load_file(saved)
    for tensor in mask.tensors:
        packed = tensors[f"bits:{tensor.name}"]
        entries = np.unpackbits(packed, count=tensor.numel, bitorder="little")
        np.testing.assert_array_equal(entries.reshape(tensor.shape), mask[tensor.name])
        strata = mask.strata(tensor.name)
        if strata is None:
            assert f"strata:{tensor.name}" not in tensors
            continue
        which, population, members = tensors[f"strata:{tensor.name}"]
        np.testing.assert_array_equal(which, np.flatnonzero(strata.population))
        np.testing.assert_array_equal(population, strata.population[which])
        np.testing.assert_array_equal(members, strata.members[which])
    with safe_open(saved, "np") as file:
        metadata = file.metadata()
    assert metadata["base"] == mask.origin.base
    assert metadata["tuned"] == mask.origin.tuned
    assert (metadata["what"], metadata["tolerance"]) == (mask.origin.what, "atol=0.001")
    assert json.loads(metadata["tensors"])[0][:3] == ["a.weight", [9, 15], "bfloat16"]


def test_a_file_on_which_much_hangs_is_one_bit_an_entry(tmp_path: Path) -> None:
    mask = UpdateMask.of({"w": np.ones((1000, 1000), bool)})
    mask.save(tmp_path / "m")
    assert 125_000 <= (tmp_path / "m").stat().st_size < 126_000


@pytest.mark.parametrize(
    "name", ["no/such/directory/mask", ".", "", "\0", "x" * 300], ids=lambda name: repr(name)[:9]
)
def test_a_path_that_cannot_be_written(
    mask: UpdateMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^cannot write the mask to .*; give a path in a"):
        mask.save(name)
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the name \\ud800 is not valid Unicode"):
        UpdateMask.of({"\ud800": [True]}).save(tmp_path / "mask")


def test_a_save_that_is_cut_short_leaves_the_old_file(
    mask: UpdateMask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write the mask to .*: No space left on dev"):
        UpdateMask.of({"w": [True]}).save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["mask.safetensors"]


@pytest.mark.parametrize("to", ["mask", "link", "./mask", "../masks/mask"])
@pytest.mark.parametrize("opened", ["mask", "link"])
def test_a_mask_saved_over_its_own_file_can_be_read_on(
    mask: UpdateMask, tmp_path: Path, opened: str, to: str
) -> None:
    directory = tmp_path / "masks"
    directory.mkdir()
    mask.save(directory / "mask")
    (directory / "link").symlink_to(directory / "mask")
    loaded = UpdateMask.load(directory / opened)
    loaded.save(f"{directory}/{to}")
    check_equal(mask, loaded)
    check_equal(mask, UpdateMask.load(directory / "mask"))
    loaded.save(f"{directory}/{to}")
    check_equal(mask, loaded)


def test_a_loaded_mask_is_not_that_of_another_file_that_it_is_saved_to(
    mask: UpdateMask, tmp_path: Path
) -> None:
    mask.save(tmp_path / "mask")
    loaded = UpdateMask.load(tmp_path / "mask")
    loaded.save(tmp_path / "other")
    (tmp_path / "other").unlink()
    check_equal(mask, loaded)
    mask.save(tmp_path / "mask")
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        loaded["a.weight"]


def test_no_such_file_and_no_mask_file(tmp_path: Path) -> None:
    for name in ("missing", ".", "\0"):
        with pytest.raises(CheckpointError):
            UpdateMask.load(tmp_path / name)
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as failed:
        UpdateMask.load(tmp_path / "w.safetensors")
    assert str(failed.value) == (
        f"{tmp_path / 'w.safetensors'} is no mask file; pass one that UpdateMask.save wrote, or "
        "make a mask of a pair of checkpoints with update_mask"
    )


def parts(path: Path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path: Path, header: object, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def read_all(path: Path) -> UpdateMask:
    """Open a mask and read all there is to read."""
    mask = UpdateMask.load(path)
    for name in mask.names():
        _ = mask[name], mask.strata(name)
    _ = (mask & mask).count, (~mask).count, repr(mask), mask.origin.base
    return mask


Tensors = list[list]


def _listed(change: Callable[[Tensors], object]) -> Callable[[dict], None]:
    def damage(header: dict) -> None:
        tensors = json.loads(header["__metadata__"]["tensors"])
        change(tensors)
        header["__metadata__"]["tensors"] = json.dumps(tensors)

    return damage


DAMAGED: dict[str, tuple[Callable[[dict], object], str]] = {
    "version": (
        lambda h: h["__metadata__"].update(version="2\x1b"),
        r"is a mask file of version 2\\x1b, this pytest-subnet reads version 1; install",
    ),
    "metadata": (
        lambda h: (h["__metadata__"].pop("base"), h["__metadata__"].pop("what")),
        "is corrupt: its header lacks what, base; save the mask again",
    ),
    "json": (
        lambda h: h["__metadata__"].update(tensors="[["),
        "its list of tensors is not JSON",
    ),
    "no list": (lambda h: h["__metadata__"].update(tensors="{}"), "it has no list of tensors"),
    "no tensors": (lambda h: h["__metadata__"].update(tensors="[]"), "is a mask of no tensors"),
    "deep": (
        lambda h: h["__metadata__"].update(tensors="[" * 100_000 + "]" * 100_000),
        "its list of tensors is not JSON",
    ),
    "item": (_listed(lambda t: t[0].pop()), "is not name, shape, dtype and count"),
    "shape": (_listed(lambda t: t[0][1].append(-1)), "it has the impossible shape"),
    "huge": (_listed(lambda t: t[0][1].extend([2**40] * 3)), "it has the impossible shape"),
    "dimensions": (_listed(lambda t: t[0][1].extend([1] * 90)), "it has 92 dimensions"),
    "true": (_listed(lambda t: t[0][1].append(True)), "it has the impossible shape"),
    "dtype": (_listed(lambda t: t[0].__setitem__(2, "f\x1b")), r"the unknown dtype f\\x1b"),
    "count": (_listed(lambda t: t[0].__setitem__(3, 136)), "136 of its 135 entries are set"),
    "fewer": (_listed(lambda t: t[0].__setitem__(3, 1)), "bits are set, its header says 1;"),
    "twice": (_listed(lambda t: t.append(t[0])), "it is listed twice"),
    "order": (_listed(lambda t: t.reverse()), "not in the place that its list gives them"),
    "not listed": (_listed(lambda t: t.pop()), "it belongs to no tensor of its list"),
    "no bits": (_listed(lambda t: t[0].__setitem__(0, "x\n")), r"of x\\n, it has no bits"),
    "larger": (_listed(lambda t: t[0].__setitem__(1, [9, 16])), "entries, it has 144"),
    "strata of float32": (
        _listed(lambda t: t[0].__setitem__(2, "float32")),
        "strata, float32 has none",
    ),
    "bits as floats": (
        lambda h: h["bits:a.weight"].update(dtype="F32", shape=[6]),
        r"its bits are float32\[6\], 135 entries need uint8\[24\]",
    ),
    "strata as floats": (
        lambda h: h["strata:a.weight"].update(dtype="F64"),
        r"its strata are not int64 \[3, n\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(saved: Path, tmp_path: Path, damage: str) -> None:
    change, message = DAMAGED[damage]
    header, data = parts(saved)
    change(header)
    write(tmp_path / "mask", header, data)
    with pytest.raises(CheckpointError, match=message):
        read_all(tmp_path / "mask")


@pytest.mark.parametrize(
    ("tensor", "values", "message"),
    [
        ("strata:a.weight", [[-1, 0]], "its strata are not ascending numbers below 512"),
        ("strata:a.weight", [[600, 0]], "its strata are not ascending numbers below 512"),
        ("strata:a.weight", [[0, 0], [0, 1]], "its strata are not ascending numbers below 512"),
        ("population", [[0, 0]], "the counts of its strata cannot be"),
        ("population", [[2**62, 0]], "entries, it has 135"),
        ("members", [[-1, 0]], "the counts of its strata cannot be"),
        ("members", [[2**62, 0]], "the counts of its strata cannot be"),
    ],
)
def test_strata_that_cannot_be_are_an_error(
    saved: Path, tmp_path: Path, tensor: str, values: list[list[int]], message: str
) -> None:
    header, data = parts(saved)
    entry = header["strata:a.weight"]
    start, count = entry["data_offsets"][0], entry["shape"][1]
    start += {"population": 8 * count, "members": 16 * count}.get(tensor, 0)
    changed = bytearray(data)
    for value, position in values:
        at = start + 8 * position
        changed[at : at + 8] = value.to_bytes(8, "little", signed=True)
    write(tmp_path / "mask", header, bytes(changed))
    mask = UpdateMask.load(tmp_path / "mask")
    with pytest.raises(CheckpointError, match=message):
        mask.strata("a.weight")


def test_every_flipped_bit_of_the_entries_is_seen(saved: Path, tmp_path: Path) -> None:
    header, data = parts(saved)
    end = header["bits:c.weight"]["data_offsets"][1]
    for bit in range(0, 8 * end, 7):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        write(tmp_path / "mask", header, bytes(changed))
        with pytest.raises(CheckpointError, match=r"bits are set, its header says|bits beyond"):
            read_all(tmp_path / "mask")


def test_every_length_that_a_copy_can_be_cut_to(saved: Path, tmp_path: Path) -> None:
    raw = saved.read_bytes()
    for length in {*range(0, len(raw), 37), 7, 8, len(raw) - 1}:
        (tmp_path / "mask").write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            UpdateMask.load(tmp_path / "mask")


SCALARS = [
    None,
    True,
    -1,
    0,
    1,
    2**63,
    2**64,
    1.5,
    -0.0,
    "",
    "x\x1b",
    "\0",
    [],
    {},
    [[]],
    "1" * 500,
]


def mutate(value: object, roll: random.Random) -> object:
    """The value with one thing in it replaced, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and roll.random() < 0.9:
        key = roll.choice(sorted(value))
        match roll.randrange(4):
            case 0:
                del value[key]
            case 1:
                value[roll.choice(["__metadata__", "bits:", "strata:x", "bits:a.weight"])] = value[
                    key
                ]
            case _:
                value[key] = mutate(value[key], roll)
        return value
    if isinstance(value, list) and value and roll.random() < 0.9:
        position = roll.randrange(len(value))
        match roll.randrange(4):
            case 0:
                del value[position]
            case 1:
                value.append(copy.deepcopy(value[position]))
            case _:
                value[position] = mutate(value[position], roll)
        return value
    if isinstance(value, int) and roll.random() < 0.6:
        return value + roll.choice([-8, -1, 1, 8])
    return copy.deepcopy(roll.choice(SCALARS))


@pytest.mark.parametrize(
    ("seed", "files"), [(0, 400), *(pytest.param(i, 1500, marks=pytest.mark.slow) for i in (1, 2))]
)
def test_of_thousands_of_damaged_files_none_raises_anything_else(
    saved: Path, tmp_path: Path, seed: int, files: int
) -> None:
    """Headers with one or two things wrong, and raw bytes: `CheckpointError`, or the same mask."""
    roll = random.Random(seed)
    header, data = parts(saved)
    errors = []
    path = tmp_path / "mask"
    for _ in range(files):
        changed, bits_of_it = copy.deepcopy(header), data
        for _ in range(roll.randint(1, 2)):
            if roll.random() < 0.5:
                text = changed.get("__metadata__")
                listed = json.loads(header["__metadata__"]["tensors"])
                if isinstance(text, dict):
                    text["tensors"] = json.dumps(mutate(listed, roll))
            else:
                mutate(changed, roll)
        raw: object = changed
        if roll.random() < 0.2:
            damaged = bytearray(json.dumps(changed).encode())
            for _ in range(roll.randint(1, 4)):
                damaged[roll.randrange(len(damaged))] = roll.randrange(256)
            raw = bytes(damaged)
        elif roll.random() < 0.2:
            bits_of_it = data[: roll.randrange(len(data))] if roll.random() < 0.5 else data + b"\0"
        write(path, raw, bits_of_it)
        try:
            read = read_all(path)
        except CheckpointError as error:
            errors.append(str(error))
        else:  # what is left is a mask all the same: another name, shape, dtype or origin
            assert read.count == sum(int(read[name].sum()) for name in read.names())
    assert len(errors) > files * 0.6
    assert all(error.isprintable() and len(error) < 1500 for error in errors)


def test_the_order_of_a_hostile_name_is_shown_escaped(tmp_path: Path) -> None:
    mask = UpdateMask.of({"evil\x1b[2J\n": [True]})
    mask.save(tmp_path / "mask")
    header, data = parts(tmp_path / "mask")
    write(tmp_path / "mask", header, b"\x03" + data[1:])
    with pytest.raises(CheckpointError, match=r"of evil\\x1b\[2J\\n bits beyond its last entry"):
        read_all(tmp_path / "mask")


MEASURE = """
import re, sys
from pathlib import Path
import numpy as np
from pytest_subnet import UpdateMask
from pytest_subnet.masks import bits
from pytest_subnet.masks.algebra import from_words
from pytest_subnet.masks.update_mask import Origin
bits._LARGEST_IN_MEMORY = 1 << 20
words = np.full(1 << 17, 0x5555555555555555, np.uint64)
def peak():  # of this process alone: getrusage starts with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def work(pieces, path):
    mask = from_words(
        [("w", (pieces, 1 << 23), "bool")], lambda name: (words for _ in range(pieces)), Origin("t")
    )
    mask.save(path)
    loaded = UpdateMask.load(path)
    assert (loaded & mask).count == (~loaded).count == pieces << 22
work(1, sys.argv[1])
before = peak()
work(32, sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell the peak")
def test_a_mask_on_disk_is_never_whole_in_memory(tmp_path: Path) -> None:
    """268 M entries, 34 MB a mask, five of them: made, saved, loaded, combined in a few MB."""
    code = [sys.executable, "-c", MEASURE, str(tmp_path / "mask")]
    grown = int(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert grown < 12_000_000


def test_what_is_loaded_needs_neither_torch_nor_the_weights(tmp_path: Path) -> None:
    base = {"w": torch.randn(8, 8).bfloat16()}
    magnitude_mask(base, 0.5).save(tmp_path / "mask")
    code = (
        "import sys; from pytest_subnet import UpdateMask; mask = UpdateMask.load(sys.argv[1]); "
        "assert mask['w'].sum() == mask.strata('w').members.sum() == 32; "
        "assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "mask")], check=True)


def test_the_file_of_a_mask_on_disk_is_the_same(
    mask: UpdateMask, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "_LARGEST_IN_MEMORY", -1)
    again = ~~mask
    again.save(tmp_path / "mask")
    assert parts(tmp_path / "mask")[1] == parts(saved)[1]
