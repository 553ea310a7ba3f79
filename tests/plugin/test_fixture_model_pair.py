"""The fixture model_pair: the pair of the options, or a failure that says what to do."""

from fnmatch import fnmatch

import pytest

USES_PAIR = """
    def test_pair(model_pair):
        assert len(model_pair.tensors) == 4
"""


def test_the_pair_is_opened(project, pair_options):
    project.makepyfile(USES_PAIR)

    project.runpytest(*pair_options).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "model_pair has no checkpoints: pass --subnet-base and --subnet-tuned on the command "
            "line, set subnet_base and subnet_tuned in the ini file, or mark the test with "
            "@pytest.mark.model_pair(base=…, tuned=…)",
        ),
        (
            ("--subnet-tuned=tuned",),
            "model_pair has no base checkpoint: pass --subnet-base on the command line, or set "
            "subnet_base in the ini file",
        ),
        (
            ("--subnet-base=base",),
            "model_pair has no tuned checkpoint: pass --subnet-tuned on the command line, or set "
            "subnet_tuned in the ini file",
        ),
    ],
)
def test_a_missing_option_is_a_failure_that_names_it(project, arguments, message):
    project.makepyfile(USES_PAIR)

    result = project.runpytest(*arguments)

    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert message in result.outlines


@pytest.mark.parametrize(
    ("ini", "arguments", "sentence"),
    [
        ("subnet_tuned = nowhere", ["--subnet-base=base"], "subnet_tuned is set in tox.ini"),
        (
            "subnet_base = base\nsubnet_tuned = nowhere",
            [],
            "subnet_base and subnet_tuned are set in tox.ini",
        ),
    ],
)
def test_a_wrong_source_from_the_ini_file_is_traced_to_it(project, ini, arguments, sentence):
    project.makeini(f"[pytest]\n{ini}")
    project.makepyfile(USES_PAIR)

    result = project.runpytest(*arguments)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["no checkpoint at *nowhere: *", sentence], consecutive=True)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ('{"base": "base"}', "needs tuned=…"),
        ("{}", "needs base=… and tuned=…"),
        ('"tuned"', "takes a mapping with base and tuned, not str"),
        (
            '{"base": "base", "tuned": "tuned", "xyz": 1}',
            "does not know the keyword 'xyz'; it takes base, tuned, rename, vocab, as_dtype",
        ),
    ],
)
def test_a_wrong_parameter_of_its_own_is_a_failure_that_names_it(
    project, pair_options, parameter, message
):
    project.makepyfile(
        f"""
        import pytest

        @pytest.mark.parametrize("model_pair", [{parameter}], indirect=True)
        def test_pair(model_pair): ...
        """
    )

    result = project.runpytest(*pair_options)

    result.assert_outcomes(errors=1)
    assert f'parametrize("model_pair", …, indirect=True) {message}' in result.outlines


def test_a_test_may_give_it_a_parameter(project):
    project.makepyfile(
        """
        import pytest

        PAIRS = [{"base": "base", "tuned": "tuned"}, {"base": "tuned", "tuned": "base"}]

        @pytest.mark.parametrize("model_pair", PAIRS, indirect=True)
        def test_pair(model_pair):
            assert {model_pair.base.label, model_pair.tuned.label} == {"base", "tuned"}
        """
    )

    project.runpytest().assert_outcomes(passed=2)


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
