"""What travels of a result: plain numbers and printable text, a row a tensor."""

import marshal
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

from pytest_subnet import (
    mask_overlap,
    open_pair,
    open_trajectory,
    update_dynamics,
    update_movement,
    update_rank,
    update_sparsity,
)
from pytest_subnet.reports.measured import by_tensor, measured, plain

NAME = "model.layers.0.mlp.up_proj.weight"


class Result:
    def __init__(self, rows=(), **numbers):
        self.per_tensor, self.numbers = rows, numbers

    def to_dict(self):
        return {"finding": "thing", **self.numbers}


class Row(NamedTuple):
    name: str
    share: float | None = 0.5
    count: int = 3
    sure: bool = True
    angles: tuple[float, ...] = (1.0, 2.0)

    @property
    def twice(self):
        return self.count * 2

    @property
    def inverse(self):
        return 1 / self.count

    @property
    def density(self):
        return 0.5


def test_numbers_come_without_their_finding():
    result = measured(Result(share=0.5, notes=["a"]), with_tensors=True)

    assert result == {
        "finding": "thing",
        "numbers": {"share": 0.5, "notes": ["a"]},
        "tensors": None,
    }


def test_tensors_come_only_where_they_are_wanted():
    result = Result(rows=(Row("a"),))

    assert measured(result, with_tensors=False)["tensors"] is None
    assert measured(result, with_tensors=True)["tensors"] is not None


def test_fields_and_properties_that_are_numbers_are_columns():
    frame = by_tensor((Row("a"), Row("b", share=float("nan"), count=0)))

    assert frame == {
        "columns": ["name", "share", "count", "twice", "inverse"],
        "rows": [["a", 0.5, 3, 6, 1 / 3], ["b", None, 0, 0, None]],
    }


def test_a_column_of_nothing_is_left_out():
    assert by_tensor([Row("a", share=None)])["columns"] == ["name", "count", "twice", "inverse"]


def test_numbers_of_numpy_are_numbers():
    frame = by_tensor([Row("a", share=np.float64(0.25), count=np.int64(4))])

    assert frame["rows"] == [["a", 0.25, 4, 8, 0.25]]
    marshal.dumps(frame)  # refuses what xdist refuses


def test_dataclasses_have_fields_too():
    @dataclass
    class Other:
        name: str
        shape: tuple[int, ...]
        rank: int

    assert by_tensor([Other("a", (2, 3), 1)]) == {
        "columns": ["name", "shape", "rank"],
        "rows": [["a", "2×3", 1]],
    }


@pytest.mark.parametrize("rows", [None, (), [], 3, {"a": 1}, [1, 2], "text"])
def test_what_is_no_rows_of_tensors_has_no_frame(rows):
    assert by_tensor(rows) is None


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), None),
        (float("-inf"), None),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (2**70, 2**70),
        (Fraction(1, 2), "1/2"),
        (("a\n", {"b\x1b": [1, None]}), ["a\\n", {"b\\x1b": [1, None]}]),
        ("https://me:secret@host/x", "https://host/x"),
        ("\ud800", "\\ud800"),
    ],
)
def test_only_what_json_has_comes_out(value, found):
    assert plain(value) == found
    assert type(plain(value)) is type(found)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One result of each finding with rows of tensors."""
    generator = torch.Generator().manual_seed(0)
    steps = [{NAME: torch.randn(8, 8, generator=generator).bfloat16()} for _ in range(3)]
    pair = open_pair(steps[0], steps[1])
    other = open_pair(steps[0], steps[2])
    return [
        update_sparsity(pair),
        update_movement(pair),
        update_rank(pair),
        mask_overlap(pair, other),
        update_dynamics(open_trajectory(steps)),
    ]


def test_every_finding_has_its_own_numbers_by_tensor(results):
    for result in results:
        found = measured(result, with_tensors=True)

        marshal.dumps(found)
        frame = found["tensors"]
        assert frame["columns"][:5] == ["name", "kind", "layer", "shape", "dtype"]
        assert frame["rows"][0][:5] == [NAME, "up_proj", 0, "8×8", "bf16"]
        assert len(frame["columns"]) >= 8
        for column, value in zip(frame["columns"], frame["rows"][0], strict=True):
            assert type(value) in (str, int, float, type(None)), column
