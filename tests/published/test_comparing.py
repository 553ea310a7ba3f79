"""A measured number beside published ones: what can be compared, and what must be said."""

import json

from pytest_subnet.published import compare_published, nearest
from pytest_subnet.scan import PAPER, SAME_BITS, Tolerance


def test_a_small_relative_tolerance_is_same_bits_in_bfloat16_only():
    assert nearest(0.5, algorithm="DAPO")[0].tolerance == Tolerance(rtol=1e-3)
    found = compare_published(0.5, tolerance=SAME_BITS, dtype="bfloat16", algorithm="DAPO")
    assert len(found.comparable) == 1
    for dtype in ("float16", "float32", "f32", "bf16+f32"):
        found = compare_published(0.5, tolerance=SAME_BITS, dtype=dtype, algorithm="DAPO")
        assert found.comparable == ()
    found = compare_published(0.5, tolerance=Tolerance(rtol=0.01), dtype="bf16", algorithm="DAPO")
    assert found.comparable == ()


def test_a_comparison_reads_well():
    found = compare_published(0.7184, tolerance=PAPER, dtype="bf16", algorithm="grpo", count=3)
    assert found.algorithm == "GRPO"
    assert repr(found) == (
        "PublishedComparison(sparsity=0.7184, atol=1e-05, 3 published, 3 comparable)"
    )
    mine, *others = found.rows()
    assert mine == {
        "source": "measured here",
        "algorithm": "GRPO",
        "model": "",
        "tolerance": "atol=1e-05",
        "dtype": "bf16",
        "sparsity": "71.84%",
        "density": "28.16%",
        "note": "",
    }
    assert [row["note"] for row in others] == ["[1]", "[2]", ""]
    text = found.table()
    lines = text.splitlines()
    assert lines[0] == "sparsity 71.84% beside the nearest published numbers for GRPO"
    assert lines[4].startswith("measured here")
    assert lines[5].startswith("arXiv 2505.11711, text")
    assert lines[7].split()[2:4] == ["Table", "6"]
    assert text.endswith(
        """
before comparing
  caveat     learning rate, number of steps, batch size and optimiser move the number by tens of
             points; no row is a target
  [1]        with the KL term
  [2]        without the KL term"""
    )


def test_another_tolerance_is_said():
    found = compare_published(0.9, tolerance=SAME_BITS, dtype="bfloat16", algorithm="PPO")
    assert found.comparable == ()
    told = found.table().partition("\n  tolerance  ")[2]
    assert " ".join(told.split()).startswith(
        "1 of 1 row not under same bits, bf16: the tolerance alone moves the number by up to 30 "
        "points; 2505.11711 mostly gives atol=1e-5, as update_sparsity(pair, atol=1e-5)"
    )
    on_float32 = compare_published(0.9, tolerance=PAPER, dtype="f32", algorithm="PPO").table()
    assert "1 of 1 row not under atol=1e-05, f32" in on_float32
    assert "mostly gives" not in on_float32
    alike = compare_published(0.9, tolerance=PAPER, dtype="bf16", algorithm="PPO").table()
    assert "\n  tolerance" not in alike


def test_a_comparison_is_plain_json():
    found = compare_published(0.9, tolerance=SAME_BITS, dtype="bfloat16", count=40)
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["sparsity"] == 0.9
    assert len(numbers["nearest"]) == 40
    assert {each["comparable"] for each in numbers["nearest"]} == {True, False}
