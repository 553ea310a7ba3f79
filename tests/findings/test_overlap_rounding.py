"""Overlap that rounding makes: updates without any structure, told apart from those with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pytest_subnet import PairMismatchError, UpdateMask, open_pair, update_mask
from pytest_subnet.findings.overlap.finding import mask_overlap
from pytest_subnet.masks.bits import MemoryBits, pack
from pytest_subnet.masks.update_mask import MaskTensor, Origin, Strata
from pytest_subnet.scan.found import stratum_of

SIDE = 2048


def mask_of(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor]) -> UpdateMask:
    """The entries with other bits, with their counts by exponent: the slow and plain way."""
    tensors, packed, strata = [], [], {}
    for name, before in base.items():
        words = before.view(torch.int16).numpy().view(np.uint16).astype(np.int64)
        entries = (before.view(torch.int16) != tuned[name].view(torch.int16)).numpy()
        stratum = ((words >> 7) & 0xFF) * 2 + ((words & 0x7F) == 0)
        strata[name] = Strata(
            np.bincount(stratum.ravel(), minlength=512),
            np.bincount(stratum[entries], minlength=512),
        )
        tensors.append(MaskTensor(name, tuple(before.shape), "bfloat16", int(entries.sum())))
        packed.append(pack(entries))
    origin = Origin("base -> tuned", "same bits", "fingerprint")
    return UpdateMask(tensors, MemoryBits(np.concatenate(packed)), origin, strata)


def updated(base: torch.Tensor, scale: float | torch.Tensor, seed: int) -> torch.Tensor:
    """A dense update without structure, as the base's dtype stores it."""
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    return (base.float() + scale * noise).to(base.dtype)


def overlap(base, scale_a, scale_b, seeds=(1, 2), **options):
    a, b = (
        mask_of({"w": base}, {"w": updated(base, scale, seed)})
        for scale, seed in zip((scale_a, scale_b), seeds, strict=True)
    )
    return mask_overlap(a, b, **options)


@pytest.fixture(scope="module")
def normal():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(SIDE, SIDE, generator=generator) * 0.02).bfloat16()


# Sizes of updates that leave the densities of arXiv 2505.11711, Table 4: seed, data, algorithm.
@pytest.mark.parametrize(
    ("scales", "densities", "published", "by_rounding"),
    [
        ((3.566e-5, 3.566e-5), (0.367, 0.367), (0.605, 0.605), (0.631, 0.631)),
        ((3.566e-5, 1.262e-5), (0.367, 0.146), (0.267, 0.671), (0.331, 0.832)),
        ((1.108e-5, 2.051e-5), (0.129, 0.230), (0.591, 0.332), (0.751, 0.422)),
    ],
)
def test_independent_updates_overlap_as_in_table_4_and_not_beyond_rounding(
    normal, scales, densities, published, by_rounding
):
    result = overlap(normal, *scales)
    assert (result.count_a / result.numel, result.count_b / result.numel) == pytest.approx(
        densities, abs=0.002
    )
    found = result.one_sided_a, result.one_sided_b
    assert found == pytest.approx(by_rounding, abs=0.004)
    assert all(share > paper for share, paper in zip(found, published, strict=True))
    assert result.null == "exponent"
    assert result.lift == pytest.approx(1, abs=0.005)
    assert result.lifts["matrix"] > 1.7
    assert abs(result.kappa) < 0.01


@pytest.mark.parametrize(
    ("scale", "by_matrix"), [(3e-6, 16.6), (1e-5, 5.1), (3e-5, 1.94), (1e-4, 1.11)]
)
def test_the_lift_by_matrix_grows_as_updates_shrink_and_that_by_exponent_does_not(
    normal, scale, by_matrix
):
    result = overlap(normal, scale, scale)
    assert result.lifts["matrix"] == pytest.approx(by_matrix, rel=0.02)
    # With 3e-6 some 25,000 entries meet by chance: one deviation is 0.005.
    assert result.lift == pytest.approx(1, abs=0.015 if scale < 1e-5 else 0.005)


def test_z_of_independent_updates_has_mean_0_and_deviation_1():
    base = (torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.02).bfloat16()
    found = [overlap(base, 2e-5, 2e-5, seeds=(2 * n + 10, 2 * n + 11)).z for n in range(40)]
    assert abs(np.mean(found)) < 0.5  # one deviation of the mean of 40 is 0.16
    assert np.std(found) == pytest.approx(1, abs=0.3)


def test_updates_that_share_a_structure_are_told_from_those_that_do_not(normal):
    rows = torch.exp(torch.randn(SIDE, 1, generator=torch.Generator().manual_seed(4)) - 1)
    result = overlap(normal, 3e-5 * rows, 3e-5 * rows)
    assert result.lifts["matrix"] > 2
    assert 1.3 < result.lift < 1.6
    assert result.z > 200
    assert overlap(normal, 3e-5 * rows, 3e-5).lift == pytest.approx(1, abs=0.005)


