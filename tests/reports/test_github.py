"""Annotations, and a summary that stays below GitHub's limit."""

from pathlib import Path

import pytest

from pytest_subnet.reports.github import MOST_BYTES, append_summary, error_annotations, fitted
from pytest_subnet.reports.github import _in_workspace as in_workspace

FAILED = {"outcome": "failed", "message": "100% wrong:\nsee a, b"}


def test_a_failed_gate_has_one_annotation_at_its_place(make_run):
    run = make_run({}, {**FAILED, "nodeid": "tests/a,b.py::test_c", "file": "tests/a,b.py"})

    assert error_annotations(run) == [
        "::error file=tests/a%2Cb.py,line=3,title=tests/a%2Cb.py%3A%3Atest_c"
        "::100%25 wrong:%0Asee a, b"
    ]


def test_a_rootdir_inside_the_repository_stands_before_the_path(make_run, monkeypatch):
    run = make_run({**FAILED, "file": "a.py"})

    assert error_annotations(run, "training/")[0].startswith("::error file=training/a.py,")
    for workspace, start in (("/r", "training/"), ("/r/training", ""), ("/other", "")):
        monkeypatch.setenv("GITHUB_WORKSPACE", workspace)
        assert in_workspace(Path("/r/training")) == start
    monkeypatch.delenv("GITHUB_WORKSPACE")
    assert in_workspace(Path("/r/training")) == ""


@pytest.mark.parametrize(("failed", "shown"), [(0, 0), (1, 1), (10, 10), (11, 10), (500, 10)])
def test_there_are_ten_at_most_and_the_last_one_counts_the_others(make_run, failed, shown):
    run = make_run(*[{**FAILED, "nodeid": f"test_{number}"} for number in range(failed)])

    lines = error_annotations(run)

    assert len(lines) == shown
    if failed > 10:
        assert lines[-1] == (
            f"::error title=pytest-subnet::{failed - 9} more gates failed; "
            "the log and the summary have all"
        )


def test_only_gates_that_failed_are_annotated(make_run):
    outcomes = ("passed", "skipped", "xfailed", "xpassed", "error")
    others = [{"outcome": outcome, "nodeid": outcome} for outcome in outcomes]

    (line,) = error_annotations(make_run({**FAILED, "gate": False}, *others))

    assert line == "::error file=test_a.py,line=3,title=error::error"


def test_an_endless_message_is_cut(make_run):
    (line,) = error_annotations(make_run({"outcome": "failed", "message": "x" * 100_000}))

    assert line.endswith("xxx%0A…")
    assert len(line) < 4_200


@pytest.mark.parametrize("most", [0, 10, 30, 100, 1_000, 5_000])
def test_what_fits_is_kept_and_the_rest_counted(most):
    lines = [f"| größer {number} |" for number in range(100)]

    text = fitted(lines, most)

    assert len(text.encode()) <= most
    if text:
        kept = [line for line in text.splitlines() if line.startswith("|")]
        assert kept == lines[: len(kept)]
        left = 100 - len(kept)
        assert text.endswith(f"\n\n{left} more rows in the log\n" if left else " |\n")


def test_a_fence_that_is_cut_is_closed():
    lines = ["# head", "````text", *["```"] * 100, "````", "end"]

    text = fitted(lines, 100)

    *kept, fence, blank, last = text.splitlines()
    assert kept == lines[: len(kept)]
    assert (fence, blank) == ("````", "")
    assert last == f"{len(lines) - len(kept)} more rows in the log"


def test_the_summary_is_appended(make_run, tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    path.write_text("of another command\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))

    assert append_summary(make_run({})) == []

    assert path.read_text().startswith("of another command\n## pytest-subnet: passed (1 passed)\n")


@pytest.mark.parametrize("there", [0, 990_000, 999_999, 1_500_000])
def test_the_file_stays_below_the_limit_whatever_is_there(make_run, tmp_path, monkeypatch, there):
    path = tmp_path / "summary.md"
    path.write_bytes(b"x" * (there - 1) + b"\n" if there else b"")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    tests = [{**FAILED, "message": f"{number}\n" * 1000} for number in range(1000)]

    assert append_summary(make_run(*tests)) == []

    assert path.stat().st_size <= max(MOST_BYTES, there)
    if there < 999_000:
        assert path.stat().st_size > 980_000
        assert path.read_text().endswith(" more rows in the log\n")


def test_a_summary_that_cannot_be_written_is_told(make_run, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "missing" / "summary.md"))

    (problem,) = append_summary(make_run({}))

    assert problem.startswith("subnet: no step summary: [Errno 2] No such file or directory")


def test_without_a_file_there_is_no_summary(make_run, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    assert append_summary(make_run({})) == []
