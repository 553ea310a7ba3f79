"""Policies: files `*.subnet.toml`, each table of which is a test."""

import textwrap
import xml.etree.ElementTree as ElementTree

import pytest

RELEASE = """
    base = "base"
    tuned = "tuned"

    [assert_same_structure]

    [assert_update_sparsity]
    at_least = 0.90

    [[assert_frozen]]
    include = "*norm*"

    [[assert_frozen]]
    include = "*layers.0*"
    """
TOO_DENSE = """\
update sparsity 85.71% is below the required 90.00%
  pair       base -> tuned   (same bits, f32, 4/4 tensors, 84 entries)
"""


@pytest.fixture
def write(project):
    """Writes a policy, `release.subnet.toml` unless it is named otherwise."""

    def write(text, name="release.subnet.toml"):
        path = project.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(project, write):
    """Writes a policy and runs pytest on it, in this process."""

    def run(text, *arguments):
        write(text)
        return project.runpytest("-p", "no:cacheprovider", "release.subnet.toml", *arguments)

    return run


def test_every_table_is_a_test_and_its_text_is_the_assertions(run):
    result = run(RELEASE, "-v")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "release.subnet.toml::assert_same_structure PASSED *",
            "release.subnet.toml::assert_update_sparsity FAILED *",
            "release.subnet.toml::assert_frozen[[]*norm*] PASSED *",
            "release.subnet.toml::assert_frozen[[]*layers.0*] FAILED *",
            "*__ assert_update_sparsity __*",
            "update sparsity 85.71% is below the required 90.00%",
            "  pair       base -> tuned   (same bits, f32, 4/4 tensors, 84 entries)",
            "*__ assert_frozen[[]*layers.0*] __*",
        ]
    )
    text = result.stdout.str()
    assert ".py" not in text.partition("FAILURES")[2].partition("subnet: what moved")[0]
    assert "Error" not in text
    result.stdout.fnmatch_lines(
        ["FAILED release.subnet.toml::assert_update_sparsity - update sparsity 85.71% is below*"]
    )


def test_a_failure_is_the_message_and_nothing_else(run):
    from pytest_subnet import assert_update_sparsity, open_pair

    result = run('base = "base"\ntuned = "tuned"\n[assert_update_sparsity]\nat_least = 0.9\n')
    with pytest.raises(AssertionError) as caught:
        assert_update_sparsity(open_pair("base", "tuned"), at_least=0.9)
    lines = result.stdout.str().splitlines()
    start = next(at for at, line in enumerate(lines) if "__ assert_update_sparsity __" in line)
    message = str(caught.value).splitlines()
    assert lines[start + 1 : start + 1 + len(message)] == message
    assert lines[start + 1 + len(message)].startswith("====")


def test_the_command_line_goes_before_the_file_and_the_file_before_the_ini(
    project, run, save_checkpoint, checkpoints
):
    project.makeini("[pytest]\nsubnet_tuned = base\n")
    named = 'base = "base"\ntuned = "tuned"\n[assert_update_sparsity]\nat_least = 0.8\n'
    run(named).assert_outcomes(passed=1)
    result = run(named, "--subnet-tuned=nowhere")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["no checkpoint at *nowhere: there is no such path*"])
    run('base = "tuned"\n[assert_update_sparsity]\nat_least = 0.8\n').assert_outcomes(passed=1)


def test_the_gate_is_the_file_alone_and_the_release_an_option(run):
    gate = 'base = "base"\n[assert_update_sparsity]\nat_least = 0.8\n'
    run(gate, "--subnet-tuned=tuned").assert_outcomes(passed=1)


def test_paths_are_relative_to_the_file(project, write):
    write('base = "../base"\ntuned = "../tuned"\n[assert_finite]\n', "gates/release.subnet.toml")
    project.runpytest("-p", "no:cacheprovider", "gates").assert_outcomes(passed=1)


MISSING = {
    "": (
        "release.subnet.toml: no base and no tuned checkpoint is named: pass --subnet-base and "
        '--subnet-tuned on the command line, or write base = "…" and tuned = "…" at the top of '
        "the file; a run that judges no release leaves the file out with --ignore"
    ),
    'base = "base"\n': (
        "release.subnet.toml: no tuned checkpoint is named: pass --subnet-tuned on the command "
        'line, or write tuned = "…" at the top of the file; a run that judges no release leaves '
        "the file out with --ignore"
    ),
}


@pytest.mark.parametrize("top", MISSING)
def test_a_side_that_nobody_names_ends_the_collection(run, top):
    result = run(f"{top}[assert_finite]\n")
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert MISSING[top] in result.stdout.str().splitlines()


WRONG = "base = 'base'\n[assert_finite]\nexclde = '*'\n"
WRONG_TEXT = "release.subnet.toml:3: unknown key exclde in [assert_finite]; did you mean exclude?"


