"""`mask_overlap`: what it counts, what each null makes of it, and what it refuses."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import CheckpointError, PairMismatchError, SelectionError, UpdateMask
from pytest_subnet.findings.overlap.finding import mask_overlap
from pytest_subnet.masks.bits import MemoryBits, pack
from pytest_subnet.masks.update_mask import MaskTensor, Origin, Strata

law = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SHAPES = st.lists(
    st.sampled_from([(), (3,), (64,), (1, 1), (2, 0), (5, 13), (4, 3, 7)]), min_size=1, max_size=4
)


def entries(shape):
    """Boolean arrays; drawn by the bit, as one number, they take a tenth of the time."""
    size = math.prod(shape)
    return st.integers(0, 2**size - 1).map(
        lambda bits: np.array([bits >> i & 1 for i in range(size)], bool).reshape(shape)
    )


@st.composite
def two_masks(draw):
    """Boolean arrays of two masks that are not empty, by name."""
    shapes = draw(SHAPES)
    names = [f"layers.{number}.weight" for number in range(len(shapes))]
    a, b = (
        {name: draw(entries(shape)) for name, shape in zip(names, shapes, strict=True)}
        for _ in range(2)
    )
    if not all(any(array.any() for array in mask.values()) for mask in (a, b)):
        a["last"] = b["last"] = np.array([[True, False]])
    return a, b


def first(count, *, of, start=0):
    """A matrix with `count` entries in the mask, from `start` on in row order."""
    entries = np.zeros(of, bool)
    entries[start : start + count] = True
    return entries.reshape(1, -1)


def overlapping(numel, a, b, both):
    """Two masks of one matrix with these counts."""
    return (
        UpdateMask.of({"weight": first(a, of=numel)}, what="a"),
        UpdateMask.of({"weight": first(b, of=numel, start=a - both)}, what="b"),
    )


class TestCounts:
    @law
    @given(two_masks())
    def test_are_those_of_boolean_arrays(self, masks):
        a, b = masks
        result = mask_overlap(UpdateMask.of(a), UpdateMask.of(b))
        both = {name: int((a[name] & b[name]).sum()) for name in a}
        either = sum(int((a[name] | b[name]).sum()) for name in a)
        assert {each.name: each.intersection for each in result.per_tensor} == both
        assert result.intersection == sum(both.values())
        assert result.count_a == sum(int(each.sum()) for each in a.values())
        assert result.count_b == sum(int(each.sum()) for each in b.values())
        assert result.numel == sum(each.size for each in a.values())
        assert result.jaccard == result.intersection / either
        assert [each.shape for each in result.per_tensor] == [each.shape for each in a.values()]

    @law
    @given(two_masks())
    def test_obey_the_identities(self, masks):
        result = mask_overlap(*map(UpdateMask.of, masks))
        assert result.one_sided_a * result.count_a == pytest.approx(result.intersection)
        assert result.one_sided_b * result.count_b == pytest.approx(result.intersection)
        assert result.one_sided == min(result.one_sided_a, result.one_sided_b)
        assert result.dice == pytest.approx(2 * result.jaccard / (1 + result.jaccard))
        least = max(0, result.count_a + result.count_b - result.numel)
        assert least <= result.intersection <= min(result.count_a, result.count_b)
        assert result.expected == pytest.approx(sum(each.expected for each in result.per_tensor))
        if result.kappa is not None:
            assert result.kappa <= 1 + 1e-12
        if result.z is not None:
            assert math.copysign(1, result.z) == math.copysign(
                1, result.intersection - result.expected
            )

    @law
    @given(two_masks(), st.sampled_from(["matrix", "rowcol", "pooled", None]))
    def test_do_not_depend_on_which_mask_comes_first(self, masks, null):
        a, b = map(UpdateMask.of, masks)
        one, other = mask_overlap(a, b, null=null), mask_overlap(b, a, null=null)
        assert (one.count_a, one.one_sided_a) == (other.count_b, other.one_sided_b)
        for name in ("intersection", "jaccard", "degenerate", "ceiling"):
            assert getattr(one, name) == getattr(other, name)
        for name in ("expected", "variance", "z", "lift", "kappa", "odds_ratio"):
            assert getattr(one, name) == pytest.approx(getattr(other, name)), name

    def test_tensors_are_found_by_name_in_whatever_order(self):
        a = {"x": first(3, of=8), "y": first(5, of=9)}
        b = {"y": first(5, of=9), "x": first(3, of=8, start=1)}
        result = mask_overlap(UpdateMask.of(a), UpdateMask.of(b))
        assert [(each.name, each.intersection) for each in result.per_tensor] == [
            ("x", 2),
            ("y", 5),
        ]

    def test_a_mask_larger_than_a_piece_is_counted_to_its_last_bit(self, monkeypatch):
        monkeypatch.setattr(sys.modules[UpdateMask.__module__], "PIECE_BYTES", 64)
        random = np.random.default_rng(0)
        a, b = ({"weight": random.random((61, 83)) < 0.5} for _ in range(2))
        result = mask_overlap(UpdateMask.of(a), UpdateMask.of(b), null="rowcol")
        assert result.intersection == (a["weight"] & b["weight"]).sum()
        rows, columns = (
            int(a["weight"].sum(axis=axis) @ b["weight"].sum(axis=axis)) for axis in (1, 0)
        )
        assert result.expected == rows * columns / (result.count_a * result.count_b)

    def test_threads_count_the_same(self, monkeypatch):
        random = np.random.default_rng(0)
        a, b = (
            UpdateMask.of({f"l.{n}.w": random.random((9, n + 1)) < 0.5 for n in range(40)})
            for _ in range(2)
        )
        alone = mask_overlap(a, b)
        monkeypatch.setattr("pytest_subnet.findings.overlap.counts._WORTH_THREADS", 0)
        assert mask_overlap(a, b) == alone


class TestGroundTruths:
    def test_equal_masks_overlap_entirely(self):
        a, b = overlapping(100, 30, 30, 30)
        result = mask_overlap(a, b)
        assert (result.jaccard, result.dice, result.kappa, result.intersection) == (1, 1, 1, 30)
        assert result.odds_ratio == math.inf

    def test_disjoint_masks_are_as_far_below_chance_as_the_counts_allow(self):
        result = mask_overlap(*overlapping(100, 40, 60, 0))
        assert (result.intersection, result.lift, result.jaccard, result.odds_ratio) == (0, 0, 0, 0)
        assert result.kappa == -24 / (40 - 24)

    def test_masks_of_two_entries_that_share_one(self):
        assert mask_overlap(*overlapping(4, 2, 2, 1)).jaccard == 1 / 3

    def test_a_mask_within_the_other_has_kappa_one(self):
        result = mask_overlap(*overlapping(100, 30, 10, 10))
        assert (result.kappa, result.one_sided_a, result.one_sided_b) == (1, 1 / 3, 1)

    def test_in_one_matrix_z_is_the_correlation_of_the_bits(self):
        random = np.random.default_rng(0)
        a, b = (random.random((30, 40)) < share for share in (0.2, 0.4))
        result = mask_overlap(UpdateMask.of({"w": a}), UpdateMask.of({"w": b}))
        phi = np.corrcoef(a.ravel(), b.ravel())[0, 1]
        assert result.z == pytest.approx(phi * math.sqrt(a.size - 1))

    # arXiv 2505.11711, Table 4 (tulu seeds, data, algorithm), with the random baseline it prints
    # for each side; lift, Jaccard and kappa follow from its numbers.
    @pytest.mark.parametrize(
        ("density_a", "density_b", "one_sided", "baseline", "lift", "jaccard", "kappa"),
        [
            (0.367, 0.367, (0.605, 0.605), (0.367, 0.367), 1.65, 0.434, 0.376),
            (0.367, 0.146, (0.267, 0.671), (0.146, 0.367), 1.83, 0.236, 0.481),
            (0.129, 0.230, (0.591, 0.332), (0.230, 0.129), 2.57, 0.270, 0.469),
        ],
    )
    def test_table_4_of_the_paper(
        self, density_a, density_b, one_sided, baseline, lift, jaccard, kappa
    ):
        numel = 1_000_000
        a, b = round(density_a * numel), round(density_b * numel)
        result = mask_overlap(*overlapping(numel, a, b, round(one_sided[0] * a)), null="pooled")
        assert (result.one_sided_a, result.one_sided_b) == pytest.approx(one_sided, abs=2e-3)
        by_chance = result.expected / result.count_a, result.expected / result.count_b
        assert by_chance == pytest.approx(baseline, abs=1e-6)
        assert result.lift == pytest.approx(lift, abs=0.01)
        assert result.jaccard == pytest.approx(jaccard, abs=2e-3)
        assert result.kappa == pytest.approx(kappa, abs=3e-3)

    # arXiv 2504.15471, Table 3: bigram subnetwork against optimal one, shares of mask parameters.
    # Both masks lie in the part of the model that makes chance by block what the table prints.
    @pytest.mark.parametrize(
        ("bigram", "optimal", "overlap", "by_block", "by_model", "lifts", "kappa", "jaccard"),
        [
            (0.0852, 0.133, 0.0523, 0.0137, 0.0113, (4.6, 3.8), 0.54, 0.315),
            (0.00171, 0.0093, 0.000651, 4.26e-5, 1.59e-5, (40.9, 15.3), 0.36, 0.063),
            (0.0109, 0.0177, 0.00241, 3.43e-4, 1.93e-4, (12.5, 7.0), 0.20, 0.092),
            (0.0107, 0.0137, 0.00153, 2.10e-4, 1.47e-4, (10.4, 7.3), 0.13, 0.067),
            (0.00103, 0.00706, 3.34e-4, 2.63e-5, 7.27e-6, (45.9, 12.7), 0.31, 0.043),
        ],
    )
    def test_table_3_of_bigram_subnetworks(
        self, bigram, optimal, overlap, by_block, by_model, lifts, kappa, jaccard
    ):
        numel = 4_000_000
        inside = round(numel * bigram * optimal / by_block)
        a, b, both = (round(share * numel) for share in (bigram, optimal, overlap))
        outside = np.zeros((1, numel - inside), bool)
        result = mask_overlap(
            UpdateMask.of({"in": first(a, of=inside), "out": outside}),
            UpdateMask.of({"in": first(b, of=inside, start=a - both), "out": outside}),
        )
        assert result.null == "matrix"
        assert result.expected / numel == pytest.approx(by_block, rel=0.01)
        assert result.pooled_expected / numel == pytest.approx(by_model, rel=0.01)
        found = result.lifts["pooled"], result.lifts["matrix"]
        assert found == pytest.approx(lifts, rel=0.02)
        assert result.kappa == pytest.approx(kappa, abs=0.006)
        assert result.jaccard == pytest.approx(jaccard, abs=0.001)
        assert (result.strata, result.degenerate, result.saturated) == (2, 1, False)


@pytest.mark.slow
def test_2000_pairs_of_independent_masks_have_z_of_mean_0_and_deviation_1():
    random = np.random.default_rng(0)
    densities = {"q": 0.5, "k": 0.02, "v": 0.2, "down": 0.01, "up": 0.9}
    shapes = {"q": (25, 40), "k": (40, 50), "v": (20, 50), "down": (50, 80), "up": (30, 30)}
    found, pooled = [], []
    for _ in range(2000):
        a, b = (
            UpdateMask.of({name: random.random(shapes[name]) < densities[name] for name in shapes})
            for _ in range(2)
        )
        result = mask_overlap(a, b)
        found.append(result.z)
        pooled.append(result.lifts["pooled"])
    assert abs(np.mean(found)) < 0.1
    assert abs(np.std(found) - 1) < 0.05
    assert np.mean(pooled) > 2


class TestNulls:
    def test_counts_alone_say_matrix_for_masks_without_a_dtype(self):
        a, b = overlapping(100, 40, 30, 20)
        result = mask_overlap(a, b)
        assert (result.null, result.dtype) == ("matrix", "bool")
        assert result.lifts == {"matrix": 20 / 12, "rowcol": 20 / 12, "pooled": 20 / 12}

    def test_rows_and_columns_keep_about_how_full_they_are(self):
        rows = np.zeros((4, 5), bool)
        rows[:2] = True
        a = UpdateMask.of({"w": rows, "norm": np.ones(5, bool)})
        b = UpdateMask.of({"w": rows | np.eye(4, 5, dtype=bool), "norm": np.ones(5, bool)})
        result = mask_overlap(a, b, null="rowcol")
        by_row, by_column = 5 * 5 + 5 * 5, 2 * (2 + 2 + 3 + 3 + 2)
        assert result.expected == by_row * by_column / (10 * 12) + 5
        assert (result.variance, result.z, result.lifts["rowcol"]) == (None, None, result.lift)
        assert mask_overlap(a, b).lifts == result.lifts
        assert [each.z for each in result.per_tensor] == [None, None]

    def test_none_is_the_bare_number(self):
        a, b = overlapping(100, 40, 30, 20)
        result = mask_overlap(a, b, null=None)
        for name in ("expected", "variance", "z", "lift", "kappa", "odds_ratio", "interval"):
            assert getattr(result, name) is None
        assert (result.jaccard, result.null) == (0.4, None)
        assert result.lifts == mask_overlap(a, b).lifts

    def test_pooled_takes_the_whole_model_for_one_matrix(self):
        a = {"x": first(50, of=100), "y": first(10, of=900)}
        b = {"x": first(40, of=100), "y": first(20, of=900)}
        result = mask_overlap(UpdateMask.of(a), UpdateMask.of(b), null="pooled")
        assert result.expected == result.pooled_expected == 60 * 60 / 1000
        assert (result.strata, result.degenerate) == (1, 0)
        assert result.odds_ratio == 50 * (1000 - 70) / (10 * 10)
        assert [each.expected for each in result.per_tensor] == pytest.approx([0.36, 3.24])
        assert [each.variance for each in result.per_tensor] == [None, None]

    @pytest.mark.parametrize("null", ["exponents", "", 3, "\x1b[31m"])
    def test_an_unknown_one_is_an_error(self, null):
        with pytest.raises(
            ValueError, match="exponent, matrix, rowcol, pooled, auto and None"
        ) as e:
            mask_overlap(*overlapping(10, 5, 5, 2), null=null)
        assert "\x1b" not in str(e.value)


class TestSaturation:
    def test_a_full_mask_leaves_nothing_to_chance(self):
        result = mask_overlap(*overlapping(10, 10, 4, 4))
        assert result.saturated
        assert (result.z, result.kappa, result.lift) == (None, None, 1)
        assert (result.strata, result.degenerate) == (1, 1)

    def test_nor_do_masks_that_never_meet_in_a_matrix(self):
        x, y = first(3, of=8), first(0, of=8)
        result = mask_overlap(UpdateMask.of({"x": x, "y": y}), UpdateMask.of({"x": y, "y": x}))
        assert result.saturated
        assert (result.z, result.lift, result.kappa, result.jaccard) == (None, None, None, 0)
        assert result.lifts == {"pooled": 0.0}
        assert result.odds_ratio is None

    def test_degenerate_matrices_are_kept_in_the_counts_and_out_of_z(self):
        alone = mask_overlap(*overlapping(100, 40, 30, 20))
        a, b = overlapping(100, 40, 30, 20)
        result = mask_overlap(
            UpdateMask.of({"weight": a["weight"], "full": first(7, of=7)}),
            UpdateMask.of({"weight": b["weight"], "full": first(5, of=7)}),
        )
        assert result.z == alone.z
        assert result.expected == alone.expected + 5
        assert (result.intersection, result.degenerate) == (25, 1)


class TestSelection:
    a = UpdateMask.of({"l.0.q_proj.weight": [[1, 0]], "l.0.norm.weight": [1, 1]})
    b = UpdateMask.of({"l.0.q_proj.weight": [[1, 1]], "l.0.norm.weight": [0, 1]})

    @pytest.mark.parametrize(
        ("options", "names"),
        [
            ({}, ["l.0.q_proj.weight", "l.0.norm.weight"]),
            ({"include": "*q_proj*"}, ["l.0.q_proj.weight"]),
            ({"exclude": ["*q_proj*"]}, ["l.0.norm.weight"]),
            ({"kinds": "norm"}, ["l.0.norm.weight"]),
        ],
    )
    def test_only_selected_tensors_count(self, options, names):
        result = mask_overlap(self.a, self.b, **options)
        assert [each.name for each in result.per_tensor] == names
        assert result.tensors_total == 2

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"include": "*k_proj*"}, "include='*k_proj*' matches none of 2 tensors"),
            ({"exclude": "k_proj"}, "exclude='k_proj' matches none of 2 tensors"),
            ({"kinds": "q_prj"}, "kinds='q_prj' is no kind here; did you mean q_proj?"),
            ({"kinds": "norm", "exclude": "*norm*"}, "nothing is selected: include=None"),
        ],
    )
    def test_what_selects_nothing_is_an_error(self, options, text):
        with pytest.raises(SelectionError, match=re.escape(text)):
            mask_overlap(self.a, self.b, **options)

    def test_a_tensor_of_one_mask_alone_can_be_left_out(self):
        more = UpdateMask.of({name: self.b[name] for name in self.b.names()} | {"head": [[1]]})
        with pytest.raises(PairMismatchError, match="1 only b"):
            mask_overlap(self.a, more)
        assert mask_overlap(self.a, more, exclude="head").tensors_total == 3


class TestRefusals:
    def test_masks_over_other_tensors_are_listed(self):
        a = UpdateMask.of({"x": [[1]], "evil\x1b[31m": [1], "y": [[1, 0]]}, what="run 1")
        b = UpdateMask.of({"x": [[1]], "z": [1], "y": [[1], [0]]}, what="run 2")
        with pytest.raises(PairMismatchError) as caught:
            mask_overlap(a, b)
        assert str(caught.value).splitlines() == [
            "tensors do not pair: 1 only a, 1 reshaped, 1 only b (of 4 tensors)",
            "  pair       run 1 against run 2",
            r"  only a     evil\x1b[31m",
            "  reshaped   y  [1, 2] against [2, 1]",
            "  only b     z",
            "  to mend    leave tensors out with exclude=",
        ]
        assert [each.kind for each in caught.value.problems] == ["only a", "reshaped", "only b"]

    def test_the_same_mask_twice(self):
        a, _ = overlapping(10, 5, 5, 2)
        with pytest.raises(PairMismatchError, match=r"a and b are the same: .*given twice"):
            mask_overlap(a, a)

    def test_the_same_file_twice_by_whatever_name(self, tmp_path):
        with pytest.raises(PairMismatchError, match="a and b are the same"):
            mask_overlap(tmp_path / "mask.safetensors", f"{tmp_path}/./mask.safetensors")

    @pytest.mark.parametrize("side", ["a", "b"])
    def test_an_empty_mask(self, side):
        masks = {"a": first(3, of=10), "b": first(3, of=10), side: first(0, of=10)}
        a, b = (UpdateMask.of({"w": masks[each]}, what=f"run {each}") for each in "ab")
        with pytest.raises(SelectionError, match=f"mask {side} is empty: run {side} has no entry"):
            mask_overlap(a, b)

    def test_masks_of_no_tensor(self):
        with pytest.raises(SelectionError, match="nothing is selected"):
            mask_overlap(UpdateMask.of({}), UpdateMask.of({}))

    @pytest.mark.parametrize("thing", [None, 3, {"w": [True]}, np.ones(3, bool)])
    def test_what_gives_no_mask(self, thing):
        a, _ = overlapping(10, 5, 5, 2)
        with pytest.raises(TypeError, match="b is a mask, a mask file or a pair, not"):
            mask_overlap(a, thing)

    @pytest.mark.parametrize("tolerance", [{"atol": 1e-5}, {"rtol": 1e-3}])
    def test_a_tolerance_for_masks_that_are_made_already(self, tolerance):
        with pytest.raises(ValueError, match="a mask has its entries already"):
            mask_overlap(*overlapping(10, 5, 5, 2), **tolerance)

    @pytest.mark.parametrize("stated", [2, 9])
    def test_counts_that_the_bits_contradict(self, stated):
        a, b = overlapping(10, 5, 5, 5)
        info = MaskTensor("weight", (1, 10), "bool", stated)
        lying = UpdateMask([info], MemoryBits(pack(a["weight"])), Origin("a file"))
        if stated == 2:
            with pytest.raises(CheckpointError, match="weight has 5 entries in both"):
                mask_overlap(lying, b)
        else:
            opposite = UpdateMask.of({"weight": ~a["weight"]})
            with pytest.raises(CheckpointError, match="weight has 0 entries in both"):
                mask_overlap(lying, opposite)


class TestResult:
    def result(self, **options):
        random = np.random.default_rng(0)
        a, b = (
            UpdateMask.of({f"l.{n}.w.weight": random.random((6, 7)) < 0.4 for n in range(4)})
            for _ in range(2)
        )
        return mask_overlap(a, b, **options)

    def test_is_one_line(self):
        a, b = overlapping(100, 40, 30, 20)
        assert repr(mask_overlap(a, b)) == (
            "MaskOverlap(lift=1.667, kappa=0.4444, jaccard=0.4, one_sided=0.5/0.6667, "
            "20 in both, null='matrix')"
        )
        assert repr(mask_overlap(a, b, null=None)) == (
            "MaskOverlap(jaccard=0.4, one_sided=0.5/0.6667, 20 in both, null=None)"
        )

    def test_a_table_has_a_row_for_each_tensor(self):
        result = mask_overlap(*overlapping(100, 40, 30, 20))
        assert result.table().splitlines() == [
            repr(result),
            "  a          a",
            "  b          b",
            "",
            "tensor    kind      layer    entries    a    b    both    expected    lift    Jaccard",
            "--------  ------  -------  ---------  ---  ---  ------  ----------  ------  ---------",
            "weight    weight                 100   40   30      20        12.0   1.667     40.00%",
        ]
        assert mask_overlap(*overlapping(10, 5, 5, 1), null=None).rows()[0]["lift"] == ""

    @pytest.mark.parametrize("null", ["matrix", "pooled", "rowcol", None])
    def test_gives_plain_types_for_reports(self, null):
        import json

        result = self.result(null=null)
        again = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert again["finding"] == "mask_overlap"
        for name in ("null", "count_a", "intersection", "z", "lift", "kappa", "expected", "lifts"):
            assert again[name] == getattr(result, name)
        if null is not None:
            assert again["interval"] == list(result.interval[:2])

    def test_an_infinite_odds_ratio_is_no_number_in_json(self):
        assert mask_overlap(*overlapping(9, 4, 4, 4)).to_dict()["odds_ratio"] is None

    def test_is_recorded(self, recorded):
        result = self.result()
        assert recorded == [result]

    def test_the_interval_is_that_of_the_tensors(self):
        result = self.result()
        assert result.interval.low < result.lift < result.interval.high
        assert (result.interval.method, result.interval.matrices) == ("leave one out", 4)


class TestExponentRefusals:
    """No silent weaker test: what lacks the counts says so, and names the null to ask for."""

    @staticmethod
    def mask(
        entries=(1, 1, 0, 0), *, base="f00d", population=(0, 2, 2), members=(0, 1, 1), **other
    ):
        entries = np.array([entries], bool)
        info = MaskTensor("weight", entries.shape, other.get("dtype", "bfloat16"), entries.sum())
        strata = {"weight": Strata(np.array(population), np.array(members))}
        return UpdateMask(
            [info],
            MemoryBits(pack(entries)),
            Origin(other.get("what", "base -> tuned"), "same bits", base),
            strata if population else None,
        )

    def test_is_the_default_for_16_bit_storage(self):
        result = mask_overlap(self.mask(), self.mask([1, 0, 1, 0]))
        assert (result.null, result.expected, result.strata) == ("exponent", 1.0, 2)
        assert result.a == "base -> tuned (same bits)"
        assert list(result.lifts) == ["exponent", "matrix", "rowcol", "pooled"]

    @pytest.mark.parametrize(
        ("other", "why"),
        [
            ({"population": (), "members": ()}, "mask b carries no counts by exponent"),
            ({"base": "beef"}, "masks over different bases (f00d and beef)"),
            ({"base": ""}, "the base of mask b is not known"),
            ({"population": (0, 3, 1)}, "masks over different bases, whose weights have other"),
            ({"population": (0, 2, 2, 0), "members": (0, 1, 1, 0)}, "whose weights have other"),
            ({"dtype": "bool", "population": ()}, "mask b carries no counts by exponent"),
            ({"dtype": "float32", "population": ()}, "mask b carries no counts by exponent"),
        ],
    )
    @pytest.mark.parametrize("null", ["auto", "exponent"])
    def test_what_cannot_be_had_is_an_error_that_names_the_weaker_null(self, other, why, null):
        a, b = self.mask(), self.mask([1, 0, 1, 0], **other, what="other -> tuned")
        with pytest.raises(PairMismatchError) as caught:
            mask_overlap(a, b, null=null)
        text = str(caught.value)
        assert text.startswith('null="exponent" cannot be had for base -> tuned against other -> ')
        assert why in text
        assert 'name null="matrix"' in text
        result = mask_overlap(a, b, null="matrix")
        assert (result.null, "exponent" in result.lifts) == ("matrix", False)

    def test_it_is_for_16_bit_storage_only(self):
        a, b = overlapping(10, 5, 5, 2)
        with pytest.raises(PairMismatchError, match="16-bit storage, and these are bool"):
            mask_overlap(a, b, null="exponent")

    @pytest.mark.parametrize(
        "other",
        [
            {"members": (0, 1, 2)},
            {"members": (0, 3, -1)},
            {"members": (1, 0, 1)},
            {"population": (0, 2, 3)},
            {"members": (0, 2)},
        ],
    )
    def test_counts_that_contradict_the_mask_are_an_error(self, other):
        with pytest.raises(CheckpointError, match=r"contradicts itself: .* of weight do not add"):
            mask_overlap(self.mask(), self.mask(**other))

    def test_a_name_from_a_file_is_escaped(self):
        with pytest.raises(PairMismatchError) as caught:
            mask_overlap(self.mask(), self.mask(base="\x1b[31m"))
        assert "\x1b" not in str(caught.value)

    def test_other_storage_beside_it_is_one_stratum(self):
        def with_norm(mask, norm):
            infos = [*mask.tensors, MaskTensor("norm", (4,), "float32", sum(norm))]
            bits = np.concatenate([pack(mask["weight"]), pack(np.array(norm, bool))])
            strata = {"weight": mask.strata("weight")}
            return UpdateMask(infos, MemoryBits(bits), mask.origin, strata)

        result = mask_overlap(
            with_norm(self.mask(), [1, 1, 0, 0]), with_norm(self.mask([1, 0, 1, 0]), [1, 1, 1, 0])
        )
        assert (result.null, result.strata) == ("exponent", 3)
        assert [each.expected for each in result.per_tensor] == [1.0, 1.5]
        assert result.dtype == "bf16+f32"
