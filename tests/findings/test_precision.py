"""The precision gate on pairs, and `visible_share`."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, SelectionError, open_pair, update_sparsity
from pytest_subnet.findings import precision
from pytest_subnet.findings.precision import movable_shares, visible_share

DOCS = Path(__file__).parents[2] / "docs" / "findings"
DTYPES = [torch.bfloat16, torch.float16]


def unstructured(dtype, scale, shape=(1536, 1024), seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    step = torch.randn(shape, generator=generator) * scale
    return {"w.weight": weight}, {"w.weight": (weight.float() + step).to(dtype)}


@pytest.mark.parametrize("scale", [1e-6, 3e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unstructured_update_has_the_density_that_is_expected_within_two_percent(dtype, scale):
    result = update_sparsity(open_pair(*unstructured(dtype, scale)))
    assert 1 - result.expected_sparsity == pytest.approx(result.density, rel=0.02)
    assert result.per_tensor[0].expected_sparsity == pytest.approx(result.expected_sparsity)


def test_under_a_tolerance_the_density_beyond_it_is_expected():
    pair = open_pair(*unstructured(torch.bfloat16, 1e-5))
    bits, paper = update_sparsity(pair), update_sparsity(pair, atol=1e-5)
    assert paper.sparsity > bits.sparsity + 0.02
    assert 1 - paper.expected_sparsity == pytest.approx(paper.density, rel=0.02)


def test_an_update_of_few_large_entries_is_far_sparser_than_rounding_makes_it():
    base, tuned = unstructured(torch.bfloat16, 0.0)
    tuned["w.weight"].view(-1)[::20] += 0.01
    result = update_sparsity(open_pair(base, tuned))
    assert result.sparsity > 0.94
    assert result.expected_sparsity < 0.1


def test_float32_is_not_rounded():
    base, tuned = unstructured(torch.float32, 1e-5)
    result = update_sparsity(open_pair(base, tuned))
    assert result.expected_sparsity is None
    assert result.per_tensor[0].expected_sparsity is None
    assert result.to_dict()["expected_sparsity"] is None


def test_a_base_that_was_cast_was_not_on_the_grid_and_has_no_estimate():
    base, tuned = unstructured(torch.float32, 1e-5)
    result = update_sparsity(open_pair(base, tuned, as_dtype="bfloat16"))
    assert result.expected_sparsity is None


def test_a_tuned_checkpoint_that_is_cast_is_rounded_once():
    base, tuned = unstructured(torch.bfloat16, 0.0)
    step = torch.randn(base["w.weight"].shape, generator=torch.Generator().manual_seed(5)) * 1e-5
    tuned = {"w.weight": base["w.weight"].float() + step}
    result = update_sparsity(open_pair(base, tuned, as_dtype="bfloat16"))
    assert 1 - result.expected_sparsity == pytest.approx(result.density, rel=0.02)


@pytest.mark.parametrize(("rtol", "known"), [(1e-3, True), (2**-8, False)])
def test_a_relative_tolerance_is_known_while_it_hides_nothing(rtol, known):
    pair = open_pair(*unstructured(torch.bfloat16, 1e-5, shape=(64, 64)))
    same_bits = update_sparsity(pair).expected_sparsity
    assert update_sparsity(pair, rtol=rtol).expected_sparsity == (same_bits if known else None)


def test_tensors_that_are_not_rounded_count_as_they_were_measured():
    base, tuned = unstructured(torch.bfloat16, 1e-5, shape=(64, 64))
    base["n.weight"], tuned["n.weight"] = torch.ones(4096), torch.ones(4096)
    tuned["n.weight"][:1024] = 2
    result = update_sparsity(open_pair(base, tuned))
    (expected,) = [e.expected_sparsity for e in result.per_tensor if e.name == "w.weight"]
    assert result.expected_sparsity == pytest.approx((expected + 0.75) / 2)


def test_nothing_moved_is_expected_where_nothing_moved():
    base, _ = unstructured(torch.bfloat16, 0.0, shape=(16, 16))
    pair = open_pair(base, {"w.weight": base["w.weight"].clone()})
    assert update_sparsity(pair).expected_sparsity == 1.0


@pytest.mark.parametrize("value", [0.0, float("nan"), 3e38])
def test_a_base_of_odd_values_has_an_estimate_or_none(value):
    base = {"w.weight": torch.full((8, 8), value, dtype=torch.bfloat16)}
    tuned = {"w.weight": base["w.weight"].clone()}
    tuned["w.weight"][0] = 1e-3
    expected = update_sparsity(open_pair(base, tuned)).expected_sparsity
    assert expected is None or 0 <= expected <= 1


def test_a_base_in_files_is_sampled_once(pair_of, monkeypatch):
    pair = pair_of(*unstructured(torch.bfloat16, 1e-5, shape=(64, 64)))
    first = update_sparsity(pair)
    monkeypatch.setattr(precision, "sample_gaps", None)
    assert update_sparsity(pair) == first


def test_a_base_that_someone_else_holds_is_sampled_again():
    base, tuned = unstructured(torch.bfloat16, 1e-5, shape=(64, 64))
    pair = open_pair(base, tuned)
    update_sparsity(pair)
    base["w.weight"].data.mul_(64)
    fresh = open_pair({"w.weight": base["w.weight"].clone()}, tuned)
    assert update_sparsity(pair).expected_sparsity == update_sparsity(fresh).expected_sparsity


def test_what_a_step_can_move_is_known_of_some_tensors_of_a_pair():
    base = {
        "small.weight": torch.full((64, 64), 2.0**-20, dtype=torch.bfloat16),
        "large.weight": torch.ones(64, 64, dtype=torch.bfloat16),
        "exact.weight": torch.ones(64, 64),
    }
    pair = open_pair(base, {name: each + 1 for name, each in base.items()})
    assert movable_shares(pair, ["small.weight", "exact.weight"], [1e-4]) == [1.0]
    assert movable_shares(pair, base, [1e-4, 1.0]) == [0.5, 1.0]
    assert movable_shares(pair, base, [1e-4]) == [visible_share(base, 1e-4)]
    assert movable_shares(pair, ["exact.weight"], [1e-4]) == []


def test_weights_that_are_not_finite_can_not_be_moved():
    base = {"w.weight": torch.full((4, 4), float("nan"), dtype=torch.bfloat16)}
    pair = open_pair(base, {"w.weight": base["w.weight"].clone()})
    assert movable_shares(pair, ["w.weight"], [1.0]) == []


def test_files_and_memory_are_sampled_alike(tmp_path):
    base, tuned = unstructured(torch.bfloat16, 1e-5, shape=(512, 300))
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    on_disk = update_sparsity(
        open_pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    )
    in_memory = update_sparsity(open_pair(base, tuned))
    assert on_disk.expected_sparsity == in_memory.expected_sparsity


def uneven(shape, where, factor, step, scale=0.2):
    """Noise of one size on weights whose scale varies with the place."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * scale
    where(weight).mul_(factor)
    weight = weight.bfloat16()
    tuned = (weight.float() + step * torch.randn(shape, generator=generator)).bfloat16()
    return {"w.weight": weight}, {"w.weight": tuned}


