"""Where a tensor first differs, and what is stored there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from pytest_subnet import open_pair
from pytest_subnet.scan import units
from pytest_subnet.scan.locating import Difference, first_difference

if TYPE_CHECKING:
    from pathlib import Path


def find(base: torch.Tensor, tuned: torch.Tensor, **options: object) -> Difference | None:
    same = {"first": torch.zeros(5, dtype=base.dtype)}
    pair = open_pair(
        same | {"w": base}, {n: t.clone() for n, t in same.items()} | {"w": tuned}, **options
    )
    assert first_difference(pair, 0) is None
    return first_difference(pair, 1)


def changed(base: torch.Tensor, **at: object) -> torch.Tensor:
    tuned = base.clone()
    for place, value in at["at"].items():
        tuned[place] = value
    return tuned


@pytest.mark.parametrize("room", [16, units.UNIT_BYTES])
def test_the_first_of_several_in_row_order(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", room)
    base = torch.zeros(3, 4, 5)
    found = find(base, changed(base, at={(2, 0, 0): 1.0, (1, 3, 2): -2.5}))
    assert found == Difference((1, 3, 2), "0", "-2.5")
    assert str(found) == "[1, 3, 2] 0 -> -2.5"
    assert str(find(torch.tensor(1.0), torch.tensor(2.0))) == "[] 1 -> 2"


def test_none_where_nothing_differs() -> None:
    assert find(torch.full((3,), torch.nan), torch.full((3,), torch.nan)) is None


@pytest.mark.parametrize(
    ("dtype", "base", "tuned", "text"),
    [
        (torch.bfloat16, 1.0, 1.0078125, "[0] 1 -> 1.0078125"),
        (torch.float16, 0.1, 0.2, "[0] 0.0999755859 -> 0.199951172"),
        (torch.float32, 1.0, 1 + 2**-23, "[0] 1 -> 1.00000012"),
        (torch.float64, 0.5, 0.5 + 2**-53, "[0] 0.5 -> 0.50000000000000011"),
        (torch.float32, 0.0, -0.0, "[0] 0 -> -0"),
        (torch.float32, 1.0, torch.inf, "[0] 1 -> inf"),
        (torch.int64, 7, 8, "[0] 0x0000000000000007 -> 0x0000000000000008"),
        (torch.bool, True, False, "[0] 0x01 -> 0x00"),
    ],
)
def test_values_are_written_so_that_they_differ(
    dtype: torch.dtype, base: float, tuned: float, text: str
) -> None:
    assert str(find(*(torch.tensor([value], dtype=dtype) for value in (base, tuned)))) == text


def test_nans_that_differ_are_written_as_bits() -> None:
    base, tuned = (
        torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16) for bits in (0x7FC0, 0x7FC1)
    )
    assert str(find(base, tuned)) == "[0] 0x7fc0 -> 0x7fc1"


def test_after_a_cast_it_is_the_cast_values_that_differ() -> None:
    base, tuned = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.0, 1.0009766, 4.0]).double()
    assert str(find(base, tuned, as_dtype="bfloat16")) == "[2] 3 -> 4"


def test_in_a_resized_vocabulary_only_common_rows_are_looked_at() -> None:
    name = "embed_tokens.weight"
    base, tuned = torch.zeros(3, 2), torch.zeros(4, 2)
    tuned[3] = 1
    assert first_difference(open_pair({name: base}, {name: tuned}, vocab="common"), 0) is None


def test_in_files(tmp_path: Path) -> None:
    for fill, name in enumerate(("base.bin", "tuned.bin")):
        torch.save({"w": torch.full((2, 2), float(fill))}, tmp_path / name)
    pair = open_pair(tmp_path / "base.bin", tmp_path / "tuned.bin")
    assert str(first_difference(pair, 0)) == "[0, 0] 0 -> 1"
