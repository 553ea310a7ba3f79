"""Boxes in a tensor, against numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_subnet.checkpoints.dcp.boxes import (
    Box,
    fault_in_cover,
    runs_between,
    start_of_run,
    strides_of,
)

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + size) for o, size in zip(*box, strict=True))


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(
        draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)
    )
    return Box(offsets, sizes)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Box, int, int]:
    shape = draw(SHAPES)
    entries = int(np.prod(shape))
    start = draw(st.integers(0, entries))
    return shape, draw(boxes(shape)), start, draw(st.integers(start, entries))


@given(cases())
def test_runs_are_the_entries_of_the_box_in_the_window(
    case: tuple[tuple[int, ...], Box, int, int],
) -> None:
    shape, box, start, stop = case
    tensor = np.arange(np.prod(shape)).reshape(shape)
    packed = tensor[slices(box)].ravel()
    found = [
        (target + i, int(packed[source + k * nbytes + i]))
        for target_of_first, source, nbytes, count, step in runs_between(box, shape, start, stop)
        for k in range(count)
        for target in [target_of_first + k * step]
        for i in range(nbytes)
    ]
    wanted = [int(each) for each in packed if start <= each < stop]
    assert found == [(each, each) for each in wanted]


@given(cases())
def test_a_box_is_one_run_where_its_entries_follow_each_other(
    case: tuple[tuple[int, ...], Box, int, int],
) -> None:
    shape, box, _, _ = case
    packed = np.arange(np.prod(shape)).reshape(shape)[slices(box)].ravel()
    is_run = bool(np.all(np.diff(packed) == 1))
    assert start_of_run(box, shape) == (packed[0] if is_run else None)


@given(SHAPES)
def test_strides_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    assert strides_of(shape) == np.empty(shape, np.uint8).strides


def test_a_single_number_has_no_strides() -> None:
    assert strides_of(()) == ()


@given(st.data())
def test_a_cover_has_each_entry_once(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    chosen = data.draw(st.lists(boxes(shape), max_size=6))
    times = np.zeros(shape, int)
    for box in chosen:
        times[slices(box)] += 1
    assert (fault_in_cover(shape, chosen) is None) == bool((times == 1).all())


@given(SHAPES, st.data())
def test_a_grid_is_a_cover_and_one_box_less_is_none(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    cuts = [
        sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape
    ]
    corners = np.stack(np.meshgrid(*(c[:-1] for c in cuts), indexing="ij"), -1)
    sizes = np.stack(np.meshgrid(*map(np.diff, cuts), indexing="ij"), -1)
    grid = [
        Box(tuple(map(int, corner)), tuple(map(int, size)))
        for corner, size in zip(
            corners.reshape(-1, len(shape)), sizes.reshape(-1, len(shape)), strict=True
        )
    ]
    assert fault_in_cover(shape, data.draw(st.permutations(grid))) is None
    assert fault_in_cover(shape, grid[1:]) is not None


def test_faults_are_named() -> None:
    shape = (4, 2)
    assert fault_in_cover(shape, []) == "they hold 0 of its 8 entries"
    assert fault_in_cover(shape, [Box((3, 0), (2, 2))]) == "the one at [3, 0] reaches to [5, 2]"
    twice = [Box((0, 0), (3, 2)), Box((2, 0), (2, 2))]
    assert fault_in_cover(shape, twice) == "those at [0, 0] and [2, 0] overlap"
    assert fault_in_cover((), [Box((), ())]) is None
