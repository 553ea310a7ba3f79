"""Counting singular values, against the SVD of numpy and of torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import ldl

from pytest_subnet.findings.matrices import spectra
from pytest_subnet.findings.matrices.spectra import (
    Spectrum,
    effective_rank,
    frobenius_norm,
    gram_of,
    is_finite,
    without_zeros,
)

SHAPES = [(300, 300), (300, 700), (700, 300), (257, 260)]


@pytest.fixture
def large(monkeypatch):
    """Takes the way of large matrices, through a Gram matrix, also for small ones."""
    monkeypatch.setattr(spectra, "SMALL", 0)


def random(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(shape, values, seed=0):
    """A float64 matrix with these singular values and zeros."""
    generator = np.random.default_rng(seed)
    left, right = (np.linalg.qr(generator.standard_normal((n, len(values))))[0] for n in shape)
    return torch.from_numpy(left * np.asarray(values) @ right.T)


def exact(matrix):
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 400), (400, 1), (2, 300), (3, 500), (40, 30)])
def test_values_largest_and_counts_are_those_of_the_svd(shape, large):
    matrix = random(shape)
    expected = exact(matrix)
    spectrum = Spectrum(matrix)
    assert spectrum.largest() == pytest.approx(expected[0], rel=2e-7)
    for limit in np.quantile(expected, [0.01, 0.3, 0.77, 0.99]) * 1.0001:
        assert spectrum.count_above(float(limit)) == (expected > limit).sum()
    assert np.sort(spectrum.values().numpy())[::-1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_a_full_spectrum_are_certified_by_cholesky(shape, large, monkeypatch):
    monkeypatch.setattr(spectra, "_positive_eigenvalues", None)
    monkeypatch.setattr(spectra, "_eigenvalues", None)
    spectrum = Spectrum(random(shape))
    least = exact(random(shape))[-1]
    assert spectrum.count_above(0.999 * float(least)) == min(shape)


@pytest.mark.parametrize("rank", [1, 2, 8, 150, 299])
def test_where_cholesky_fails_the_pivots_are_counted(rank, large, monkeypatch):
    monkeypatch.setattr(spectra, "_eigenvalues", None)
    matrix = planted((300, 500), np.linspace(1, 2, rank))
    spectrum = Spectrum(matrix)
    monkeypatch.setattr(spectrum, "_largest", 2.0)
    assert spectrum.count_above(1e-5) == rank
    assert spectrum.count_above(1.49) == (np.linspace(1, 2, rank) > 1.49).sum()


def test_the_inertia_is_that_of_scipys_factorisation():
    """An indefinite matrix, of which many pivots are blocks of two."""
    symmetric = random((300, 300)).double()
    symmetric = symmetric + symmetric.T
    symmetric.fill_diagonal_(0)
    _, blocks, _ = ldl(symmetric.numpy())
    assert np.count_nonzero(np.diagonal(blocks, -1)) > 20
    lower = torch.from_numpy(np.asfortranarray(symmetric.numpy()))
    for shift in (0.0, 3.0, 20.0):
        expected = int((np.linalg.eigvalsh(symmetric.numpy()) > shift).sum())
        assert spectra._positive_eigenvalues(lower, shift) == expected


@pytest.mark.parametrize("shape", [(300, 320), (320, 300), (64, 64)])
@pytest.mark.parametrize("off", [0.999, 1.001])
def test_a_value_beside_the_limit_is_on_its_side(shape, off):
    """The limit of a rank: a planted value a thousandth above or below counts, or does not."""
    limit = max(shape) * 2.0**-23
    matrix = planted(shape, [1.0, 0.5, 0.25, limit * off, limit / 100])
    spectrum = Spectrum(matrix)
    found = spectrum.count_above(spectrum.largest() * limit)
    assert found == 3 + (off > 1)


def test_zeros_are_dropped_and_change_nothing():
    matrix = torch.zeros(400, 500)
    rows, columns = torch.arange(0, 400, 3), torch.arange(1, 500, 2)
    matrix[rows[:, None], columns] = random((len(rows), len(columns)))
    assert without_zeros(matrix).shape == (len(rows), len(columns))
    expected = exact(matrix)
    spectrum = Spectrum(matrix)
    assert spectrum.size == len(rows)
    assert spectrum.count_above(1e-3) == len(rows)
    assert spectrum.largest() == pytest.approx(expected[0], rel=2e-7)
    full = random((30, 40))
    assert without_zeros(full) is full


def test_a_matrix_of_zeros_has_no_values():
    spectrum = Spectrum(torch.zeros(300, 400))
    assert (spectrum.largest(), spectrum.count_above(0.0), len(spectrum.values())) == (0.0, 0, 0)
    assert effective_rank(spectrum.values()) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e6])
def test_the_size_of_the_entries_does_not_matter(scale, large):
    matrix = planted((300, 400), [1.0, 0.9, 0.9, 1e-3])
    spectrum = Spectrum(matrix * scale)
    assert spectrum.largest() == pytest.approx(scale, rel=2e-7)
    assert [spectrum.count_above(scale * x) for x in (0.95, 0.5, 1e-4)] == [1, 3, 4]


@pytest.mark.parametrize("error", ["not converged", "nothing certified"])
def test_without_lanczos_all_values_are_computed(error, large, monkeypatch):
    """Lanczos may stop at a value that is not the largest; the certificate notices."""
    lower = None if error == "not converged" else 0.5
    monkeypatch.setattr(spectra, "_lanczos", lambda gram: lower)
    assert Spectrum(planted((300, 400), [1.0, 0.5])).largest() == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_effective_rank_of_equal_values_is_their_number(count):
    values = torch.cat([torch.full((count,), 0.3), torch.zeros(5)]).double()
    assert effective_rank(values) == pytest.approx(count)


def test_the_effective_rank_is_the_exponential_of_the_entropy():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0]).double()
    assert math.log2(effective_rank(values)) == pytest.approx(1.75)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_finite_norm(value):
    matrix = torch.ones(4, 5)
    assert frobenius_norm(matrix) == pytest.approx(math.sqrt(20))
    matrix[2, 2] = value
    assert not math.isfinite(frobenius_norm(matrix))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 60), st.integers(0, 30), st.integers(0, 99), st.booleans()
)
def test_the_rank_is_that_of_torch_in_float64(rows, columns, rank, seed, through_gram):
    """Planted ranks of any shape, with the tolerance of float32."""
    rank = min(rank, rows, columns)
    left, right = random((rows, rank), seed).double(), random((rank, columns), seed + 1).double()
    matrix = left @ right
    before = spectra.SMALL
    spectra.SMALL = 0 if through_gram else before
    try:
        spectrum = Spectrum(matrix)
        # Of small matrices the tolerance is at the rounding of the squares: ask for more.
        found = spectrum.count_above(spectrum.largest() * 1e-5)
    finally:
        spectra.SMALL = before
    assert found == int(torch.linalg.matrix_rank(matrix, rtol=1e-5))


LAYOUTS = [
    lambda matrix: matrix,
    lambda matrix: matrix.T.contiguous().T,
    lambda matrix: torch.stack([matrix, matrix], dim=2)[:, :, 1],  # not dense
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 4099), (90, 30)])
def test_gram_matrices_are_products(shape, dtype, layout):
    """Of any layout, in blocks of columns and in the last, shorter one."""
    matrix = layout(random(shape).to(dtype))
    expected = (matrix.double() @ matrix.double().T).tril()
    found = gram_of(matrix)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    single = gram_of(matrix, torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_entry_that_is_not_finite_is_found(dtype, layout):
    """Wherever it is, also beside an infinity, and with the largest number there is."""
    matrix = random((17, 33)).to(dtype)
    matrix[3, 4] = torch.finfo(dtype).max
    assert is_finite(layout(matrix))
    assert is_finite(matrix[:, :0])
    for place in [(0, 0), (16, 32), (8, 20)]:
        for value in (math.nan, math.inf, -math.inf):
            wrong = matrix.clone()
            wrong[place] = value
            assert not is_finite(layout(wrong))
            wrong[16, 0] = math.inf
            assert not is_finite(layout(wrong))
