"""What a user sees of a failure: his own line and our message, and nothing between."""

import pytest

from pytest_subnet.tracebacks import end_at_caller

MODULE = """
    import torch
    from pytest_subnet import *

    def helper(pair, include):
        assert_frozen(pair, include)
"""


def failure(result):
    """What is printed of the one failure, from its heading on."""
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if line.startswith("____"))
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("===="))
    return lines[start + 1 : end]


def test_an_assertion_shows_the_users_line_and_the_message(project):
    project.makepyfile(
        test_it=MODULE
        + """
    def test_gate():
        pair = open_pair("base", "tuned")
        assert_update_sparsity(pair, at_least=0.9)
        """
    )

    shown = failure(project.runpytest())

    assert shown[:6] == [
        "",
        "    def test_gate():",
        '        pair = open_pair("base", "tuned")',
        ">       assert_update_sparsity(pair, at_least=0.9)",
        "E       AssertionError: update sparsity 85.71% is below the required 90.00%",
        "E         pair       base -> tuned   (same bits, f32, 4/4 tensors, 84 entries)",
    ]
    assert all(line.startswith("E  ") for line in shown[4:-2])
    assert shown[-2:] == ["", "test_it.py:9: AssertionError"]


@pytest.mark.parametrize(
    ("call", "error", "start"),
    [
        ("assert_frozen(pair, '*typo*')", "SelectionError", "include='*typo*' matches none of "),
        ("update_sparsity(pair, kinds='typo')", "SelectionError", "kinds='typo' is no kind of "),
        ("assert_tied(pair)", "SelectionError", ""),
        ("open_pair('base', 'base')", "PairMismatchError", "base and tuned are the same: base; "),
        ("open_pair('base', './x')", "CheckpointError", "no checkpoint at ./x: "),
        ("open_checkpoint(None)", "TypeError", "a checkpoint is a path, "),
        ("assert_update_sparsity(pair)", "ValueError", "no bound: give at_least, "),
        ("assert_update_sparsity(pair, at_least=70)", "ValueError", "at_least=70 is not "),
        ("assert_max_change(pair, at_most=-1)", "ValueError", "at_most=-1 is not "),
        ("update_sparsity(pair, atol=-1)", "ValueError", "atol=-1 is not "),
        ("assert_frozen(pair, [5])", "TypeError", "include takes "),
        ("assert_frozen(pair, 5)", "TypeError", "include takes "),
    ],
)
def test_what_cannot_be_judged_ends_at_the_users_line(project, call, error, start):
    project.makepyfile(
        test_it=MODULE
        + f"""
    def test_gate():
        pair = open_pair("base", "tuned")
        {call}
        """
    )

    result = project.runpytest()

    result.assert_outcomes(failed=1)
    shown = failure(result)
    assert shown[3] == f">       {call}"
    full_name = error if error in ("TypeError", "ValueError") else f"pytest_subnet.errors.{error}"
    assert shown[4].startswith(f"E       {full_name}: {start}")
    assert all(line.startswith("E  ") for line in shown[4:-2])
    assert shown[-2:] == ["", f"test_it.py:9: {error}"]


def test_a_users_own_helper_stays_in_sight(project):
    project.makepyfile(
        test_it=MODULE
        + """
    def test_gate():
        helper(open_pair("base", "tuned"), "*typo*")
        """
    )

    shown = failure(project.runpytest())

    assert '>       helper(open_pair("base", "tuned"), "*typo*")' in shown
    assert ">       assert_frozen(pair, include)" in shown
    assert not [line for line in shown if "pytest_subnet/" in line]


@pytest.mark.parametrize("phase", ["setup", "teardown"])
def test_a_users_own_fixture_is_where_its_error_is_shown(project, phase):
    asks = {"setup": ("open_pair('base', './x')", ""), "teardown": ("", "open_pair('base', './x')")}
    before, after = asks[phase]
    project.makepyfile(
        test_it=MODULE
        + f"""
    import pytest

    @pytest.fixture
    def asks():
        {before}
        yield
        {after}

    def test_gate(asks): ...
        """
    )

    result = project.runpytest()

    result.assert_outcomes(errors=1, **({"passed": 1} if phase == "teardown" else {}))
    shown = failure(result)
    assert ">       open_pair('base', './x')" in shown
    assert not [line for line in shown if "pytest_subnet/" in line]


