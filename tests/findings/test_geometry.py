import numpy as np
import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    magnitude_mask,
    mask_overlap,
    open_pair,
    update_mask,
)
from pytest_subnet.findings.geometry import counts as geometry_counts
from pytest_subnet.findings.geometry import masks as geometry_masks
from pytest_subnet.findings.geometry.finding import assert_off_principal, update_geometry
from pytest_subnet.findings.geometry.masks import low_magnitude_bits, principal_bits
from pytest_subnet.masks.bits import unpack

NULLS = ("exponent", "matrix", "rowcol", "pooled")


def weights(rows: int, columns: int, dtype=torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)


def noise(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))


def stepped(base: torch.Tensor, step: float | torch.Tensor, seed: int = 1) -> torch.Tensor:
    """A dense update without structure, as the base's dtype stores it."""
    return (base.float() + step * noise(base.shape, seed)).to(base.dtype)


def pair_of(base, tuned, name="w.weight", **options):
    return open_pair({name: base}, {name: tuned}, **options)


def flags(bits, shape):
    return torch.from_numpy(unpack(bits, shape[0] * shape[1])).reshape(shape)


@pytest.fixture(scope="module")
def base():
    return weights(320, 320)


# Densities and shares of arXiv 2606.07082 (SFT, distillation, RL), with 30 % of the weights.
@pytest.mark.parametrize(
    ("step", "density", "published"),
    [(5e-4, 0.927, 0.3188), (4.9e-5, 0.463, 0.5359), (2.55e-5, 0.278, 0.7348)],
)
def test_noise_has_the_published_low_magnitude_overlaps_and_nothing_beyond_rounding(
    base, step, density, published
):
    pair = pair_of(base, stepped(base, step))
    result = update_geometry(pair, rank=20)
    assert result.updated / result.numel == pytest.approx(density, abs=0.004)
    low, principal = result.low_magnitude, result.principal
    assert low.share == pytest.approx(published, abs=0.03)
    assert low.share == pytest.approx(low.by_rounding, abs=0.006)
    assert low.lift == pytest.approx(1, abs=0.01)
    assert principal.share == pytest.approx(principal.by_rounding, abs=0.006)
    assert principal.share < 0.3  # "off principal" without any structure
    assert principal.lift == pytest.approx(1, abs=0.02)
    bare = published / 0.3 - 0.02
    assert_off_principal(pair, min_low_magnitude_lift=bare, rank=20, null=None)
    assert_off_principal(pair, max_principal_lift=0.999, rank=20, null=None)
    for null in NULLS:  # rounding explains it whatever chance is
        with pytest.raises(AssertionError, match=r"^low-magnitude lift .* and rounding\)\n"):
            assert_off_principal(pair, min_low_magnitude_lift=1.03, rank=20, null=null)
        with pytest.raises(AssertionError, match=r"^principal lift .* and rounding\)\n"):
            assert_off_principal(pair, max_principal_lift=0.95, rank=20, null=null)


