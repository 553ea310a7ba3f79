"""--subnet-base and --subnet-tuned, and their ini keys."""

from pathlib import Path

import pytest

NATIVE_TOML = pytest.version_tuple >= (9, 0)
SHOWS_PAIR = """
    def test_pair(model_pair):
        print("pair:", model_pair.label)
"""


def pair_of(result):
    """What the test above printed."""
    result.assert_outcomes(passed=1)
    return next(line for line in result.outlines if "pair: " in line).partition("pair: ")[2]


def test_options_are_relative_to_where_pytest_is_called(project, monkeypatch):
    project.makeini("[pytest]")
    project.makepyfile(SHOWS_PAIR)
    project.mkdir("below")
    monkeypatch.chdir("below")

    result = project.runpytest(
        "-s", "--rootdir=..", "--subnet-base=../base", "--subnet-tuned=../tuned", ".."
    )

    assert pair_of(result) == "base -> tuned"


def test_absolute_paths_are_shown_whole_where_they_leave_the_rootdir(project, checkpoints):
    project.makepyfile(SHOWS_PAIR)

    base = checkpoints / "base"

    result = project.runpytest("-s", f"--subnet-base={base}", "--subnet-tuned=tuned")

    assert pair_of(result) == f"{base} -> tuned"


def test_home_is_expanded(project, monkeypatch):
    project.makepyfile(SHOWS_PAIR)
    monkeypatch.setenv("HOME", str(project.path))
    monkeypatch.setenv("USERPROFILE", str(project.path))

    result = project.runpytest("-s", "--subnet-base=~/base", "--subnet-tuned=~/tuned")

    assert pair_of(result) == "base -> tuned"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pytest.ini", "[pytest]\nsubnet_base = base\nsubnet_tuned = tuned\n"),
        (
            "pyproject.toml",
            '[tool.pytest.ini_options]\nsubnet_base = "base"\nsubnet_tuned = "tuned"\n',
        ),
        pytest.param(
            "pyproject.toml",
            '[tool.pytest]\nsubnet_base = "base"\nsubnet_tuned = "tuned"\n',
            marks=pytest.mark.skipif(not NATIVE_TOML, reason="pytest 9.0 brought [tool.pytest]"),
            id="native",
        ),
    ],
)
def test_ini_keys_are_relative_to_the_rootdir(project, monkeypatch, file, text):
    (project.path / file).write_text(text)
    project.makepyfile(SHOWS_PAIR)
    project.mkdir("below")
    monkeypatch.chdir("below")

    assert pair_of(project.runpytest("-s", "..")) == "base -> tuned"


def test_an_option_wins_over_its_ini_key(project):
    project.makeini("[pytest]\nsubnet_base = nowhere\nsubnet_tuned = tuned")
    project.makepyfile(SHOWS_PAIR)

    assert pair_of(project.runpytest("-s", "--subnet-base=base")) == "base -> tuned"


def test_a_test_may_change_the_working_directory(project, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import assert_update_sparsity

        def test_elsewhere(model_pair, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)
            assert_update_sparsity(model_pair, at_least=0.8)
        """
    )

    project.runpytest(*pair_options).assert_outcomes(passed=1)


def test_paths_may_hold_spaces_and_other_scripts(project, pair_options):
    for name in ("base", "tuned"):
        Path(name).rename(f"{name} für 模型")
    project.makepyfile(SHOWS_PAIR)

    result = project.runpytest("-s", *(f"{option} für 模型" for option in pair_options))

    assert pair_of(result) == "base für 模型 -> tuned für 模型"


@pytest.mark.parametrize("name", ["base", "tuned", "device"])
def test_an_empty_option_is_a_usage_error(project, name):
    result = project.runpytest(f"--subnet-{name}=")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --subnet-{name} is empty; is the variable for it *"])


@pytest.mark.skipif(not NATIVE_TOML, reason="pytest 9.0 brought [tool.pytest]")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("subnet_base", "5"),
        ("subnet_tuned", '["a"]'),
        ("subnet_device", "true"),
        ("subnet_tolerances", '"atol=1e-6"'),
    ],
)
def test_a_value_of_another_type_is_a_usage_error(project, key, value):
    project.makepyprojecttoml(f"[tool.pytest]\n{key} = {value}\n")

    result = project.runpytest()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *pyproject.toml: *{key}*"])
