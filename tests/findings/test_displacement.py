import numpy as np
import pytest
import scipy.linalg
import torch

from pytest_subnet import PairMismatchError, SelectionError, open_pair
from pytest_subnet.findings.displacement.finding import (
    assert_displacement_rank,
    displacement,
    displacement_rank,
)
from pytest_subnet.findings.displacement.operators import DisplacementOperator

RNG = np.random.default_rng(0)


def toeplitz(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    rng = np.random.default_rng([m, n])
    matrix = scipy.linalg.toeplitz(rng.standard_normal(m), rng.standard_normal(n))
    return torch.from_numpy(matrix).to(dtype)


def dense(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 40), (24, 40), (200, 96), (300, 512)])
def test_a_stored_toeplitz_matrix_has_rank_2(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    result = assert_displacement_rank(toeplitz(*shape, dtype), max_rank=2)
    assert result.rank == 2
    assert result.compression == pytest.approx(shape[0] * shape[1] / (2 * sum(shape)))


@pytest.mark.parametrize("size", [128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rounded_product_has_rank_4(size: int, dtype: torch.dtype) -> None:
    """Of full rank by the bits: the tolerance is what tells rounding from structure."""
    product = toeplitz(size, size, torch.float32) @ toeplitz(size, size + 1, torch.float32)[:, :-1]
    matrix = product.to(dtype)
    if size == 128 and dtype != torch.float32:
        assert int(torch.linalg.matrix_rank(displacement(matrix).double())) > 4
    assert displacement_rank(matrix).rank == 4


@pytest.mark.parametrize("size", [128, 384])
def test_rounding_is_three_quarters_of_the_tolerance(size: int) -> None:
    left, right = toeplitz(size, size, torch.float64), toeplitz(size, size + 1, torch.float64)
    product = left @ right[:, :-1]
    noise = displacement(product.bfloat16().double() - product)
    tolerance = displacement_rank(product.bfloat16()).per_tensor[0].tolerance
    assert 0.65 < float(torch.linalg.matrix_norm(noise, 2)) / tolerance < 0.85


def test_dense_matrices_have_no_structure() -> None:
    result = displacement_rank(dense(300, 200).bfloat16())
    row = result.per_tensor[0]
    assert row.rank > 195
    assert row.method == "gram"
    with pytest.raises(AssertionError) as failure:
        assert_displacement_rank(dense(300, 200).bfloat16(), max_rank=4)
    assert str(failure.value).splitlines()[0] == (
        f"displacement rank {row.rank} is above the allowed 4: matrix"
    )
    assert "to accept" not in str(failure.value)  # 200 could not fail, and would be an error
    with pytest.raises(ValueError, match="max_rank=200 could not fail"):
        assert_displacement_rank(dense(300, 200).bfloat16(), max_rank=200)


def test_a_bound_that_is_named_holds() -> None:
    """The sum of two matrices that have ranks 2 and 4."""
    matrix = toeplitz(60, 50, torch.float64) + dense(60, 2).double() @ dense(2, 50).double()
    with pytest.raises(AssertionError) as failure:
        assert_displacement_rank(matrix, max_rank=4)
    assert str(failure.value).splitlines()[-1] == "  to accept  max_rank=6"
    assert_displacement_rank(matrix, max_rank=6)


def test_whether_the_displacement_determines_the_matrix() -> None:
    assert not displacement_rank(toeplitz(64, 224)).operator_invertible
    assert displacement_rank(toeplitz(64, 224)).per_tensor[0].nullity == 32
    assert displacement_rank(toeplitz(224, 64)).operator_invertible
    assert displacement_rank(toeplitz(64, 224), form="stein").operator_invertible


def test_inverse_circulant_identity() -> None:
    matrix = toeplitz(96, 96, torch.float64) + 20 * torch.eye(96, dtype=torch.float64)
    assert displacement_rank(torch.linalg.inv(matrix)).rank == 2
    assert displacement_rank(torch.eye(96)).rank == 1
    circulant = scipy.linalg.circulant(RNG.standard_normal(96))
    assert displacement_rank(circulant).rank == 1  # an array will do


def test_cauchy_has_rank_1() -> None:
    rows, columns = np.linspace(0, 1, 80), np.linspace(1.5, 3, 60)
    operator = DisplacementOperator.cauchy(rows.tolist(), columns.tolist())
    matrix = torch.from_numpy(1 / (rows[:, None] - columns))
    assert_displacement_rank(matrix, max_rank=1, operator=operator)


def test_a_sum_of_both_has_rank_4_once_rounded() -> None:
    hankel = scipy.linalg.hankel(RNG.standard_normal(256), RNG.standard_normal(256))
    both = (toeplitz(256, 256, torch.float64) + torch.from_numpy(hankel)).bfloat16()
    assert displacement_rank(both, operator="toeplitz+hankel").rank == 4
    assert displacement_rank(both).rank > 200


def test_one_gate_over_a_pair() -> None:
    base = {
        "layers.0.structured.weight": toeplitz(64, 48),
        "layers.0.mlp.up_proj.weight": dense(64, 48).bfloat16(),
        "layers.0.norm.weight": torch.ones(64).bfloat16(),
    }
    tuned = {**base, "layers.0.structured.weight": (toeplitz(64, 48).float() * 1.5).bfloat16()}
    tuned["layers.0.mlp.up_proj.weight"] = base["layers.0.mlp.up_proj.weight"] + 1
    pair = open_pair(base, tuned)
    structured = assert_displacement_rank(pair, max_rank=2, include="*structured*")
    assert [each.rank for each in structured.per_tensor] == [2]
    assert displacement_rank(pair).per_tensor[0].rank == 2
    assert displacement_rank(pair, of="base", include="*structured*").rank == 2
    update = displacement_rank(pair, of="update", include="*structured*")
    assert (update.of, update.rank) == ("update", 2)
    with pytest.raises(AssertionError) as failure:
        assert_displacement_rank(pair, max_rank=4)
    assert str(failure.value) == (
        "displacement rank 48 is above the allowed 4: layers.0.mlp.up_proj.weight\n"
        "  pair       dict of tensors -> dict of tensors   (toeplitz, sylvester, of tuned, bf16, "
        "2/2 matrices)\n"
        f"  tolerance  {displacement_rank(pair).per_tensor[1].tolerance:.3g}: what rounding to its "
        "dtype produces by itself\n"
        "  worst      layers.0.mlp.up_proj.weight  rank 48 of 48  (bf16[64,48])\n"
        "  chance     a matrix without structure has rank min(m, n), and so has rounding\n"
        "  usually    a layer that trained without its structure, or another operator than its "
        "own\n"
        "  to mend    include= or kinds=, to name the matrices that are meant to be structured"
    )
    assert repr(update).startswith("DisplacementRanks(rank=2 at most, of the update, 1 matrix")
    with pytest.raises(SelectionError, match="none of 1 selected tensor is a weight of two"):
        displacement_rank(pair, include="*norm*")


def test_an_update_of_nothing_has_no_rank() -> None:
    weights = {"layers.0.structured.weight": toeplitz(64, 48)}
    pair = open_pair(weights, {"layers.0.structured.weight": toeplitz(64, 48).clone()})
    with pytest.raises(SelectionError, match="holds zeros alone"):
        displacement_rank(pair, of="update")


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_update_is_of_numbers_on_both_sides(side: str) -> None:
    name = "layers.0.structured.weight"
    sides = {"base": {name: toeplitz(64, 48)}, "tuned": {name: dense(64, 48).bfloat16()}}
    sides[side][name][3, 4] = torch.nan
    with pytest.raises(SelectionError, match=f"{name} holds NaN or Inf and has no displacement"):
        displacement_rank(open_pair(sides["base"], sides["tuned"]), of="update")


def test_an_update_below_rounding_shows_no_structure() -> None:
    """A step or none of bf16 in some entries: rank 0 is no proof of a structure."""
    base = dense(64, 48).bfloat16()
    tuned = base.clone()
    tuned.view(torch.int16)[::3, ::3] += 1
    pair = open_pair({"layers.0.structured.weight": base}, {"layers.0.structured.weight": tuned})
    assert displacement_rank(pair, of="update").rank == 0
    with pytest.raises(AssertionError) as failure:
        assert_displacement_rank(pair, max_rank=4, of="update")
    (row,) = displacement_rank(pair, of="update").per_tensor
    assert str(failure.value) == (
        "displacement rank 0 of every update: none is above what rounding produces by itself, and "
        "whether it is structured cannot be seen\n"
        "  pair       dict of tensors -> dict of tensors   (toeplitz, sylvester, of update, bf16, "
        "1/1 matrix)\n"
        f"  tolerance  {row.tolerance:.3g} at most: of layers.0.structured.weight\n"
        "  usually    few steps, or a learning rate of reinforcement learning\n"
        '  to mend    of="tuned", where the weights themselves are meant to be structured'
    )


def test_what_does_not_align_is_not_measured() -> None:
    pair = open_pair({"w": toeplitz(64, 48)}, {"w": toeplitz(48, 64)})
    with pytest.raises(PairMismatchError):
        displacement_rank(pair)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"max_rank": 0}, ValueError, "max_rank=0 is below 1"),
        ({"max_rank": 2.0}, TypeError, "max_rank=2.0 is not an integer"),
        ({"max_rank": True}, TypeError, "max_rank=True is not an integer"),
        ({"max_rank": 24}, ValueError, "max_rank=24 could not fail for 1 matrix, such as matrix"),
        ({"max_rank": 2, "of": "both"}, ValueError, "of='both' is not one of"),
        ({"max_rank": 2, "include": "*"}, ValueError, "choose among the matrices of a pair"),
        ({"max_rank": 2, "operator": "toplitz"}, ValueError, "did you mean toeplitz"),
        ({"max_rank": 2, "message": "no"}, TypeError, "is not a function"),
    ],
)
def test_bounds_that_are_none(keywords: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        assert_displacement_rank(toeplitz(40, 24), **keywords)


@pytest.mark.parametrize(
    ("matrix", "error", "text"),
    [
        (torch.ones(4), ValueError, r"a matrix has two dimensions, not shape \[4\]"),
        (torch.ones(4, 0), ValueError, "a matrix has two dimensions"),
        (torch.ones(4, 4, dtype=torch.int64), ValueError, "cast it to a real float"),
        (torch.ones(4, 4, dtype=torch.complex64), ValueError, "cast it to a real float"),
        (torch.zeros(4, 4), SelectionError, "holds zeros alone"),
        (torch.full((4, 4), float("nan")), SelectionError, "holds NaN or Inf"),
        ("model", TypeError, "a ModelPair is needed, got str"),
    ],
)
def test_what_is_no_matrix(matrix: object, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        displacement_rank(matrix)


def test_what_reports_store() -> None:
    result = displacement_rank(toeplitz(64, 224))
    assert result.to_dict()["rank"] == 2
    assert result.to_dict()["operator_invertible"] is False
    assert "64x224" in result.table()
    assert repr(result) == "DisplacementRanks(rank=2 at most, 1 matrix, toeplitz, bf16)"


def test_a_result_of_a_pair_says_of_which_checkpoints_it_is() -> None:
    """What a baseline needs; of one matrix there are none."""
    pair = open_pair({"w": toeplitz(64, 48)}, {"w": 2 * toeplitz(64, 48)})
    prints = displacement_rank(pair).fingerprints
    assert dict(prints) == {"base": pair.base.fingerprint(), "tuned": pair.tuned.fingerprint()}
    assert displacement_rank(toeplitz(64, 48)).fingerprints == {}
