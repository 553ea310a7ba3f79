"""Under xdist: the same verdicts, numbers and table as without."""

import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("xdist")

MANY = """
    import pytest
    from pytest_subnet import assert_frozen, update_sparsity

    @pytest.mark.parametrize("number", range(6))
    def test_all(model_pair, number):
        result = update_sparsity(model_pair)
        assert_frozen(model_pair, "*norm*")
"""
HALVES = """
    import os
    import pytest
    from pytest_subnet import update_sparsity

    @pytest.mark.parametrize("layer", [0, 1])
    def test_layer(model_pair, layer):
        print("worker", os.environ["PYTEST_XDIST_WORKER"])
        update_sparsity(model_pair, include=f"*.{layer}.*")
"""


def section(result):
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if "= subnet: what moved =" in line)
    end = next(i for i, line in enumerate(lines) if i > start and line.startswith("==="))
    return lines[start + 1 : end]


def test_a_pair_that_every_worker_read_is_shown_once(project, run_apart, monkeypatch):
    project.makeini("[pytest]")
    project.makepyfile(MANY)
    monkeypatch.chdir(project.mkdir("below"))  # options are relative to where pytest is called

    result = run_apart("-n2", "-Werror", "--subnet-base=../base", "--subnet-tuned=../tuned", "..")

    result.assert_outcomes(passed=6)
    shown = section(result)
    assert shown[:2] == [
        "base -> tuned",
        "85.71% same bits, density 14.29% (f32, 4/4 tensors, 84 entries)",
    ]
    assert len([line for line in shown if " -> " in line]) == 1


def test_what_the_workers_read_is_put_together(project, run_apart, pair_options):
    project.makepyfile(HALVES)

    result = run_apart(*pair_options, "-n2", "-rP")

    result.assert_outcomes(passed=2)
    workers = {line for line in result.outlines if line.startswith("worker gw")}
    assert workers == {"worker gw0", "worker gw1"}
    assert section(result)[1] == "75.00% same bits, density 25.00% (f32, 2/4 tensors, 48 entries)"


def test_numbers_come_with_the_reports(project, run_apart, gate, pair_options):
    result = run_apart(*pair_options, "-n2", "--junit-xml=report.xml")

    result.assert_outcomes(passed=1, failed=1)
    cases = list(ET.parse(project.path / "report.xml").iter("testcase"))
    assert len(cases) == 2
    for case in cases:
        found = {each.get("name"): each.get("value") for each in case.iter("property")}
        assert found["subnet.update_sparsity.updated"] == "12"
        assert found["subnet.update_sparsity.pair"] == "base -> tuned"


def test_a_result_with_values_of_numpy_does_not_end_the_run(project, run_apart):
    project.makepyfile(
        r"""
        import numpy as np
        from pytest_subnet.recording import record

        class Result:
            def to_dict(self):
                return {
                    "finding": "odd",
                    "float": np.float64(0.5),
                    "int": np.int64(3),
                    "bool": np.bool_(True),
                    "text": "lone \ud800 surrogate",
                    "list": [np.float32(1)],
                    "nan": float("nan"),
                    "large": 2**70,
                }

        def test_odd():
            record(Result())
        """
    )

    result = run_apart("-n1", "--junit-xml=report.xml")

    result.assert_outcomes(passed=1)
    (case,) = ET.parse(project.path / "report.xml").iter("testcase")
    found = {each.get("name"): each.get("value") for each in case.iter("property")}
    assert found["subnet.odd.float"] == "0.5"
    assert found["subnet.odd.int"] == "3"
    assert found["subnet.odd.text"] == r"lone \ud800 surrogate"


def test_a_worker_that_crashes_does_not_take_the_table_along(project, run_apart, pair_options):
    project.makepyfile(
        test_a="""
        import os

        def test_crash(model_pair):
            os._exit(1)
        """,
        test_b=MANY,
    )

    result = run_apart(*pair_options, "-n2", "--dist=loadfile", "--max-worker-restart=0")

    result.assert_outcomes(passed=6, failed=1)
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
    assert "base -> tuned" in section(result)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--subnet-device=gpu", "ERROR: --subnet-device (or subnet_device) is 'gpu'; *"),
        ("--subnet-base=", "ERROR: --subnet-base is empty; *"),
    ],
)
def test_a_wrong_option_is_one_clean_usage_error(run_apart, gate, option, message):
    result = run_apart("-n2", option)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    result.stderr.no_fnmatch_line("*Traceback*")


def test_a_wrong_mark_is_one_clean_error(project, run_apart):
    project.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(base="base")
        def test_marked(model_pair): ...
        """
    )

    result = run_apart("-n2")

    assert result.ret in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)
    result.stdout.fnmatch_lines(["*@pytest.mark.model_pair needs tuned=…"])
    result.stdout.no_fnmatch_line("*INTERNALERROR*")