def test_what_a_failure_says(fails_with):
    base = weights(64, 64)
    pair = pair_of(base, stepped(base, 4e-5), "layers.0.up_proj.weight")
    with fails_with("""
      low-magnitude lift 0.999 is below the required 1.1 (null "exponent" and rounding)
        pair       dict of tensors -> dict of tensors   (same bits, bf16, 1/1 matrix, 4,096 entries)
        updated    1,640 entries, density 40.04%
        principal  20.85% of the update, 21.55% by chance, 21.47% by rounding alone, z -1.1
                   (the largest 30% of each matrix's part of rank 8)
        low        59.82% of the update, 59.82% by chance, 59.86% by rounding alone, z 0.00417
                   (the smallest 30% of each matrix)
        chance     is taken by matrix and exponent of the base weight
        principal  lift: exponent 0.968, matrix 0.695, rowcol 0.731, pooled 0.695, rounding 0.971
        low        lift: exponent 1, matrix 1.99, rowcol 1.93, pooled 1.99, rounding 0.999
        worst      layers.0.up_proj.weight  59.82%  lift 0.999  (bf16[64,64])
        usually    an update that rounding alone places: in 16 bits small weights flip under
                   any update, and few of them are principal
        to accept  null=None, which asserts the bare number
        """):
        assert_off_principal(pair, min_low_magnitude_lift=1.1, rank=8)
    with fails_with("""
      principal lift 0.695 is above the allowed 0.5
        pair       dict of tensors -> dict of tensors   (same bits, bf16, 1/1 matrix, 4,096 entries)
        updated    1,640 entries, density 40.04%
        principal  20.85% of the update, 21.47% by rounding alone
                   (the largest 30% of each matrix's part of rank 8)
        low        59.82% of the update, 59.86% by rounding alone
                   (the smallest 30% of each matrix)
        principal  lift: exponent 0.968, matrix 0.695, rowcol 0.731, pooled 0.695, rounding 0.971
        low        lift: exponent 1, matrix 1.99, rowcol 1.93, pooled 1.99, rounding 0.999
        worst      layers.0.up_proj.weight  20.85%  lift 0.695  (bf16[64,64])
        usually    an update that rounding alone places: in 16 bits small weights flip under
                   any update, and few of them are principal
        to accept  max_principal_lift=0.7
        """):
        assert_off_principal(pair, max_principal_lift=0.5, rank=8, null=None)


def test_what_a_failure_says_to_paste_holds():
    """Of the bare number too, where the bound that failed is out of its reach as well."""
    base = weights(64, 64)
    pair = pair_of(base, stepped(base, 4e-5))
    for bounds, accepted in (
        ({"max_principal_lift": 0.5}, {"max_principal_lift": 0.7}),
        ({"min_low_magnitude_lift": 3}, {"min_low_magnitude_lift": 1.97}),
    ):
        with pytest.raises(AssertionError) as failure:
            assert_off_principal(pair, **bounds, rank=8)
        (name, value), *_ = accepted.items()
        assert str(failure.value).splitlines()[-1] == (
            f"  to accept  {name}={value}, null=None, which asserts the bare number"
        )
        assert_off_principal(pair, **accepted, rank=8, null=None)


def test_the_worst_are_those_beyond_the_bound():
    """Not those with least of the update, which say nothing of a lift that is too high."""
    base = weights(64, 64)
    none, many = base.clone(), base.clone()
    principal = flags(principal_bits(base, 0.3, 8), base.shape)
    none[~principal] = stepped(base, 1e-4)[~principal]
    many[principal] = stepped(base, 1e-2)[principal]
    pair = open_pair({"a": base, "b": base}, {"a": none, "b": many})
    with pytest.raises(AssertionError) as failure:
        assert_off_principal(pair, max_principal_lift=0.5, rank=8, null=None)
    worst = next(line for line in str(failure.value).splitlines() if "worst" in line)
    assert worst.split()[1] == "b"


def test_an_update_off_the_principal_entries_is_found(base):
    shape = base.shape
    principal = flags(principal_bits(base, 0.3, 20), shape)
    moved = stepped(base, 3e-5)
    off = torch.where(principal & (noise(shape, 5) > -0.5), base, moved)
    result = assert_off_principal(pair_of(base, off), max_principal_lift=0.5, rank=20)
    assert result.principal.z < -20
    on = torch.where(principal | (noise(shape, 5) > 0.5), moved, base)
    with pytest.raises(AssertionError, match=r"^principal lift 2\.\d+ is above the allowed 0\.5 "):
        assert_off_principal(pair_of(base, on), max_principal_lift=0.5, rank=20)


def test_an_update_of_small_entries_is_found(base):
    small = flags(low_magnitude_bits(base, 0.3), base.shape)
    moved = torch.where(small & (noise(base.shape, 5) > 0), base + 0.01, base)
    result = assert_off_principal(pair_of(base, moved), min_low_magnitude_lift=3, rank=20)
    assert result.low_magnitude.share == 1
    assert result.low_magnitude.by_rounding == pytest.approx(0.3, abs=0.01)  # steps show anywhere
    # The exponents alone say that it lies there, but for one of them: see `low_magnitude_lift`.
    assert result.low_magnitude.lift == pytest.approx(1.01, abs=0.005)
    assert result.low_magnitude.z > 10