UNEVEN = {
    "columns": ((64, 16384), lambda w: w[:, :2048], 0.01, 1e-4),
    "half the columns": ((512, 4096), lambda w: w[:, :2048], 2, 3e-5, 0.02),
    "rows": ((4096, 1024), lambda w: w.view(-1, 16, 1024)[:, :2], 0.1, 1e-4),
}


SAMPLED = {"columns": 0.02, "half the columns": 0.02, "rows": 0.10}
"""The error of a share that the page admits, for columns and for rows that repeat."""


@pytest.mark.parametrize("case", UNEVEN)
def test_weights_of_other_scales_by_row_or_column_are_all_looked_at(case):
    base, tuned = uneven(*UNEVEN[case])
    result = update_sparsity(open_pair(base, tuned))
    assert 1 - result.expected_sparsity == pytest.approx(result.density, rel=0.02)
    words = base["w.weight"].view(torch.int16).numpy().view(np.uint16).ravel()
    shown = visible_share(base, 1e-4)
    assert shown == pytest.approx(visible_of(words, 1e-4), abs=1e-12)


def visible_of(words, step):
    """The share of weights and directions in which a step shows, entry by entry."""
    values = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).float()
    shown = [(values + sign * step).bfloat16().float() != values for sign in (1, -1)]
    return torch.stack(shown).double().mean().item()


