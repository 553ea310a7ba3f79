"""Results held to those recorded: what is compared, and what is said when they differ."""

import json
import re
import textwrap
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_subnet.errors import SubnetError
from pytest_subnet.findings.common.fingerprints import Fingerprints
from pytest_subnet.gating.baseline_texts import Change
from pytest_subnet.gating.baselines import Baseline, _is_beyond

BASE, TUNED, OTHER = "0" * 32, "1" * 32, "2" * 32
SAID = {
    "finding": "update_sparsity",
    "sparsity": 0.95,
    "updated": 1200,
    "expected": None,
    "saturated": False,
    "updated_under": {"same bits": 1200, "atol=1e-05": np.int64(7)},
    "steps": [0.5, np.float32(0.25)],
    "odds": float("inf"),
    "pair": "base -> tuned",
    "tolerance": "same bits",
    "dtype": "bf16",
    "null": None,
    "tensors": 2,
    "tensors_total": 3,
    "numel": 24_000,
    "notes": ["a cast"],
}


class Result:
    """As a finding's, or a user's own."""

    def __init__(self, fingerprints=None, **changes):
        self._said = {**SAID, **changes}
        self.fingerprints = {"base": BASE, "tuned": TUNED} | (fingerprints or {})

    def to_dict(self):
        return self._said


@pytest.fixture
def baseline_of(pytester, monkeypatch):
    """Gives the baselines of a test of its own, in a run with these options."""
    monkeypatch.delenv("CI", raising=False)

    def make(*options, source="def test_release(): ...", index=0):
        path = pytester.makepyfile(test_gate=source)
        # It collects garbage five times when a run ends: seconds each, late in a long run.
        config = pytester.parseconfigure(path, "-p", "no:unraisableexception", *options)
        return Baseline(pytester.genitems([pytester.getnode(config, path)])[index])

    return make


@pytest.fixture
def recorded(baseline_of):
    """The same of a test of which `Result()` was recorded."""

    def make(*results, **where):
        writing = baseline_of("--subnet-write-baselines", **where)
        for result in results or (Result(),):
            assert writing.check(result, within={"sparsity": 0}) is result
        writing.write()
        return baseline_of(**where)

    return make


def failure(expected, baseline, result, **within):
    with pytest.raises(expected) as caught:
        baseline.check(result, within=within or {"sparsity": 0.02})
    return str(caught.value)


def test_what_is_as_recorded_passes_and_comes_back(recorded):
    baseline, result = recorded(), Result(sparsity=0.97, updated=1199)
    assert baseline.check(result, within={"sparsity": 0.02, "updated": 1}) is result


def test_what_is_recorded(recorded, pytester):
    recorded()

    (entry,) = json.loads((pytester.path / "subnet_baselines/test_gate.json").read_text())[
        "tests"
    ].values()
    assert entry == {
        "update_sparsity": {
            "finding": "update_sparsity",
            "numbers": {
                "sparsity": 0.95,
                "updated": 1200,
                "updated_under.same bits": 1200,
                "updated_under.atol=1e-05": 7,
                "steps[0]": 0.5,
                "steps[1]": 0.25,
            },
            "under": {"tolerance": "same bits", "dtype": "bf16", "null": None},
            "coverage": {"tensors": 2, "tensors_total": 3, "numel": 24_000},
            "fingerprints": {"base": BASE, "tuned": TUNED},
            "versions": {name: version(name) for name in ("numpy", "pytest-subnet", "torch")},
        }
    }


