"""--subnet-report: what is in the file, when it is written, and what is found out beforehand."""

import importlib.resources
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from pytest_subnet.reports import markdown
from pytest_subnet.reports.page_words import verdict_of

SCHEMA = json.loads(
    importlib.resources.files("pytest_subnet").joinpath("reports/schema.json").read_text("utf-8")
)
ALL_OUTCOMES = """
    import pytest
    from pytest_subnet import assert_update_sparsity, update_movement, update_rank

    def test_holds(model_pair):
        assert_update_sparsity(model_pair, at_least=0.8)
        update_rank(model_pair)

    def test_fails(model_pair):
        assert_update_sparsity(model_pair, at_least=0.9, atol=1e-5)

    @pytest.fixture
    def broken(model_pair):
        update_movement(model_pair)
        raise RuntimeError("no setup")

    def test_setup(broken): ...

    @pytest.fixture
    def untidy():
        yield
        raise RuntimeError("no teardown")

    def test_teardown(untidy): ...

    @pytest.mark.skip(reason="not today")
    def test_skipped(model_pair): ...

    def test_skips_itself():
        pytest.skip("nor tomorrow")

    @pytest.mark.xfail(reason="known")
    def test_xfailed():
        assert 1 == 2

    @pytest.mark.xfail(reason="was known")
    def test_xpassed(): ...

    @pytest.mark.xfail(strict=True)
    def test_strict(): ...

    def test_other(): ...
"""
OUTCOMES = {
    "test_holds": "passed",
    "test_fails": "failed",
    "test_setup": "error",
    "test_teardown": "error",
    "test_skipped": "skipped",
    "test_skips_itself": "skipped",
    "test_xfailed": "xfailed",
    "test_xpassed": "xpassed",
    "test_strict": "failed",
    "test_other": "passed",
}
PASSES = """
    from pytest_subnet import update_sparsity

    def test_it(model_pair):
        update_sparsity(model_pair)
"""
EARLIER = '{"version":1,"passed":true,"counts":{},"tests":[],"pairs":[],"environment":{}}'


@pytest.fixture
def reported(project, pair_options):
    """Runs pytest with a report, and gives what is in it, held to the schema."""

    def reported(*arguments, run=project.runpytest):
        run("--subnet-report=out.json", *pair_options, *arguments)
        run = json.loads((project.path / "out.json").read_text())
        jsonschema.validate(run, SCHEMA, cls=jsonschema.Draft202012Validator)
        return run

    return reported


def by_name(run):
    return {test["nodeid"].rpartition("::")[2]: test for test in run["tests"]}


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_outcome_is_told(project, reported):
    project.makepyfile(test_all=ALL_OUTCOMES)

    run = reported()

    tests = by_name(run)
    assert {name: test["outcome"] for name, test in tests.items()} == OUTCOMES
    assert run["passed"] is False
    assert run["counts"] == {
        **{"passed": 2, "failed": 2, "error": 2},
        **{"skipped": 2, "xfailed": 1, "xpassed": 1},
    }
    assert [name for name, test in tests.items() if test["gate"]] == [
        *("test_holds", "test_fails", "test_setup", "test_skipped")
    ]
    assert tests["test_fails"]["file"] == "test_all.py"
    assert tests["test_fails"]["line"] == 8
    assert min(test["seconds"] for test in tests.values()) >= 0


def test_messages_say_why_without_a_traceback(project, reported):
    project.makepyfile(ALL_OUTCOMES)

    tests = by_name(reported())

    assert tests["test_fails"]["message"].startswith(
        "update sparsity 85.71% is below the required 90.00%\n  pair       base -> tuned"
    )
    assert tests["test_fails"]["message"].endswith("\n  to accept  at_least=0.85")
    assert tests["test_setup"]["message"] == "RuntimeError: no setup"
    assert tests["test_teardown"]["message"] == "RuntimeError: no teardown"
    assert tests["test_skipped"]["message"] == "not today"
    assert tests["test_skips_itself"]["message"] == "nor tomorrow"
    assert tests["test_xfailed"]["message"] == "known"
    assert tests["test_xpassed"]["message"] == ""
    assert tests["test_strict"]["message"] == "[XPASS(strict)]"
    assert tests["test_holds"]["message"] == ""


