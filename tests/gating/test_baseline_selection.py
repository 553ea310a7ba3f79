"""Which tensors a baseline is of: two selections of equal size are not one."""

import json
import textwrap
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_subnet.gating.baseline_selection import selection


def of(*names):
    return selection(SimpleNamespace(per_tensor=[SimpleNamespace(name=name) for name in names]))


def test_numbers_are_gathered_and_what_is_shown_is_short():
    experts = [f"layers.{layer}.experts.{each}.up.weight" for layer in (0, 1, 5) for each in (2, 4)]
    assert of(*experts, "norm.weight").startswith(
        "layers.0-1,5.experts.2,4.up.weight, norm.weight ("
    )
    assert of(*(f"{letter}.weight" for letter in "edcba")).startswith(
        "a.weight, b.weight, c.weight, … 2 more ("
    )
    assert len(of(*(f"{'x' * 9999}.{at}.{at}" for at in range(50)))) < 1000


def test_what_is_hostile_is_escaped_and_still_told_apart():
    assert of("\x1b[31m.1.\udc80").startswith("\\x1b[31m.1.\\udc80 (")
    assert of("a\0b") != of("a", "b")
    assert of("a.0\0.1.b").isprintable()
    assert of("a.1.b.\0.c", "a.1.b.2.c").isprintable()  # alike but for how many numbers they have


@given(*[st.sets(st.text("a.01", min_size=1), min_size=1)] * 2)
def test_the_same_tensors_and_no_others_are_the_same_selection(one, other):
    assert (of(*one) == of(*other)) == (one == other)
    assert of(*sorted(one)) == of(*sorted(one, reverse=True))


@pytest.mark.parametrize("result", [object(), SimpleNamespace(per_tensor=[]), SimpleNamespace()])
def test_of_what_has_no_tensors_nothing_is_said(result):
    assert selection(result) is None


@pytest.mark.slow
def test_a_baseline_of_other_tensors_fails_and_names_both(pytester, llama_pair, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    source = """
        from pytest_subnet import update_sparsity
        def test_release(model_pair, subnet_baseline):
            result = update_sparsity(model_pair, include={include!r})
            subnet_baseline.check(result, within={{"updated": 10**9, "sparsity": 1}})
    """
    sides = [f"--subnet-{side}={llama_pair / side}" for side in ("base", "tuned")]

    def run(include, *options):
        pytester.makepyfile(test_gate=source.format(include=include))
        return pytester.runpytest_subprocess(*sides, "-p", "no:cacheprovider", *options)

    run("*.0.*.up_proj.*", "--subnet-write-baselines").assert_outcomes(passed=1)
    written = json.loads((pytester.path / "subnet_baselines/test_gate.json").read_text())
    under = written["tests"]["test_release"]["update_sparsity"]["under"]
    assert under["selection"].startswith("model.layers.0.mlp.up_proj.weight (")
    run(["model.layers.0.mlp.up_proj.*"]).assert_outcomes(passed=1)

    other = run("*.1.*.up_proj.*")
    other.assert_outcomes(failed=1)
    text = [line[8:] for line in other.outlines if line.startswith("E  ")]
    before, here = under["selection"], of("model.layers.1.mlp.up_proj.weight")
    assert "\n".join([text[0].partition("SubnetError: ")[2], *text[1:3]]) == textwrap.dedent(
        f"""\
        update_sparsity was recorded with another selection
          selection  recorded {before}, here {here}
          baseline   subnet_baselines/test_gate.json, test_release"""
    )
