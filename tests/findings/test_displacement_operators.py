from math import gcd

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet.findings.displacement import operators as operator_module
from pytest_subnet.findings.displacement.operators import (
    Diagonal,
    DisplacementOperator,
    Path,
    Shift,
    resolve_operator,
)

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def dense(factor: object, size: int) -> np.ndarray:
    match factor:
        case Shift(corner=corner, transposed=transposed):
            matrix = np.eye(size, k=-1)
            matrix[0, -1] += corner
            return matrix.T if transposed else matrix
        case Path(first=first, last=last):
            matrix = np.eye(size, k=-1) + np.eye(size, k=1)
            matrix[0, 0] += first
            matrix[-1, -1] += last
            return matrix
        case Diagonal(nodes=nodes):
            return np.diag(nodes)
    raise AssertionError(factor)


def rank(matrix: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.double(), rtol=1e-10))


sizes = st.integers(1, 7)
corners = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0])
shifts = st.builds(Shift, corners, st.booleans())
paths = st.builds(Path, corners, corners)


@st.composite
def operators(draw: st.DrawFn) -> tuple[DisplacementOperator, int, int]:
    m, n = draw(sizes), draw(sizes)

    def diagonal(size: int) -> st.SearchStrategy[Diagonal]:
        nodes = st.lists(st.integers(-3, 4), min_size=size, max_size=size, unique=True)
        return nodes.map(lambda values: Diagonal(tuple(values)))

    left = draw(st.one_of(shifts, paths, diagonal(m)))
    right = draw(st.one_of(shifts, paths, diagonal(n)))
    return DisplacementOperator("drawn", left, right), m, n


@law
@given(operators(), st.sampled_from(["sylvester", "stein"]), st.integers(0, 99))
def test_shifts_are_products(
    drawn: tuple[DisplacementOperator, int, int], form: str, seed: int
) -> None:
    operator, m, n = drawn
    matrix = np.random.default_rng(seed).standard_normal((m, n))
    a, b = dense(operator.left, m), dense(operator.right, n)
    product = a @ matrix - matrix @ b if form == "sylvester" else matrix - a @ matrix @ b
    found = operator.displacement(torch.from_numpy(matrix), form)
    np.testing.assert_allclose(found.numpy(), product, atol=1e-12)


@law
@given(
    operators(),
    st.sampled_from(["sylvester", "stein"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.integers(1, 7),
    st.integers(1, 50),
)
def test_some_rows_at_a_time_are_the_whole(
    drawn: tuple[DisplacementOperator, int, int],
    form: str,
    dtype: torch.dtype,
    rows: int,
    entries: int,
) -> None:
    operator, m, n = drawn
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(entries)).to(dtype)
    whole = operator.displacement(matrix, form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator_module, "_ENTRIES", entries)
        found = operator.displacement_of(lambda: matrix.split(rows), (m, n), form)
    assert found.dtype == whole.dtype
    assert torch.equal(found, whole)


@law
@given(operators())
def test_noise_adds_up_in_squares(drawn: tuple[DisplacementOperator, int, int]) -> None:
    operator, m, n = drawn
    for factor, size in ((operator.left, m), (operator.right, n)):
        if size > 1:  # a corner on the diagonal adds to what is there
            squares = np.square(dense(factor, size)).sum() / size
            if not (size == 2 and isinstance(factor, Shift)):
                assert factor.mean_square(size) == pytest.approx(squares)


@law
@given(operators(), st.sampled_from(["sylvester", "stein"]))
def test_the_nullity_is_that_of_the_linear_map(
    drawn: tuple[DisplacementOperator, int, int], form: str
) -> None:
    operator, m, n = drawn
    a, b = dense(operator.left, m), dense(operator.right, n)
    if form == "sylvester":
        whole = np.kron(np.eye(n), a) - np.kron(b.T, np.eye(m))
    else:
        whole = np.eye(m * n) - np.kron(b.T, a)
    # Of a map that is not normal, as with the nilpotent shift, equal eigenvalues say only whether.
    missing = m * n - np.linalg.matrix_rank(whole, tol=1e-8)
    assert (operator.nullity((m, n), form) == 0) == (missing == 0)


def test_the_toeplitz_operator_is_singular_by_the_2_adic_rule() -> None:
    operator = resolve_operator("toeplitz")
    for m in range(1, 40):
        for n in range(1, 40):
            assert operator.nullity((m, n)) == gcd(m, 2 * n) - gcd(m, n)
    assert operator.nullity((8, 4)) == 4
    assert operator.nullity((64, 224)) == 32
    assert operator.nullity((4096, 14336)) == 2048
    assert operator.nullity((14336, 4096)) == 0


def test_a_matrix_without_displacement_need_not_be_zero() -> None:
    a, b = dense(Shift(1), 8), dense(Shift(-1), 4)
    whole = np.kron(np.eye(4), a) - np.kron(b.T, np.eye(8))
    _, values, directions = np.linalg.svd(whole)
    assert (values < 1e-12).sum() == 4
    matrix = torch.from_numpy(directions[-1].reshape(4, 8).T.copy())
    assert resolve_operator("toeplitz").displacement(matrix).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(40, 40), (24, 40), (40, 24), (33, 50), (64, 32)])