@pytest.mark.parametrize("size", ["by row", "heavy tails"])
def test_uneven_updates_without_a_preference_are_no_evidence(base, size):
    """One step size does not describe them, and puts too little into the small entries."""
    step = torch.exp(2 * noise((320, 1) if size == "by row" else (320, 320), 8)) * 3e-6
    pair = pair_of(base, stepped(base, step))
    result = update_geometry(pair, rank=20)
    assert result.low_magnitude.rounding_lift > 1.2
    with pytest.raises(
        AssertionError, match=r"^low-magnitude lift \S+ is no evidence: z \S+ is bel"
    ):
        assert_off_principal(pair, min_low_magnitude_lift=1.2, rank=20)


def test_the_counts_are_those_of_mask_overlap():
    base = {f"layers.{n}.weight": weights(96, 64 + 32 * n, seed=n) for n in range(2)}
    tuned = {name: stepped(each, 3e-5 * (n + 1), n) for n, (name, each) in enumerate(base.items())}
    pair = open_pair(base, tuned)
    small = magnitude_mask(base, 0.3, largest=False)
    for null in NULLS:
        found = update_geometry(pair, rank=8, null=null)
        by_masks = mask_overlap(update_mask(pair), small, null=null)
        low = found.low_magnitude
        assert (low.updated, low.members, low.both) == (
            by_masks.count_a,
            by_masks.count_b,
            by_masks.intersection,
        )
        assert low.expected == pytest.approx(by_masks.expected, rel=1e-12)
        assert low.variance == (by_masks.variance and pytest.approx(by_masks.variance))
        assert {k: v for k, v in low.lifts.items() if k != "rounding"} == pytest.approx(
            by_masks.lifts
        )
        for mine, theirs in zip(found.per_tensor, by_masks.per_tensor, strict=True):
            assert (mine.name, mine.low_magnitude.both) == (theirs.name, theirs.intersection)
            assert mine.low_magnitude.expected == pytest.approx(theirs.expected, rel=1e-12)
            assert mine.low_magnitude.z == (pytest.approx(theirs.z) if theirs.z else None)
    assert found.principal.both == sum(each.principal.both for each in found.per_tensor)
    assert found.updated == sum(each.updated for each in found.per_tensor)


@pytest.mark.parametrize(
    ("dtype", "step", "atol"),
    [
        (torch.bfloat16, 3e-5, None),
        (torch.bfloat16, 1e-4, 1e-4),
        (torch.float16, 4e-6, None),
    ],
)
def test_what_rounding_alone_gives_is_what_simulated_noise_has(dtype, step, atol):
    base = weights(192, 128, dtype)
    masks = [
        flags(bits, base.shape)
        for bits in (principal_bits(base, 0.3, 8), low_magnitude_bits(base, 0.3))
    ]
    shares = []
    for seed in range(20):
        delta = stepped(base, step, seed + 10).float() - base.float()
        updated = delta.abs() > (atol or 0.0)
        shares.append([float((updated & mask).sum() / updated.sum()) for mask in masks])
    result = update_geometry(pair_of(base, stepped(base, step)), rank=8, atol=atol)
    found = result.principal.by_rounding, result.low_magnitude.by_rounding
    assert found == pytest.approx(np.mean(shares, axis=0), abs=0.005)


def test_z_of_noise_has_mean_0_and_deviation_1():
    base = weights(96, 64)
    found = [
        update_geometry(pair_of(base, stepped(base, 3e-5, seed)), rank=8) for seed in range(30)
    ]
    for z in ([each.principal.z for each in found], [each.low_magnitude.z for each in found]):
        assert abs(np.mean(z)) < 0.5
        assert np.std(z) == pytest.approx(1, abs=0.3)


def test_a_cast_pair_has_the_same_geometry():
    base = weights(64, 48)
    stored, cast = (
        update_geometry(pair_of(base, stepped(base, 3e-5), as_dtype=as_dtype), rank=8)
        for as_dtype in (None, "float32")
    )
    assert stored.principal == cast.principal
    assert stored.low_magnitude == cast.low_magnitude
    assert cast.dtype == "f32"


