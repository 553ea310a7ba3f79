import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet.findings.matrices.low_rank import _norm_at_most, count_above

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def of_rank(shape: tuple[int, int], values: list[float], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in shape
    ]
    return (sides[0] * torch.tensor(values, dtype=torch.float64)) @ sides[1].T


@law
@given(
    st.lists(st.floats(1e-3, 1e3), max_size=20),
    st.sampled_from([(90, 60), (60, 200), (128, 128)]),
    st.integers(1, 8),
    st.integers(0, 9),
)
def test_the_count_is_that_of_all_values(
    values: list[float], shape: tuple[int, int], expected: int, seed: int
) -> None:
    limit = 0.5
    matrix = of_rank(shape, [each for each in values if abs(each - limit) > 1e-6], seed)
    counted = count_above(matrix, limit, expected=expected)
    assert counted.above == int((torch.linalg.svdvals(matrix) > limit).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_below_the_limit_does_not_count(dtype: torch.dtype) -> None:
    noise = torch.randn(400, 300, generator=torch.Generator().manual_seed(0), dtype=dtype)
    noise /= torch.linalg.matrix_norm(noise, 2)
    matrix = of_rank((400, 300), [50.0, 20.0, 5.0], 0).to(dtype) + 0.7 * noise
    assert count_above(matrix, 1.0, expected=3)[::2] == (3, "sketch")


def test_values_just_above_the_limit_are_not_missed() -> None:
    """Full rank behind a few large ones: the sketch alone would say three."""
    values = [50.0, 20.0, 5.0] + [1.01] * 200
    counted = count_above(of_rank((400, 300), values, 0), 1.0, expected=3)
    assert counted[::2] == (203, "gram")


def test_more_than_the_sketch_holds_are_all_counted() -> None:
    counted = count_above(of_rank((400, 300), [3.0] * 40, 0), 1.0, expected=4)
    assert counted[::2] == (40, "gram")


@law
@given(st.integers(0, 50))
def test_the_norm_is_bounded_from_above(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -3 * (seed % 4), 80, dtype=torch.float64).tolist()
    matrix = of_rank((120, 80), decay, seed)
    kept = torch.randn(120, 2, generator=generator).double(), torch.zeros(2, 80).double()
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert true <= _norm_at_most(matrix, kept) <= 1.3 * true
