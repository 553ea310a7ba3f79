"""Masks in memory: what they hold and how they are read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pytest_subnet import SelectionError, UpdateMask, magnitude_mask, open_pair, update_mask

if TYPE_CHECKING:
    from pathlib import Path

ENTRIES = arrays(np.bool_, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))


@given(st.dictionaries(st.text(max_size=5), ENTRIES, min_size=1, max_size=4))
def test_entries_come_back_as_they_were(entries: dict[str, np.ndarray]) -> None:
    mask = UpdateMask.of(entries)
    assert mask.names() == list(entries)
    assert mask.count == sum(int(array.sum()) for array in entries.values())
    assert mask.numel == sum(array.size for array in entries.values())
    for name, array in entries.items():
        np.testing.assert_array_equal(mask[name], array)
        counted = sum(int(np.bitwise_count(words).sum()) for words in mask.words(name))
        assert counted == mask.info(name).entries == array.sum()


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    mask = UpdateMask.of({"layer.weight": [True]})
    with pytest.raises(SelectionError, match=r"no tensor layer\.weigth.*layer\.weight"):
        mask["layer.weigth"]


def test_repr_is_one_line_that_says_how_many() -> None:
    assert repr(UpdateMask.of({"a": [True, False]})) == (
        "<UpdateMask given: 1 of 2 entries of 1 tensor (density 0.5)>"
    )


def test_it_is_a_collection_of_names_that_is_true_where_it_has_entries() -> None:
    mask = UpdateMask.of({"a": [True, False], "b": [[False]]})
    assert ("a" in mask, "c" in mask, 0 in mask, None in mask) == (True, False, False, False)
    assert list(mask) == ["a", "b"]
    assert len(mask) == 2
    assert mask
    assert not UpdateMask.of({"a": [False, False]})
    assert not mask - mask


def test_equality_is_identity() -> None:
    one, other = (UpdateMask.of({"a": [True, False]}) for _ in range(2))
    assert one in [one]
    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("wrong", [0, None, ("a", 0), slice(None), ["a"]])
def test_a_name_is_text(wrong: object) -> None:
    mask = UpdateMask.of({"a": [True]})
    for ask in (mask.info, mask.__getitem__, lambda name: next(mask.words(name))):
        with pytest.raises(TypeError) as failed:
            ask(wrong)
        assert str(failed.value) == (
            f"names of tensors are str, not {type(wrong).__name__}; names() lists them"
        )


def test_what_is_read_cannot_be_written_to() -> None:
    base = torch.ones(4, 4).bfloat16()
    mask = magnitude_mask({"a": base}, 0.5)
    for array in (next(mask.words("a")), *(mask.strata("a") or ())):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    entries = mask["a"]
    entries[:] = False  # a copy
    assert mask.count == mask["a"].sum() == 8


FLAGS = [[True, False], [False, True]]


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor(FLAGS),
        *(torch.tensor(FLAGS).to(each) for each in (torch.bfloat16, torch.float16, torch.int64)),
        torch.tensor(FLAGS).float().to(torch.float8_e4m3fn),
        torch.tensor(FLAGS).float().requires_grad_(),
        torch.nn.Parameter(torch.tensor(FLAGS).bfloat16()),
        torch.tensor(FLAGS).T,
        np.array(FLAGS, order="F"),
        np.array(FLAGS, np.float16),
        [[1, 0], [0, 1]],
    ],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)
def test_entries_may_be_tensors_of_any_dtype(given: object) -> None:
    assert UpdateMask.of({"w": given})["w"].tolist() == FLAGS


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.tensor([0.5]).bfloat16(), ValueError, "are not all 0 or 1; compare them first"),
        (torch.tensor([1 + 2**-7]).bfloat16(), ValueError, "are not all 0 or 1"),
        (torch.tensor([1 + 1e-15], dtype=torch.float64), ValueError, "are not all 0 or 1"),
        (torch.tensor([float("nan")]), ValueError, "are not all 0 or 1"),
        (torch.eye(2).to_sparse(), TypeError, "are a sparse or nested tensor; pass a dense one"),
        (torch.empty(2, device="meta"), TypeError, "are on the meta device, where there are none"),
        ([[True], [True, False]], ValueError, r"are no array \(.*inhomogeneous.*\); pass one in"),
        (
            np.ma.masked_array([True], [True]),
            TypeError,
            r"are a masked array; .*filled\(False\)",
        ),
        (["yes"], TypeError, "are list of <U3; pass an array of booleans, or of 0 and 1"),
        (None, TypeError, "are NoneType of object; pass an array of booleans"),
        ({"x": 1}, TypeError, "are dict of object; pass an array of booleans"),
    ],
)
def test_entries_that_are_none_are_refused(given: object, error: type, message: str) -> None:
    with pytest.raises(error, match=r"^the entries of w\\x1b " + message):
        UpdateMask.of({"w\x1b": given})


def test_what_is_no_mapping_of_names_is_refused() -> None:
    with pytest.raises(TypeError) as failed:
        UpdateMask.of([True, False])
    assert str(failed.value) == (
        "entries is a mapping from tensor names to arrays, as in {'weight': array}, not list"
    )
    with pytest.raises(TypeError) as failed:
        UpdateMask.of({"a": [True], 0: [True]})
    assert str(failed.value) == "entries has the name 0; names of tensors are str, not int"
    with pytest.raises(SelectionError) as failed:
        UpdateMask.of({})
    assert str(failed.value) == (
        "nothing is selected: entries has no tensor, and a mask covers at least one"
    )


def test_two_masks_are_one_only_where_that_is_certain(tmp_path: Path) -> None:
    base = {"w": torch.ones(4, 4), "v": torch.ones(3)}
    tuned = {"w": torch.eye(4), "v": torch.ones(3)}
    one, again = (update_mask(open_pair(base, tuned)) for _ in range(2))
    assert one.is_same(one)
    assert not one.is_same(again), "no fingerprint was taken"
    assert one.origin.known is None
    one.save(tmp_path / "one")
    again.save(tmp_path / "again")
    assert one.origin.known == ("same bits", one.origin.base, one.origin.tuned)
    assert one.is_same(again)
    loaded = [UpdateMask.load(tmp_path / name) for name in ("one", "one", "again")]
    assert all(mask.is_same(one) and one.is_same(mask) for mask in loaded)
    coarse = update_mask(open_pair(base, tuned), atol=1e-5)
    coarse.save(tmp_path / "coarse")
    assert not coarse.is_same(one), "another tolerance"
    assert not (one & again).is_same(one), "of no two checkpoints"
    part = update_mask(open_pair(base, tuned), include="w")
    part.save(tmp_path / "part")
    assert not part.is_same(one), "other tensors"


def test_masks_from_one_file_are_one_by_whatever_path(tmp_path: Path) -> None:
    given = UpdateMask.of({"w": [True, False]})
    given.save(tmp_path / "mask")
    given.save(tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "mask")
    mask, linked, copied = (UpdateMask.load(tmp_path / name) for name in ("mask", "link", "copy"))
    assert mask.is_same(linked)
    assert not mask.is_same(copied), "the same entries, from no known checkpoints"
    assert not mask.is_same(given)
    given.save(tmp_path / "mask")
    assert not mask.is_same(UpdateMask.load(tmp_path / "mask")), "written again since"