def test_float32_has_no_exponents_and_no_rounding():
    base = weights(64, 48, torch.float32)
    pair = pair_of(base, stepped(base, 1e-4))
    with pytest.raises(PairMismatchError, match="16-bit storage, and these are float32") as error:
        update_geometry(pair, rank=8)
    assert 'name null="matrix"' in str(error.value)
    result = update_geometry(pair, rank=8, null="matrix")
    assert result.principal.expected_by_rounding is None
    assert set(result.principal.lifts) == {"matrix", "rowcol", "pooled"}
    assert result.principal_lift == result.principal.lift == pytest.approx(1, abs=0.01)
    with pytest.raises(AssertionError, match=r'required 1.1 \(null "matrix"\)\n'):
        assert_off_principal(pair, min_low_magnitude_lift=1.1, rank=8, null="matrix")


def test_tensors_that_are_not_rounded_are_spread_evenly_over_the_masks():
    base = {"a.weight": weights(64, 48), "b.weight": weights(64, 48, torch.float32)}
    tuned = {name: stepped(each, 3e-5) for name, each in base.items()}
    result = update_geometry(open_pair(base, tuned), rank=8)
    rounded, plain = (each.low_magnitude for each in result.per_tensor)
    assert plain.expected_by_rounding is None
    assert result.low_magnitude.expected_by_rounding == pytest.approx(
        rounded.expected_by_rounding + plain.updated * plain.of_entries
    )
    assert result.low_magnitude.lift == pytest.approx(1, abs=0.02)


def test_a_wide_rtol_hides_stored_steps_and_a_narrow_one_none():
    base = weights(64, 48)
    pair = pair_of(base, stepped(base, 1e-3))
    assert update_geometry(pair, rank=8, rtol=0.5).principal.by_rounding is None
    narrow = update_geometry(pair, rank=8, rtol=1e-3)
    assert narrow.principal == update_geometry(pair, rank=8).principal


def test_a_few_rows_at_a_time_count_the_same(monkeypatch):
    base = weights(100, 37)
    tuned = stepped(base, 3e-5)
    whole = update_geometry(pair_of(base, tuned), rank=8)
    monkeypatch.setattr(geometry_masks, "_ENTRIES", 500)
    pieces = update_geometry(pair_of(base, tuned), rank=8, fraction=0.3)
    assert pieces.principal == whole.principal
    assert pieces.low_magnitude == whole.low_magnitude


def test_experts_are_matrices_of_their_own():
    base = torch.stack([weights(24, 16, seed=seed) for seed in range(3)])
    tuned = base.clone()
    tuned[1] = stepped(base[1], 1e-4)
    result = update_geometry(pair_of(base, tuned, "layers.0.mlp.experts.up_proj"), rank=4)
    assert [each.updated > 0 for each in result.per_tensor] == [False, True, False]
    assert result.per_tensor[1].name == "layers.0.mlp.experts.up_proj[1]"
    alone = update_geometry(pair_of(base[1].clone(), tuned[1].clone()), rank=4)
    for name in ("principal", "low_magnitude"):
        mine, theirs = (getattr(each, name) for each in (result.per_tensor[1], alone.per_tensor[0]))
        assert mine._replace(lifts={}) == theirs._replace(lifts={})
    assert result.per_tensor[0].principal.share is None


def test_principal_entries_of_a_base_are_found_once(monkeypatch):
    seen = []
    found = geometry_counts.principal_bits
    monkeypatch.setattr(geometry_counts, "principal_bits", lambda *a: seen.append(a) or found(*a))
    base = weights(24, 16, seed=77)
    for seed in range(3):
        update_geometry(pair_of(base.clone(), stepped(base, 1e-4, seed)), rank=4)
    assert len(seen) == 1
    update_geometry(pair_of(base.clone(), stepped(base, 1e-4)), rank=5)
    assert len(seen) == 2


