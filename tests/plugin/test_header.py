"""The line in pytest's header on what changes a verdict."""

import pytest


def header(result):
    return [line for line in result.outlines if line.startswith("subnet:")]


def test_nothing_set_nothing_shown(project):
    assert header(project.runpytest()) == []


def test_all_that_is_set_is_shown(project, pair_options):
    project.makeini("[pytest]\nsubnet_tolerances =\n    atol=1e-6\n    rtol=1e-3")

    result = project.runpytest(*pair_options, "--subnet-device=cpu")

    assert header(result) == [
        "subnet: base base, tuned tuned, device cpu, also counting atol=1e-6, rtol=1e-3"
    ]


def test_a_source_that_is_not_there_is_shown_as_it_will_be_looked_for(project):
    result = project.runpytest("--subnet-base=org/name@main", "--subnet-tuned=./nowhere")

    assert header(result) == ["subnet: base org/name@main, tuned nowhere"]


def test_what_could_steer_a_terminal_is_escaped(project):
    result = project.runpytest("--subnet-base=\x1b[31m\nred")

    assert header(result) == [r"subnet: base \x1b[31m\nred"]


def test_a_run_that_compares_with_no_baseline_says_so(project):
    assert header(project.runpytest("--subnet-write-baselines")) == [
        "subnet: writing baselines, comparing with none"
    ]


def test_no_token_is_shown(project):
    result = project.runpytest("--subnet-base=runs/hf_AbCdEfGhIjKlMnOpQrStUvWx/base")

    assert header(result) == ["subnet: base runs/hf_…/base"]


@pytest.mark.parametrize("name", ["x" * 300, "null\0byte", "~nobody-here/x"])
def test_a_name_that_no_file_can_have_is_not_looked_for_before_it_is_needed(project, name):
    result = project.runpytest(f"--subnet-base={name}")

    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert len(header(result)) == 1