def test_unittest_shows_the_same(project):
    project.makepyfile(
        test_it=MODULE
        + """
    import unittest

    class TestCase(unittest.TestCase):
        def test_error(self):
            open_pair("base", "./x")
        """
    )

    shown = failure(project.runpytest())

    assert '>       open_pair("base", "./x")' in shown
    assert not [line for line in shown if "pytest_subnet/" in line]


def test_an_error_of_a_library_is_not_shown_behind_ours(project):
    project.makepyfile(
        test_it="""
        from pytest_subnet import CheckpointError

        def test_gate():
            try:
                open("nowhere")
            except OSError as error:
                raise CheckpointError("cannot read nowhere") from error
        """
    )

    result = project.runpytest()

    result.stdout.fnmatch_lines(["E *pytest_subnet.errors.CheckpointError: cannot read nowhere"])
    result.stdout.no_fnmatch_line("*FileNotFoundError*")


def test_the_full_trace_is_there_for_who_asks(project):
    project.makepyfile(
        test_it=MODULE
        + """
    def test_gate():
        open_pair("base", "./x")
        """
    )

    result = project.runpytest("--full-trace")

    result.stdout.fnmatch_lines(["*pytest_subnet*opening.py:*"])


def test_pytest_raises_sees_the_whole_error(project):
    project.makepyfile(
        test_it=MODULE
        + """
    import pytest

    def test_gate():
        with pytest.raises(CheckpointError, match="no checkpoint at ./x") as caught:
            open_pair("base", "./x")
        assert "opening.py" in str(caught.traceback[-1].path)
        """
    )

    project.runpytest().assert_outcomes(passed=1)


def test_an_error_of_the_users_own_stays_as_it_is(project):
    project.makepyfile(
        test_it=MODULE
        + """
    def rename(name):
        return {}[name]

    def test_gate():
        open_pair("base", "tuned", rename=rename)
        """
    )

    shown = failure(project.runpytest())

    assert ">       return {}[name]" in shown


def test_an_error_that_nobody_meant_to_raise_keeps_all_its_frames(project):
    project.makepyfile(
        test_it=MODULE
        + """
    from pytest_subnet.text import percent

    def test_gate():
        percent("no number")
        """
    )

    shown = failure(project.runpytest())

    assert '>       percent("no number")' in shown
    assert shown[-1].endswith("ValueError")
    assert "text.py:" in shown[-1]


def test_an_error_that_was_never_raised_is_left_alone():
    end_at_caller(ValueError("no traceback"))


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        ("assert_update_sparsity(pair, at_least=0.9)", ["85.71%", "below", "90.00"]),
        ("assert_update_sparsity(pair, at_most=0.8)", ["85.71%", "above", "80.00"]),
        ("assert_update_sparsity(same, at_least=0)", ["nothing moved"]),
        ("assert_even_sparsity(pair, max_spread=0.1)", ["15.00 points", "off, allowed 10.00"]),
        ("assert_frozen(pair, '*')", ["2 of 4", "moved"]),
        ("assert_updated(pair, '*')", ["2 of 4", "did not move"]),
        ("assert_updated(pair, '*proj*', at_least=0.5)", ["25.00%", "50.00%"]),
        ("assert_max_change(pair, at_most=0.1)", ["0.5", "above", "0.1"]),
        ("assert_finite(nan, include='*norm*')", ["2", "NaN or Inf in tuned"]),
        ("assert_same_structure(nan)", ["do not pair", "3 only base"]),
    ],
)
def test_the_short_summary_begins_with_verdict_and_number(project, call, fragments):
    project.makepyfile(
        test_it=MODULE
        + f"""
    def test_gate():
        norm = "model.norm.weight"
        pair = open_pair("base", "tuned")
        nan = open_pair("base", {{norm: torch.tensor([1, 1, torch.nan, torch.inf])}})
        same = open_pair({{norm: torch.ones(2)}}, {{norm: torch.ones(2)}})
        {call}
        """
    )

    result = project.runpytest()

    summary = next(line for line in result.outlines if line.startswith("FAILED"))
    message = summary.partition(" - AssertionError: ")[2][:50]
    assert all(fragment in message for fragment in fragments), message