def test_a_missing_baseline_says_how_to_record_it(baseline_of):
    source = """
        import pytest

        class TestRun:
            class TestFast:
                @pytest.mark.parametrize("name", ["a b", "it's"])
                def test_one(self, name): ...
    """
    text = failure(SubnetError, baseline_of(source=source), Result())
    assert text == textwrap.dedent(
        """\
        no baseline for update_sparsity was recorded
          baseline   subnet_baselines/test_gate.json, TestRun::TestFast::test_one[a b]   \
(there is no such file: is it committed?)
          to record  pytest 'test_gate.py::TestRun::TestFast::test_one[a b]' \
--subnet-write-baselines"""
    )
    text = failure(SubnetError, baseline_of(source=source, index=1), Result())
    assert """'test_gate.py::TestRun::TestFast::test_one[it'"'"'s]'""" in text


def test_the_command_names_the_pair_without_its_secrets(baseline_of, pytester):
    baseline = baseline_of(
        "--subnet-base=my base", "--subnet-tuned=https://me:secret@host/run/x.safetensors?sig=f00"
    )
    text = failure(SubnetError, baseline, Result())
    assert text.splitlines()[-1] == (
        "  to record  pytest test_gate.py::test_release '--subnet-base=my base' "
        "'--subnet-tuned=https://host/run/x.safetensors' --subnet-write-baselines"
    )


def test_a_number_that_was_not_recorded_is_missing(recorded):
    text = failure(SubnetError, recorded(), Result(more=1), more=0)
    assert text.startswith("no baseline for update_sparsity with more was recorded\n")


def test_all_that_changed_is_shown_worst_first(recorded):
    result = Result({"tuned": OTHER}, sparsity=0.9, updated=2400, updated_under={"same bits": 1201})
    within = {"updated": 500, "sparsity": 0.001, "updated_under.same bits": 0, "steps[0]": 0}

    text = failure(AssertionError, recorded(), result, **within)

    assert text == textwrap.dedent(
        f"""\
        updated_under.same bits 1,200 → 1,201: not as recorded (update_sparsity, and 2 more)
          pair       base -> tuned
          changed    updated_under.same bits 1,200 → 1,201   (+1, ±0 allowed)
                     sparsity 0.95 → 0.9   (-0.05, ±0.001 allowed)
                     updated 1,200 → 2,400   (+1,200, ±500 allowed)
          tuned      another than recorded: {TUNED} → {OTHER}
          baseline   subnet_baselines/test_gate.json, test_release
          to accept  pytest test_gate.py::test_release --subnet-write-baselines"""
    )


def test_the_same_checkpoint_with_other_numbers(recorded, baseline_of, pytester):
    recorded()
    path = pytester.path / "subnet_baselines/test_gate.json"
    path.write_text(path.read_text().replace(version("torch"), "1.0"))

    text = failure(AssertionError, baseline_of(), Result(sparsity=0.9500001), sparsity=0)

    assert text == textwrap.dedent(
        f"""\
        sparsity 0.95 → 0.9500001: not as recorded (update_sparsity)
          pair       base -> tuned
          changed    sparsity 0.95 → 0.9500001   (+1e-07, ±0 allowed)
          tuned      the checkpoint that was recorded: how it is measured has changed
          version    of torch: 1.0 → {version("torch")}
          baseline   subnet_baselines/test_gate.json, test_release
          to accept  pytest test_gate.py::test_release --subnet-write-baselines"""
    )


def test_another_base_is_another_error(recorded):
    text = failure(SubnetError, recorded(), Result({"base": OTHER}, sparsity=0.1, dtype="f32"))
    assert text == textwrap.dedent(
        f"""\
        update_sparsity was recorded for another base
          base       recorded {BASE}
                     here     {OTHER}
          baseline   subnet_baselines/test_gate.json, test_release
          to accept  pytest test_gate.py::test_release --subnet-write-baselines"""
    )


def test_every_base_counts(recorded):
    result = Result({"base_b": TUNED})
    text = failure(SubnetError, recorded(), result)
    assert text.splitlines()[1:3] == [
        "  base_b     recorded of an unknown one",
        f"             here     {TUNED}",
    ]


