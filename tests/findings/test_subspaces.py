import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet.findings.matrices import block_krylov, subspaces
from pytest_subnet.findings.matrices.spectra import gram_of
from pytest_subnet.findings.matrices.subspaces import (
    both_ways,
    leading,
    principal_angles_deg,
    vector_angles_deg,
)

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def basis(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random((n, k), seed)).Q


def with_values(values: torch.Tensor, shape: tuple[int, int], seed: int) -> torch.Tensor:
    k = len(values)
    return (basis(shape[0], k, seed) * values) @ basis(shape[1], k, seed + 1).T


@law
@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 99), st.sampled_from([1, 1e-3, 1e-7]))
def test_angles_are_scipys(n: int, k: int, seed: int, apart: float) -> None:
    k = min(k, n)
    one = basis(n, k, seed)
    other = torch.linalg.qr(one + apart * random((n, k), seed + 1)).Q
    expected = np.rad2deg(scipy.linalg.subspace_angles(one.numpy(), other.numpy()))
    np.testing.assert_allclose(principal_angles_deg(one, other), expected, atol=1e-9, rtol=1e-6)


def test_the_same_subspace_is_at_no_angle() -> None:
    one = basis(400, 40, 0)
    turned = one @ basis(40, 40, 1)
    assert float(principal_angles_deg(one, turned).max()) < 1e-12
    assert float(vector_angles_deg(one, turned).max()) > 45


def test_right_angles_are_told() -> None:
    whole = basis(10, 6, 0)
    np.testing.assert_allclose(principal_angles_deg(whole[:, :3], whole[:, 3:]), 90)


def test_a_sign_is_no_turn() -> None:
    one = basis(20, 4, 0)
    assert float(vector_angles_deg(one, -one).max()) < 1e-6


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25), (700, 650), (650, 700)])
@pytest.mark.parametrize("k", [1, 8])
def test_it_is_the_svd(shape: tuple[int, int], k: int) -> None:
    matrix = with_values(torch.linspace(10, 1, 20).double(), shape, 0)
    found = leading(matrix, k)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(found.values, values[:k], rtol=1e-10)
    assert found.beyond == pytest.approx(float(values[k]), rel=1e-8)
    assert float(principal_angles_deg(found.left, left[:, :k]).max()) < 1e-5
    assert float(principal_angles_deg(found.right, right[:k].T).max()) < 1e-5
    rebuilt = (found.left * found.values) @ found.right.T
    best = (left[:, :k] * values[:k]) @ right[:k]
    np.testing.assert_allclose(rebuilt, best, atol=1e-9)
    assert math.degrees(found.error) < 1e-4


def test_all_directions_have_nothing_beyond() -> None:
    found = leading(random((5, 3), 0), 3)
    assert (found.beyond, found.gap) == (0.0, 1.0)


def test_iterating_from_nearby_finds_the_same() -> None:
    values = torch.cat([torch.linspace(20, 10, 12), torch.linspace(2, 0.1, 588)]).double()
    base = with_values(values, (600, 750), 0)
    tuned = base + 0.02 * random((600, 750), 9)
    left, _, right = torch.linalg.svd(tuned, full_matrices=False)
    for found in (leading(tuned, 12, start=leading(base, 12)), leading(tuned, 12)):
        assert found.method == "block-krylov"
        for one, other in ((found.left, left[:, :12]), (found.right, right[:12].T)):
            angle = principal_angles_deg(one, other).max()
            assert float(angle) <= math.degrees(found.error) < 0.002