def test_results_come_with_their_numbers_and_tensors(project, reported):
    project.makepyfile(ALL_OUTCOMES)

    tests = by_name(reported())

    sparsity, rank = tests["test_holds"]["results"]
    assert (sparsity["finding"], rank["finding"]) == ("update_sparsity", "update_rank")
    assert sparsity["numbers"]["updated"] == 12
    tensors = [
        dict(zip(sparsity["tensors"]["columns"], row, strict=True))
        for row in sparsity["tensors"]["rows"]
    ]
    assert [each["updated"] for each in tensors] == [0, 4, 8, 0]
    assert tensors[1] == {
        "name": "model.layers.0.self_attn.q_proj.weight",
        "kind": "q_proj",
        "layer": 0,
        "shape": "4×4",
        "dtype": "f32",
        "numel": 16,
        "updated": 4,
        "changed": 4,
        "zero_sign_flips": 0,
        "nonfinite_base": 0,
        "nonfinite_tuned": 0,
        "max_change": 0.5,
        "change_norm": 1.0,
        "base_norm": 4.0,
        "tuned_norm": pytest.approx(21**0.5),
        "sparsity": 0.75,
        "relative_change": 0.25,
    }
    assert [each["finding"] for each in tests["test_setup"]["results"]] == ["update_movement"]
    assert tests["test_other"]["results"] == []


def test_pairs_come_with_their_tensors_and_what_is_published(project, reported):
    project.makepyfile(PASSES)

    run = reported()

    (pair,) = run["pairs"]
    assert run["passed"] is True
    assert (pair["pair"], pair["total"], pair["entries"]) == ("base -> tuned", 4, 84)
    assert (pair["updated"], pair["beyond"]) == (12, 12)
    assert pair["base"] == {"label": "base", "fingerprint": None}
    assert pair["tensors"]["rows"][1] == [
        *("model.layers.0.self_attn.q_proj.weight", "q_proj", 0, "f32", "4×4"),
        *(16, 4, 4, 0.5, 1.0, 4.0),
    ]
    assert len(pair["published"]["rows"]) == 5
    assert pair["published"]["rows"][0][0].startswith("arXiv 2505.11711, ")


def test_the_environment_names_versions_and_settings(project, reported):
    project.makepyfile(PASSES)

    environment = reported()["environment"]

    assert environment["pytest"] == pytest.__version__
    assert {"python", "torch", "pytest-subnet", "platform"} <= environment.keys()
    assert (environment["base"], environment["tuned"]) == ("base", "tuned")
    assert (environment["engine"], environment["strict"]) == ("threads", "no")
    assert os.uname().nodename not in environment.values()


@pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="pytest 9.0 brought subtests")
def test_subtests_belong_to_their_test(project, reported):
    project.makepyfile(
        """
        from pytest_subnet import assert_update_sparsity

        def test_layers(model_pair, subtests):
            for layer in (0, 1):
                with subtests.test(layer=layer):
                    assert_update_sparsity(model_pair, include=f"*.{layer}.*", at_least=0.8)
            assert_update_sparsity(model_pair, at_least=0.8)
        """
    )

    (test,) = reported()["tests"]

    assert [each["numbers"]["updated"] for each in test["results"]] == [4, 8, 12]
    assert test["outcome"] == "failed"
    assert test["message"].count("update sparsity 75.00% is below the required 80.00%") == 2
    assert test["message"].endswith("contains 2 failed subtests")


def test_workers_hand_the_same_over(project, reported, run_apart):
    pytest.importorskip("xdist")
    project.makepyfile(ALL_OUTCOMES.replace("update_rank", "update_movement"))

    def facts(run):
        for test in run["tests"]:
            del test["seconds"]
        return {**run, "tests": sorted(run["tests"], key=lambda test: test["nodeid"])}

    alone = facts(reported(run=run_apart))
    (project.path / "out.json").unlink()

    assert facts(reported("-n1", run=run_apart)) == alone


def test_a_worker_that_crashes_is_a_failure(project, reported, run_apart):
    pytest.importorskip("xdist")
    project.makepyfile(
        """
        import os

        def test_fine(): ...
        def test_crash(model_pair): os._exit(1)
        """
    )

    run = reported("-n1", run=run_apart)

    test = by_name(run)["test_crash"]
    assert run["passed"] is False
    assert test["outcome"] == "error"
    assert test["message"].startswith("worker 'gw0' crashed while running")


