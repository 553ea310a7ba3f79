import numpy as np
import pytest
import scipy.linalg
import torch

from pytest_subnet.findings.displacement.finding import assert_displacement_rank, displacement_rank
from pytest_subnet.training.structured import ToeplitzLikeLinear, fit_displacement


def toeplitz(m: int, n: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(scipy.linalg.toeplitz(rng.standard_normal(m), rng.standard_normal(n)))


def by_hand(layer: ToeplitzLikeLinear) -> np.ndarray:
    """Σ Z_1(g) Z_-1(h), from powers of the shifts."""
    size = layer.left.shape[1]
    total = np.zeros((size, size))
    for column, skew in zip(layer.left.tolist(), layer.right.tolist(), strict=True):
        factors = []
        for first, corner in ((column, 1.0), (skew, -1.0)):
            shift = np.eye(size, k=-1)
            shift[0, -1] += corner
            powers = (np.linalg.matrix_power(shift, k) for k in range(size))
            factors.append(sum(value * power for value, power in zip(first, powers, strict=True)))
        total += factors[0] @ factors[1]
    return total[: layer.out_features, : layer.in_features]


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (5, 9), (9, 5), (1, 1), (1, 4)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_fft_is_the_product_of_powers(shape: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    layer = ToeplitzLikeLinear(shape[1], shape[0], rank=rank).double()
    expected = by_hand(layer)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, atol=1e-12)
    inputs = torch.randn(4, 3, shape[1], dtype=torch.float64)
    bias = layer.bias.detach().numpy()
    outputs = inputs.numpy() @ expected.T + bias
    np.testing.assert_allclose(layer(inputs).detach().numpy(), outputs, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    layer = ToeplitzLikeLinear(5, 6, rank=2).double()
    inputs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda left, right, x: torch.func.functional_call(
            layer, {"left": left, "right": right}, (x,)
        ),
        (layer.left.detach().requires_grad_(), layer.right.detach().requires_grad_(), inputs),
    )


def test_it_has_2_n_r_numbers_and_a_rank_to_match() -> None:
    torch.manual_seed(0)
    layer = ToeplitzLikeLinear(96, 96, rank=3, bias=False)
    assert sum(each.numel() for each in layer.parameters()) == 2 * 96 * 3
    assert_displacement_rank(layer.weight, max_rank=3)
    assert displacement_rank(layer.weight).rank == 3


def test_outputs_are_as_large_as_a_linear_layers() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 128)
    layer = ToeplitzLikeLinear(128, 64, rank=4, bias=False)
    linear = torch.nn.Linear(128, 64, bias=False)
    assert 0.8 < float((layer(inputs).std() / linear(inputs).std()).detach()) < 1.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_comes_out_has_the_layers_dtype(dtype: torch.dtype) -> None:
    layer = ToeplitzLikeLinear(8, 8, rank=1).to(dtype)
    assert layer(torch.ones(2, 8, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("shape", [(24, 24), (20, 24), (24, 20)])
def test_a_toeplitz_matrix_is_found(shape: tuple[int, int]) -> None:
    # A rectangular one lies in a square with zeros around it: at most two ranks more.
    rank = 2 if shape[0] == shape[1] else 4
    matrix = toeplitz(*shape)
    layer = fit_displacement(matrix, rank)
    torch.testing.assert_close(layer.weight.detach(), matrix, atol=1e-9, rtol=0)


def test_products_and_inverses_are_found() -> None:
    first, second = toeplitz(20, 20, 1), toeplitz(20, 20, 2)
    for matrix, rank in ((first @ second, 4), (torch.linalg.inv(first), 2)):
        fitted = fit_displacement(matrix, rank).weight.detach()
        torch.testing.assert_close(fitted, matrix, atol=1e-7 * float(matrix.norm()), rtol=0)


def test_a_dense_matrix_is_approached_more_closely_with_more_numbers() -> None:
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    errors = [
        float((fit_displacement(matrix, rank).weight.detach() - matrix).norm() / matrix.norm())
        for rank in (1, 4, 12)
    ]
    assert 1 > errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5


def test_training_keeps_the_structure() -> None:
    torch.manual_seed(0)
    layer = ToeplitzLikeLinear(48, 48, rank=2)
    target = toeplitz(48, 48).float()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        inputs = torch.randn(64, 48)
        loss = (layer(inputs) - inputs @ target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert_displacement_rank(layer.weight, max_rank=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_features": 0, "out_features": 4, "rank": 1}, "in_features=0 is not an"),
        (
            {"in_features": 4, "out_features": 4, "rank": 0},
            "rank=0 is not an integer of at least 1",
        ),
        (
            {"in_features": 4, "out_features": True, "rank": 1},
            "out_features=True is not",
        ),
    ],
)
def test_layers_that_are_none(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ToeplitzLikeLinear(**arguments)


@pytest.mark.parametrize(
    ("matrix", "rank", "text"),
    [
        (torch.ones(4), 1, "a matrix of two dimensions and real floats is needed"),
        (torch.ones(4, 4, dtype=torch.int64), 1, "real floats"),
        (torch.full((4, 4), float("inf")), 1, "holds NaN or Inf"),
        (torch.ones(4, 4), 4, "rank=4 is not an integer from 1 to 3"),
        (torch.ones(4, 4), 0, "rank=0 is not an integer from 1 to 3"),
    ],
)
def test_what_cannot_be_fitted(matrix: torch.Tensor, rank: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit_displacement(matrix, rank)


def test_a_matrix_of_zeros_is_fitted_by_zeros() -> None:
    assert not fit_displacement(torch.zeros(6, 6), 1).weight.any()


def test_fitting_draws_nothing_from_the_callers_generator() -> None:
    before = torch.get_rng_state()
    fit_displacement(torch.ones(6, 6), 2)
    assert torch.equal(torch.get_rng_state(), before)
