import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import PairMismatchError, SelectionError, open_pair
from pytest_subnet.findings.spectrum.finding import assert_singular_values_stable, singular_shift

law = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def pair_of(base: torch.Tensor, tuned: torch.Tensor, name: str = "w"):
    return open_pair({name: base}, {name: tuned})


def known(values: list[float], shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = [
        torch.linalg.qr(torch.randn(size, len(values), generator=generator).double()).Q
        for size in shape
    ]
    return (sides[0] * torch.tensor(values).double()) @ sides[1].T


def by_svd(base: torch.Tensor, tuned: torch.Tensor, relative_to: str) -> float:
    s, t = (np.linalg.svd(each.double().numpy(), compute_uv=False) for each in (base, tuned))
    moved = np.abs(t - s)
    if relative_to == "each":
        kept = s > s[0] * max(base.shape) * 2.0**-23
        return float((moved[kept] / s[kept]).max())
    if relative_to == "top":
        return float(moved.max() / s[0])
    return float(np.linalg.norm(moved) / np.linalg.norm(s))


@law
@given(
    st.sampled_from([(5, 9), (40, 24), (24, 40)]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.sampled_from([1e-3, 0.1, 3.0]),
    st.sampled_from(["spectrum", "top", "each"]),
    st.integers(0, 5),
)
def test_it_is_what_an_svd_of_both_sides_says(
    shape: tuple[int, int], dtype: torch.dtype, size: float, relative_to: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    tuned = (base + size * torch.randn(shape, generator=generator)).to(dtype)
    found = singular_shift(pair_of(base, tuned), relative_to=relative_to)
    expected = by_svd(base, tuned, relative_to)
    assert found.shift == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert found.per_tensor[0].method in ("gram", "certificate:mirsky")


@pytest.mark.parametrize("relative_to", ["spectrum", "top", "each"])
def test_large_matrices_go_by_their_gram_matrix(relative_to: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(270, 300, generator=generator).bfloat16()
    tuned = (base.float() + 0.1 * torch.randn(270, 300, generator=generator)).bfloat16()
    found = singular_shift(pair_of(base, tuned), relative_to=relative_to)
    assert found.shift == pytest.approx(by_svd(base, tuned, relative_to), rel=1e-4)


@law
@given(st.integers(0, 10_000), st.floats(1e-4, 2), st.sampled_from(["spectrum", "top"]))
def test_the_certificate_is_never_too_small(seed: int, size: float, relative_to: str) -> None:
    """Mirsky and Weyl: whatever the matrices."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 12, size=2))
    base = torch.from_numpy(rng.standard_normal(shape) * rng.choice([1e-4, 1, 50], size=shape))
    tuned = base + size * torch.from_numpy(rng.standard_normal(shape))
    certain = singular_shift(pair_of(base, tuned), relative_to=relative_to, max_shift=1e9)
    assert certain.per_tensor[0].method == "certificate:mirsky"
    assert certain.shift >= by_svd(base, tuned, relative_to) * (1 - 1e-9)


def test_changes_too_small_for_their_squares_are_in_the_certificate() -> None:
    base = torch.full((8, 8), 1e-25)
    tuned = base.clone()
    tuned[0, 0] *= 3
    certain = singular_shift(pair_of(base, tuned), max_shift=1e9)
    assert certain.shift >= by_svd(base, tuned, "spectrum") > 0


def test_scaling_shifts_by_the_scale() -> None:
    base = known(list(np.linspace(10, 1, 24)), (60, 40))
    for relative_to in ("spectrum", "top", "each"):
        result = singular_shift(pair_of(base, base * 1.25), relative_to=relative_to)
        assert result.shift == pytest.approx(0.25)
    assert result.per_tensor[0].moved_most is not None
    # Of all bounds this one is met: the update is along the matrix itself.
    certain = singular_shift(pair_of(base, base * 1.25), max_shift=1)
    assert certain.shift == pytest.approx(0.25, rel=1e-4)


def test_a_rotation_shifts_nothing() -> None:
    base = known(list(np.linspace(10, 1, 24)), (60, 40))
    angle = math.radians(17)
    turn = torch.eye(60, dtype=torch.float64)
    turn[0, 0] = turn[5, 5] = math.cos(angle)
    turn[0, 5], turn[5, 0] = -math.sin(angle), math.sin(angle)
    result = singular_shift(pair_of(base, turn @ base))
    assert result.shift < 1e-12
    assert result.per_tensor[0].method == "gram"


def test_noise_of_one_per_cent_shifts_a_twentieth_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    base, noise = (torch.randn(400, 300, generator=generator).double() for _ in range(2))
    tuned = base + 0.01 * noise * base.norm() / noise.norm()
    assert singular_shift(pair_of(base, tuned)).shift == pytest.approx(5e-4, rel=0.15)


def test_what_the_norms_prove_is_not_decomposed() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["layers.0.a.weight", "layers.1.b.weight"]
    base = {name: torch.randn(32, 20, generator=generator) for name in names}
    tuned = {names[0]: base[names[0]] * 1.001, names[1]: base[names[1]] * 1.1}
    result = singular_shift(open_pair(base, tuned), max_shift=0.01)
    assert [each.method for each in result.per_tensor] == ["certificate:mirsky", "gram"]
    assert [each.is_bound for each in result.per_tensor] == [True, False]
    assert result.proven_by_norms == 1
    assert "<= 0.001" in result.table()
    for row in singular_shift(open_pair(base, tuned)).per_tensor:
        assert row.method == "gram"


@pytest.mark.parametrize("relative_to", ["spectrum", "top", "each"])
@pytest.mark.parametrize("max_shift", [None, 0.5])
def test_each_row_says_how_large_the_update_was(relative_to: str, max_shift: float | None) -> None:
    """Whatever proved its shift; not of a matrix in a stack, whose norms are not counted."""
    base = {"w": known([3, 2, 1], (6, 5)), "experts": torch.randn(2, 6, 5)}
    tuned = {"w": base["w"] * 1.25, "experts": base["experts"] * 1.25}
    rows = singular_shift(open_pair(base, tuned), relative_to=relative_to, max_shift=max_shift)
    assert [each.relative_change for each in rows.per_tensor] == [pytest.approx(0.25), None, None]


def test_tails_are_told_apart_by_each() -> None:
    base = known([10.0, 5.0, 0.01], (30, 20))
    tuned = known([10.0, 5.0, 0.02], (30, 20))
    result = singular_shift(pair_of(base, tuned), relative_to="each")
    assert result.shift == pytest.approx(1.0, rel=1e-4)
    assert result.per_tensor[0].moved_most == 2
    assert singular_shift(pair_of(base, tuned)).shift < 1e-3


def test_experts_are_matrices_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"layers.0.mlp.experts.gate_up_proj": torch.randn(3, 24, 16, generator=generator)}
    tuned = {name: each.clone() for name, each in base.items()}
    tuned["layers.0.mlp.experts.gate_up_proj"][1] *= 1.5
    result = singular_shift(open_pair(base, tuned), max_shift=0.1)
    assert [round(each.shift, 6) for each in result.per_tensor] == [0, 0.5, 0]
    assert result.per_tensor[1].name == "layers.0.mlp.experts.gate_up_proj[1]"


def test_a_shift_that_is_too_large() -> None:
    base = torch.eye(6).bfloat16()
    pair = pair_of(base, base * 1.5, "layers.0.mlp.up_proj.weight")
    with pytest.raises(AssertionError) as failure:
        assert_singular_values_stable(pair, max_shift=0.1)
    assert str(failure.value) == (
        "singular shift 0.5 is above the allowed 0.1: layers.0.mlp.up_proj.weight\n"
        "  pair       dict of tensors -> dict of tensors   (bf16, 1/1 matrix, 36 entries)\n"
        "  relative   to the spectrum of the base\n"
        "  proven     0 by norms alone, 1 by all singular values\n"
        "  worst      layers.0.mlp.up_proj.weight  0.5  most at σ1  (bf16[6,6])\n"
        "  usually    a learning rate too high, or weights that were scaled or replaced\n"
        "  to accept  max_shift=0.5"
    )
    assert assert_singular_values_stable(pair, max_shift=0.5).shift == pytest.approx(0.5)


def test_the_tail_is_named_where_each_value_is_asked_for() -> None:
    pair = pair_of(known([10.0, 0.01], (30, 20)), known([10.0, 0.0205], (30, 20)))
    with pytest.raises(AssertionError) as failure:
        assert_singular_values_stable(pair, max_shift=0.1, relative_to="each")
    assert str(failure.value).splitlines()[-3:] == [
        "  usually    the smallest values, which noise moves by more than themselves;",
        '             relative_to="spectrum" asks how far all of them moved',
        "  to accept  max_shift=1.1",
    ]
    assert_singular_values_stable(pair, max_shift=0.1)


def test_nothing_moved_proves_nothing() -> None:
    base = torch.eye(6)
    with pytest.raises(AssertionError, match=r"^no matrix moved: of course its singular values"):
        assert_singular_values_stable(pair_of(base, base.clone()), max_shift=0.1)


@pytest.mark.parametrize(
    ("base", "tuned", "text"),
    [
        (torch.zeros(4, 4), torch.ones(4, 4), "hold zeros alone in the base"),
        (torch.eye(4), torch.full((4, 4), float("nan")), "hold NaN or Inf and have no"),
        (torch.ones(4), torch.ones(4) * 2, "only these have singular values"),
        (torch.zeros(2, 4, 4), torch.ones(2, 4, 4), "holds zeros alone in the base"),
        (torch.ones(2, 4, 4), torch.full((2, 4, 4), float("inf")), "holds NaN or Inf"),
    ],
)
def test_what_has_no_spectrum(base: torch.Tensor, tuned: torch.Tensor, text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        singular_shift(pair_of(base, tuned))


def test_bounds_that_are_none() -> None:
    pair = pair_of(torch.eye(4), torch.eye(4) * 2)
    with pytest.raises(ValueError, match="max_shift=-1 is not a finite number of at least 0"):
        assert_singular_values_stable(pair, max_shift=-1)
    with pytest.raises(ValueError, match="relative_to='all' is not one of"):
        singular_shift(pair, relative_to="all")
    with pytest.raises(PairMismatchError):
        singular_shift(open_pair({"w": torch.eye(4)}, {"w": torch.eye(5)}))


def test_a_base_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its content: another pair of the same base, from another mapping, finds it."""
    import pytest_subnet.findings.spectrum.finding as module

    seen = []
    values = module._values
    monkeypatch.setattr(module, "_values", lambda *a: seen.append(a) or values(*a))
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(12, 9, generator=generator)
    for factor in (1.5, 2.0, 3.0):
        singular_shift(pair_of(base.clone(), base * factor))
    assert len(seen) == 1 + 3


def test_what_reports_store() -> None:
    result = singular_shift(pair_of(torch.eye(4), torch.eye(4) * 2))
    stored = result.to_dict()
    assert (stored["finding"], stored["shift"]) == ("singular_shift", pytest.approx(1))
    assert set(result.fingerprints) == {"base", "tuned"}
