import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import magnitude_mask, principal_mask
from pytest_subnet.findings.geometry import masks as geometry_masks
from pytest_subnet.findings.geometry.masks import low_magnitude_bits, principal_bits, row_blocks
from pytest_subnet.masks.bits import unpack

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def drawn(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flags(bits, shape):
    return unpack(bits, shape[0] * shape[1]).reshape(shape)


@pytest.fixture(params=[1 << 20, 100])
def entries(request, monkeypatch):
    """Whole matrices at a time, and a few rows."""
    monkeypatch.setattr(geometry_masks, "_ENTRIES", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (17, 3), (1, 9)])
def test_small_entries_are_those_of_magnitude_mask(entries, shape, dtype):
    matrix = (drawn(shape, dtype) * 4).round() / 4  # many of one size: the first are taken
    for fraction in (0.1, 0.3, 0.77):
        known = magnitude_mask({"w": matrix}, fraction, largest=False)["w"]
        assert (flags(low_magnitude_bits(matrix, fraction), shape) == known).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (90, 70)])
def test_principal_entries_are_those_of_an_svd(entries, shape, dtype):
    matrix = drawn(shape, dtype)
    for rank in (1, 5, min(shape)):
        left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
        part = np.abs((left[:, :rank] * values[:rank]) @ right[:rank]).ravel()
        wanted = np.zeros(part.size, bool)
        wanted[np.argsort(-part, kind="stable")[: round(0.3 * part.size)]] = True
        found = flags(principal_bits(matrix, 0.3, rank), shape).ravel()
        assert found.sum() == wanted.sum()
        # At the very edge the rounding of float32, and the order of equal ones, may choose others.
        edge = part[wanted].min()
        assert (np.abs(part[found != wanted] - edge) <= 1e-5 * edge).all()


def test_they_are_those_of_principal_mask():
    matrix = drawn((150, 100), torch.bfloat16)
    known = principal_mask({"w": matrix}, 0.3, rank=16)["w"]
    assert (flags(principal_bits(matrix, 0.3, 16), (150, 100)) == known).mean() > 0.9997


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_of_float64_do_not_leave_it(scale):
    matrix = drawn((30, 20), torch.float64)
    expected = principal_bits(matrix, 0.3, 4)
    before = (matrix * scale).clone()
    found = principal_bits(before, 0.3, 4)
    assert (expected == found).all()
    assert torch.equal(before, matrix * scale)  # the matrix is not written to


@law
@given(st.integers(1, 60), st.integers(1, 300), st.integers(1, 500))
def test_blocks_cover_all_rows_and_end_at_whole_bytes(rows, columns, entries):
    before, geometry_masks._ENTRIES = geometry_masks._ENTRIES, entries
    try:
        blocks = list(row_blocks((rows, columns)))
    finally:
        geometry_masks._ENTRIES = before
    covered = [row for each in blocks for row in range(each.start, each.stop)]
    assert covered == list(range(rows))
    assert all(each.start * columns % 8 == 0 for each in blocks)
