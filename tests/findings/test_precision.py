"""The precision gate on pairs, and `visible_share`."""

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


def test_a_large_model_is_sampled_from_every_64th_block(monkeypatch):
    """Blocks that are not looked at may hold anything."""
    monkeypatch.setattr(precision, "_SMALL", 1)
    weight = torch.ones(512, 16384, dtype=torch.bfloat16)
    weight.view(-1, 64, 16384)[:, 1:] = 64.0
    tuned = weight.clone()
    tuned += 2.0**-7
    pair = open_pair({"w.weight": weight}, {"w.weight": tuned})
    counts = precision._gaps(pair, [0])[0]
    assert np.count_nonzero(counts) == 2  # those of 1.0, above and below
    assert counts.sum() == 2 * 2048 * 8


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
