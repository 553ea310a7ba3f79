"""Correct in every host: strict, with warnings as errors, read-only, alone, switched off."""

import os
import stat

import pytest

NATIVE_TOML = pytest.version_tuple >= (9, 0)


def test_strict_mode_with_warnings_as_errors(project, run_apart, gate):
    settings = {"base": "base", "tuned": "tuned", "device": "cpu", "tolerances": "atol=1e-6"}
    if NATIVE_TOML:
        lines = [f'subnet_{key} = "{value}"' for key, value in settings.items()]
        lines[-1] = 'subnet_tolerances = ["atol=1e-6"]'
        project.makepyprojecttoml("\n".join(["[tool.pytest]", "strict = true", *lines]))
    else:
        lines = [f"subnet_{key} = {value}" for key, value in settings.items()]
        strict = "addopts = --strict-markers --strict-config"
        project.makeini("\n".join(["[pytest]", strict, *lines]))

    result = run_apart("-W", "error")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["subnet: base base, tuned tuned, device cpu, also counting atol=1e-6", "*what moved*"]
    )


def test_every_fixture_with_warnings_as_errors(project, run_apart, pair_options):
    project.makepyfile(
        """
        import torch
        from pytest_subnet import assert_frozen, open_pair

        def test_all(model_pair, open_model_pair, record_update, subnet_device):
            assert open_model_pair("base", "tuned") is model_pair
            model = torch.nn.Linear(2, 2)
            with record_update(model) as update: ...
            assert_frozen(update, "*")
            assert_frozen(open_pair("base", "tuned"), "*norm*")
        """
    )

    run_apart("-W", "error", *pair_options).assert_outcomes(passed=1)


def test_collecting_shows_each_pair_and_reads_none(project, gate, scans):
    project.makepyfile(
        test_marked="""
        import pytest

        @pytest.mark.model_pair(base="base", tuned="nowhere")
        def test_marked(model_pair): ...
        """
    )

    result = project.runpytest("--collect-only", "-q")

    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "test_gate.py::test_holds",
            "test_gate.py::test_fails",
            "test_marked.py::test_marked[[]base-nowhere[]]",
        ]
    )
    assert scans == []


def test_nothing_selected_is_pytests_own_exit_code(project, gate, pair_options):
    result = project.runpytest(*pair_options, "-k", "nothing-of-this-name")

    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.no_fnmatch_line("*what moved*")


def test_no_tests_at_all(project, pair_options):
    assert project.runpytest(*pair_options).ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_switched_off_by_its_name(run_apart, gate):
    result = run_apart("-p", "no:subnet")

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*fixture 'model_pair' not found"])
    result.stdout.no_fnmatch_line("*subnet-*")


def test_switched_off_its_assertions_still_work(project, run_apart):
    project.makepyfile(
        """
        from pytest_subnet import assert_update_sparsity, open_pair

        def test_plain():
            assert_update_sparsity(open_pair("base", "tuned"), at_least=0.8)
        """
    )

    run_apart("-p", "no:subnet").assert_outcomes(passed=1)


def test_loaded_by_hand_where_nothing_loads_by_itself(run_apart, gate, pair_options, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    unknown = run_apart(*pair_options)
    known = run_apart("-p", "pytest_subnet.plugin", *pair_options)

    assert unknown.ret == pytest.ExitCode.USAGE_ERROR
    known.assert_outcomes(passed=1, failed=1)
    known.stdout.fnmatch_lines(["*what moved*"])


@pytest.mark.parametrize("way", ["blocked", "not installed"])
def test_without_xdist(project, run_apart, gate, pair_options, monkeypatch, way):
    arguments = ["-p", "no:xdist"]
    if way == "not installed":
        project.makepyfile(xdist="raise ImportError('xdist is not installed')")
        monkeypatch.setenv("PYTHONPATH", str(project.path))
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        arguments = ["-p", "pytest_subnet.plugin"]

    result = run_apart("-W", "error", *arguments, *pair_options)

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*what moved*", "base -> tuned"])


def test_without_the_cache_in_a_rootdir_that_cannot_be_written_to(project, gate, pair_options):
    project.makeini("[pytest]")
    mode = stat.S_IMODE(project.path.stat().st_mode)
    before = {path.relative_to(project.path) for path in project.path.rglob("*")}
    os.chmod(project.path, 0o555)  # noqa: PTH101
    try:
        result = project.runpytest("-p", "no:cacheprovider", *pair_options)
    finally:
        os.chmod(project.path, mode)  # noqa: PTH101

    result.assert_outcomes(passed=1, failed=1)
    after = {path.relative_to(project.path) for path in project.path.rglob("*")}
    assert {path for path in after - before if "__pycache__" not in path.parts} == set()


def test_the_help_names_every_option(project):
    result = project.runpytest("--help")

    result.stdout.fnmatch_lines(
        [
            "weights of fine-tuned models (pytest-subnet):",
            "  --subnet-base=PATH_ID_OR_URL",
            "  --subnet-tuned=PATH_ID_OR_URL",
            "  --subnet-device=DEVICE",
            "  subnet_base (string):*",
            "  subnet_tuned (string):*",
            "  subnet_device (string):*",
            "  subnet_tolerances (linelist):*",
        ]
    )