@pytest.mark.parametrize("case", UNEVEN)
def test_what_a_large_model_is_sampled_for_misses_no_columns_and_no_rows(case, monkeypatch):
    base, tuned = uneven(*UNEVEN[case])
    exact = visible_share(base, 1e-4)
    monkeypatch.setattr(precision, "_SMALL", 1)
    result = update_sparsity(open_pair(base, tuned))
    assert 1 - result.expected_sparsity == pytest.approx(result.density, abs=SAMPLED[case])
    assert visible_share(base, 1e-4) == pytest.approx(exact, abs=SAMPLED[case])


def entries_read(name, shape):
    """Row and column of each entry of the pages."""
    runs = precision._runs(name, shape, math.prod(shape), 64)
    assert {count for _, count in runs} == {2048}
    at = (np.array([start for start, _ in runs])[:, None] + np.arange(2048)).ravel()
    assert at.max() < math.prod(shape)
    return np.divmod(at, shape[-1])


@pytest.mark.parametrize("name", ["q_proj.weight", "down_proj.weight"])
@pytest.mark.parametrize("width", [896, 2048, 4096, 11008, 14336, 16384])
def test_pages_fall_on_all_columns_and_on_all_rows(width, name):
    """As the page says: a block of columns or of rows to 2 points, scattered rows to 10."""
    rows, columns = entries_read(name, (4096, width))
    for eighth in range(8):
        assert np.mean(columns * 8 // width == eighth) == pytest.approx(1 / 8, abs=0.02)
        assert np.mean(rows * 8 // 4096 == eighth) == pytest.approx(1 / 8, abs=0.02)
        assert np.mean(rows % 8 == eighth) == pytest.approx(1 / 8, abs=0.10)


@pytest.mark.parametrize("shape", [(1 << 20,), (2, 1 << 20), (8, 512, 2048), (1 << 20, 2)])
def test_pages_of_tensors_of_other_shapes_fall_everywhere(shape):
    rows, columns = entries_read("w", shape)
    at = rows * shape[-1] + columns
    found = np.bincount(at * 2 // math.prod(shape), minlength=2) / at.size
    assert found == pytest.approx([0.5, 0.5], abs=0.15)


def test_one_page_in_512_is_read_of_a_large_tensor_and_64_of_a_smaller_one():
    shape = 32768, 4096  # 128 * 512 pages
    runs = precision._runs("w", shape, 1 << 27, 64)
    assert len(runs) == 128
    assert runs == precision._runs("w", shape, 1 << 27, 64)
    assert runs != precision._runs("v", shape, 1 << 27, 64)
    assert len(precision._runs("w", (1000, 2048), 1000 * 2048, 64)) == 64


def test_models_of_many_tensors_share_what_is_read():
    assert precision._least_pages([1 << 23]) is None
    assert precision._least_pages([1 << 24]) == 64
    assert precision._least_pages([1 << 20] * 512) == 32
    assert precision._least_pages([1 << 20] * 4096) == 4


def test_of_thousands_of_tensors_those_of_one_sort_share_a_sample(monkeypatch):
    base, tuned = {}, {}
    for expert in range(12):
        generator = torch.Generator().manual_seed(expert)
        for kind, scale in (("up_proj", 0.02), ("down_proj", 0.2)):
            name = f"model.layers.0.mlp.experts.{expert}.{kind}.weight"
            base[name] = (torch.randn(64, 64, generator=generator) * scale).bfloat16()
            step = torch.randn(64, 64, generator=generator) * 1e-4
            tuned[name] = (base[name].float() + step).bfloat16()
    alone = update_sparsity(open_pair(base, tuned))
    monkeypatch.setattr(precision, "_MANY", 23)
    together = open_pair(base, tuned)
    one = update_sparsity(together, include="*experts.3.up_proj*")
    shared = update_sparsity(together)
    assert shared.expected_sparsity == pytest.approx(alone.expected_sparsity, abs=0.005)
    assert one.per_tensor[0] in shared.per_tensor  # whatever was asked first
    for mine, theirs in zip(shared.per_tensor, alone.per_tensor, strict=True):
        assert mine.expected_sparsity == pytest.approx(theirs.expected_sparsity, abs=0.03)


@pytest.mark.parametrize("numel", [0, 1, 2047, 2049, 64 * 2048, 1 << 20, (1 << 21) + 5])
def test_all_of_a_small_model_is_read_and_of_a_tensor_of_few_pages(numel):
    for least in (None, 64):
        if least is None or numel <= 64 * 2048:
            runs = precision._runs("w", (numel,), numel, least)
            assert [start for start, _ in runs] == list(range(0, numel, 1 << 20))
            assert sum(count for _, count in runs) == numel


@pytest.mark.parametrize("as_dtype", ["float32", "float64"])
def test_a_pair_of_16_bits_is_judged_by_its_storage_and_not_by_the_cast(as_dtype):
    base, tuned = unstructured(torch.bfloat16, 1e-5, shape=(256, 256))
    stored = update_sparsity(open_pair(base, tuned))
    cast = update_sparsity(open_pair(base, tuned, as_dtype=as_dtype))
    assert cast.expected_sparsity == pytest.approx(stored.expected_sparsity, rel=1e-6)


def test_a_tuned_checkpoint_in_float32_compared_as_such_is_not_rounded():
    base, tuned = unstructured(torch.bfloat16, 1e-5, shape=(64, 64))
    tuned = {name: each.float() for name, each in tuned.items()}
    assert update_sparsity(open_pair(base, tuned, as_dtype="float32")).expected_sparsity is None


@pytest.mark.parametrize("master", ["bfloat16", "float32"])
def test_the_share_grows_with_the_step_up_to_all(master):
    base, _ = unstructured(torch.bfloat16, 0.0, shape=(256, 256))
    shares = [visible_share(base, 10.0**-k, master=master) for k in (12, 6, 5, 4, 0)]
    assert shares == sorted(shares)
    assert shares[0] < 1e-4
    assert shares[-1] == 1.0


def test_a_tensor_weighs_as_much_as_it_has_entries_however_it_is_sampled():
    small = torch.full((64, 64), 2.0**-20, dtype=torch.bfloat16)
    large = torch.ones(3 * 4096, 4, dtype=torch.bfloat16)
    share = visible_share({"small.weight": small, "large.weight": large}, 1e-4)
    assert share == pytest.approx(4096 / (4096 + 3 * 16384))


def test_the_masters_dtype_says_which_weights_are_meant():
    half, brain = torch.ones(4, 4, dtype=torch.float16), torch.full((4, 4), 1e-6).bfloat16()
    model = {"half.weight": half, "brain.weight": brain}
    assert visible_share(model, 1e-5, master="float16") == 0
    assert visible_share(model, 1e-5, master="bfloat16") == 1
    assert 0.5 < visible_share(model, 1e-5, master="float32") < 0.6


@pytest.mark.parametrize(
    ("checkpoint", "step", "options", "error", "text"),
    [
        ({"w": torch.ones(4)}, 1e-6, {}, SelectionError, "stores no weight as bfloat16 .*float32"),
        ({"w": torch.ones(4).int()}, 1e-6, {}, SelectionError, "it has no floats"),
        ({"w": torch.ones(4).bfloat16()}, -1.0, {}, ValueError, "step_size=-1.0"),
        ({"w": torch.ones(4).bfloat16()}, float("inf"), {}, ValueError, "step_size=inf"),
        ({"w": torch.ones(4).bfloat16()}, "1e-6", {}, TypeError, "not a number"),
        ({"w": torch.ones(4).bfloat16()}, 1e-6, {"master": "f32"}, ValueError, "master='f32' is"),
        ({"w": torch.ones(4).bfloat16() / 0}, 1e-6, {}, SelectionError, "holds only NaN and Inf"),
        ({}, 1e-6, {}, CheckpointError, "no tensors"),
    ],
)
def test_misuse_is_an_error(checkpoint, step, options, error, text):
    with pytest.raises(error, match=text):
        visible_share(checkpoint, step, **options)


@pytest.mark.slow
def test_the_picture_of_the_page_is_what_its_script_measures():
    drawn = runpy.run_path(str(DOCS / "draw_precision.py"))["draw"]()
    assert drawn == (DOCS / "precision.svg").read_text(encoding="utf-8")