def test_what_is_wrong_with_the_file_is_all_there_is_to_see(run):
    result = run(WRONG)
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    lines = result.stdout.str().splitlines()
    start = next(at for at, line in enumerate(lines) if "ERROR collecting" in line)
    assert lines[start + 1] == WRONG_TEXT
    assert lines[start + 2].startswith("=====")


def test_under_xdist_a_wrong_file_is_an_error_too(write, run_apart):
    write(WRONG)
    result = run_apart("-n2", "release.subnet.toml")
    assert WRONG_TEXT in result.stdout.str().splitlines()
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert result.ret in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.TESTS_FAILED)


def test_under_xdist_the_tests_are_shared_out(write, run_apart):
    write(RELEASE)
    result = run_apart("-n2", "release.subnet.toml", "--junitxml=junit.xml")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(["update sparsity 85.71% is below the required 90.00%"])


@pytest.mark.parametrize(
    ("expression", "passed", "failed"),
    [("norm", 1, 0), ("assert_frozen", 1, 1), ("not frozen and not sparsity", 1, 0)],
)
def test_k_selects_by_name(run, expression, passed, failed):
    run(RELEASE, "-k", expression).assert_outcomes(
        passed=passed, failed=failed, deselected=4 - passed - failed
    )


def test_a_test_is_run_alone_by_its_id(project, write):
    write(RELEASE)
    name = "release.subnet.toml::assert_frozen[*norm*]"
    project.runpytest("-p", "no:cacheprovider", name).assert_outcomes(passed=1)


def test_collect_only_lists_the_gates(run):
    result = run(RELEASE, "--collect-only", "-q")
    assert result.stdout.lines[:4] == [
        "release.subnet.toml::assert_same_structure",
        "release.subnet.toml::assert_update_sparsity",
        "release.subnet.toml::assert_frozen[*norm*]",
        "release.subnet.toml::assert_frozen[*layers.0*]",
    ]


def test_in_strict_mode_equal_patterns_are_tests_of_their_own(project, run):
    project.makepyprojecttoml("[tool.pytest]\nstrict = true\nfilterwarnings = ['error']\n")
    twice = '[[assert_frozen]]\ninclude = "*norm*"\n' * 2
    run(f'base = "base"\ntuned = "tuned"\n{twice}').assert_outcomes(passed=2)


def test_the_pair_is_read_once_whatever_the_tables_ask(run, scans):
    run(
        """
        base = "base"
        tuned = "tuned"
        [[assert_update_sparsity]]
        at_least = 0.1
        atol = 1e-4
        [[assert_update_sparsity]]
        at_least = 0.1
        rtol = 1e-2
        [assert_max_change]
        at_most = 1
        """
    ).assert_outcomes(passed=3)
    assert scans == [("base -> tuned", 4)]


def test_tests_and_policies_share_a_pair(project, write, gate, scans):
    write(RELEASE)
    result = project.runpytest(
        "-p", "no:cacheprovider", "--subnet-base=base", "--subnet-tuned=tuned"
    )
    result.assert_outcomes(passed=3, failed=3)
    assert scans == [("base -> tuned", 4)]


def test_junit_has_the_gate_its_message_and_its_numbers(project, run):
    run(RELEASE, "--junitxml=junit.xml")
    cases = ElementTree.parse(project.path / "junit.xml").getroot().iter("testcase")
    by_name = {case.get("name"): case for case in cases}
    assert list(by_name) == [
        *("assert_same_structure", "assert_update_sparsity"),
        *("assert_frozen[*norm*]", "assert_frozen[*layers.0*]"),
    ]
    case = by_name["assert_update_sparsity"]
    (failure,) = case.iter("failure")
    assert failure.get("message").startswith("update sparsity 85.71% is below")
    assert failure.text.startswith(TOO_DENSE)
    numbers = {each.get("name"): each.get("value") for each in case.iter("property")}
    assert numbers["subnet.update_sparsity.updated"] == "12"


def test_tb_line_points_into_the_file(project, run):
    result = run(RELEASE, "--tb=line")
    result.stdout.fnmatch_lines(
        [f"{project.path}/release.subnet.toml:6: update sparsity 85.71% is below*"]
    )


def test_without_cache_and_terminal_the_verdict_is_the_exit_code(run):
    assert run(RELEASE, "-p", "no:terminal").ret == pytest.ExitCode.TESTS_FAILED
    assert run(RELEASE, "-p", "no:terminal", "-k", "norm").ret == pytest.ExitCode.OK


def test_an_error_is_its_text(run):
    result = run('base = "base"\ntuned = "tuned"\n[assert_frozen]\ninclude = "*normm*"\n')
    result.assert_outcomes(failed=1)
    lines = result.stdout.str().splitlines()
    text = next(line for line in lines if line.startswith("include='*normm*' matches none of 4"))
    assert "did you mean" in text
    assert "Traceback" not in result.stdout.str()