OTHERWISE = [
    (
        {"tolerance": "atol=1e-05"},
        "tolerance",
        "tolerance  recorded same bits, here atol=1e-05",
    ),
    ({"dtype": "f32"}, "dtype", "dtype      recorded bf16, here f32"),
    ({"null": "exponent"}, "null", "null       recorded None, here exponent"),
    ({"numel": 23_000}, "numel", "numel      recorded 24,000, here 23,000"),
]


def test_what_was_measured_otherwise_is_not_compared(recorded, baseline_of):
    recorded()
    for changes, verdict, row in OTHERWISE:
        text = failure(SubnetError, baseline_of(), Result(**changes))
        assert text == textwrap.dedent(
            f"""\
            update_sparsity was recorded with another {verdict}
              {row}
              baseline   subnet_baselines/test_gate.json, test_release
              to accept  pytest test_gate.py::test_release --subnet-write-baselines"""
        )


def test_results_of_one_finding_are_told_apart_by_their_order(recorded):
    baseline = recorded(Result(), Result(sparsity=0.5), Result(finding="other", sparsity=0.1))

    baseline.check(Result(finding="other", sparsity=0.1), within={"sparsity": 0})
    baseline.check(Result(), within={"sparsity": 0})
    text = failure(AssertionError, baseline, Result(sparsity=0.6), sparsity=0)

    assert text.splitlines()[0] == "sparsity 0.5 → 0.6: not as recorded (update_sparsity#2)"


def test_what_a_test_no_longer_checks_is_dropped_when_it_is_recorded(recorded, pytester):
    recorded(Result(), Result())
    recorded(Result())
    (entries,) = json.loads((pytester.path / "subnet_baselines/test_gate.json").read_text())[
        "tests"
    ].values()
    assert list(entries) == ["update_sparsity"]


def test_only_the_base_is_read_for_a_result_that_passes(recorded):
    taken = []

    def take(role, fingerprint):
        taken.append(role)
        return fingerprint

    baseline, result = recorded(), Result()
    result.fingerprints = Fingerprints(
        {"base": lambda: take("base", BASE), "tuned": lambda: take("tuned", TUNED)}
    )
    baseline.check(result, within={"sparsity": 0.02})
    assert taken == ["base"]


HAS = (
    "update_sparsity has sparsity, steps[0], steps[1], updated, updated_under.atol=1e-05, "
    "updated_under.same bits"
)


WRONG = [
    (
        {},
        ValueError,
        "within={} compares nothing; say how far each number may be from the recorded one: " + HAS,
    ),
    (
        {"sparsty": 0.1},
        ValueError,
        f"within: 'sparsty' is no number of it; did you mean sparsity?; {HAS}",
    ),
    (
        {"dtype": 0.1},
        ValueError,
        f"within: 'dtype' is 'bf16', no number to compare; {HAS}",
    ),
    (
        {"expected": 0.1},
        ValueError,
        f"within: 'expected' is None, no number to compare; {HAS}",
    ),
    ({"odds": 0.1}, ValueError, f"within: 'odds' is inf, no number to compare; {HAS}"),
    (
        {"saturated": 0},
        ValueError,
        f"within: 'saturated' is False, no number to compare; {HAS}",
    ),
    ({1: 0}, ValueError, f"within: 1 is no number of it; {HAS}"),
    (
        {"\x1b[1m": 0},
        ValueError,
        rf"within: '\x1b[1m' is no number of it; {HAS}",
    ),
    (
        {"sparsity": -0.1},
        ValueError,
        "within['sparsity']=-0.1 is not a finite number of at least 0",
    ),
    (
        {"sparsity": float("nan")},
        ValueError,
        "within['sparsity']=nan is not a finite number of at least 0",
    ),
    (
        {"sparsity": float("inf")},
        ValueError,
        "within['sparsity']=inf is not a finite number of at least 0",
    ),
    ({"sparsity": "1"}, TypeError, "within['sparsity']='1' is not a number"),
    ({"sparsity": True}, TypeError, "within['sparsity']=True is not a number"),
    (0.02, TypeError, "within=0.02 is no mapping from numbers to tolerances"),
]