def test_a_file_that_cannot_be_collected_is_an_error(project, reported):
    project.makepyfile(test_bad="import no_such_module", test_good=PASSES)

    run = reported("--continue-on-collection-errors")

    assert run["passed"] is False
    (bad,) = (test for test in run["tests"] if test["outcome"] == "error")
    assert (bad["nodeid"], bad["file"], bad["line"]) == ("test_bad.py", "test_bad.py", 1)
    assert "No module named 'no_such_module'" in bad["message"]


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("", {}),
        ("import pytest\n@pytest.mark.skip\ndef test_skipped(): ...", {"skipped": 1}),
        ("def test_fine(): ...\ndef test_stop(): raise KeyboardInterrupt", {"passed": 1}),
    ],
)
def test_a_run_in_which_nothing_was_judged_or_that_was_stopped_has_not_passed(
    project, reported, run_apart, body, counts
):
    project.makepyfile(body)

    run = reported(run=run_apart)

    assert run["passed"] is False
    assert run["counts"] == counts


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        (["-k", "test_holds"], "-k test_holds"),
        (["--deselect", "test_two.py::test_fails"], "--deselect test_two.py::test_fails"),
        (["test_two.py::test_holds"], "test_two.py::test_holds"),
    ],
)
def test_what_was_left_out_is_said_beside_the_verdict(project, reported, options, selection):
    project.makepyfile(test_two="def test_holds(): ...\ndef test_fails(): assert 0")

    run = reported(*options)

    assert run["passed"]
    assert run["environment"]["selection"] == selection
    assert markdown.page(run).startswith(
        f"## pytest-subnet: passed (1 passed; selection `{selection}`)\n"
    )
    assert verdict_of(run)["details"].endswith(f"; selection {selection}")


def test_a_run_that_compared_with_no_baseline_says_so(project, reported):
    project.makepyfile(test_it="def test_it(): ...")

    run = reported("--subnet-write-baselines")

    assert run["environment"]["baselines"] == "written, not compared"
    assert markdown.page(run).startswith(
        "## pytest-subnet: passed (1 passed; baselines `written, not compared`)\n"
    )
    assert verdict_of(run)["details"].endswith("; baselines written, not compared")


def test_what_others_fail_a_run_for_fails_the_report_too(project, reported):
    project.makepyfile(PASSES)
    project.makeconftest(
        """
        import pytest

        @pytest.hookimpl(trylast=True)
        def pytest_sessionfinish(session):
            session.exitstatus = 1
        """
    )

    assert reported()["passed"] is False


@pytest.mark.parametrize("ending", [".html", ".json", ".md", ".HTML"])
def test_the_end_of_the_run_says_where_the_report_is(project, pair_options, ending):
    project.makepyfile(PASSES)

    result = project.runpytest(*pair_options, f"--subnet-report=out{ending}")

    assert result.ret == 0
    assert result.outlines[-2] == f"subnet: report written to out{ending}"
    assert (project.path / f"out{ending}").stat().st_size > 500


def test_the_ini_key_is_relative_to_the_rootdir(project, pair_options, monkeypatch):
    project.makeini("[pytest]\nsubnet_report = out.md")
    project.makepyfile(PASSES)
    monkeypatch.chdir(project.mkdir("below"))

    project.runpytest("--subnet-base=../base", "--subnet-tuned=../tuned", "..")

    assert (project.path / "out.md").read_text().startswith("## pytest-subnet: passed (1 passed)\n")


def test_it_is_written_without_a_terminal(project, reported):
    project.makepyfile(PASSES)

    assert reported("-p", "no:terminal")["passed"] is True


@pytest.mark.parametrize("how", [("--collect-only",), ("--fixtures",), ("--help",), ("--version",)])
def test_a_run_without_tests_leaves_the_report_of_another_alone(project, pair_options, how):
    project.makepyfile(PASSES)
    (project.path / "out.json").write_text("of another run")

    project.runpytest(*pair_options, "--subnet-report=out.json", *how)

    assert (project.path / "out.json").read_text() == "of another run"


@pytest.mark.parametrize("wrong", ["--subnet-device=tpu", "--subnet-tuned=", "nowhere.py"])
@pytest.mark.usefixtures("gate")
def test_a_run_that_cannot_start_leaves_no_report_of_another(project, wrong):
    (project.path / "out.json").write_text(EARLIER)

    result = project.runpytest("--subnet-report=out.json", wrong)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    if wrong == "nowhere.py":  # found out by pytest, in a session that has a report
        assert json.loads((project.path / "out.json").read_text())["passed"] is False
    else:
        assert not (project.path / "out.json").exists()


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "data.json", "index.html"])
@pytest.mark.usefixtures("gate")
def test_what_is_no_report_is_not_removed(project, name):
    (project.path / name).write_text('{"version":1} pytest-subnet')

    result = project.runpytest(f"--subnet-report={name}", "--subnet-device=tpu")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (project.path / name).read_text() == '{"version":1} pytest-subnet'


@pytest.mark.parametrize("name", ["out.md", "out.json", "out.html"])
def test_a_report_is_known_by_its_start(project, pair_options, name):
    project.makepyfile(PASSES)
    project.runpytest(*pair_options, f"--subnet-report={name}")
    assert (project.path / name).exists()

    project.runpytest(f"--subnet-report={name}", "--subnet-device=tpu")

    assert not (project.path / name).exists()


def test_processes_that_follow_write_nothing(project, pair_options, monkeypatch):
    project.makepyfile(PASSES)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    project.runpytest(*pair_options, "--subnet-report=out.json").assert_outcomes(passed=1)

    assert not (project.path / "out.json").exists()