def test_luck_is_no_evidence():
    base = weights(64, 48)
    tuned = base.clone()
    small = flags(low_magnitude_bits(base, 0.3), base.shape)
    chosen = (small & ~flags(principal_bits(base, 0.3, 8), base.shape)).nonzero()[:3]
    tuned[chosen[:, 0], chosen[:, 1]] += 0.01
    pair = pair_of(base, tuned)
    with pytest.raises(AssertionError) as failure:
        assert_off_principal(pair, min_low_magnitude_lift=1.01, rank=8)
    assert str(failure.value).splitlines()[0] == (
        "low-magnitude lift 3.03 is no evidence: z 0.235 is below the 2 that is clear of chance "
        '(null "exponent" and rounding)'
    )
    with pytest.raises(AssertionError) as failure:
        assert_off_principal(pair, max_principal_lift=0.99, rank=8, null="matrix")
    assert str(failure.value).splitlines()[0] == (
        "principal lift 0 is no evidence: z -1.13 is not below the -2 that is clear of chance "
        '(null "matrix" and rounding)'
    )
    assert assert_off_principal(pair, min_low_magnitude_lift=3, rank=8, null=None).updated == 3


def test_a_null_that_leaves_nothing_to_chance_cannot_judge():
    large = weights(8, 8)
    large[:4] = 2
    tuned = large.clone()
    tuned[6, 3] += 1  # no principal entry has an exponent as small
    pair = pair_of(large, tuned, "w")
    assert update_geometry(pair, rank=1).principal_lift is None
    with pytest.raises(SelectionError) as error:
        assert_off_principal(pair, max_principal_lift=0.5, rank=1)
    assert str(error.value) == (
        "max_principal_lift cannot be judged: the counts alone fix how much of the update is in "
        "its mask\n"
        "  pair       dict of tensors -> dict of tensors   "
        "(same bits, bf16, 1/1 matrix, 64 entries)\n"
        "  updated    1 entry, density 1.56%\n"
        "  principal  0.00% of the update, 0.00% by chance, 29.12% by rounding alone\n"
        "             (the largest 30% of each matrix's part of rank 1)\n"
        "  low        100.00% of the update, 100.00% by chance, 30.26% by rounding alone\n"
        "             (the smallest 30% of each matrix)\n"
        "  chance     is taken by matrix and exponent of the base weight\n"
        "  principal  lift: matrix 0, pooled 0, rounding 0\n"
        "  low        lift: exponent 1, matrix 3.37, rowcol 1.27, pooled 3.37, rounding 3.31\n"
        "  why        in each stratum of the null the update or the mask is empty or full, and\n"
        "             nothing is left to chance\n"
        '  to mend    another fraction=, or null="matrix"; null=None asserts the bare number'
    )
    assert assert_off_principal(pair, max_principal_lift=0.5, rank=1, null=None).updated == 1


def test_a_mask_of_whole_exponents_cannot_be_judged_by_exponent():
    even = torch.ones(20, 20, dtype=torch.bfloat16)
    even[:6] = 0.001  # the smallest 30 % are all of one exponent
    tuned = even.clone()
    tuned[:6, ::2] += 0.1
    pair = pair_of(even, tuned)
    with pytest.raises(SelectionError, match=r"^min_low_magnitude_lift cannot be judged"):
        assert_off_principal(pair, min_low_magnitude_lift=1.5, rank=1)
    assert_off_principal(pair, min_low_magnitude_lift=1.5, rank=1, null="matrix")


def test_an_identical_pair_has_no_update_to_place():
    base = weights(16, 16)
    with pytest.raises(SelectionError) as error:
        update_geometry(pair_of(base, base.clone()), rank=4)
    assert str(error.value) == (
        "no entry of the selected matrices of dict of tensors -> dict of tensors is updated, and "
        "what share of the update lies anywhere is undefined; did the run save its base again?"
    )