def test_within_must_say_something(baseline_of):
    for options in ((), ("--subnet-write-baselines",)):
        baseline = baseline_of(*options)
        for within, error, message in WRONG:
            with pytest.raises(error) as caught:
                baseline.check(Result(), within=within)
            assert str(caught.value) == message


class Bare:
    def to_dict(self):
        return dict(SAID)


NO_RESULTS = [
    (
        0.95,
        TypeError,
        "check() takes what a measure or an assertion returned, not 0.95; it needs to_dict(), "
        'with the name of the finding under "finding"',
    ),
    (
        Bare(),
        TypeError,
        "a baseline of update_sparsity needs .fingerprints, a mapping with that of the base "
        'under "base" (Checkpoint.fingerprint()); Bare has none, and which checkpoints it is '
        "of cannot be told",
    ),
    (
        Result({"base": ""}),
        SubnetError,
        "a baseline of update_sparsity needs the fingerprint of the base, and it does not say "
        "of which base it is: was it made of masks that are not of a checkpoint?",
    ),
    (
        Result({"tuned": "f00"}),
        TypeError,
        "fingerprints['tuned'] of update_sparsity is 'f00', not 32 hexadecimal digits as of "
        "Checkpoint.fingerprint(), nor empty for unknown",
    ),
]


def test_a_result_must_say_what_it_is_of(baseline_of):
    baseline = baseline_of("--subnet-write-baselines")
    for result, error, message in NO_RESULTS:
        with pytest.raises(error) as caught:
            baseline.check(result, within={"sparsity": 0})
        assert str(caught.value) == message


@example(Decimal("0.70"), Decimal("0.02"))
@given(st.decimals(0, 1, places=4), st.decimals(0, 1, places=4))
def test_a_tolerance_holds_as_it_is_written(old, limit):
    """Where floats round: 0.72 - 0.7 is above 0.02."""
    for new, beyond in ((old + limit, False), (old + limit + Decimal("0.0001"), True)):
        for change in ((old, new), (new, old)):
            assert _is_beyond(Change("n", *map(float, change), float(limit))) == beyond


@given(st.integers(0, 2**70), st.integers(0, 2**70), st.integers(0, 2**70))
def test_counts_are_compared_exactly(old, new, limit):
    assert _is_beyond(Change("n", old, new, limit)) == (abs(new - old) > limit)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, Fraction])
def test_a_tolerance_may_be_of_any_kind_of_number(recorded, kind):
    baseline = recorded(Result(sparsity=0.5))
    limit = kind("0.25") if kind is Fraction else kind(0.25)
    baseline.check(Result(sparsity=0.75), within={"sparsity": limit})
    baseline = recorded(Result(sparsity=0.5))
    with pytest.raises(AssertionError, match=re.escape("(+0.375, ±0.25 allowed)")):
        baseline.check(Result(sparsity=0.875), within={"sparsity": limit})


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_a_tolerance_may_be_a_count_of_numpy(recorded, kind):
    baseline = recorded(Result(updated=200))
    baseline.check(Result(updated=203), within={"updated": kind(3)})


def test_hostile_names_are_escaped(recorded):
    hostile = "\x1b[31m::error::\n<script>"
    name = r"\x1b[31m::error::\n<script>"
    baseline = recorded(Result(finding=hostile, **{hostile: 1}, sparsity=0.95))
    result = Result(finding=hostile, pair=hostile, **{hostile: 3})

    text = failure(AssertionError, baseline, result, **{name: 1})

    assert text.splitlines()[:3] == [
        f"{name} 1 → 3: not as recorded ({name})",
        f"  pair       {name}",
        f"  changed    {name} 1 → 3   (+2, ±1 allowed)",
    ]
