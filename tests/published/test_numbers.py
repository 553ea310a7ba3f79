"""Published numbers that are no sparsity of a pair: what must add up does."""

import pytest

from pytest_subnet.published import NUMBERS, OVERLAPS, published_numbers, published_sparsities


@pytest.mark.parametrize("row", OVERLAPS, ids=lambda row: row.setting)
def test_both_sides_of_an_overlap_count_one_intersection(row):
    density_a, density_b = 1 - row.sparsity_a, 1 - row.sparsity_b
    assert row.random_a == pytest.approx(density_b, abs=1e-6)
    assert row.random_b == pytest.approx(density_a, abs=1e-6)
    # As printed each share is good to half a tenth of a percent.
    error = 0.0005 * (density_a + density_b + row.one_sided_a + row.one_sided_b)
    assert row.one_sided_a * density_a == pytest.approx(row.one_sided_b * density_b, abs=error)
    assert row.lift == pytest.approx(row.one_sided_b / row.random_b, rel=0.01)


def test_lifts_are_those_of_the_reference():
    assert [round(row.lift, 2) for row in OVERLAPS] == [1.65, 1.83, 2.57]


def test_the_parts_of_the_dynamics_are_everything():
    parts = [published_numbers(quantity=part)[0] for part in ("never", "cancelled", "final")]
    assert sum(row.value for row in parts) == pytest.approx(1)
    assert "77.0%" in parts[0].note


def test_what_is_a_share_is_a_fraction_and_a_range_has_two_ends():
    for row in NUMBERS:
        if row.quantity != "principal angle in degrees":
            assert 0 <= row.value <= 1
        if row.upper is not None:
            assert row.value < row.upper <= 1
    assert {row.source for row in published_numbers(quantity="step sparsity")} == {
        "arXiv 2505.11711",
        "arXiv 2602.03839",
    }


def test_means_of_table_3_follow_from_its_rows():
    for quantity, mean in (("full score", 0.403), ("subnetwork score", 0.419)):
        scores = [
            row for row in published_numbers(quantity=quantity) if row.setting.startswith("DPO")
        ]
        *single, printed = [row.value for row in scores]
        assert len(single) == 5
        assert printed == mean == pytest.approx(sum(single) / 5, abs=0.0006)


def test_steps_of_one_paper_are_compared_by_bits_in_bfloat16():
    rows = published_numbers(quantity="step sparsity", source="2602.03839")
    assert [(row.setting, row.value) for row in rows] == [
        ("one optimiser step", 0.99),
        ("worst of 400 steps", 0.98),
        ("up to 8 steps apart", 0.98),
    ]
    assert {(str(row.tolerance), row.dtype) for row in rows} == {("same bits", "bfloat16")}
    assert all("second-hand" in row.note for row in rows)


def test_the_ranges_of_one_paper_are_those_of_its_rows():
    for setting, rows in (
        ("SFT", published_sparsities(algorithm="SFT", source="2511.08567")),
        (
            "RL",
            [row for row in published_sparsities(source="2511.08567") if row.algorithm != "SFT"],
        ),
    ):
        (whole,) = [
            row
            for row in published_numbers(quantity="sparsity", source="2511.08567")
            if row.setting == setting
        ]
        shares = [row.sparsity for row in rows]
        assert min(shares) == pytest.approx(whole.value, abs=0.005)
        assert max(shares) == pytest.approx(whole.upper, abs=0.005)
        assert {row.tolerance for row in rows} == {whole.tolerance}
