"""The ini key subnet_tolerances: counted in the one pass that there is."""

import pytest


@pytest.fixture
def three_tolerances(project):
    """Three tests that need the pair under three tolerances."""
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_bits(model_pair):
            assert update_sparsity(model_pair).updated == 12

        def test_absolute(model_pair):
            assert update_sparsity(model_pair, atol=0.6).updated == 0

        def test_relative(model_pair):
            assert update_sparsity(model_pair, rtol=0.1).updated == 12
        """
    )


@pytest.mark.usefixtures("three_tolerances")
def test_what_is_declared_is_counted_in_one_scan(project, pair_options, scans):
    project.makeini("[pytest]\nsubnet_tolerances =\n    atol=0.6\n    rtol=1e-1")

    project.runpytest(*pair_options).assert_outcomes(passed=3)

    assert scans == [("base -> tuned", 4)]


@pytest.mark.usefixtures("three_tolerances")
def test_what_is_not_declared_takes_a_scan_of_its_own(project, pair_options, scans):
    project.runpytest(*pair_options).assert_outcomes(passed=3)

    assert len(scans) == 3


def test_what_is_declared_is_shown_beside_every_number(project, pair_options):
    project.makeini("[pytest]\nsubnet_tolerances = rtol=0.1")
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_shown(model_pair):
            assert "rtol=0.1" in update_sparsity(model_pair).updated_under
        """
    )

    project.runpytest(*pair_options).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "value",
    ["1e-5", "atol", "atol=", "atol=x", "atol=-1", "rtol=nan", "rtol=inf", "tol=1", "atol = 1"],
)
def test_what_is_no_tolerance_is_a_usage_error(project, value):
    project.makeini(f"[pytest]\nsubnet_tolerances =\n    rtol=1e-3\n    {value}")

    result = project.runpytest()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = f"'{value}' is not atol=NUMBER or rtol=NUMBER, one a line"
    result.stderr.fnmatch_lines([f"ERROR: *.ini: subnet_tolerances: {said}"])


def test_without_an_ini_file_the_command_line_is_named(project):
    result = project.runpytest("-o", "subnet_tolerances=1e-6")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: -o: subnet_tolerances: '1e-6' is not atol=NUMBER or rtol=NUMBER, one a line"]
    )


def test_a_number_of_toml_is_no_tolerance(project):
    project.makepyprojecttoml("[tool.pytest.ini_options]\nsubnet_tolerances = [1e-6]\n")

    result = project.runpytest()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *subnet_tolerances*"])
