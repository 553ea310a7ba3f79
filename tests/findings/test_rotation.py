import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import PairMismatchError, SelectionError, open_pair
from pytest_subnet.findings.rotation.finding import (
    assert_singular_vector_rotation,
    singular_rotation,
)
from pytest_subnet.findings.spectrum.finding import singular_shift

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)
K = 10


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def line(shape: tuple[int, int] = (200, 120)) -> torch.Tensor:
    """Singular values from 10 down to 1, evenly."""
    left, right = (torch.linalg.qr(random((size, min(shape)), size)).Q for size in shape)
    return (left * torch.linspace(10, 1, min(shape)).double()) @ right.T


def turned(matrix: torch.Tensor, i: int, j: int, degrees: float = 17) -> torch.Tensor:
    """Left singular vectors i and j of `matrix`, rotated in their plane."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    angle = math.radians(degrees)
    one, other = left[:, i].clone(), left[:, j].clone()
    left[:, i] = math.cos(angle) * one + math.sin(angle) * other
    left[:, j] = math.cos(angle) * other - math.sin(angle) * one
    return (left * values) @ right


def noisy(matrix: torch.Tensor, share: float, seed: int = 1) -> torch.Tensor:
    noise = random(tuple(matrix.shape), seed)
    return matrix + share * matrix.norm() / noise.norm() * noise


def pair_of(base: torch.Tensor, tuned: torch.Tensor, name: str = "w"):
    return open_pair({name: base}, {name: tuned})


@pytest.mark.parametrize("plane", [(K - 1, K), (0, 119)])
def test_a_turn_across_the_boundary_is_one_angle(plane: tuple[int, int]) -> None:
    base = line()
    row = singular_rotation(pair_of(base, turned(base, *plane)), k=K, null=None).per_tensor[0]
    assert row.left_deg[0] == pytest.approx(17, abs=1e-6)
    assert max(row.left_deg[1:]) < 1e-6
    assert max(row.right_deg) < 1e-6
    assert singular_shift(pair_of(base, turned(base, *plane))).shift < 1e-12


def test_a_turn_inside_is_seen_by_vectors_alone() -> None:
    base = line()
    row = singular_rotation(pair_of(base, turned(base, 0, 1)), k=K, null=None).per_tensor[0]
    assert max(row.left_deg) < 1e-6
    assert row.left_vectors_deg[:2] == pytest.approx((17, 17), abs=1e-6)
    assert max(row.left_vectors_deg[2:]) < 1e-6


def test_scaling_turns_nothing() -> None:
    base = line()
    row = singular_rotation(pair_of(base, 1.5 * base), k=K, null=None).per_tensor[0]
    assert max(row.angles_deg) < 1e-6
    # All energy of the update along the base's own directions: the leading ones' share of it.
    values = torch.linalg.svdvals(base)
    share = float(values[:K].square().sum() / values.square().sum())
    assert row.value_energy == pytest.approx(share)
    assert row.turn_energy == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_it_is_what_two_svds_say(shape: tuple[int, int], k: int) -> None:
    base = random(shape, 0)
    tuned = noisy(base, 0.05)
    row = singular_rotation(pair_of(base, tuned), k=k, null=None).per_tensor[0]
    for side, index in (("left_deg", 0), ("right_deg", 2)):
        one, other = (torch.linalg.svd(each, full_matrices=False)[index] for each in (base, tuned))
        if index == 2:
            one, other = one.T, other.T
        cosines = torch.linalg.svdvals(one[:, :k].T @ other[:, :k]).clamp(max=1)
        expected = torch.rad2deg(torch.acos(cosines)).flip(0)
        np.testing.assert_allclose(getattr(row, side), expected, atol=1e-5)


@law
@given(st.integers(0, 10_000), st.floats(1e-3, 0.5))
def test_wedins_bound_holds(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    m, n = rng.integers(2, 9, size=2).tolist()
    base = random((m, n), seed)
    k = int(rng.integers(1, min(m, n) + 1))
    row = singular_rotation(pair_of(base, noisy(base, share, seed + 1)), k=k, null=None)
    row = row.per_tensor[0]
    if row.wedin_deg is not None:
        assert row.max_deg <= row.wedin_deg + 1e-6


def test_energies_of_noise_are_their_nulls() -> None:
    base = random((90, 60), 0)
    rows = [
        singular_rotation(pair_of(base, noisy(base, 0.01, seed)), k=8, null=None).per_tensor[0]
        for seed in range(1, 9)
    ]
    turn = sum(each.turn_energy for each in rows) / len(rows)
    assert turn == pytest.approx(rows[0].turn_energy_null, rel=0.15)
    assert rows[0].value_energy_null == pytest.approx(8 / 5400)


def test_one_per_cent_of_noise_turns_vectors_and_leaves_values() -> None:
    base = random((400, 300), 0)
    pair = pair_of(base, noisy(base, 0.01))
    assert singular_shift(pair).shift == pytest.approx(5e-4, rel=0.15)
    result = singular_rotation(pair, k=300, side="left", null=None)
    assert np.median(result.per_tensor[0].left_vectors_deg) == pytest.approx(7, rel=0.15)


@pytest.mark.parametrize("null", ["gaussian", "support"])
def test_noise_does_not_pass_against_its_null(null: str) -> None:
    base = random((200, 150), 2).float()
    tuned = noisy(base, 0.01).float()
    if null == "support":
        chosen = torch.from_numpy(np.random.default_rng(5).random((200, 150)) < 0.05)
        tuned = torch.where(chosen, tuned, base)
    pair = pair_of(base, tuned)
    result = singular_rotation(pair, k=32, null=null)
    assert result.excess == pytest.approx(1, abs=0.15)
    for bound in ({"min_excess": 1.2}, {"min_angle_deg": 0.3}):
        with pytest.raises(AssertionError):
            assert_singular_vector_rotation(pair, k=32, null=null, **bound)
    # However low the bound: it must be told from chance.
    with pytest.raises(AssertionError, match=r"^rotation is no evidence: z|beyond the null"):
        assert_singular_vector_rotation(pair, k=32, null=null, min_angle_deg=0)
    assert_singular_vector_rotation(pair, k=32, min_angle_deg=0.05, null=None)


def test_a_turn_of_its_own_passes() -> None:
    """Of both sides alike, between neighbours: noise of that norm spends it on everything."""
    base, tuned = line(), of_its_own(80)
    result = assert_singular_vector_rotation(
        pair_of(base, tuned), k=K, min_excess=5, min_angle_deg=5
    )
    assert result.mean_deg == pytest.approx(8, abs=1e-3)
    assert result.per_tensor[0].z > 3


def test_the_null_is_what_full_decompositions_give() -> None:
    base = random((200, 150), 0)
    tuned = noisy(base, 0.02)
    row = singular_rotation(pair_of(base, tuned), k=20, side="left").per_tensor[0]
    norm = float((tuned - base).norm())
    known = torch.linalg.svd(base)[0][:, :20]
    means = []
    for seed in range(100, 130):
        noise = random((200, 150), seed)
        other = torch.linalg.svd(base + norm / noise.norm() * noise)[0][:, :20]
        cosines = torch.linalg.svdvals(known.T @ other).clamp(max=1)
        means.append(float(torch.rad2deg(torch.acos(cosines)).mean()))
    assert row.null_deg == pytest.approx(np.mean(means), rel=0.05)


def test_too_far() -> None:
    base = line()
    pair = pair_of(base, turned(base, K - 1, K), "layers.0.mlp.up_proj.weight")
    with pytest.raises(AssertionError) as failure:
        assert_singular_vector_rotation(pair, k=K, side="left", max_angle_deg=1)
    assert str(failure.value) == (
        "rotation 1.7° is above the allowed 1°: layers.0.mlp.up_proj.weight\n"
        "  pair       dict of tensors -> dict of tensors   (f64, 1 matrix of 1, 24,000 entries)\n"
        "  angles     principal, mean over the 10 leading left directions\n"
        "  worst      layers.0.mlp.up_proj.weight  1.7°  (f64[200,120])\n"
        "  usually    a learning rate too high, or singular values so close to each other that\n"
        "             any update mixes their directions: see the gap in the table\n"
        "  to accept  max_angle_deg=1.8"
    )
    assert_singular_vector_rotation(pair, k=K, side="left", max_angle_deg=1.8)


def of_its_own(degrees: float) -> torch.Tensor:
    """The line, with both sides turned alike between its tenth and eleventh directions."""
    left, values, right = torch.linalg.svd(line(), full_matrices=False)
    turn = torch.eye(120).double()
    angle = math.radians(degrees)
    turn[K - 1, K - 1] = turn[K, K] = math.cos(angle)
    turn[K, K - 1], turn[K - 1, K] = math.sin(angle), -math.sin(angle)
    return left @ turn @ torch.diag(values) @ turn.T @ right


def last_lines(keywords: dict, tuned: torch.Tensor, count: int = 1) -> list[str]:
    with pytest.raises(AssertionError) as failure:
        assert_singular_vector_rotation(pair_of(line(), tuned), k=K, **keywords)
    return str(failure.value).splitlines()[-count:]


@pytest.mark.parametrize(
    ("name", "null"),
    [("min_angle_deg", "gaussian"), ("min_excess", "gaussian"), ("min_angle_deg", None)],
)
def test_the_bound_that_is_named_holds(name: str, null: str | None) -> None:
    (line_of,) = last_lines({name: 90, "null": null}, of_its_own(78.5))
    named = re.fullmatch(rf"  to accept  {name}=([\d.]+)", line_of)
    bound = float(named[1])
    assert_singular_vector_rotation(
        pair_of(line(), of_its_own(78.5)), k=K, null=null, **{name: bound}
    )
    with pytest.raises(AssertionError):
        assert_singular_vector_rotation(
            pair_of(line(), of_its_own(78.5)), k=K, null=null, **{name: 1.1 * bound}
        )


@pytest.mark.parametrize("asked", [{"min_angle_deg": 20}, {"min_excess": 20}, {"min_excess": 0.1}])
def test_of_noise_the_bare_angle_is_named(asked: dict) -> None:
    tuned = noisy(line(), 0.01)
    assert last_lines(asked, tuned, 3) == [
        "  usually    an update without a direction of its own: any that is small turns vectors",
        "             and leaves values",
        "  to accept  min_angle_deg=1.3, null=None: the bare angle",
    ]
    assert_singular_vector_rotation(pair_of(line(), tuned), k=K, min_angle_deg=1.3, null=None)


def test_no_evidence() -> None:
    pair = pair_of(line(), noisy(line(), 0.01), "layers.0.mlp.up_proj.weight")
    row = singular_rotation(pair, k=K).per_tensor[0]
    with pytest.raises(AssertionError) as failure:
        assert_singular_vector_rotation(pair, k=K, min_excess=0.1)
    numbers = f"null {row.null_deg:.3g}°  excess {row.excess:.3g}  z {row.z:.1f}"
    assert str(failure.value) == (
        f"rotation is no evidence: z {row.z:.3g} is below the 3 that is clear of chance: "
        "layers.0.mlp.up_proj.weight\n"
        "  pair       dict of tensors -> dict of tensors   (f64, 1 matrix of 1, 24,000 entries)\n"
        "  angles     principal, mean over the 10 leading left and right directions\n"
        "  null       gaussian: random updates of the same norm, everywhere, turn them by "
        f"{row.null_deg:.3g}°\n"
        f"  worst      layers.0.mlp.up_proj.weight  {row.mean_deg:.3g}°  {numbers}  "
        "(f64[200,120])\n"
        "  usually    an update without a direction of its own: any that is small turns vectors\n"
        "             and leaves values\n"
        "  to accept  min_angle_deg=1.3, null=None: the bare angle"
    )


def test_energies_of_all_are_weighted_by_theirs() -> None:
    base = line()
    pair = open_pair({"a": base, "b": base}, {"a": noisy(base, 0.01), "b": 1.5 * base})
    result = singular_rotation(pair, k=K, null=None)
    for share in ("value_energy", "turn_energy", "value_energy_null", "turn_energy_null"):
        rows = [(each.change_norm**2, getattr(each, share)) for each in result.per_tensor]
        expected = sum(size * part for size, part in rows) / sum(size for size, _ in rows)
        assert getattr(result, share) == pytest.approx(expected)
        assert result.to_dict()[share] == getattr(result, share)
    assert result.value_energy > 0.1 > result.turn_energy  # next to all of it scales
    line_of = next(text for text in result.table().splitlines() if "energy" in text)
    assert line_of.endswith("turns them into each other (of noise 0.375%)")
    still = singular_rotation(pair_of(base, base.clone()), k=K, null=None)
    assert still.value_energy == 0
    assert "energy" not in still.table()


def test_what_did_not_move_did_not_turn() -> None:
    base = line()
    with pytest.raises(AssertionError, match=r"^no matrix moved: nothing turned"):
        assert_singular_vector_rotation(pair_of(base, base.clone()), k=K, min_angle_deg=1)
    with pytest.raises(AssertionError, match=r"^no matrix moved: nothing turned"):
        assert_singular_vector_rotation(pair_of(base, base.clone()), k=K, max_angle_deg=1)
    pair = open_pair({"a": base, "b": base}, {"a": turned(base, 9, 10), "b": base.clone()})
    with pytest.raises(AssertionError, match=r"^b did not move: nothing turned"):
        assert_singular_vector_rotation(pair, k=K, min_angle_deg=0.1)
    assert_singular_vector_rotation(pair, k=K, max_angle_deg=5)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"k": 0, "max_angle_deg": 1}, ValueError, "k=0 is below 1"),
        ({"k": 121, "max_angle_deg": 1}, ValueError, "k=121 is more than the 120 directions of w"),
        ({"k": 2.0, "max_angle_deg": 1}, TypeError, "k=2.0 is not an integer"),
        ({"k": 2}, ValueError, "no bound: give min_angle_deg"),
        ({"k": 2, "max_angle_deg": 91}, ValueError, "max_angle_deg=91 is above 90"),
        ({"k": 2, "min_angle_deg": 3, "max_angle_deg": 2}, ValueError, "nothing can hold"),
        ({"k": 2, "min_excess": 2, "null": None}, ValueError, "null=None leaves none"),
        ({"k": 2, "min_excess": 0}, ValueError, "min_excess=0 could not fail"),
        ({"k": 2, "max_angle_deg": 1, "side": "top"}, ValueError, "side='top' is not one of"),
        ({"k": 2, "max_angle_deg": 1, "null": "noise"}, ValueError, "null='noise' is not one of"),
    ],
)
def test_bounds_that_are_none(keywords: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        assert_singular_vector_rotation(pair_of(line(), 2 * line()), **keywords)


@pytest.mark.parametrize(
    ("base", "tuned", "text"),
    [
        (torch.zeros(4, 4), torch.eye(4), "holds zeros alone in the base"),
        (torch.eye(4), torch.full((4, 4), float("nan")), "holds NaN or Inf"),
        (torch.ones(4), torch.ones(4) * 2, "only these have singular directions"),
        (torch.ones(4, 4, dtype=torch.int64), torch.zeros(4, 4, dtype=torch.int64), "singular dir"),
    ],
)
def test_what_has_no_directions(base: torch.Tensor, tuned: torch.Tensor, text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        singular_rotation(pair_of(base, tuned), k=1)


def test_what_does_not_align_is_not_measured() -> None:
    with pytest.raises(PairMismatchError):
        singular_rotation(pair_of(torch.eye(4), torch.eye(5)), k=1)


def test_what_reports_store() -> None:
    base = line()
    result = singular_rotation(pair_of(base, noisy(base, 0.05)), k=4)
    stored = result.to_dict()
    assert stored["finding"] == "singular_rotation"
    assert stored["excess"] == pytest.approx(result.mean_deg / result.null_deg)
    assert "gaussian" in result.table()
    assert set(result.fingerprints) == {"base", "tuned"}