@pytest.mark.parametrize(
    ("base", "tuned", "text"),
    [
        (torch.zeros(8, 8), torch.ones(8, 8), r"w.weight of .* holds zeros alone in the base"),
        (torch.eye(8), torch.full((8, 8), float("nan")), r"w.weight of .* holds NaN or Inf"),
        (torch.full((8, 8), float("inf")), torch.eye(8), r"w.weight of .* holds NaN or Inf"),
        (torch.ones(8), torch.ones(8) * 2, "only these have principal entries"),
        (torch.ones(3, 8), torch.ones(3, 8) * 2, r"rank=4 is above the rows or columns of 1 sel"),
    ],
)
def test_what_has_no_geometry(base, tuned, text):
    with pytest.raises(SelectionError, match=text):
        update_geometry(pair_of(base, tuned), rank=4, null="matrix")


def test_masks_without_an_entry():
    pair = pair_of(torch.eye(4), torch.eye(4) * 2)
    with pytest.raises(SelectionError, match=r"fraction=0\.01 chooses no entry of 1 selected"):
        update_geometry(pair, rank=1, fraction=0.01, null="matrix")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fraction": 0}, ValueError, "fraction=0 is not between 0 and 1, both excluded"),
        ({"fraction": 1.0}, ValueError, "fraction=1.0 is not between 0 and 1, both excluded"),
        ({"fraction": 30}, ValueError, r"fraction=30 is not a fraction in \[0, 1\]; 30% is"),
        ({"fraction": float("nan")}, ValueError, "fraction=nan is not a fraction"),
        ({"fraction": "a"}, TypeError, "fraction='a' is not a number"),
        ({"rank": 0}, ValueError, "rank=0 is below 1"),
        ({"rank": 2.0}, TypeError, "rank=2.0 is not an integer"),
        ({"null": "exponents"}, ValueError, "null='exponents' is none of .*; did you mean exp"),
        ({"null": "auto"}, ValueError, "null='auto' is none of"),
        ({"atol": 1e-5, "rtol": 1e-3}, ValueError, "give at most one"),
        ({"include": "x*"}, SelectionError, "include='x\\*'|matches none"),
        ({"max_principal_lift": None}, ValueError, "no bound: give one of max_principal_lift, min"),
        ({"max_principal_lift": 1.0}, ValueError, "max_principal_lift=1.0 is no claim beyond the"),
        ({"max_principal_lift": -1}, ValueError, "max_principal_lift=-1 is not a finite number"),
        (
            {"min_low_magnitude_lift": 1},
            ValueError,
            "min_low_magnitude_lift=1 is no claim .* above",
        ),
        ({"min_low_magnitude_lift": "2"}, TypeError, "min_low_magnitude_lift='2' is not a number"),
        ({"message": "text"}, TypeError, "message='text' is not a function"),
    ],
)
def test_arguments_that_cannot_be_meant(options, error, text):
    pair = pair_of(torch.eye(8), torch.eye(8) * 2)
    with pytest.raises(error, match=text):
        assert_off_principal(pair, **{"max_principal_lift": 0.5, "rank": 4} | options)


def test_other_shapes_are_no_pair():
    with pytest.raises(PairMismatchError):
        update_geometry(pair_of(torch.eye(4), torch.eye(5)), rank=2)


def test_what_reports_store(recorded):
    base = weights(64, 48)
    result = update_geometry(pair_of(base, stepped(base, 3e-5)), rank=8)
    assert recorded == [result]
    stored = result.to_dict()
    assert stored["finding"] == "update_geometry"
    assert stored["principal_share"] == result.principal.share
    assert stored["low_magnitude_lifts"]["rounding"] == result.low_magnitude.rounding_lift
    assert set(result.fingerprints) == {"base", "tuned"}
    assert "principal by rounding" in result.table()
    bare = update_geometry(pair_of(base, stepped(base, 3e-5)), rank=8, null=None)
    assert repr(bare).startswith("UpdateGeometry(principal=")
    assert bare.principal_lift == bare.principal.bare_lift


def test_a_message_of_ones_own():
    base = weights(64, 48)
    with pytest.raises(AssertionError, match=r"^off: low-magnitude lift"):
        assert_off_principal(
            pair_of(base, stepped(base, 3e-5)),
            min_low_magnitude_lift=1.2,
            rank=8,
            message=lambda text: f"off: {text}",
        )
