"""Overlap end to end: checkpoints on disk, pairs of them, mask files, and weights that are gone."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pytest_subnet import (
    CheckpointError,
    PairMismatchError,
    SelectionError,
    UpdateMask,
    assert_mask_overlap,
    mask_overlap,
    open_pair,
    update_mask,
)
from pytest_subnet.published import OVERLAPS

DOCS = Path(__file__).parents[2] / "docs" / "findings"
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"


def weights(seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {
        UP: (0.02 * torch.randn(96, 64, generator=generator)).to(dtype),
        DOWN: (0.02 * torch.randn(64, 96, generator=generator)).to(dtype),
        NORM: torch.ones(64, dtype=dtype),
    }


def trained(base, seed, scale=4e-5):
    """The base after a dense update without structure, which leaves out the norm."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight
        if name == NORM
        else (weight.float() + scale * torch.randn(weight.shape, generator=generator)).to(
            weight.dtype
        )
        for name, weight in base.items()
    }


@pytest.fixture
def base():
    return weights()


@pytest.fixture
def run(save):
    """A pair on disk: a base, and it after a run of its own."""

    def make(base, seed, *, at="base"):
        if not Path(at).exists():  # written again, it would be another base to pairs of it
            save(base, at)
        return open_pair(at, save(trained(base, seed), f"run{seed}"))

    return make


@pytest.fixture
def mask_file(run):
    """The mask file of such a run."""

    def make(base, seed, *, at="base", atol=None):
        update_mask(run(base, seed, at=at), atol=atol).save(f"{seed}.safetensors")
        return f"{seed}.safetensors"

    return make


def numbers(result):
    fields = ("null", "count_a", "count_b", "intersection", "expected", "variance", "lifts")
    return {name: getattr(result, name) for name in (*fields, "kappa", "z", "strata", "degenerate")}


