"""Matrices of one shape ranked together: as on a GPU, held here to the route of one by one."""

import numpy as np
import pytest
import torch

from pytest_subnet import SelectionError, open_pair, update_rank
from pytest_subnet.findings.matrices import batched as spectra_batched
from pytest_subnet.findings.matrices import engines as matrix_engines
from pytest_subnet.findings.matrices import spectra
from pytest_subnet.findings.matrices.batched import nbytes_of, settle, spectra_of
from pytest_subnet.findings.matrices.spectra import Spectrum
from pytest_subnet.findings.rank import finding as rank
from pytest_subnet.findings.rank.finding import FLOAT32_EPS

SHAPES = [(60, 60), (40, 90), (90, 40), (1, 50), (3, 70)]


@pytest.fixture
def large(monkeypatch):
    """Takes the way of large matrices, through a Gram matrix, also for small ones."""
    monkeypatch.setattr(spectra, "SMALL", 0)


@pytest.fixture
def batched(monkeypatch):
    """Batches on the CPU; gives how many matrices were in each."""
    monkeypatch.setattr(matrix_engines, "_BATCHED_ON", "cpu")
    sizes = []
    whole = rank._ranks_of

    def ranks_of(pair, batch, **options):
        sizes.append(len(batch))
        return whole(pair, batch, **options)

    monkeypatch.setattr(rank, "_ranks_of", ranks_of)
    return sizes


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(shape):
    """Full rank, rank 1 and 2, rows or columns of zeros, all zeros, tiny and large entries."""
    rows, columns = shape
    sparse = random(*shape, seed=1)
    sparse[::3] = 0
    sparse[:, 1::2] = 0
    return [
        random(*shape),
        random(rows, 1, seed=2) @ random(1, columns, seed=3),
        random(rows, 2, seed=2) @ random(2, columns, seed=3) + random(*shape, seed=4) * 1e-9,
        sparse,
        torch.zeros(shape),
        random(*shape, seed=5) * 1e-12,
        random(*shape, seed=6) * 1e6,
        torch.eye(*shape),
    ]


def exact(matrix):
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


