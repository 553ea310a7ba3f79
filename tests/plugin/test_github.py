"""On GitHub Actions: a summary of the step and annotations, from the controller alone."""

import pytest


@pytest.fixture
def summary(project, monkeypatch):
    """The file that GitHub names for the summary of a step."""
    path = project.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    monkeypatch.setenv("GITHUB_WORKSPACE", str(project.path))
    return path


def annotations(result):
    return [line for line in result.outlines if line.startswith("::")]


def test_a_failed_gate_is_annotated_and_the_summary_written(project, gate, summary, pair_options):
    result = project.runpytest(*pair_options)

    (line,) = annotations(result)
    assert line.startswith(
        "::error file=test_gate.py,line=6,title=test_gate.py%3A%3Atest_fails"
        "::update sparsity 85.71%25 is below the required 90.00%25%0A  pair       base -> tuned"
    )
    text = summary.read_text()
    assert text.startswith("## pytest-subnet: NOT PASSED (1 failed, 1 passed)\n\n### failed: ")
    assert "\n### `base -> tuned`\n" in text
    assert "| passed | `test_gate.py::test_holds` | update sparsity: sparsity 85.71%" in text


def test_under_xdist_the_controller_writes_it_once(project, run_apart, gate, summary, pair_options):
    pytest.importorskip("xdist")

    result = run_apart("-n2", *pair_options)

    assert len(annotations(result)) == 1
    assert summary.read_text().count("## pytest-subnet:") == 1
    assert summary.read_text().count("### `base -> tuned`") == 1


def test_a_gate_in_which_its_worker_crashed_is_annotated_too(
    project, run_apart, summary, pair_options
):
    pytest.importorskip("xdist")
    project.makepyfile(
        """
        import os

        def test_crash(model_pair):
            os._exit(1)
        """
    )

    result = run_apart("-n1", *pair_options)

    assert annotations(result) == [
        "::error file=test_a_gate_in_which_its_worker_crashed_is_annotated_too.py,line=3,"
        "title=test_a_gate_in_which_its_worker_crashed_is_annotated_too.py%3A%3Atest_crash::worker "
        "'gw0' crashed while running "
        "'test_a_gate_in_which_its_worker_crashed_is_annotated_too.py::test_crash'"
    ]


def test_nothing_is_collected_by_tensor_for_it(project, gate, summary, pair_options):
    project.makeconftest(
        """
        def pytest_runtest_logreport(report):
            assert all(result["tensors"] is None for result in report.subnet["results"])
        """
    )

    project.runpytest(*pair_options).assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize("value", ["", "false", "1"])
def test_nothing_happens_elsewhere(project, gate, summary, pair_options, monkeypatch, value):
    monkeypatch.setenv("GITHUB_ACTIONS", value)

    assert annotations(project.runpytest(*pair_options)) == []
    assert not summary.exists()


def test_a_project_without_gates_gets_nothing(project, summary):
    project.makepyfile("def test_other(): assert 0")

    assert annotations(project.runpytest()) == []
    assert not summary.exists()


def test_processes_that_follow_write_nothing(project, gate, summary, pair_options, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    assert annotations(project.runpytest(*pair_options)) == []
    assert not summary.exists()


def test_a_summary_that_cannot_be_written_fails_nothing(
    project, summary, pair_options, monkeypatch
):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(project.path / "missing" / "summary.md"))
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_it(model_pair):
            update_sparsity(model_pair)
        """
    )

    result = project.runpytest(*pair_options, "--subnet-report=out.md")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["subnet: no step summary: *", "subnet: report written to out.md"])