def test_a_bound_that_nothing_can_fail_is_a_warning_and_strictly_a_failure(run):
    policy = 'base = "base"\ntuned = "tuned"\n[assert_update_sparsity]\nat_least = 0\n'
    run(policy, "-W", "default").assert_outcomes(passed=1, warnings=1)
    result = run(policy, "--subnet-strict")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["assert_update_sparsity: at_least=0 is no bound*"])
    assert ".py" not in result.stdout.str().partition("FAILURES")[2].partition("subnet:")[0]


def test_a_run_is_judged_by_its_checkpoints(project, run, checkpoints):
    import shutil

    for name, step in (("base", 1), ("tuned", 2)):
        shutil.copytree(checkpoints / name, project.path / "runs" / "grpo" / f"step-{step}")
    policy = 'trajectory = "runs/grpo"\npattern = "step-*"\n[[assert_step_sparsity]]\nat_least = '
    run(f"{policy}0.8\n").assert_outcomes(passed=1)
    result = run(f"{policy}0.9\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*85.71%*90.00%*"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--subnet-tuned=tuned"], "--subnet-tuned names"),
        (["--subnet-base=base", "--subnet-tuned=tuned"], "--subnet-base and --subnet-tuned name"),
    ],
)
def test_a_run_is_not_judged_in_the_place_of_what_the_command_line_names(run, options, words):
    policy = 'trajectory = "runs"\n[assert_step_sparsity]\nat_least = 0.8\n'
    result = run(policy, *options)
    result.assert_outcomes(errors=1)
    assert (
        "release.subnet.toml: it names a trajectory, so it would judge that run and not what "
        f"{words}; give the file a command of its own, without the option"
    ) in result.stdout.str().splitlines()


def test_the_ini_file_does_not_change_a_run(project, run, checkpoints):
    import shutil

    for name, step in (("base", 1), ("tuned", 2)):
        shutil.copytree(checkpoints / name, project.path / "runs" / f"checkpoint-{step}")
    project.makeini("[pytest]\nsubnet_tuned = nowhere\n")
    policy = 'trajectory = "runs"\nas_dtype = "float32"\n[assert_step_sparsity]\nat_least = 0.8\n'
    run(policy).assert_outcomes(passed=1)


def test_a_pair_is_aligned_as_the_policy_says(run, save_checkpoint, checkpoints):
    from safetensors.numpy import load_file

    other = load_file(checkpoints / "tuned" / "model.safetensors")
    other["renamed.weight"] = other.pop("model.layers.0.self_attn.q_proj.weight")
    save_checkpoint("renamed", other)
    gate = 'base = "base"\ntuned = "renamed"\n{}[assert_same_structure]\n[assert_finite]\n'
    run(gate.format("")).assert_outcomes(failed=2)
    run(
        gate.format(
            'as_dtype = "bfloat16"\nvocab = "common"\n'
            'rename = {"renamed.weight" = "model.layers.0.self_attn.q_proj.weight"}\n'
        )
    ).assert_outcomes(passed=2)


def test_two_runs_are_held_against_each_other(project, run, save_checkpoint, checkpoints):
    from safetensors.numpy import load_file

    other = load_file(checkpoints / "tuned" / "model.safetensors")
    other["model.layers.0.self_attn.q_proj.weight"][1] += 0.5
    save_checkpoint("runs/2", other)
    policy = """
        base = "base"
        tuned = "tuned"
        [assert_mask_overlap]
        other = "runs/2"
        null = "none"
        min_jaccard = {}
        """
    run(policy.format(0.7)).assert_outcomes(passed=1)
    result = run(policy.format(0.8))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*75.00%*80.00%*"])


def test_hostile_names_are_escaped(run):
    result = run(
        'base = "base"\ntuned = "tuned"\n[assert_frozen]\n'
        'include = "\\u001b[31m::error::<script>\\n*"\n',
        "-v",
    )
    result.assert_outcomes(failed=1)
    assert "\x1b[31m::" not in result.stdout.str()
    result.stdout.fnmatch_lines(
        ["release.subnet.toml::assert_frozen[[]\\x1b[[]31m::error::<script>\\n[*]] FAILED*"]
    )


def test_other_toml_files_are_left_alone(project, write):
    write("[assert_finite]\n", "release.toml")
    result = project.runpytest("-p", "no:cacheprovider")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_interface_can_be_gated(project, run):
    for side in ("base", "tuned"):
        theta = 10000.0 if side == "base" else 500000.0
        (project.path / side / "config.json").write_text(f'{{"rope_theta": {theta}}}')
    policy = 'base = "base"\ntuned = "tuned"\n[assert_same_interface]\n'
    result = run(policy)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  differs    config.json: rope_theta 10000.0 → 500000.0"])
    run(f'{policy}allow = ["rope_theta"]\n').assert_outcomes(passed=1)
