"""`pytest-subnet diff`."""

import json
import os

import numpy as np
import pytest

from pytest_subnet import open_pair, update_sparsity
from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.cli.arguments import DTYPES
from pytest_subnet.reports.building import run_of
from pytest_subnet.reports.session import SessionReport

HEAD = """\
base -> tuned
85.71% same bits, density 14.29% (f32, 4/4 tensors, 84 entries)
"""
TENSORS = """\

  layer    entries    updated    same bits    within 1e-05  tensor
-------  ---------  ---------  -----------  --------------  --------------------------------------
      1         32          8       75.00%          75.00%  model.layers.1.mlp.up_proj.weight
      0         16          4       75.00%          75.00%  model.layers.0.self_attn.q_proj.weight
"""


def test_what_moved(run, pair):
    code, shown, complaint = run("diff", *pair)

    assert (code, complaint) == (0, "")
    assert shown.startswith(HEAD + TENSORS)
    assert "layers 0-1  ██\n" in shown
    assert "q_proj          16          4       75.00%          75.00%\n" in shown


def test_verbose_shows_what_did_not_move_too(run, pair):
    _, shown, _ = run("diff", "-v", *pair)

    assert "model.norm.weight" in shown


def test_nothing_moved_is_no_failure(run, pair, save, weights):
    weights["model.norm.weight"][0] = -0.0
    for name in ("zeros", "zeros_again"):
        save(name, weights)

    code, shown, _ = run("diff", "zeros", "zeros_again")

    assert code == 0
    assert "100.00% same bits, density 0.00%" in shown


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        (["--include", "*q_proj*"], "1/4 tensors, 16 entries"),
        (["--include", "*q_proj*", "--include", "*norm*"], "2/4 tensors, 20 entries"),
        (["--exclude", "*embed*"], "3/4 tensors, 52 entries"),
        (["--kinds", "norm", "--kinds", "embed"], "2/4 tensors, 36 entries"),
    ],
)
def test_some_of_the_tensors(run, pair, options, covered):
    _, shown, _ = run("diff", *pair, *options)

    assert covered in shown


def test_a_pattern_that_matches_nothing(run, pair):
    code, shown, complaint = run("diff", *pair, "--include", "*q_prj*")

    assert (code, shown) == (1, "")
    assert complaint == (
        "pytest-subnet: include='*q_prj*' matches none of 4 tensors (model.embed_tokens.weight, "
        "model.layers.0.self_attn.q_proj.weight, … 2 more); did you mean *q_proj*?\n"
    )


def test_the_json_is_that_of_a_report_without_tests(run, pair):
    code, shown, _ = run("diff", *pair, "--json")

    found = json.loads(shown)
    assert code == 0
    assert found["tests"] == []
    report, opened = SessionReport(), open_pair(*pair)
    report.watch(opened)
    update_sparsity(opened)
    assert found == run_of(report.tables())


def test_files_are_written_beside_the_table(run, pair, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("plotly")

    code, shown, _ = run("diff", *pair, "--json", "out.json", "--html", "out.html")

    assert code == 0
    assert shown.startswith(HEAD)
    assert json.loads((tmp_path / "out.json").read_text())["pairs"][0]["updated"] == 12
    assert "base -&gt; tuned" in (tmp_path / "out.html").read_text()


def test_a_page_without_its_libraries_is_found_out_before_the_scan(run, pair, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert run("diff", "nowhere", "tuned", "--html", "out.html") == (
        1,
        "",
        "pytest-subnet: a page in HTML needs jinja2 and plotly: "
        'pip install "pytest-subnet[report]", or write --json\n',
    )


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("", "cannot write to '': it names no file"),
        ("base", "cannot write to base: it is a directory; name a file in it"),
        (
            "gone/out.json",
            "cannot write to gone/out.json: there is no directory gone; make it first",
        ),
        (
            "base/out.json",
            "cannot write to base/out.json: it would lie among the weights of base; name a file "
            "elsewhere",
        ),
    ],
)
def test_a_file_that_cannot_be_written_is_found_out_before_the_scan(run, pair, target, reason):
    assert run("diff", "base", "nowhere", "--json", target) == (1, "", f"pytest-subnet: {reason}\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_cannot_be_written_to(run, pair, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)

    code, _, complaint = run("diff", *pair, "--json", "closed/out.json")

    assert code == 1
    assert complaint == (
        "pytest-subnet: cannot write to closed/out.json: nothing can be written to the directory "
        "closed; name a file elsewhere\n"
    )


def test_what_has_no_partner_is_listed(run, pair, save, weights):
    weights["model.norm.bias"] = np.ones(4, np.float32)
    weights["model.embed_tokens.weight"] = np.ones((9, 4), np.float32)
    save("grown", weights)

    code, shown, complaint = run("diff", "base", "grown")

    assert (code, complaint) == (0, "")
    assert "note: 2 tensors not compared: no partner, or another shape\n" in shown
    assert shown.endswith(
        """
2 tensors not compared
  only tuned model.norm.bias
  reshaped   model.embed_tokens.weight  f32[8,4] -> f32[9,4], 1 row added; allow with vocab="common"
"""
    )


def test_the_common_rows_of_a_vocabulary(run, pair, save, weights):
    weights["model.embed_tokens.weight"] = np.ones((9, 4), np.float32)
    save("grown", weights)

    _, shown, _ = run("diff", "base", "grown", "--vocab", "common")

    assert "not compared\n  " not in shown
    assert "4/4 tensors, 84 entries" in shown


def test_another_dtype(run, pair, save, weights):
    save("half", {name: each.astype(np.float16) for name, each in weights.items()})

    code, _, complaint = run("diff", "base", "half")
    assert code == 1
    assert complaint.startswith("pytest-subnet: tensors do not pair: 4 retyped (of 4 tensors)\n")

    code, shown, _ = run("diff", "base", "half", "--as-dtype", "float16")
    assert code == 0
    assert "note: 4 tensors cast to float16\n" in shown


def test_buffers_are_told_apart(run, pair, save, weights):
    for name, position in (("before", 3), ("after", 4)):
        save(name, {**weights, "model.position_ids": np.full(2, position)})

    _, shown, _ = run("diff", "before", "after")
    assert "note: 1 tensor apart (buffers, integers), 1 moved\n" in shown

    code, _, complaint = run("diff", "before", "after", "--include", "*position_ids")
    assert code == 1
    assert complaint == (
        "pytest-subnet: only buffers and integer tensors are selected (1), which have no sparsity; "
        "compare them with assert_frozen or assert_updated\n"
    )


def test_names_steer_neither_the_terminal_nor_a_job_on_github(run, save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "\x1b[31m::error::red"
    for side, value in (("before", 1.0), ("::error::after", 2.0)):
        save(side, {name: np.full((2, 2), value, np.float32)})

    code, shown, _ = run("diff", "-v", "before", "::error::after")
    assert code == 0
    assert "\x1b" not in shown
    assert "\\x1b[31m::error::red" in shown

    _, shown, _ = run("diff", "::error::after", "before")
    assert shown.startswith("'::error::after -> before\n")


def test_dtypes_are_those_that_can_be_cast_to():
    assert set(DTYPES) == set(ARITHMETIC)