class TestSources:
    def test_two_pairs_are_counted_as_their_tensors_are(self, base, run):
        result = mask_overlap(run(base, 1), run(base, 2))
        moved = [
            {name: each[name] != base[name] for name in base}
            for each in (trained(base, 1), trained(base, 2))
        ]
        assert {each.name: each.intersection for each in result.per_tensor} == {
            name: int((moved[0][name] & moved[1][name]).sum()) for name in base
        }
        assert result.count_a == sum(int(each.sum()) for each in moved[0].values())
        assert (result.null, result.dtype) == ("exponent", "bf16")
        assert (result.a, result.b) == ("base -> run1 (same bits)", "base -> run2 (same bits)")

    def test_pairs_masks_and_files_give_the_same_numbers(self, base, run, mask_file):
        files = [mask_file(base, seed) for seed in (1, 2)]
        pairs = [run(base, seed) for seed in (1, 2)]
        made = [update_mask(pair) for pair in pairs]
        loaded = [UpdateMask.load(file) for file in files]
        expected = numbers(mask_overlap(*pairs))
        for a in (pairs[0], made[0], loaded[0], files[0], Path(files[0])):
            for b in (pairs[1], made[1], loaded[1], files[1], Path(files[1])):
                assert numbers(mask_overlap(a, b)) == expected

    def test_two_files_are_compared_by_exponent_after_the_weights_are_gone(self, base, mask_file):
        files = [mask_file(base, seed) for seed in (1, 2)]
        for directory in ("base", "run1", "run2"):
            shutil.rmtree(directory)
        result = assert_mask_overlap(*files, max_jaccard=0.9)
        assert result.null == "exponent"
        assert list(result.lifts) == ["exponent", "matrix", "rowcol", "pooled"]
        assert result.lifts["matrix"] > 1.4 > 1.05 > result.lift

    def test_a_tolerance_goes_to_the_pairs(self, base, run, mask_file):
        file = mask_file(base, 1, atol=1e-5)
        result = mask_overlap(file, run(base, 2), atol=1e-5)
        assert (result.a, result.b) == (
            "base -> run1 (atol=1e-05)",
            "base -> run2 (atol=1e-05)",
        )
        assert result.count_b < mask_overlap(file, run(base, 2)).count_b

    def test_a_pattern_may_name_what_only_one_side_has(self, base, run, save):
        more = {**base, "head.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
        a, b = run(base, 1), run(more, 2, at="grown")
        with pytest.raises(PairMismatchError, match="1 only b"):
            mask_overlap(a, b, null="matrix")
        assert mask_overlap(a, b, null="matrix", exclude="head*").numel == 2 * 96 * 64 + 64
        assert mask_overlap(a, b, null="matrix", include=["*mlp*"]).numel == 2 * 96 * 64

    def test_float32_is_held_against_chance_by_matrix(self, run):
        wide = weights(dtype=torch.float32)
        result = mask_overlap(run(wide, 1), run(wide, 2), atol=4e-5)
        assert (result.null, result.dtype, list(result.lifts)) == (
            "matrix",
            "f32",
            ["matrix", "rowcol", "pooled"],
        )
        assert result.lift == pytest.approx(1, abs=0.05)

    def test_neither_torch_nor_transformers_is_needed(self, base, mask_file):
        files = [mask_file(base, seed) for seed in (1, 2)]
        code = (
            "import sys; from pytest_subnet import assert_mask_overlap as check; "
            f"check({files[0]!r}, {files[1]!r}, min_lift=0.5); "
            f"check({files[0]!r}, {files[1]!r}, min_lift=0.5, null='rowcol'); "
            "print([m for m in ('torch', 'transformers') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stderr


class TestBadInput:
    def test_a_mask_file_from_another_base(self, base, mask_file):
        files = mask_file(base, 1), mask_file(weights(seed=9), 2, at="other")
        for null in ("auto", "exponent"):
            with pytest.raises(PairMismatchError) as caught:
                assert_mask_overlap(*files, min_lift=1.1, null=null)
            assert str(caught.value) == (
                'null="exponent" cannot be had for base -> run1 against other -> run2: they are '
                "masks over different bases, whose weights have other exponents in 2 tensors "
                f'({DOWN}, {UP}); name null="matrix" for the weaker comparison with chance in each '
                "matrix, which rounding alone can exceed"
            )
        assert mask_overlap(*files, null="matrix").lift == pytest.approx(1, abs=0.05)

    def test_another_base_whose_exponents_are_the_same_is_known_by_its_fingerprint(
        self, base, mask_file
    ):
        other = {name: -weight for name, weight in base.items()}
        files = mask_file(base, 1), mask_file(other, 2, at="other")
        with pytest.raises(PairMismatchError, match=r"over different bases \(\w+ and \w+\); name"):
            mask_overlap(*files)

    def test_a_copy_of_the_base_is_the_same_base(self, base, mask_file):
        files = mask_file(base, 1), mask_file(base, 2, at="copy")
        assert mask_overlap(*files).null == "exponent"

    def test_a_mask_without_counts_by_exponent(self, base, mask_file):
        files = [mask_file(base, seed) for seed in (1, 2)]
        bare = UpdateMask.of({name: UpdateMask.load(files[1])[name] for name in base}, what="bare")
        with pytest.raises(PairMismatchError, match=r"mask b carries no counts .* 3 tensors"):
            assert_mask_overlap(files[0], bare, min_lift=0.5)
        assert assert_mask_overlap(files[0], bare, min_lift=0.5, null="matrix").null == "matrix"

    def test_a_pair_and_its_own_mask(self, base, run, mask_file):
        pair = run(base, 1)
        again = open_pair("base", "run1")
        for other in (pair, again, update_mask(pair)):
            with pytest.raises(PairMismatchError, match="a and b are the same: base -> run1;"):
                mask_overlap(pair, other)

    def test_a_mask_and_the_file_it_was_saved_to(self, base, run, mask_file):
        file = mask_file(base, 1)
        pair, again = open_pair("base", "run1"), open_pair("base", "run1")
        mask, loaded = update_mask(pair), UpdateMask.load(file)
        sources = [(loaded, file), (loaded, UpdateMask.load(file)), (pair, file), (mask, file)]
        for a, b in [*sources, (file, pair), (mask, ~~mask), (mask, update_mask(again))]:
            with pytest.raises(PairMismatchError, match="the same"):
                assert_mask_overlap(a, b, min_lift=1.2, null="matrix")
        with pytest.raises(PairMismatchError, match="bit for bit the same"):
            assert_mask_overlap(pair, file, min_lift=1.2, include="*mlp*", null="matrix")
        with pytest.raises(PairMismatchError, match="a and b are the same: base -> run1"):
            mask_overlap(loaded, file)

    def test_nan_and_inf_are_said_where_a_pair_knows_of_them(self, base, run, save, mask_file):
        broken = trained(base, 1)
        broken[UP][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        pair, other = open_pair(save(base, "base"), save(broken, "run1")), run(base, 2)
        for result, nonfinite in (
            (mask_overlap(pair, other), (3, 0, 3)),
            (mask_overlap(other, pair, include="*down_proj*"), (0, 0, 0)),
            (mask_overlap(mask_file(base, 3), pair), (None, 3, 3)),
            (mask_overlap(update_mask(pair), update_mask(other)), (None, None, None)),
        ):
            assert (result.nonfinite_a, result.nonfinite_b, result.nonfinite) == nonfinite
            assert result.to_dict()["nonfinite"] == nonfinite[2]
        with pytest.raises(AssertionError) as caught:
            assert_mask_overlap(pair, other, min_lift=9)
        assert (
            "  not finite 3 in a: NaN and Inf, updated wherever their bits changed"
            in str(caught.value).splitlines()
        )
        with pytest.raises(AssertionError) as caught:
            assert_mask_overlap(other, run(base, 4), min_lift=9)
        assert "not finite" not in str(caught.value)

    def test_a_run_that_saved_its_base_again(self, base, run, save):
        pair = run(base, 1)
        with pytest.raises(SelectionError) as caught:
            mask_overlap(pair, open_pair("base", save(base, "again")))
        assert str(caught.value) == (
            "mask b is empty: base -> again has no entry in 3 selected tensors, and what share of "
            "it lies in the other mask is undefined; did the run save its base again?"
        )

    def test_a_run_that_moved_everything_is_saturated(self, base, run, save):
        full = open_pair(save(base, "base"), save({n: w + 1 for n, w in base.items()}, "full"))
        result = mask_overlap(full, run(base, 1))
        assert (result.z, result.kappa, result.saturated) == (None, None, True)
        assert repr(result).endswith("null='exponent', saturated)")
        with pytest.raises(SelectionError, match=r"\Amin_lift cannot be judged: .* are saturated"):
            assert_mask_overlap(full, run(base, 1), min_lift=0.9)

    def test_other_shapes(self, base, mask_file):
        turned = {**base, UP: base[UP].T.contiguous()}
        with pytest.raises(PairMismatchError) as caught:
            mask_overlap(mask_file(base, 1), mask_file(turned, 2, at="turned"))
        assert f"reshaped   {UP}  [96, 64] against [64, 96]" in str(caught.value)

    def test_another_model(self, base, mask_file, save):
        save({"h.0.weight": torch.ones(4, 4)}, "gpt")
        save({"h.0.weight": torch.ones(4, 4) + 1}, "gpt_tuned")
        update_mask(open_pair("gpt", "gpt_tuned")).save("gpt.safetensors")
        with pytest.raises(PairMismatchError, match="3 only a, 1 only b"):
            mask_overlap(mask_file(base, 1), "gpt.safetensors")

    def test_the_same_file_under_another_name(self, base, mask_file, tmp_path):
        file = mask_file(base, 1)
        Path("link.safetensors").symlink_to(file)
        with pytest.raises(PairMismatchError, match=r"a and b are the same: 1\.safetensors;"):
            mask_overlap(file, tmp_path / "link.safetensors")

    @pytest.mark.parametrize("kept", [0, 7, 100, -9])
    def test_a_truncated_file(self, base, mask_file, kept):
        files = [mask_file(base, seed) for seed in (1, 2)]
        data = Path(files[1]).read_bytes()
        Path(files[1]).write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=re.escape(files[1])):
            mask_overlap(*files)

    def test_bits_that_the_header_contradicts(self, base, mask_file):
        files = [mask_file(base, seed) for seed in (1, 2)]
        data = bytearray(Path(files[1]).read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start] ^= 1
        Path(files[1]).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"2\.safetensors is corrupt: of \S+ .* bits are"):
            mask_overlap(*files)

    def test_a_checkpoint_is_no_mask(self, base, mask_file):
        with pytest.raises(CheckpointError, match="is no mask file"):
            mask_overlap(mask_file(base, 1), "base/model.safetensors")
        with pytest.raises(CheckpointError, match=r"nowhere\.safetensors"):
            mask_overlap("1.safetensors", "nowhere.safetensors")

    def test_names_from_a_file_are_escaped(self, tmp_path):
        name = "evil\x1b[31m\nweight"
        for side, shape in (("a", (2, 4)), ("b", (4, 2))):
            for state, value in (("base", 1.0), ("tuned", 2.0)):
                path = tmp_path / f"{side}-{state}.safetensors"
                save_file({name: torch.full(shape, value)}, path)
            pair = open_pair(tmp_path / f"{side}-base.safetensors", path)
            update_mask(pair).save(tmp_path / f"{side}.mask")
        with pytest.raises(PairMismatchError) as caught:
            mask_overlap(tmp_path / "a.mask", tmp_path / "b.mask")
        assert r"evil\x1b[31m\nweight  [2, 4] against [4, 2]" in str(caught.value)
        assert "\x1b" not in str(caught.value)


class TestPicture:
    """Random updates beside Table 4 of arXiv 2505.11711, under its tolerance."""

    script = runpy.run_path(str(DOCS / "draw_overlap.py"))

    @pytest.mark.parametrize(
        ("row", "scales"), list(zip(OVERLAPS, script["SCALES"], strict=True)), ids=script["NAMES"]
    )
    def test_random_updates_overlap_as_strongly_and_not_beyond_rounding(self, row, scales):
        found, lift = self.script["measured"](scales)
        published = 100 * row.one_sided_a, 100 * row.one_sided_b
        by_chance = 100 * row.random_a, 100 * row.random_b
        assert found == pytest.approx(published, abs=6.5)
        assert all(o > 1.6 * chance for o, chance in zip(found, by_chance, strict=True))
        assert lift == pytest.approx(1, abs=0.005)

    def test_it_shows_what_its_script_measures(self):
        assert self.script["draw"]() == (DOCS / "overlap.svg").read_text(encoding="utf-8")