def test_float16_has_the_same_strata(normal):
    base = {"w": normal.half()}
    infos = []
    for seed in (1, 2):
        entries = (updated(base["w"], 2e-6, seed) != base["w"]).numpy()
        words = base["w"].view(torch.int16).numpy().view(np.uint16).astype(np.int64)
        stratum = ((words >> 10) & 0x1F) * 2 + ((words & 0x3FF) == 0)
        strata = Strata(
            np.bincount(stratum.ravel(), minlength=64), np.bincount(stratum[entries], minlength=64)
        )
        info = MaskTensor("w", (SIDE, SIDE), "float16", int(entries.sum()))
        origin = Origin("base -> tuned", "same bits", "fingerprint")
        infos.append(UpdateMask([info], MemoryBits(pack(entries)), origin, {"w": strata}))
    result = mask_overlap(*infos)
    assert result.null == "exponent"
    assert result.lifts["matrix"] > 1.2
    assert result.lift == pytest.approx(1, abs=0.01)


# Pairs of 16-bit checkpoints that are compared as wider floats


def pairs_of(dtype, as_dtype, shape=(256, 256)):
    """Two unrelated updates of one base."""
    base = {"w": (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)}
    scale = 3e-5 if dtype == torch.bfloat16 else 4e-6
    return [
        open_pair(base, {"w": updated(base["w"], scale, seed)}, as_dtype=as_dtype)
        for seed in (1, 2)
    ]


@pytest.mark.parametrize("as_dtype", ["float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_to_wider_floats_does_not_switch_the_null_off(dtype, as_dtype):
    stored = mask_overlap(*pairs_of(dtype, None))
    cast = mask_overlap(*pairs_of(dtype, as_dtype))
    assert cast.null == stored.null == "exponent"
    assert cast.lift == stored.lift == pytest.approx(1, abs=0.05)
    assert cast.lifts["matrix"] > 1.2
    assert cast.dtype == stored.dtype
    (one, _), (other, _) = pairs_of(dtype, None), pairs_of(dtype, as_dtype)
    for mine, theirs in zip(
        update_mask(one).strata("w"), update_mask(other).strata("w"), strict=True
    ):
        assert mine.tolist() == theirs.tolist()


def test_strata_of_a_cast_pair_travel_with_its_mask_and_are_those_of_each_tensor(tmp_path):
    base = {
        f"{name}.weight": (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02)
        for name, shape in (("a", (7, 9)), ("b", (3, 100)), ("c", (5,)))
    }
    base = {name: each.bfloat16() for name, each in base.items()}
    pair = open_pair(base, {n: updated(w, 3e-4, 1) for n, w in base.items()}, as_dtype="float32")
    mask = update_mask(pair)
    mask.save(tmp_path / "mask.safetensors")
    loaded = UpdateMask.load(tmp_path / "mask.safetensors")
    assert {each.dtype for each in loaded.tensors} == {"bfloat16"}
    for name, weight in base.items():
        words = weight.view(torch.int16).numpy().view(np.uint16).ravel()
        stratum = stratum_of(words, 512)
        expected = (
            np.bincount(stratum, minlength=512),
            np.bincount(stratum[mask[name].ravel()], minlength=512),
        )
        for made, read, by_hand in zip(
            mask.strata(name), loaded.strata(name), expected, strict=True
        ):
            assert made.tolist() == read.tolist() == by_hand.tolist()


def test_where_the_base_was_not_stored_in_16_bits_the_weaker_null_has_to_be_named():
    base = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02}
    pairs = [
        open_pair(base, {"w": updated(base["w"], 1e-3, seed).bfloat16()}, as_dtype="float32")
        for seed in (1, 2)
    ]
    masks = [update_mask(pair, atol=1e-3) for pair in pairs]
    assert masks[0].strata("w") is None
    with pytest.raises(PairMismatchError, match=r'null="exponent" cannot be had .*null="matrix"'):
        mask_overlap(*masks)
    assert mask_overlap(*masks, null="matrix").null == "matrix"


def test_an_update_kept_in_float32_of_a_base_in_16_bits_is_not_rounded():
    base = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()}
    pairs = [
        open_pair(base, {"w": updated(base["w"].float(), 1e-3, seed)}, as_dtype="float32")
        for seed in (1, 2)
    ]
    masks = [update_mask(pair, atol=1e-3) for pair in pairs]
    assert {each.dtype for each in masks[0].tensors} == {"float32"}
    assert mask_overlap(*masks).null == "matrix"
