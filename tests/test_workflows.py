"""The release jobs of docs/gating.md, run as far as they can be without the services they are for.

What a service would do besides (check out, install, cache, upload) is held to what it requires.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML reads the jobs")
pytest.importorskip("plotly", reason="the report is drawn by plotly")
pytest.importorskip("jinja2", reason="the report is written by jinja2")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gating.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OUTER = ("CI", "BUILD_NUMBER", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "PYTEST_ADDOPTS")


def block(language, first_lines):
    """The one block of the page that starts so."""
    (found,) = [text for kind, text in BLOCKS if kind == language and text.startswith(first_lines)]
    return found


GITHUB = yaml.safe_load(block("yaml", "# .github/workflows/"))
GITLAB = yaml.safe_load(block("yaml", "# .gitlab-ci.yml"))
SCRIPT = block("sh", "#!/usr/bin/env bash\n")
STEPS = GITHUB["jobs"]["gate"]["steps"]


def step(name):
    (found,) = [each for each in STEPS if each.get("name") == name]
    return found


@pytest.fixture
def project(tmp_path, llama_pair):
    """What the page says a project holds, a release, and a run that saved its base again."""
    for name in ("base", "tuned"):
        shutil.copytree(llama_pair / name, tmp_path / name)
    shutil.copytree(tmp_path / "base", tmp_path / "again")
    for path, language in (
        ("release.subnet.toml", "toml"),
        ("tests/release/test_release.py", "python"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(block(language, f"# {path}\n"), encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return tmp_path


@dataclass
class Ended:
    """What a job left."""

    directory: Path
    code: int
    printed: str

    def failures(self, name="junit.xml"):
        """The tests in `name` that did not pass, and how many tests there were."""
        suite = ET.parse(self.directory / name).getroot()[0]
        failed = [
            each.get("name") for each in suite.iter("testcase") if len(each.findall("failure"))
        ]
        assert int(suite.get("failures")) == len(failed)
        assert suite.get("errors") == suite.get("skipped") == "0"
        return failed, int(suite.get("tests"))

    def page(self, name="report.html"):
        text = (self.directory / name).read_text(encoding="utf-8")
        assert text.lstrip().lower().startswith("<!doctype html>")
        return text


def run(project, command, **variables):
    """Run as a service would: in the checkout, with nothing of this run around it."""
    clean = {name: value for name, value in os.environ.items() if name not in OUTER}
    clean = {name: value for name, value in clean.items() if not name.startswith("GITHUB_")}
    path = f"{project / 'bin'}{os.pathsep}{clean['PATH']}"
    ended = subprocess.run(
        command,
        cwd=project,
        env={**clean, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Ended(project, ended.returncode, ended.stdout)


def on_github(project, tuned):
    shell = {"bash": ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]}
    assert GITHUB["jobs"]["gate"]["env"].keys() >= {"BASE", "TUNED"}
    return run(
        project,
        [*shell[GITHUB["defaults"]["run"]["shell"]], step("Judge the release")["run"]],
        CI="true",
        GITHUB_ACTIONS="true",
        GITHUB_STEP_SUMMARY=str(project / "summary.md"),
        BASE="base",
        TUNED=tuned,
    )


def on_gitlab(project, tuned):
    script = "\n".join(GITLAB["gate"]["script"])
    return run(
        project, ["sh", "-e", "-c", script], CI="true", GITLAB_CI="true", BASE="base", TUNED=tuned
    )


def in_a_shell(project, *arguments):
    (project / "release.sh").write_text(SCRIPT, encoding="utf-8")
    return run(project, ["bash", "release.sh", *arguments])


NOT_MOVED = ["assert_update_sparsity", "assert_update_sparsity", "test_every_layer_moved"]


@pytest.mark.slow
def test_github_accepts_a_release(project):
    ended = on_github(project, "tuned")

    assert ended.code == 0, ended.printed
    assert ended.failures() == ([], 7)
    assert re.search(r"<h1[^>]*>\s*Passed", ended.page())
    assert "tuned" in (project / "summary.md").read_text(encoding="utf-8")
    assert "::error" not in ended.printed


@pytest.mark.slow
def test_github_refuses_a_base_that_was_saved_again(project):
    ended = on_github(project, "again")

    assert ended.code == 1, ended.printed
    failed, count = ended.failures()
    assert ([each.partition("[")[0] for each in failed], count) == (NOT_MOVED, 7)
    assert "nothing moved" in ended.page()
    assert "nothing moved" in (project / "summary.md").read_text(encoding="utf-8")
    assert ended.printed.count("::error ") == 3


@pytest.mark.slow
def test_gitlab_accepts_a_release(project):
    ended = on_gitlab(project, "tuned")

    assert ended.code == 0, ended.printed
    assert ended.failures() == ([], 7)
    ended.page()


@pytest.mark.slow
def test_gitlab_refuses_a_pipeline_without_its_variables(project):
    ended = on_gitlab(project, "")

    assert ended.code == 4
    assert "--subnet-tuned is empty; is the variable for it not set?" in ended.printed


@pytest.mark.slow
def test_a_shell_accepts_a_release(project):
    ended = in_a_shell(project, "base", "tuned")

    assert ended.code == 0, ended.printed
    assert ended.printed.endswith("the release was accepted\n")
    assert ended.failures("reports/junit.xml") == ([], 7)
    ended.page("reports/report.html")
    assert "7 passed" in (project / "reports" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_shell_refuses_a_base_that_was_saved_again_through_its_pipe(project):
    ended = in_a_shell(project, "base", "again")

    assert ended.code == 1, ended.printed
    assert "the release was accepted" not in ended.printed
    assert len(ended.failures("reports/junit.xml")[0]) == 3
    assert "nothing moved" in ended.page("reports/report.html")


@pytest.mark.slow
def test_without_pipefail_the_shell_would_have_accepted(project, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", SCRIPT.replace("-euo pipefail", "-eu"))

    assert in_a_shell(project, "base", "again").code == 0


@pytest.mark.parametrize("arguments", [(), ("base",), ("base", "")])
def test_a_shell_needs_both_checkpoints(project, arguments):
    ended = in_a_shell(project, *arguments)

    assert ended.code != 0
    assert "before" in ended.printed or "after fine-tuning" in ended.printed
    assert not (project / "reports").exists()


@pytest.mark.slow
def test_a_gate_that_is_skipped_stops_the_release(project):
    test = project / "tests" / "release" / "test_release.py"
    text = test.read_text(encoding="utf-8")
    test.write_text(
        text.replace("import ass", "import pytest\nfrom pytest_subnet import ass", 1)
        .replace("from pytest_subnet import pytest", "import pytest")
        .replace("    for layer", '    pytest.skip("no GPU")\n    for layer'),
        encoding="utf-8",
    )

    ended = in_a_shell(project, "base", "tuned")

    assert ended.code == 1, ended.printed
    assert "skipped, which fails under --subnet-strict: no GPU" in ended.printed


def test_every_job_runs_the_same_gate():
    gates = [step("Judge the release")["run"], *GITLAB["gate"]["script"], SCRIPT]
    for each in gates:
        words = shlex.split(each.replace("\\\n", " "), comments=True)
        start = words.index("pytest")
        assert words[start - 2 : start + 3] == [
            "python",
            "-m",
            "pytest",
            "release.subnet.toml",
            "tests/release",
        ]
        assert {"--subnet-base", "--subnet-tuned", "--subnet-strict", "--subnet-report"} <= {*words}


def test_the_extra_that_is_installed_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for command in (step("Install")["run"], *GITLAB["gate"]["before_script"]):
        name, extra = re.search(r'"([\w-]+)\[(\w+)\]"', command).groups()
        assert name == project["name"]
        assert extra in project["optional-dependencies"]


def test_what_github_requires_of_a_workflow():
    # `on` is a boolean in YAML 1.1, and a key all the same.
    assert GITHUB.keys() == {"name", True, "permissions", "defaults", "jobs"}
    inputs = GITHUB[True]["workflow_dispatch"]["inputs"]
    assert all(each.keys() == {"description", "required"} for each in inputs.values())
    for job in GITHUB["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for each in job["steps"]:
            assert len(each.keys() & {"run", "uses"}) == 1
            assert each.keys() <= {"name", "if", "run", "uses", "with"}
            assert re.fullmatch(r"actions/[\w/-]+@v\d+", each.get("uses", "actions/x@v1"))
    assert GITHUB["jobs"]["publish"]["needs"] == "gate"


def test_nothing_that_came_from_outside_is_part_of_a_script():
    assert all("${{" not in each.get("run", "") for each in STEPS)


def test_report_and_cache_are_kept_of_a_release_that_failed():
    names = [each.get("name") for each in STEPS]
    after = STEPS[names.index("Judge the release") + 1 :]
    assert [each["if"] for each in after] == ["always()"] * 2
    assert "continue-on-error" not in PAGE.partition("```yaml")[2]
    report = step("Keep the report")
    assert report["uses"].startswith("actions/upload-artifact@")
    assert report["with"]["path"].split() == ["report.html", "junit.xml"]
    kept, fetched = (
        step("Keep what was counted")["with"],
        step("Fetch what was counted before")["with"],
    )
    assert fetched == {**kept, "restore-keys": "subnet-"}
    assert kept["key"].startswith(fetched["restore-keys"])


def test_what_gitlab_requires_of_a_pipeline():
    assert GITLAB.keys() == {"stages", "variables", "gate", "publish"}
    gate, publish = GITLAB["gate"], GITLAB["publish"]
    assert [gate["stage"], publish["stage"]] == GITLAB["stages"]
    assert publish["needs"] == ["gate"]
    assert gate.keys() == {"stage", "image", "cache", "before_script", "script", "artifacts"}
    assert gate["artifacts"] == {
        "when": "always",
        "paths": ["report.html"],
        "reports": {"junit": "junit.xml"},
    }
    assert gate["cache"] == {"key": "subnet", "when": "always", "paths": [".pytest_cache/"]}
    assert all(each.keys() == {"description", "value"} for each in GITLAB["variables"].values())


@pytest.mark.skipif(shutil.which("bash") is None, reason="the system has no bash")
def test_the_script_is_what_bash_reads():
    assert subprocess.run(["bash", "-n"], input=SCRIPT, text=True).returncode == 0