@pytest.mark.parametrize("scale", [1, 1e-25, 1e25])
def test_products_in_float32_are_held_to_the_matrix_in_float64(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where their squares leave the range of float32 they are not believed."""
    products = []

    def counted(matrix: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        products.append(dtype)
        return gram_of(matrix, dtype)

    monkeypatch.setattr(subspaces, "gram_of", counted)
    monkeypatch.setattr(subspaces, "_LARGE", 1)
    values = torch.cat([torch.linspace(20, 10, 12), torch.linspace(2, 0.1, 588)]).double()
    matrix = scale * with_values(values, (600, 750), 0)
    found = leading(matrix, 12)
    left, exact, right = torch.linalg.svd(matrix, full_matrices=False)
    assert products == [torch.float32, torch.float64][: 1 if scale == 1 else 2]
    np.testing.assert_allclose(found.values, exact[:12], rtol=1e-10)
    for one, other in ((found.left, left[:, :12]), (found.right, right[:12].T)):
        angle = principal_angles_deg(one, other).max()
        assert float(angle) <= math.degrees(found.error) < 0.002


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("entries", [1, 250, 1 << 23])
def test_both_ways_through_a_matrix(
    shape: tuple[int, int], dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a column, of a few with a shorter last one, and at once; of either layout."""
    monkeypatch.setattr(subspaces, "_ENTRIES", entries)
    matrix = random(shape, 0).to(dtype)
    short, long = random((shape[0], 3), 1), random((shape[1], 2), 2)
    for stored in (matrix, matrix.T.contiguous().T):
        across, down = both_ways(stored, short, long)
        torch.testing.assert_close(across, matrix.double() @ long)
        torch.testing.assert_close(down, matrix.double().T @ short)
        image, again = both_ways(stored, short)
        torch.testing.assert_close(image, matrix.double() @ (matrix.double().T @ short))
        assert torch.equal(again, down)


@pytest.mark.parametrize(
    ("values", "k", "method"),
    [([20, 12], 20, "block-krylov"), ([20, 12], 32, "block-krylov"), ([40, 1], 9, "eigh")],
)
def test_a_value_that_many_directions_share_is_found_as_often(
    values: list[int], k: int, method: str
) -> None:
    """Of these the iteration has shown no more than 8 when it first seems to have arrived."""
    many, few = values
    rest = torch.linspace(0.5, 0.1, 600 - many - few)
    parts = [torch.full((many,), 5.0), torch.linspace(4, 3, few), rest]
    matrix = with_values(torch.cat(parts).double(), (600, 750), 0)
    found = leading(matrix, k)
    assert found.method == method
    np.testing.assert_allclose(found.values, torch.cat(parts)[:k], rtol=1e-6)


@pytest.mark.parametrize("rest", [torch.linspace(2, 0.1, 846), torch.zeros(846)])
def test_iterating_from_nowhere_finds_what_the_decomposition_does(rest) -> None:
    values = torch.cat([torch.linspace(20, 10, 4), rest]).double()
    matrix = with_values(values, (850, 900), 0)
    found = leading(matrix, 4)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert found.method == "block-krylov"
    np.testing.assert_allclose(found.values, values[:4], rtol=1e-10)
    assert 0.95 * float(values[4]) <= found.beyond <= float(values[4]) + 1e-5
    for one, other in ((found.left, left[:, :4]), (found.right, right[:4].T)):
        assert float(principal_angles_deg(one, other).max()) <= math.degrees(found.error) + 1e-9
    assert math.degrees(found.error) < 0.002


def test_a_direction_that_was_not_there_is_not_missed() -> None:
    values = torch.cat([torch.linspace(20, 10, 12), torch.linspace(2, 0.1, 588)]).double()
    base = with_values(values, (700, 600), 0)
    new = 30 * torch.outer(basis(700, 1, 5)[:, 0], basis(600, 1, 6)[:, 0])
    near = leading(base + new, 12, start=leading(base, 12))
    afresh = leading(base + new, 12)
    assert float(principal_angles_deg(near.left, afresh.left).max()) < 0.01


def test_without_a_gap_it_is_not_believed() -> None:
    """Of equal values no direction is the k-th: all vectors are computed instead."""
    values = torch.cat([torch.full((20,), 5.0), torch.linspace(2, 0.1, 680)]).double()
    base = with_values(values, (700, 750), 0)
    assert block_krylov.columns(12) < 700
    assert leading(base, 12, start=leading(base, 12)).method == "eigh"
