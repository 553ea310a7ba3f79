"""`--subnet-strict`: a gate that is skipped fails, and so does a bound that nothing can fail."""

import shutil
import warnings
import xml.etree.ElementTree as ET
from fnmatch import fnmatchcase

import pytest

STRICT = "--subnet-strict"
PAIR = ("--subnet-base=base", "--subnet-tuned=tuned")
OLD = pytest.version_tuple < (9, 0)


@pytest.fixture
def strict(project, pair_options):
    """Runs pytest strictly on the pair of the project."""
    return lambda *more: project.runpytest(*pair_options, STRICT, *more)


def test_a_skip_is_a_skip_by_default_and_fails_under_strict(project, pair_options, strict):
    project.makepyfile(
        test_gate="""
        import pytest

        def test_sparsity(model_pair):
            pytest.skip("no GPU here")
        """
    )

    project.runpytest(*pair_options).assert_outcomes(skipped=1)
    result = strict()

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    lines = result.outlines
    at = next(number for number, line in enumerate(lines) if "_ test_sparsity _" in line) + 1
    assert lines[at : at + 3] == [
        "skipped, which fails under --subnet-strict: no GPU here",
        "  at         test_gate.py:4",
        "  to mend    give the test what it lacks, or leave it out by name: --deselect, --ignore, "
        "-k or -m",
    ]
    result.stdout.fnmatch_lines(
        ["FAILED test_gate.py::test_sparsity - Failed: skipped, which fails under --subnet-strict*"]
    )


GATES = """
    import unittest

    import pytest

    @pytest.fixture
    def release(open_model_pair):
        return open_model_pair("base", "tuned")

    @pytest.fixture
    def accelerator():
        pytest.skip("no accelerator")

    def test_in_its_body(model_pair):
        pytest.skip("no checkpoint")

    def test_extra(model_pair):
        pytest.importorskip("a_library_that_is_not_there")

    def test_through_a_fixture_of_the_project(release):
        pytest.skip("no baseline")

    def test_in_a_fixture(release, accelerator): ...

    @pytest.mark.skip(reason="not today")
    def test_mark(model_pair): ...

    @pytest.mark.skipif(True, reason="not here")
    @pytest.mark.model_pair(base="base", tuned="tuned")
    def test_marker_alone(request): ...

    @pytest.mark.parametrize("side", ["base", pytest.param("tuned", marks=pytest.mark.skip)])
    def test_parameters(model_pair, side): ...

    @pytest.mark.usefixtures("open_model_pair")
    class TestClass(unittest.TestCase):
        @unittest.skip("decorated")
        def test_decorated(self): ...

        def test_raised(self):
            raise unittest.SkipTest("raised")

        def test_called(self):
            self.skipTest("called")
"""


def test_whatever_skips_a_gate_fails_it(project, strict):
    project.makepyfile(test_gate=GATES)

    result = strict("--junitxml=junit.xml", "-rA")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    assert "skipped" not in outcomes
    assert outcomes["passed"] == 1
    assert outcomes["failed"] + outcomes["errors"] == 10
    text = result.stdout.str()
    for reason in (
        "no checkpoint",
        "could not import 'a_library_that_is_not_there'*",
        "no baseline",
        "no accelerator",
        "not today",
        "not here",
        "unconditional skip",
        "decorated",
        "raised",
        "called",
    ):
        result.stdout.fnmatch_lines([f"skipped, which fails under --subnet-strict: {reason}"])
    assert text.count("which fails under --subnet-strict") >= 10
    suite = ET.parse(project.path / "junit.xml").getroot()[0]
    counted = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failures, errors = outcomes["failed"], outcomes["errors"]
    assert counted == {"tests": 11, "failures": failures, "errors": errors, "skipped": 0}
    messages = [each.get("message") for each in suite.iter("failure")]
    assert any("which fails under --subnet-strict: no checkpoint" in each for each in messages)


def test_what_is_expected_to_fail_still_is(project, strict):
    project.makepyfile(
        """
        import pytest
        from pytest_subnet import assert_update_sparsity

        @pytest.mark.xfail(reason="the run is young")
        def test_fails(model_pair):
            assert_update_sparsity(model_pair, at_least=0.99)

        @pytest.mark.xfail(run=False)
        def test_is_not_run(model_pair): ...

        def test_says_so(model_pair):
            pytest.xfail("later")
        """
    )

    result = strict()

    assert result.ret == 0
    result.assert_outcomes(xfailed=3)


