"""Where `torch.save` puts data in its zip file, held against where torch itself looks for it."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_subnet import CheckpointError, open_checkpoint
from pytest_subnet.checkpoints.zip_records import Records, mapped_from, read_records

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    tensors = {str(n): torch.zeros(n, dtype=torch.uint8) for n in (5, 1, 300, 0, 64)}
    torch.save({**tensors, "again": tensors["5"], "part": tensors["300"][7:9]}, path)
    return path


def test_spans_are_where_torch_reads(path: Path) -> None:
    with FakeTensorMode():
        storages = [tensor.untyped_storage() for tensor in torch.load(path).values()]
    theirs = {(storage._checkpoint_offset, storage.nbytes()) for storage in storages}
    assert read_records(path) == Records(sorted(span for span in theirs if span[1]), native=True)


def test_address_of_the_first_byte_follows_from_all_storages(path: Path) -> None:
    records = read_records(path)
    mapped = {offset + 4096: nbytes for offset, nbytes in records.spans}
    assert mapped_from(path, records, mapped) == 4096


@pytest.mark.parametrize("change", ["moved", "longer", "missing", "further"])
def test_storages_that_are_not_those_of_the_file_are_refused(path: Path, change: str) -> None:
    records = read_records(path)
    mapped = {offset + 4096: nbytes for offset, nbytes in records.spans}
    second = sorted(mapped)[1]
    if change == "moved":
        mapped[second + 1] = mapped.pop(second)
    elif change == "longer":
        mapped[second] += 1
    elif change == "missing":
        del mapped[second]
    else:
        mapped[second + 1] = 1
    with pytest.raises(CheckpointError, match="and the data stored with it disagree"):
        mapped_from(path, records, mapped)


def test_file_without_data_has_no_spans(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"step": 1, "empty": torch.empty(0)}, path)
    records = read_records(path)
    assert records.spans == []
    assert mapped_from(path, records, {}) == 0


def test_byte_order_of_another_machine_is_known(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, b"middle" if name.endswith("/byteorder") else data)
    assert not read_records(path).native


@pytest.mark.parametrize(("field", "shift"), [(26, 2), (28, -2), (28, 2), (28, 64)])
def test_a_damaged_length_does_not_shift_the_data(tmp_path: Path, field: int, shift: int) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.arange(256.0), "b": torch.ones(64)}, path)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("w/data/0").header_offset + field
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[at : at + 2], "little") + shift
    raw[at : at + 2] = length.to_bytes(2, "little")
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == (
        f"{path} is truncated or corrupt: its data is not where torch.save puts it; "
        "save or download it again"
    )
