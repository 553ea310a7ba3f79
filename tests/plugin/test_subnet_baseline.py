"""The fixture subnet_baseline, and what is said of baselines that no test used."""

import json
import textwrap

import pytest

GATE = """
    import pytest
    from pytest_subnet import update_sparsity

    def test_release(model_pair, subnet_baseline):
        subnet_baseline.check(update_sparsity(model_pair), within={"sparsity": 0.02, "updated": 0})
"""
QUICK = """
    import os
    import pytest

    class Result:
        fingerprints = {"base": "0" * 32}

        def __init__(self, number=1):
            self.number = number

        def to_dict(self):
            return {"finding": "one", "number": self.number}

    def test_kept(subnet_baseline):
        subnet_baseline.check(Result(), within={"number": 0})

    def test_other(subnet_baseline):
        subnet_baseline.check(Result(), within={"number": 0})
"""
WITHOUT_OTHER = QUICK.replace("def test_other", "def test_renamed").replace(
    """def test_renamed(subnet_baseline):
        subnet_baseline.check(Result(), within={"number": 0})""",
    "def test_renamed(): ...",
)
WRITE = "--subnet-write-baselines"
UNUSED = "subnet_baselines/test_gate.json: test_other (one): there is no such test"


@pytest.fixture
def recorded(project):
    """A project with two baselines; the second belongs to `test_other`."""
    project.makepyfile(test_gate=QUICK)
    project.runpytest(WRITE).assert_outcomes(passed=2)
    return project


def section(result):
    """The lines on baselines at the end of a run."""
    lines = [line.rstrip() for line in result.outlines]
    starts = [i for i, line in enumerate(lines) if "= subnet: baselines =" in line]
    if not starts:
        return []
    rest = lines[starts[0] + 1 :]
    return rest[: next(i for i, line in enumerate(rest) if line.startswith("==="))]


def errors(result):
    return "\n".join(line[8:] for line in result.outlines if line.startswith("E   "))