def test_a_skip_is_no_expected_failure(project, strict):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.xfail
        def test_skips(model_pair):
            pytest.skip("no GPU")
        """
    )

    strict().assert_outcomes(failed=1)


def test_tests_that_are_no_gates_may_skip(project, strict):
    project.makepyfile(
        test_other="""
        import pytest

        def test_windows_only():
            pytest.skip("not Windows")
        """,
        test_whole="""
        import pytest
        pytest.skip("not here", allow_module_level=True)
        """,
    )

    result = strict()

    assert result.ret in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.assert_outcomes(skipped=2)


def test_a_test_in_a_file_that_names_the_package_is_a_gate_without_any_fixture(project, strict):
    project.makepyfile(
        """
        from pathlib import Path

        import pytest
        from pytest_subnet import assert_update_sparsity, open_pair

        @pytest.mark.skipif(not Path("release").exists(), reason="no checkpoint at release")
        def test_release():
            assert_update_sparsity(open_pair("base", "release"), at_least=0.7)
        """
    )

    result = strict()

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--subnet-strict: no checkpoint at release"])


def test_a_gate_that_is_left_out_by_name_is_no_failure(project, strict):
    project.makepyfile(
        test_gate="""
        import pytest

        def test_gpu(model_pair):
            pytest.skip("no GPU")

        def test_pair(model_pair): ...
        """
    )

    strict("--deselect=test_gate.py::test_gpu").assert_outcomes(passed=1, deselected=1)


@pytest.mark.parametrize(
    "skip",
    [
        'pytest.skip("no GPU", allow_module_level=True)',
        'pytest.importorskip("not_there", reason="no GPU")',
    ],
)
def test_a_file_of_gates_that_skips_itself_is_an_error(project, strict, pair_options, skip):
    project.makepyfile(
        test_gate=f"""
        import pytest
        {skip}

        def test_pair(model_pair): ...
        """
    )

    project.runpytest(*pair_options).assert_outcomes(skipped=1)
    result = strict()

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "skipped, which fails under --subnet-strict: no GPU",
            "  at         test_gate.py:2",
            "ERROR test_gate.py*",
        ]
    )


def test_a_directory_of_gates_that_skips_itself_is_an_error(project, strict):
    gates = project.mkdir("gates")
    (gates / "conftest.py").write_text('import pytest\npytest.importorskip("not_there")\n')
    (gates / "test_gate.py").write_text("def test_pair(model_pair): ...\n")
    other = project.mkdir("other")
    (other / "conftest.py").write_text('import pytest\npytest.importorskip("not_there")\n')
    (other / "test_other.py").write_text("def test_one(): ...\n")

    result = strict(".")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.assert_outcomes(errors=1, skipped=1)
    result.stdout.fnmatch_lines(["*--subnet-strict: could not import 'not_there'*"])


@pytest.mark.skipif(OLD, reason="pytest 9.0 brought subtests")
def test_a_subtest_that_is_skipped_fails(project, strict):
    project.makepyfile(
        """
        import pytest

        def test_layers(model_pair, subtests):
            with subtests.test("layer"):
                pytest.skip("no GPU")
        """
    )

    result = strict()

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--subnet-strict: no GPU"])


def test_what_comes_from_outside_is_escaped_and_kept_short(project, strict):
    project.makepyfile(
        r"""
        import pytest

        def test_pair(model_pair):
            pytest.skip("\x1b[31m\nhf_abcdefghijklmnopqrstuvwxyz012345" + "x" * 10_000)
        """
    )

    result = strict()

    text = result.stdout.str()
    assert r"--subnet-strict: \x1b[31m\n" in text
    assert "hf_abcdefghijkl" not in text
    assert max(map(len, result.outlines)) < 500


def test_the_ini_file_and_the_header(project, pair_options):
    project.makeini("[pytest]\nsubnet_strict = true")
    project.makepyfile(
        "import pytest\ndef test_pair(model_pair): pytest.skip('no GPU')",
    )

    result = project.runpytest(*pair_options)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["subnet: base base, tuned tuned, strict"])


VACUOUS = """
    import warnings

    import pytest
    from pytest_subnet import assert_update_sparsity

    def test_bound(model_pair):
        assert_update_sparsity(model_pair, at_least=0)
