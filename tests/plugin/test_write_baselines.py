"""--subnet-write-baselines: what it records, where it is refused, and what it leaves alone."""

import json
import sys

import pytest

GATE = """
    import os
    import pytest

    class Result:
        def __init__(self, number, finding="one", base="0"):
            self.number, self.finding = number, finding
            self.fingerprints = {"base": base * 32, "tuned": "1" * 32}

        def to_dict(self):
            return {"finding": self.finding, "number": self.number, "tolerance": "same bits"}

    class TestRun:
        @pytest.mark.parametrize("name", ["a", "b"])
        def test_one(self, subnet_baseline, name):
            subnet_baseline.check(Result(NUMBER), within={"number": 5})
            subnet_baseline.check(Result(NUMBER + 1), within={"number": 5})

    def test_last(subnet_baseline):
        subnet_baseline.check(Result(NUMBER / 3, base=BASE), within={"number": 0.1})
        LAST
"""
WRITE = "--subnet-write-baselines"
FILE = "subnet_baselines/test_gate.json"


@pytest.fixture
def write(project):
    """Runs the gate with these values and records."""

    def run(*options, number=10, base="0", last="pass"):
        source = GATE.replace("NUMBER", str(number)).replace("BASE", repr(base))
        project.makepyfile(test_gate=source.replace("LAST", last))
        return project.runpytest(WRITE, *options)

    return run


@pytest.fixture
def recorded(project):
    """The numbers in the file, by test and name."""

    def read():
        tests = json.loads((project.path / FILE).read_text())["tests"]
        return {
            test: {name: entry["numbers"]["number"] for name, entry in entries.items()}
            for test, entries in tests.items()
        }

    return read


def section(result):
    lines = [line.rstrip() for line in result.outlines]
    start = next(i for i, line in enumerate(lines) if "= subnet: baselines =" in line)
    rest = lines[start + 1 :]
    return rest[: next(i for i, line in enumerate(rest) if line.startswith("==="))]


def test_what_was_written_is_listed(write, recorded):
    result = write()

    result.assert_outcomes(passed=3)
    assert section(result) == [
        f"{FILE}: TestRun::test_one[a] one: new",
        f"{FILE}: TestRun::test_one[a] one#2: new",
        f"{FILE}: TestRun::test_one[b] one: new",
        f"{FILE}: TestRun::test_one[b] one#2: new",
        f"{FILE}: test_last one: new",
    ]
    assert recorded() == {
        "TestRun::test_one[a]": {"one": 10, "one#2": 11},
        "TestRun::test_one[b]": {"one": 10, "one#2": 11},
        "test_last": {"one": 10 / 3},
    }


def test_old_and_new_are_shown_and_other_tests_stay(write, recorded):
    write()

    result = write("-k", "not b", number=12, base="2")

    result.assert_outcomes(passed=2, deselected=1)
    assert section(result) == [
        f"{FILE}: TestRun::test_one[a] one: number 10 → 12",
        f"{FILE}: TestRun::test_one[a] one#2: number 11 → 13",
        f"{FILE}: test_last one: number 3.33333 → 4, another base",
    ]
    assert recorded()["TestRun::test_one[b]"] == {"one": 10, "one#2": 11}
    assert section(write(number=12, base="2"))[0] == (
        f"{FILE}: TestRun::test_one[a] one: as before"
    )


@pytest.mark.parametrize("last", ["assert 0", "pytest.skip()", "pytest.xfail()"])
def test_a_test_that_did_not_pass_records_nothing(write, recorded, last):
    write(last=last)
    assert list(recorded()) == ["TestRun::test_one[a]", "TestRun::test_one[b]"]


def test_a_file_that_cannot_be_read_is_left_alone(write, project):
    (project.path / "subnet_baselines").mkdir()
    (project.path / FILE).write_text("{")

    result = write("-k", "last")

    result.assert_outcomes(passed=1, errors=1, deselected=2)
    assert (
        f"{FILE} is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)); restore it from version control, or delete it and record its baselines: "
        f"pytest test_gate.py {WRITE}"
    ) in result.outlines
    assert (project.path / FILE).read_text() == "{"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys is Linux's")
def test_where_nothing_can_be_written_the_test_errs(write, project):
    (project.path / "subnet_baselines").symlink_to("/sys/kernel")

    result = write("-k", "last")

    result.assert_outcomes(passed=1, errors=1, deselected=2)
    assert (
        f"cannot write {FILE}: Permission denied; record where the repository can be written to, "
        "and commit the file"
    ) in result.outlines
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("options", [("-n2",), ("--dist=load", "--tx=popen"), ("-d", "--tx=popen")])
def test_workers_do_not_write(write, options, pytestconfig):
    pytest.importorskip("xdist")
    if "no:xdist" in pytestconfig.getoption("--inside"):
        pytest.skip("without xdist inside")

    result = write(*options)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (
        f"ERROR: {WRITE} cannot run under xdist: workers would overwrite what the others wrote; "
        "repeat with -n0"
    ) in result.errlines


@pytest.mark.parametrize("value", ["true", "1", "yes", "TRUE"])
def test_ci_does_not_write(write, monkeypatch, value):
    monkeypatch.setenv("CI", value)

    result = write()

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (
        f"ERROR: {WRITE} is refused where CI is set: a release would be held to itself; record "
        "where you can look at the difference, and commit it"
    ) in result.errlines


@pytest.mark.parametrize("value", ["", "0", "false", "False"])
def test_where_ci_says_no_it_writes(write, monkeypatch, value):
    monkeypatch.setenv("CI", value)
    write("-k", "last").assert_outcomes(passed=1, deselected=2)


def test_ci_compares(write, monkeypatch, project):
    write()
    monkeypatch.setenv("CI", "true")
    project.runpytest().assert_outcomes(passed=3)


def test_processes_that_follow_do_not_write(write, monkeypatch, project):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    write("-k", "last").assert_outcomes(passed=1, deselected=2)
    assert not (project.path / FILE).exists()

    monkeypatch.setenv("RANK", "0")
    write("-k", "last").assert_outcomes(passed=1, deselected=2)
    assert (project.path / FILE).exists()


def test_the_command_of_a_worker_can_be_pasted(write, project, run_apart):
    pytest.importorskip("xdist")
    write("-k", "nothing")

    result = run_apart("-n1", "-k", "last")

    result.assert_outcomes(failed=1)
    command = f"pytest test_gate.py::test_last -n0 {WRITE}"
    assert any(line.endswith(command) for line in result.outlines)