def test_results_are_no_properties_of_the_test(project, pair_options):
    project.makepyfile(PASSES)

    project.runpytest(*pair_options, "--subnet-report=out.json", "--junit-xml=junit.xml")

    assert "q_proj" not in (project.path / "junit.xml").read_text()


UNKNOWN = (
    "ERROR: --subnet-report (or subnet_report) is 'out{}'; its name must end in .html, .json or .md"
)


@pytest.mark.parametrize("ending", ["", ".txt", ".json.gz", "json"])
def test_an_unknown_ending_is_refused_at_the_start(project, gate, pair_options, scans, ending):
    result = project.runpytest(*pair_options, f"--subnet-report=out{ending}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == [UNKNOWN.format(ending), ""]
    assert scans == []


def test_an_unknown_ending_in_the_ini_file_is_refused_too(project, run_apart, gate):
    project.makeini("[pytest]\nsubnet_report = out.pdf")

    for more in ([], ["-n1"]):
        result = run_apart(*more)

        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert result.errlines == [UNKNOWN.format(".pdf"), ""]


def test_a_directory_that_is_missing_is_found_out_at_the_start(project, gate, pair_options, scans):
    result = project.runpytest(*pair_options, "--subnet-report=reports/out.json")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == [
        "ERROR: --subnet-report (or subnet_report) is 'reports/out.json', and there is no "
        f"directory {project.path / 'reports'}; make it first",
        "",
    ]
    assert scans == []


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        (f"{'x' * 300}.json", f"{'x' * 150}…{'x' * 144}.json", "File name too long"),
        ("null\0byte.json", r"null\\x00byte.json", "embedded null byte"),
    ],
)
def test_a_name_that_no_file_can_have_is_found_out_at_the_start(
    project, gate, pair_options, scans, name, shown, reason
):
    result = project.runpytest(*pair_options, f"--subnet-report={name}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines[0] == (
        f"ERROR: --subnet-report (or subnet_report) is '{shown}', and no file can be made there "
        f"({reason})"
    )
    assert scans == []


def test_a_directory_in_its_place_is_found_out_at_the_start(project, gate, pair_options, scans):
    project.mkdir("out.json")

    result = project.runpytest(*pair_options, "--subnet-report=out.json")

    assert result.errlines == [
        "ERROR: --subnet-report (or subnet_report) is 'out.json', which is a directory; name a "
        "file in it",
        "",
    ]
    assert scans == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="everything can be written to")
def test_a_directory_that_cannot_be_written_to_is_found_out_at_the_start(
    project, gate, pair_options, scans
):
    result = project.runpytest(*pair_options, "--subnet-report=/proc/self/out.json")

    (message, _) = result.errlines
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message.startswith(
        "ERROR: --subnet-report (or subnet_report) is '/proc/self/out.json', and no file can be "
        "made in /proc/self ("
    )
    assert message.endswith("); name one in a directory that you can write to")
    assert scans == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any file")
def test_a_file_that_is_write_protected_is_found_out_at_the_start(project, gate, pair_options):
    (project.path / "out.json").touch(mode=0o444)

    result = project.runpytest(*pair_options, "--subnet-report=out.json")

    assert result.errlines == [
        "ERROR: --subnet-report (or subnet_report) is 'out.json', which is write-protected; "
        "remove it or name another",
        "",
    ]


def test_a_page_without_what_makes_it_is_refused_at_the_start(project, gate, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)  # as if it were not installed

    result = project.runpytest("--subnet-report=out.html")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.errlines == [
        "ERROR: --subnet-report (or subnet_report) is 'out.html', and a page needs plotly: "
        'pip install "pytest-subnet[report]", or name a file that ends in .json or .md',
        "",
    ]


def test_a_report_that_cannot_be_written_in_the_end_fails_the_run(project, pair_options):
    project.mkdir("reports")
    project.makepyfile(PASSES + "\n        import os; os.rmdir('reports')\n")

    result = project.runpytest(*pair_options, "--subnet-report=reports/out.json")

    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["subnet: the report is not written: *No such file or directory*"])
    result.stdout.no_fnmatch_line("*report written to*")


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_report_that_could_be_taken_for_its_own(
    project, pair_options
):
    (project.path / "out.json").write_text(EARLIER)
    project.makepyfile(
        PASSES + "\n        import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    killed = subprocess.run(
        [sys.executable, "-m", "pytest", "--subnet-report=out.json", *pair_options],
        cwd=project.path,
        capture_output=True,
        check=False,
    )

    assert killed.returncode == -signal.SIGKILL
    assert not (project.path / "out.json").exists()
    assert not list(project.path.glob(".out*"))
