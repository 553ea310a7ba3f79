"""`pytest-subnet overlap`."""

import numpy as np
import pytest

TEXT = """\
lift 1.6 over chance by matrix
  a          base -> tuned (same bits): 12 entries (14.29%)
  b          base -> other (same bits): 10 entries (11.90%)
  covers     4/4 tensors, 84 entries, f32
  in both    4; by chance 2.5
  one-sided  33.33% of a, 40.00% of b; by chance 20.83% of the larger
  Jaccard    22.22%; by chance 12.82%
  lift       1.6 matrix, 1 rowcol, 2.8 pooled
  kappa      0.2 (0 is chance, 1 is nested masks)

tensor                                    a    b    both    expected    lift
--------------------------------------  ---  ---  ------  ----------  ------
model.layers.0.self_attn.q_proj.weight    4    2       2         0.5       4
model.layers.1.mlp.up_proj.weight         8    8       2           2       1
model.embed_tokens.weight                 0    0       0           0       -
model.norm.weight                         0    0       0           0       -
"""


@pytest.fixture
def runs(pair, save, weights):
    """Two runs on one base."""
    weights["model.layers.0.self_attn.q_proj.weight"][:] = 1
    weights["model.layers.0.self_attn.q_proj.weight"][0, :2] += 0.25
    weights["model.layers.1.mlp.up_proj.weight"][:] = 1
    weights["model.layers.1.mlp.up_proj.weight"][:, 0] += 0.25
    return "tuned", save("other", weights)


def test_two_mask_files(run, runs):
    for name in runs:
        assert run("mask", "base", name, "-o", f"{name}.mask")[0] == 0

    assert run("overlap", "tuned.mask", "other.mask") == (0, TEXT, "")


def test_two_runs_on_one_base(run, runs):
    assert run("overlap", *runs, "--base", "base") == (0, TEXT, "")


def test_another_null_and_some_of_the_tensors(run, runs):
    code, shown, _ = run(
        *("overlap", *runs, "--base", "base", "--null", "pooled", "--kinds", "up_proj"),
        *("--atol", "0.1"),
    )

    assert code == 0
    assert shown.startswith("lift 1 over chance by pooled\n")
    assert "covers     1/4 tensors, 32 entries, f32\n" in shown
    assert "(atol=0.1)" in shown


def test_a_directory_is_no_mask(run, runs):
    assert run("overlap", *runs) == (
        1,
        "",
        "pytest-subnet: tuned is a directory, not a mask; to compare what two runs did to one "
        "model, name it with --base, or save masks with pytest-subnet mask\n",
    )


def test_the_same_mask_twice(run, runs):
    run("mask", "base", "tuned", "-o", "tuned.mask")

    code, _, complaint = run("overlap", "tuned.mask", "tuned.mask")

    assert code == 1
    assert complaint.startswith("pytest-subnet: a and b are the same: tuned.mask; ")


def test_an_empty_mask(run, runs, save, weights):
    save("still", {name: np.ones_like(each) for name, each in weights.items()})

    code, _, complaint = run("overlap", "still", "tuned", "--base", "base")

    assert code == 1
    assert complaint.startswith("pytest-subnet: mask a is empty: base -> still has no entry in ")


def test_names_are_cut_to_the_terminal():
    from pytest_subnet.cli.tables import fitted

    rows = [{"tensor": f"model.layers.{n}.self_attn.q_proj.weight", "a": "12"} for n in (1, 22)]

    narrow = fitted(rows, numbers=["a"], width=30).splitlines()
    assert narrow[2:] == ["model.layers…_proj.weight   12"] * 2
    assert max(map(len, narrow)) == 30
    assert fitted(rows, numbers=["a"], width=100).count("self_attn") == 2