def test_record_compare_and_fail(project, pair_options, save_checkpoint):
    import numpy as np
    from safetensors.numpy import load_file

    project.makepyfile(test_gate=GATE)
    options = " ".join(pair_options)
    place = "subnet_baselines/test_gate.json, test_release"

    missing = project.runpytest(*pair_options)
    missing.assert_outcomes(failed=1)
    assert errors(missing).strip() == textwrap.dedent(
        f"""\
        pytest_subnet.errors.SubnetError: no baseline for update_sparsity was recorded
          baseline   {place}   (there is no such file: is it committed?)
          to record  pytest test_gate.py::test_release {options} {WRITE}"""
    )

    written = project.runpytest(*pair_options, WRITE)
    written.assert_outcomes(passed=1)
    assert section(written) == [
        "subnet_baselines/test_gate.json: test_release update_sparsity: new"
    ]
    project.runpytest(*pair_options).assert_outcomes(passed=1)

    tensors = dict(load_file(project.path / "tuned/model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
    save_checkpoint("other", tensors)
    changed = project.runpytest(pair_options[0], "--subnet-tuned=other")
    changed.assert_outcomes(failed=1)
    assert [line.split("  ")[0] for line in errors(changed).strip().splitlines()[:1]] == [
        "AssertionError: updated 12 → 16: not as recorded (update_sparsity, and 1 more)"
    ]
    assert "sparsity 0.857143 → 0.809524   (-0.047619, ±0.02 allowed)" in errors(changed)

    swapped = project.runpytest("--subnet-base=tuned", "--subnet-tuned=other")
    swapped.assert_outcomes(failed=1)
    assert "SubnetError: update_sparsity was recorded for another base" in errors(swapped)
    swap = "  usually    base and tuned are swapped: this base was recorded as tuned"
    assert swap in errors(swapped).splitlines()


def test_the_pair_of_a_mark_is_no_part_of_the_name(project):
    """Each release has another tuned checkpoint."""
    import shutil

    source = """
        import pytest
        from pytest_subnet import update_sparsity

        @pytest.mark.model_pair(base="base", tuned="tuned")
        class TestRelease:
            def test_one(self, model_pair, subnet_baseline):
                subnet_baseline.check(update_sparsity(model_pair), within={"updated": 0})

            @pytest.mark.parametrize("kind", ["norm", "-1"])
            def test_each(self, model_pair, subnet_baseline, kind):
                subnet_baseline.check(update_sparsity(model_pair), within={"updated": 0})
    """
    project.makepyfile(test_gate=source)
    missing = project.runpytest("-k", "one or norm")
    for command in ("TestRelease::test_one", "'TestRelease::test_each[base-tuned-norm]'"):
        quote = "'" if command[0] == "'" else ""
        text = (
            f"to record  pytest {quote}test_gate.py::{command.strip(quote or None)}{quote} {WRITE}"
        )
        assert text in errors(missing)

    project.runpytest(WRITE).assert_outcomes(passed=3)
    tests = json.loads((project.path / "subnet_baselines/test_gate.json").read_text())["tests"]
    assert list(tests) == [
        "TestRelease::test_each[-1]",
        "TestRelease::test_each[norm]",
        "TestRelease::test_one",
    ]
    shutil.copytree(project.path / "tuned", project.path / "run-2")
    project.makepyfile(test_gate=source.replace('tuned="tuned"', 'tuned="run-2"'))
    result = project.runpytest("--subnet-strict")
    result.assert_outcomes(passed=3)
    assert section(result) == []


def test_the_traceback_ends_at_the_users_line(recorded):
    (recorded.path / "subnet_baselines/test_gate.json").unlink()
    result = recorded.runpytest("-k", "kept")
    result.stdout.fnmatch_lines(['>       subnet_baseline.check(Result(), within={"number": 0})'])
    assert not any("baselines.py" in line for line in result.outlines)


def test_a_run_that_uses_all_says_nothing(recorded):
    assert section(recorded.runpytest()) == []


@pytest.mark.parametrize("strict", [False, True])
def test_a_baseline_that_no_test_used_is_named(recorded, strict):
    recorded.makepyfile(test_gate=WITHOUT_OTHER)

    result = recorded.runpytest(*["--subnet-strict"] * strict)

    result.assert_outcomes(passed=2)
    verdict = ", and --subnet-strict fails the run" if strict else ""
    assert section(result) == [
        f"1 baseline that no test used{verdict}; delete from the file what nothing is held to, or "
        "check it again:",
        f"  {UNUSED}",
    ]
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if strict else pytest.ExitCode.OK)


def test_a_check_that_was_taken_out(recorded):
    recorded.makepyfile(
        test_gate=QUICK.replace(
            "def test_other(", "def test_other(x=1):\n        return\n\n    def helper("
        )
    )

    assert section(recorded.runpytest())[1:] == [
        "  subnet_baselines/test_gate.json: test_other (one): the test passed without it"
    ]


def test_a_module_that_is_gone(recorded):
    recorded.makepyfile(test_new="def test_new(): ...")
    (recorded.path / "test_gate.py").unlink()

    assert section(recorded.runpytest())[1:] == [
        "  subnet_baselines/test_gate.json: test_kept (one): there is no such module",
        "  subnet_baselines/test_gate.json: test_other (one): there is no such module",
    ]


@pytest.mark.parametrize(
    "options",
    [
        ("-k", "kept or renamed"),
        ("-m", "not slow"),
        ("test_gate.py::test_kept",),
        ("--deselect", "test_gate.py::test_renamed"),
        ("--collect-only",),
        ("-x", "--maxfail=1", "test_fails.py", "test_gate.py"),
    ],
    ids=lambda options: options[0],
)
def test_a_run_of_a_part_judges_nothing(recorded, options):
    recorded.makepyfile(test_gate=WITHOUT_OTHER, test_fails="def test_fails(): assert False")
    recorded.makeini("[pytest]\nmarkers = slow")

    assert section(recorded.runpytest("--subnet-strict", *options)) == []


def test_a_module_that_cannot_be_collected_judges_nothing(recorded):
    recorded.makepyfile(test_gate=WITHOUT_OTHER, test_broken="import nowhere")
    result = recorded.runpytest("--continue-on-collection-errors")
    result.assert_outcomes(passed=2, errors=1)
    assert section(result) == []


def test_the_last_failed_judge_nothing(recorded):
    recorded.makepyfile(test_gate=WITHOUT_OTHER + "\n    def test_fails(): assert 0")
    assert len(section(recorded.runpytest())) == 2
    assert section(recorded.runpytest("--lf")) == []


@pytest.mark.parametrize(
    "body", ["pytest.skip('no')", "assert 0", "pytest.xfail('later')", "pytest.importorskip('no')"]
)
def test_a_test_that_did_not_get_there_is_no_owner_to_judge_by(recorded, body):
    recorded.makepyfile(
        test_gate=QUICK.replace(
            "def test_other(subnet_baseline):", f"def test_other(subnet_baseline):\n        {body}"
        )
    )
    assert section(recorded.runpytest()) == []


def test_another_module_is_not_judged_by(recorded):
    recorded.makepyfile(test_gate=WITHOUT_OTHER, test_new="def test_new(): ...")
    assert section(recorded.runpytest("test_new.py")) == []


def test_a_broken_file_that_nobody_read_is_named(recorded):
    recorded.makepyfile(test_gate="def test_kept(): ...")
    (recorded.path / "subnet_baselines/test_gate.json").write_text("<<<<<<< HEAD\n")
    assert section(recorded.runpytest())[1].startswith(
        "  subnet_baselines/test_gate.json holds merge-conflict markers (line 1: <<<<<<<); keep"
    )


def test_a_broken_file_that_a_test_needed_is_not_called_unused(recorded):
    (recorded.path / "subnet_baselines/test_gate.json").write_text("<<<<<<< HEAD\n")
    result = recorded.runpytest()
    result.assert_outcomes(failed=2)
    assert section(result) == []


def test_workers_tell_what_they_used(recorded, run_apart):
    pytest.importorskip("xdist")
    result = run_apart("-n2", "--subnet-strict")
    result.assert_outcomes(passed=2)
    assert section(result) == []

    recorded.makepyfile(test_gate=WITHOUT_OTHER)
    result = run_apart("-n2", "--subnet-strict")
    result.assert_outcomes(passed=2)
    assert section(result)[1:] == [f"  {UNUSED}"]
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_worker_that_crashed_judges_nothing(recorded, run_apart):
    pytest.importorskip("xdist")
    recorded.makepyfile(
        test_gate=WITHOUT_OTHER, test_crash="import os\n\ndef test_crash(): os._exit(1)"
    )
    result = run_apart("-n2", "--subnet-strict")
    assert any("crashed" in line for line in result.outlines)
    assert section(result) == []


def test_items_without_python_have_baselines_too(project):
    project.makeconftest(
        """
        import pytest
        from pytest_subnet.gating.baselines import Baseline

        class Result:
            fingerprints = {"base": "0" * 32}

            def to_dict(self):
                return {"finding": "one", "number": 1}

        class Item(pytest.Item):
            def runtest(self):
                baseline = Baseline(self)
                baseline.check(Result(), within={"number": 0})
                baseline.write()

        class Policy(pytest.File):
            def collect(self):
                yield Item.from_parent(self, name="sparsity of norms")

        def pytest_collect_file(file_path, parent):
            if file_path.suffix == ".gate":
                return Policy.from_parent(parent, path=file_path)
        """
    )
    (project.path / "release.gate").write_text("")

    missing = project.runpytest("-rN")
    command = "pytest 'release.gate::sparsity of norms' --subnet-write-baselines"
    assert any(line.endswith(command) for line in missing.outlines)
    project.runpytest(WRITE).assert_outcomes(passed=1)
    result = project.runpytest("--subnet-strict")
    result.assert_outcomes(passed=1)
    assert section(result) == []
    path = project.path / "subnet_baselines/release.gate.json"
    assert list(json.loads(path.read_text())["tests"]) == ["sparsity of norms"]