"""
WARNED = (
    "*VacuousBoundWarning: assert_update_sparsity: at_least=0 is no bound, nothing is below 0; "
    "say what is too little: a number above 0"
)


def test_a_vacuous_bound_is_a_warning_at_the_users_line(project, run_apart, pair_options):
    project.makepyfile(test_gate=VACUOUS)

    result = run_apart(*pair_options)

    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines([f"*test_gate.py:7: {WARNED.removeprefix('*')}"])


@pytest.mark.parametrize("more", [(), ("-p", "no:warnings")])
def test_a_vacuous_bound_fails_under_strict(project, run_apart, pair_options, more):
    project.makepyfile(test_gate=VACUOUS)

    result = run_apart(*pair_options, STRICT, *more)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [">*assert_update_sparsity(model_pair, at_least=0)", f"E {WARNED}", "test_gate.py:7:*"]
    )
    result.stdout.no_fnmatch_line("*bounds.py*")


def test_a_filter_of_the_ini_file_does_not_undo_it(project, strict):
    project.makeini("[pytest]\nfilterwarnings =\n    error\n    ignore::UserWarning")
    project.makepyfile(VACUOUS)

    strict().assert_outcomes(failed=1)


def test_a_filter_on_the_command_line_counts_more(project, strict):
    project.makepyfile(VACUOUS)

    strict("-W", "ignore::pytest_subnet.VacuousBoundWarning").assert_outcomes(passed=1)


def test_a_filter_of_the_test_counts_more(project, strict):
    mark = '@pytest.mark.filterwarnings("ignore::pytest_subnet.VacuousBoundWarning")\n    def'
    project.makepyfile(VACUOUS.replace("def", mark))

    strict().assert_outcomes(passed=1)


def test_workers_agree(project, run_apart, pair_options):
    pytest.importorskip("xdist")
    project.makepyfile(test_gate=GATES, test_bound=VACUOUS)

    result = run_apart(*pair_options, STRICT, "-n2", "--junitxml=junit.xml")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    outcomes = result.parseoutcomes()
    assert "skipped" not in outcomes
    assert (outcomes["passed"], outcomes["failed"] + outcomes["errors"]) == (1, 11)
    suite = ET.parse(project.path / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("skipped")) == ("12", "0")


def test_no_filter_is_left_behind(project, strict):
    project.makepyfile(VACUOUS)
    before = list(warnings.filters)

    strict("-p", "no:warnings").assert_outcomes(failed=1)

    assert warnings.filters == before


def test_a_gate_that_runs_passes_under_strict(project, strict, gate):
    strict("-k", "holds").assert_outcomes(passed=1, deselected=1)


GATE = "from pytest_subnet import *\ndef test_gate(model_pair): {}\n"
SPARSE = GATE.format("assert_update_sparsity(model_pair, at_least=0.5)")
NOWHERE = ("--subnet-base=base", "--subnet-tuned=nowhere")


@pytest.mark.parametrize(
    ("gate", "options", "code", "said"),
    [
        (SPARSE, ["--subnet-base=base", "--subnet-tuned="], 4, "*--subnet-tuned is empty;*"),
        (SPARSE, [], 1, "*model_pair has no checkpoints: pass --subnet-base*"),
        (SPARSE, NOWHERE, 1, "no checkpoint at *nowhere: there is no such path*"),
        (SPARSE, ["--subnet-base=base", "--subnet-tuned=base"], 1, "*base and tuned are the same*"),
        (SPARSE, ["--subnet-base=base", "--subnet-tuned=again"], 1, "*nothing moved*"),
        (GATE.format("assert_frozen(model_pair, '*nrom*')"), PAIR, 1, "*did you mean*norm*"),
        (SPARSE, [*PAIR, "--subnet-report=nowhere/report.json"], 4, "*no directory*nowhere*"),
        (SPARSE, [*PAIR, "-k", "another"], 5, "*1 deselected*"),
        (SPARSE, [*PAIR, "-p", "no:subnet"], 4, "*unrecognized arguments: *"),
        (
            "def test_gate(subnet_device): ...",
            ["--subnet-device=cuda:99"],
            1,
            "*--subnet-device cuda:99: *",
        ),
        (
            "from pytest_subnet import *\ndef test_gate(model_pair, subnet_baseline):\n"
            "    subnet_baseline.check(update_sparsity(model_pair), within={'sparsity': 0.01})",
            PAIR,
            1,
            "*no baseline for *",
        ),
    ],
)
def test_what_cannot_be_passed_by_accident(project, gate, options, code, said):
    shutil.copytree(project.path / "base", project.path / "again")
    project.makepyfile(test_gate=gate)

    result = project.runpytest(*options)

    assert result.ret == code
    assert any(fnmatchcase(line, said) for line in (*result.outlines, *result.errlines))


def test_a_misspelt_policy_is_not_passed_by_accident(project, pair_options):
    (project.path / "release.subnet.toml").write_text(
        "[assert_update_sparsity]\nat_laest = 0.5\n", encoding="utf-8"
    )

    result = project.runpytest(*pair_options, "release.subnet.toml")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*at_laest*at_least*"])


def test_a_policy_is_a_gate(project, strict):
    (project.path / "release.subnet.toml").write_text(
        "[assert_update_sparsity]\nat_least = 0\n", encoding="utf-8"
    )
    project.makeconftest(
        """
        import pytest

        def pytest_runtest_setup(item):
            if item.config.getoption("markexpr") == "skips":
                pytest.skip("no GPU")

        def pytest_itemcollected(item):
            item.add_marker("skips")
        """
    )
    project.makeini("[pytest]\nmarkers = skips")

    result = strict("release.subnet.toml")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert_update_sparsity: at_least=0 is no bound*"])
    result = strict("release.subnet.toml", "-m", "skips")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["skipped, which fails under --subnet-strict: no GPU"])