@pytest.mark.parametrize("form", ["sylvester", "stein"])
def test_toeplitz_is_2_in_every_shape(shape: tuple[int, int], form: str) -> None:
    rng = np.random.default_rng(0)
    toeplitz = scipy.linalg.toeplitz(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
    found = resolve_operator("toeplitz", form).displacement(torch.from_numpy(toeplitz), form)
    assert rank(found) == 2


def test_the_table_of_classes() -> None:
    rng = np.random.default_rng(0)
    n = 40
    column, row = rng.standard_normal((2, n))
    toeplitz = scipy.linalg.toeplitz(column, row)
    hankel = scipy.linalg.hankel(column, row)

    def ranked(matrix: np.ndarray, name: str, form: str = "sylvester") -> int:
        operator = resolve_operator(name, form)
        return rank(operator.displacement(torch.from_numpy(matrix), form))

    assert ranked(scipy.linalg.circulant(column), "toeplitz") == 1
    assert ranked(np.eye(n), "toeplitz") == 1
    assert ranked(np.linalg.inv(toeplitz), "toeplitz") == 2
    assert ranked(toeplitz @ scipy.linalg.toeplitz(row, column), "toeplitz") == 4
    assert ranked(rng.standard_normal((n, 3)) @ rng.standard_normal((3, n)), "toeplitz") <= 6
    assert ranked(rng.standard_normal((n, n)), "toeplitz") == n
    assert ranked(hankel, "hankel") == 2
    assert ranked(hankel, "hankel", "stein") == 2
    assert ranked(hankel, "toeplitz") == n
    assert ranked(toeplitz + hankel, "toeplitz+hankel") == 4


@pytest.mark.parametrize("form", ["sylvester", "stein"])
def test_nodes_have_classes_too(form: str) -> None:
    nodes = np.linspace(0.5, 1.4, 12)
    powers = torch.from_numpy(np.vander(nodes, 9, increasing=True))
    if form == "sylvester":
        assert rank(DisplacementOperator.vandermonde(nodes.tolist()).displacement(powers)) == 1
        columns = np.linspace(2.0, 3.0, 9)
        cauchy = torch.from_numpy(1 / (nodes[:, None] - columns))
        operator = DisplacementOperator.cauchy(nodes.tolist(), columns.tolist())
        assert rank(operator.displacement(cauchy)) == 1
    else:
        left = Diagonal(tuple(nodes.tolist()))
        operator = DisplacementOperator("powers", left, Shift(0, transposed=True))
        assert rank(operator.displacement(powers, "stein")) == 1


def test_16_bit_floats_cancel_exactly() -> None:
    rng = np.random.default_rng(0)
    toeplitz = scipy.linalg.toeplitz(rng.standard_normal(64), rng.standard_normal(48))
    moved = resolve_operator("toeplitz").displacement(torch.from_numpy(toeplitz).bfloat16())
    assert moved.dtype == torch.float32
    assert not moved[1:, :-1].any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: resolve_operator("toplitz"), "did you mean toeplitz"),
        (lambda: resolve_operator("cauchy"), "needs its nodes: DisplacementOperator.cauchy"),
        (lambda: resolve_operator("toeplitz", "lyapunov"), "form='lyapunov' is not one of"),
        (
            lambda: resolve_operator("toeplitz+hankel", "stein"),
            "operator='toeplitz+hankel' is not one of 'toeplitz', 'hankel' in the form stein",
        ),
        (lambda: Diagonal((1.0, 2.0, 1.0)), "node 1.0 is there twice"),
        (lambda: Diagonal((1.0, float("nan"))), "the nodes of an operator are finite numbers"),
        (
            lambda: DisplacementOperator.cauchy([1.0, 2.0], [2.0]),
            "node 2.0 is of a row and of a column",
        ),
        (
            lambda: DisplacementOperator.vandermonde([1.0, 2.0]).displacement(torch.ones(3, 2)),
            "operator vandermonde, rows: 2 nodes do not fit a side of 3",
        ),
    ],
)
def test_what_is_no_operator(make: object, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("+", r"\+")):
        make()


def test_an_operator_has_a_name_or_is_one() -> None:
    with pytest.raises(TypeError, match="operator=3 is neither a name nor an operator"):
        resolve_operator(3)