@pytest.mark.parametrize("all_values", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_one_by_one_and_of_the_svd(shape, all_values, large):
    given = matrices(shape)
    together = spectra_of(given, all_values=all_values)
    alone = [Spectrum(each, all_values=all_values) for each in given]
    for share in (1e-5, 0.3, 0.999, 1.001):
        limits = [each.largest() * share for each in alone]
        settle(together, limits)
        found = [each.count_above(limit) for each, limit in zip(together, limits, strict=True)]
        assert found == [each.count_above(limit) for each, limit in zip(alone, limits, strict=True)]
        assert found == [
            int((exact(each) > limit).sum()) if limit else 0
            for each, limit in zip(given, limits, strict=True)
        ]
    for each, one, matrix in zip(together, alone, given, strict=True):
        assert each.largest() == pytest.approx(one.largest(), rel=2e-7)
        found = np.sort(each.values().numpy())[::-1]
        assert found == pytest.approx(exact(matrix), rel=1e-6, abs=1e-7 * one.largest())


def test_small_matrices_are_decomposed_together():
    given = matrices((30, 40))
    for each, matrix in zip(spectra_of(given), given, strict=True):
        assert each.values().numpy() == pytest.approx(exact(matrix), rel=1e-9, abs=1e-9)
        assert each.largest() == pytest.approx(exact(matrix)[0], rel=1e-9)


def test_what_is_certain_is_not_factorised_again(large, monkeypatch):
    given = [random(50, 80, seed=seed) for seed in range(3)]
    least = min(exact(each)[-1] for each in given)
    found = spectra_of(given)
    settle(found, [0.9 * float(least)] * 3)
    for name in ("_lanczos", "_factorises", "_positive_eigenvalues", "_eigenvalues"):
        monkeypatch.setattr(spectra, name, None)
    assert [each.count_above(0.8 * float(least)) for each in found] == [50] * 3
    assert [each.largest() for each in found] == [
        pytest.approx(exact(each)[0], rel=2e-7) for each in given
    ]


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_where_lanczos_is_wrong_each_finds_its_own(wrong, large, monkeypatch):
    """It may stop at a value that is not the largest; the certificate notices."""
    monkeypatch.setattr(
        spectra_batched, "_lanczos", lambda grams: grams.new_full((len(grams),), wrong)
    )
    given = [random(50, 80), random(50, 80, seed=1)]
    assert [each.largest() for each in spectra_of(given)] == [
        pytest.approx(exact(each)[0], rel=2e-7) for each in given
    ]


@pytest.mark.parametrize("size", [200, 500])
def test_the_edge_of_noise_is_found_and_certified(size, large, monkeypatch):
    monkeypatch.setattr(spectra, "_largest_eigenvalue", None)
    given = [random(size, 2 * size, seed=seed) for seed in range(2)]
    for each, matrix in zip(spectra_of(given), given, strict=True):
        assert each.largest() == pytest.approx(exact(matrix)[0], rel=2e-7)


def test_large_factorisations_one_after_the_other_say_the_same(large, monkeypatch):
    given = matrices((40, 90))
    expected = spectra_batched._factorise(spectra_batched._grams(torch.stack(given)))
    monkeypatch.setattr(spectra_batched, "_LOOPED", 0)
    assert spectra_batched._factorise(spectra_batched._grams(torch.stack(given))) == expected
    assert True in expected
    assert False in expected


def model(dtype, *, seed):
    shapes = [(48, 64)] * 5 + [(64, 48)] * 3 + [(300, 270)]
    return {
        f"model.layers.{number}.mlp.up_proj.weight": (random(*shape, seed=seed + number) * 0.02).to(
            dtype
        )
        for number, shape in enumerate(shapes)
    }


def moved(dtype):
    """A pair on the CPU, matrices of three shapes, of which some moved in few directions."""
    base = model(dtype, seed=0)
    tuned = {}
    for number, (name, weight) in enumerate(base.items()):
        rows, columns = weight.shape
        update = random(rows, 3, seed=50) @ random(3, columns, seed=51) * 1e-3
        if number % 2:
            update = random(rows, columns, seed=60 + number) * 1e-4
        tuned[name] = (weight.double() + update.double() * (number != 4)).to(dtype)
    return base, tuned


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("through_gram", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ranks_are_those_of_one_by_one(dtype, through_gram, effective, batched, monkeypatch):
    monkeypatch.setattr(spectra, "SMALL", 0 if through_gram else 256)
    base, tuned = moved(dtype)
    together = update_rank(open_pair(base, tuned, device="cpu"), effective=effective)
    assert batched == [5, 3]
    alone = update_rank(open_pair(base, tuned), effective=effective)
    for one, other in zip(together.per_tensor, alone.per_tensor, strict=True):
        assert one.largest == pytest.approx(other.largest, rel=2e-7)
        assert one.effective_rank == pytest.approx(other.effective_rank)
        assert one.stable_rank == pytest.approx(other.stable_rank, rel=1e-6)
        known = dict(largest=0, effective_rank=None, stable_rank=0)
        assert one._replace(**known) == other._replace(**known)
    for row, name in zip(together.per_tensor, base, strict=True):
        delta = tuned[name].double() - base[name].double()
        limit = float(exact(delta)[0]) * max(delta.shape) * FLOAT32_EPS
        assert row.rank == (exact(delta) > limit).sum()


def test_a_batch_takes_no_more_than_it_may(batched, monkeypatch):
    base, tuned = moved(torch.float32)
    monkeypatch.setattr(matrix_engines, "_BATCH_BYTES", 2 * nbytes_of(48, 64, 4))
    expected = update_rank(open_pair(base, tuned)).rank
    assert update_rank(open_pair(base, tuned, device="cpu")).rank == expected
    assert batched == [2, 2, 2]  # and three alone: the fifth, the last of three, the largest


def test_where_a_gpu_has_no_room_for_a_batch_they_are_ranked_one_by_one(monkeypatch):
    monkeypatch.setattr(matrix_engines, "_BATCHED_ON", "cpu")

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("out of memory")

    base, tuned = moved(torch.bfloat16)
    expected = update_rank(open_pair(base, tuned)).rank
    monkeypatch.setattr(spectra_batched, "spectra_of", full)
    assert update_rank(open_pair(base, tuned, device="cpu")).rank == expected


def test_one_that_is_not_finite_is_named(batched):
    base, tuned = moved(torch.float32)
    name = "model.layers.2.mlp.up_proj.weight"
    tuned[name][3, 3] = float("nan")
    with pytest.raises(SelectionError, match=rf"^{name} holds NaN, Inf or changes beyond float32"):
        update_rank(open_pair(base, tuned, device="cpu"))
    update_rank(open_pair(base, tuned, device="cpu"), exclude=name)
    assert batched == [5, 4, 3]


def test_without_a_gpu_each_is_ranked_alone(monkeypatch):
    monkeypatch.setattr(rank, "_ranks_of", None)
    base, tuned = moved(torch.float32)
    for device in (None, "cpu"):
        assert update_rank(open_pair(base, tuned, device=device)).rank
