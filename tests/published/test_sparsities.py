"""Published sparsities: as printed, consistent where the papers are, and noted where not."""

import math

import pytest

from pytest_subnet.published import (
    NUMBERS,
    SPARSITIES,
    PublishedSparsity,
    published_numbers,
    published_sparsities,
)
from pytest_subnet.scan import PAPER

SIMPO = "princeton-nlp/Llama-3-Instruct-8B-SimPO"


def rows_of(table):
    return [row for row in published_sparsities(source="2505.11711") if row.table == table]


def test_there_is_every_row_of_every_table():
    counts = {}
    for row in SPARSITIES:
        counts[row.source, row.table] = counts.get((row.source, row.table), 0) + 1
    assert counts == {
        ("arXiv 2505.11711", "Table 1"): 10,
        ("arXiv 2505.11711", "Table 6"): 12 * 4,
        ("arXiv 2505.11711", "Table 4"): 3,
        ("arXiv 2505.11711", "Table 5"): 6,
        ("arXiv 2505.11711", "text"): 4,
        ("arXiv 2505.11711", "authors' notebook"): 2,
        ("arXiv 2511.08567", "Tables 1 and 2"): 15,
        ("arXiv 2606.07082", "tables"): 14,
    }


@pytest.mark.parametrize("row", SPARSITIES, ids=lambda row: f"{row.table}-{row.tuned}")
def test_every_row_is_complete(row):
    assert 0 < row.sparsity < 1
    assert row.sparsity == round(row.sparsity, 4)  # as printed
    assert row.density == 1 - row.sparsity
    assert row.algorithm
    assert row.source.startswith("arXiv 2")
    assert (row.tolerance is None) == (row.dtype == "") == (row.source == "arXiv 2606.07082")
    assert row.dtype in ("", "bfloat16")
    assert row.base or row.tuned or row.note


def test_no_row_is_there_twice():
    assert len(set(SPARSITIES)) == len(SPARSITIES)
    assert len(set(NUMBERS)) == len(NUMBERS)


def test_table_1_is_the_last_column_of_table_6_but_for_what_is_noted():
    last_column = {row.tuned: row.sparsity for row in rows_of("Table 6") if row.tolerance == PAPER}
    absent, different = [], []
    for row in rows_of("Table 1"):
        assert row.tolerance == PAPER
        if row.tuned not in last_column:
            absent.append(row)
        elif not math.isclose(row.sparsity, last_column[row.tuned], abs_tol=0.00051):
            different.append(row)
    assert {row.tuned.split("/")[1] for row in absent} == {
        "DeepSeek-R1-Zero",
        "Llama-3-Base-8B-SFT-KTO",
    }
    assert all("not in Table 6" in row.note for row in absent)
    (wrong,) = different
    assert wrong.tuned == SIMPO
    assert "mislabelled" in wrong.note
    meant = last_column["princeton-nlp/Llama-3-Base-8B-SFT-SimPO"]
    assert wrong.sparsity == pytest.approx(meant, abs=0.0005)


def test_sparsity_never_falls_with_the_tolerance():
    by_model = {}
    for row in rows_of("Table 6"):
        by_model.setdefault(row.tuned, []).append((row.tolerance.atol, row.sparsity))
    assert len(by_model) == 12
    for values in by_model.values():
        assert [limit for limit, _ in values] == [1e-8, 1e-7, 1e-6, 1e-5]
        assert values == sorted(values)
        sparsities = [sparsity for _, sparsity in values]
        assert sparsities == sorted(sparsities)
    widest = max(values[-1][1] - values[0][1] for values in by_model.values())
    assert widest == pytest.approx(0.297, abs=0.001)  # "up to 30 points"


def test_a_model_has_one_base_and_one_algorithm_in_tables_1_and_6():
    known = {}
    for row in [*rows_of("Table 1"), *rows_of("Table 6")]:
        known.setdefault(row.tuned, set()).add((row.algorithm, row.base))
    assert all(len(each) == 1 for each in known.values())


def test_what_contradicts_itself_says_so():
    def note(table, **fields):
        (row,) = [
            row
            for row in rows_of(table)
            if all(getattr(row, name) == value for name, value in fields.items())
        ]
        return row.note

    alpha = {"tuned": "kaist-ai/mistral-orpo-alpha", "tolerance": PAPER}
    assert "68.5%" in note("Table 6", **alpha)
    prime = {"tuned": "PRIME-RL/Eurus-2-7B-PRIME", "tolerance": PAPER}
    assert "PPO" in note("Table 6", **prime)
    assert "Qwen2.5-Math-7B" in note("Table 1", tuned="PRIME-RL/Eurus-2-7B-PRIME")
    assert "6.8%" in note("Table 5", tuned="Zephyr-7b-Beta")
    assert "90.0%" in note("Table 5", algorithm="RFT")
    twins = [row for row in rows_of("Table 5") if row.tuned == "Llama-3.1-8B-SFT"]
    assert [(row.algorithm, row.sparsity) for row in twins] == [("SFT", 0.068), ("DPO", 0.068)]
    assert all("to SFT and to DPO" in row.note for row in twins)


def test_two_papers_agree_on_one_checkpoint_within_a_point():
    path = {row.tuned: row for row in published_sparsities(source="2511.08567")}
    again = [
        row for row in published_sparsities(source="2606.07082") if row.tuned in path.keys() - {""}
    ]
    assert len(again) == 5
    for row in again:
        assert abs(row.sparsity - path[row.tuned].sparsity) <= 0.01
        if row.sparsity != path[row.tuned].sparsity:
            assert "2511.08567 gives" in row.note


def test_densities_and_sparsities_of_one_paper_do_not_add_up_as_noted():
    densities = {row.setting: row.value for row in published_numbers(quantity="density")}
    controlled = [
        row for row in published_sparsities(source="2606.07082") if row.base == "Qwen3-8B"
    ]
    sums = [
        row.sparsity + densities["RLVR" if row.algorithm == "GRPO" else row.algorithm]
        for row in controlled
    ]
    assert sums == pytest.approx([1.008, 0.979, 1.050], abs=0.0005)
    assert all("do not add up" in row.note for row in controlled)


def test_rows_can_be_made_and_compared():
    row = SPARSITIES[0]
    assert row == PublishedSparsity(
        "arXiv 2505.11711",
        "Table 1",
        "DPO",
        "allenai/Llama-3.1-Tulu-3-8B-SFT",
        "allenai/Llama-3.1-Tulu-3-8B-DPO",
        PAPER,
        "bfloat16",
        0.814,
    )
