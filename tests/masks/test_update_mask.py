"""Masks in memory: what they hold and how they are read back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pytest_subnet import SelectionError, UpdateMask

ENTRIES = arrays(np.bool_, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))


@given(st.dictionaries(st.text(max_size=5), ENTRIES, max_size=4))
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
