import itertools

import numpy as np
import pytest
import torch

from pytest_subnet import (
    PairMismatchError,
    SelectionError,
    UpdateMask,
    mask_overlap,
    open_pair,
    update_mask,
)
from pytest_subnet.findings.common.chance import hypergeometric
from pytest_subnet.findings.geometry.consensus import consensus_jaccard, shared_by_chance


def drawn(count, *, shape=(20, 30), density=0.3, seed=0):
    random = np.random.default_rng(seed)
    return [
        UpdateMask.of({f"layers.{n}.weight": random.random(shape) < density for n in range(2)})
        for _ in range(count)
    ]


def runs(count, step=3e-5):
    generator = torch.Generator().manual_seed(0)
    base = {"w.weight": (torch.randn(192, 160, generator=generator) * 0.02).bfloat16()}
    moved = [
        (base["w.weight"].float() + step * torch.randn(192, 160, generator=generator)).bfloat16()
        for _ in range(count)
    ]
    return [open_pair(base, {"w.weight": each}) for each in moved]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_is_what_sets_say(count):
    masks = drawn(count)
    result = consensus_jaccard(masks)
    entries = [np.concatenate([mask[name].ravel() for name in mask]) for mask in masks]
    assert result.intersection == np.logical_and.reduce(entries).sum()
    assert result.union == np.logical_or.reduce(entries).sum()
    assert result.jaccard == result.intersection / result.union
    pairs = [(a & b).sum() / (a | b).sum() for a, b in itertools.combinations(entries, 2)]
    assert result.pairwise == pytest.approx(pairs)
    assert result.mean_pairwise == pytest.approx(np.mean(pairs))
    assert result.intersection == sum(each.intersection for each in result.per_tensor)


def test_of_two_masks_it_is_their_overlap():
    a, b = drawn(2)
    found, overlap = consensus_jaccard([a, b]), mask_overlap(a, b)
    assert (found.null, found.intersection) == (overlap.null, overlap.intersection)
    assert found.jaccard == overlap.jaccard
    assert found.expected == pytest.approx(overlap.expected, rel=1e-12)
    assert found.variance == pytest.approx(overlap.variance, rel=1e-9)
    assert found.z == pytest.approx(overlap.z)
    assert found.jaccard_by_chance == pytest.approx(overlap.jaccard_by_chance)


def test_chance_is_what_random_sets_share():
    population, sizes = 60, (20, 35, 50)
    random = np.random.default_rng(0)
    shared, joined = [], []
    for _ in range(4000):
        sets = [random.permutation(population) < size for size in sizes]
        shared.append(np.logical_and.reduce(sets).sum())
        joined.append(np.logical_or.reduce(sets).sum())
    mean, variance, union = shared_by_chance(
        np.array([population]), np.array([[size] for size in sizes])
    )
    assert mean == pytest.approx(np.mean(shared), abs=0.1)
    assert variance == pytest.approx(np.var(shared), rel=0.08)
    assert union == pytest.approx(np.mean(joined), abs=0.1)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 10), (10, 10), (10, 3), (1, 1)])
def test_two_sets_are_hypergeometric(sizes):
    numel = np.array([10])
    a, b = (np.array([size]) for size in sizes)
    mean, variance = hypergeometric(numel, a, b)
    found = shared_by_chance(numel, np.stack([a, b]))
    assert found[:2] == pytest.approx((mean.item(), variance.item()))


def test_full_masks_add_nothing_to_z():
    members = np.array([[7], [10], [10]])
    assert shared_by_chance(np.array([10]), members) == pytest.approx((7, 0, 10))


def test_rounding_makes_consensus_by_matrix_and_not_by_exponent():
    pairs = runs(4)
    result = consensus_jaccard(pairs)
    assert result.null == "exponent"
    assert result.lift == pytest.approx(1, abs=0.04)
    assert abs(result.z) < 4
    by_matrix = consensus_jaccard(pairs, null="matrix")
    assert by_matrix.lift > 4
    assert by_matrix.jaccard == result.jaccard
    assert consensus_jaccard(pairs, null=None).expected is None


def test_files_are_masks_too(tmp_path):
    pairs = runs(3)
    paths = []
    for number, pair in enumerate(pairs):
        paths.append(tmp_path / f"{number}.safetensors")
        update_mask(pair).save(paths[-1])
    assert consensus_jaccard(paths).expected == consensus_jaccard(pairs).expected


@pytest.mark.parametrize(
    ("masks", "error", "text"),
    [
        ([], ValueError, "a consensus takes at least two masks, and masks has 0; one agrees with"),
        (drawn(1), ValueError, "at least two masks, and masks has 1"),
        (drawn(1)[0], TypeError, "masks is a list of masks, mask files or pairs, not one of them"),
        ([*drawn(1), 3], TypeError, r"masks\[1\] is a mask, a mask file or a pair, not int"),
        (drawn(2)[:1] * 2, PairMismatchError, "a and b are the same"),
        ([*drawn(2), *drawn(1, density=0)], SelectionError, "mask b is empty"),
        ([*drawn(2), *drawn(1, shape=(20, 31), seed=1)], PairMismatchError, "reshaped|31"),
    ],
)
def test_masks_without_a_consensus(masks, error, text):
    with pytest.raises(error, match=text):
        consensus_jaccard(masks)


def test_nulls_that_cannot_be_had():
    with pytest.raises(ValueError, match="null='rowcol' is none of exponent, matrix, auto"):
        consensus_jaccard(drawn(2), null="rowcol")
    with pytest.raises(PairMismatchError, match='null="exponent" cannot be had'):
        consensus_jaccard(drawn(2), null="exponent")
    one, (_, other) = runs(1), runs(2)
    base = {"w.weight": one[0].base.read("w.weight") * 2}
    apart = open_pair(base, {"w.weight": other.tuned.read("w.weight")})
    with pytest.raises(PairMismatchError, match=r"other exponents|different bases"):
        consensus_jaccard([one[0], other, apart])


def test_what_reports_store(recorded):
    result = consensus_jaccard(runs(3))
    assert recorded[-1] is result
    assert result.to_dict()["finding"] == "consensus_jaccard"
    assert set(result.fingerprints) == {
        f"{side}_{n}" for side in ("base", "tuned") for n in (1, 2, 3)
    }
    assert result.fingerprints["base_1"] == result.fingerprints["base_3"] != ""
    assert "in all" in result.table()
