"""The fixture model_pair: the pair of the options, or a failure that says what to do."""

from fnmatch import fnmatch

import pytest

USES_PAIR = """
    def test_pair(model_pair):
        assert len(model_pair.tensors) == 4
"""
ADVICE = (
    "on the command line, set subnet_base and subnet_tuned in the ini file, or mark the test with "
    "@pytest.mark.model_pair(base=…, tuned=…)"
)


def test_the_pair_is_opened(project, pair_options):
    project.makepyfile(USES_PAIR)

    project.runpytest(*pair_options).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ((), "--subnet-base and --subnet-tuned"),
        (("--subnet-tuned=tuned",), "--subnet-base"),
        (("--subnet-base=base",), "--subnet-tuned"),
    ],
)
def test_a_missing_option_is_a_failure_that_names_it(project, arguments, missing):
    project.makepyfile(USES_PAIR)

    result = project.runpytest(*arguments)

    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert f"model_pair has no checkpoints: pass {missing} {ADVICE}" in result.outlines


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ("nowhere", "no checkpoint at *nowhere*"),
        ("empty", "*empty has no weights: it is empty; *"),
        ("base", "base and tuned are the same: base; *"),
        ("corrupt", "*corrupt*model.safetensors*"),
    ],
)
def test_what_cannot_be_opened_is_a_message_without_a_traceback(project, tuned, message):
    project.mkdir("empty")
    (project.mkdir("corrupt") / "model.safetensors").write_bytes(b"x" * 5)
    project.makepyfile(USES_PAIR)

    result = project.runpytest("--subnet-base=base", f"--subnet-tuned={tuned}")

    result.assert_outcomes(errors=1)
    start = next(i for i, line in enumerate(result.outlines) if "ERROR at setup" in line)
    end = next(i for i, line in enumerate(result.outlines) if "short test summary" in line)
    (shown,) = result.outlines[start + 1 : end]
    assert fnmatch(shown, message)


def test_the_failure_is_told_to_every_test(project):
    project.makepyfile(
        """
        def test_one(model_pair): ...
        def test_two(model_pair): ...
        """
    )

    project.runpytest("--subnet-base=base", "--subnet-tuned=nowhere").assert_outcomes(errors=2)


def test_all_tests_share_one_pair_and_read_it_once(project, pair_options, scans):
    source = """
        from pytest_subnet import assert_finite, assert_frozen, assert_update_sparsity

        def test_frozen(model_pair):
            assert_frozen(model_pair, "*norm*")

        def test_sparsity(model_pair):
            assert_update_sparsity(model_pair, at_least=0.8)
            assert_update_sparsity(model_pair, at_least=0.8, atol=1e-5)

        def test_finite(model_pair):
            assert_finite(model_pair)
    """
    project.makepyfile(test_one=source, test_two=source)

    project.runpytest(*pair_options).assert_outcomes(passed=6)

    assert sum(tensors for _, tensors in scans) == 4


def test_the_fixtures_are_documented_with_a_test_each(project):
    result = project.runpytest("--fixtures", "-v")

    for name in ("model_pair", "open_model_pair", "causal_lm_pair", "subnet_device"):
        result.stdout.fnmatch_lines([f"{name} [[]session scope[]] -- *", "    *def test_*"])
    result.stdout.fnmatch_lines(["record_update -- *", "    *with record_update(model) as update:"])
