"""`pytest-subnet suggest`: the policy that it prints holds on the very pair."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import pytest_subnet
from pytest_subnet import open_pair
from pytest_subnet.cli.suggest import suggested

POLICY = """\
# What base -> tuned shows, as bounds for the next run: written by pytest-subnet suggest, to be
# read before it is used. Bounds say what this one run did; tighten those that matter, and leave
# out those that do not. Paths are as seen from the directory of this file.
# Delete the line of tuned before this gates another run: a job that forgets --subnet-tuned then
# fails, instead of judging this run again.

base = "base"
tuned = "tuned"

# Every tensor has a partner of its own shape and dtype.
[assert_same_structure]

# Neither side holds NaN or Inf.
[assert_finite]

# No bit of these kinds changed. Leave it out if they are trained: rounding can swallow small
# steps.
[assert_frozen]
include = "*"
kinds = ["embed", "norm"]

# Every tensor of these kinds moved. One that stands still was not trained, or its steps were
# smaller than its dtype can store.
[assert_updated]
include = "*"
kinds = ["q_proj", "up_proj"]

# 85.71% of 84 entries kept their bits, 12 did not (f32). The bounds leave room for a quarter more
# and a quarter less of these.
# Published nearby; none is a target:
[[assert_update_sparsity]]
at_least = 0.82
at_most = 0.9

# 85.71% of 84 entries stayed within 1e-05 (the paper's tolerance), 12 did not (f32). The bounds
# leave room for a quarter more and a quarter less of these.
# Published nearby; none is a target:
[[assert_update_sparsity]]
at_least = 0.82
at_most = 0.9
atol = 1e-05

# The furthest of 2 matrices is 0.00 points from the sparsity of all of them. A part that is
# frozen by accident, or trained at another rate, is further off.
[assert_even_sparsity]
max_spread = 0.02
kinds = ["q_proj", "up_proj"]

# No entry moved by more than 0.5; twice as far is allowed.
[[assert_max_change]]
at_most = 1.0

# No tensor moved by more than 25.00% of its norm; twice as far is allowed.
[[assert_max_change]]
at_most = 0.5
relative = true
"""
KINDS = ("q_proj", "o_proj", "up_proj", "down_proj")


def judge(text, pair):
    """Make every assertion of a policy, as whoever collects it does."""
    policy = tomllib.loads(text)
    made = []
    for name, tables in policy.items():
        if name in ("base", "tuned"):
            continue
        for keywords in tables if isinstance(tables, list) else [tables]:
            getattr(pytest_subnet, name)(pair, **keywords)
            made.append(name)
    return made


def llama(seed, *, moved=0.1, step=0.01, dtype=np.float32):
    """Two blocks, an embedding and norms; `moved` of the entries of the projections moved."""
    weights = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    for layer in range(2):
        weights[f"model.layers.{layer}.input_layernorm.weight"] = (8,)
        weights |= {f"model.layers.{layer}.mlp.{kind}.weight": (16, 8) for kind in KINDS}
    generator = np.random.default_rng(0)
    base = {name: generator.normal(size=shape).astype(dtype) for name, shape in weights.items()}
    generator = np.random.default_rng(seed)
    tuned = {
        name: (each + step * (generator.random(each.shape) < moved)).astype(dtype)
        if "proj" in name
        else each
        for name, each in base.items()
    }
    return base, tuned


@pytest.fixture
def suggest(save, tmp_path, monkeypatch, run):
    """Writes two checkpoints and gives what is suggested for them."""
    monkeypatch.chdir(tmp_path)

    def suggest(base, tuned):
        return run("suggest", save("base", base), save("tuned", tuned))

    return suggest


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("moved", "step"), [(0.01, 0.01), (0.1, 1e-3), (0.5, 0.1), (1.0, 3.0)])
def test_what_is_suggested_holds(suggest, moved, step, dtype):
    code, text, complaint = suggest(*llama(1, moved=moved, step=step, dtype=dtype))

    assert (code, complaint) == (0, "")
    made = judge(text, open_pair("base", "tuned"))
    assert {"assert_same_structure", "assert_finite", "assert_frozen"} <= set(made)
    assert made.count("assert_update_sparsity") == 2
    assert made.count("assert_max_change") == 2


def test_pytest_takes_it_as_a_policy(suggest, tmp_path):
    _, text, _ = suggest(*llama(1))
    (tmp_path / "release.subnet.toml").write_text(text, encoding="utf-8")

    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--subnet-strict", "release.subnet.toml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert found.returncode == 0, found.stdout
    assert f"= {len(re.findall('^.?.assert', text, re.M))} passed in " in found.stdout


def test_a_like_run_passes_and_another_does_not(suggest, tmp_path):
    _, text, _ = suggest(*llama(1))
    for name, options in (("like", {}), ("dense", {"moved": 0.2}), ("far", {"step": 0.5})):
        _, tuned = llama(2, **options)
        (tmp_path / name).mkdir()
        save_file(tuned, tmp_path / name / "model.safetensors")

    assert judge(text, open_pair("base", "like"))
    with pytest.raises(AssertionError, match="is below the required"):
        judge(text, open_pair("base", "dense"))
    with pytest.raises(AssertionError, match=r"largest change 0\.5 is above"):
        judge(text, open_pair("base", "far"))


def test_the_whole_policy(run, pair):
    code, text, complaint = run("suggest", *pair)

    assert (code, complaint) == (0, "")
    # Which published numbers are nearest is not this command's to say.
    assert re.sub("^#   .*\n", "", text, flags=re.M) == POLICY


def test_what_does_not_hold_is_left_out_and_said(suggest):
    base, tuned = llama(1)
    tuned["model.norm.weight"] = np.full(8, np.nan, np.float32)

    code, text, _ = suggest(base, tuned)

    assert code == 0
    assert "\n# assert_finite is left out: " in text
    assert "[assert_finite]" not in text
    assert judge(text, open_pair("base", "tuned"))


def test_the_interface_is_held_to_where_there_is_one(suggest, save, tmp_path):
    base, tuned = llama(1)
    for name, weights in (("with_config", base), ("with_too", tuned)):
        save(name, weights)
        (tmp_path / name / "config.json").write_text('{"hidden_size": 8}')

    _, text, _ = suggest(base, tuned)
    assert "interface" not in text

    pair = open_pair(tmp_path / "with_config", tmp_path / "with_too")
    assert "assert_same_interface" in judge(suggested(pair, "a", "b"), pair)


def test_a_block_that_stood_still_is_a_glob(suggest):
    base, tuned = llama(1)
    tuned |= {name: each for name, each in base.items() if ".layers.0." in name}

    _, text, _ = suggest(base, tuned)

    assert tomllib.loads(text)["assert_frozen"] == [
        {"include": "*", "kinds": ["embed", "norm"]},
        {"include": ["model.layers.0.*"]},
    ]
    assert judge(text, open_pair("base", "tuned"))


def test_nothing_moved(run, pair, save, weights):
    save("still", {name: np.ones_like(each) for name, each in weights.items()})

    assert run("suggest", "base", "still") == (
        1,
        "",
        "pytest-subnet: base -> still: nothing moved, so there is nothing to bound; check which "
        "checkpoints are compared\n",
    )


def test_what_does_not_pair(run, pair, save, weights):
    save("grown", {**weights, "lm_head.weight": np.ones((8, 4), np.float32)})

    code, text, complaint = run("suggest", "base", "grown")

    assert (code, text) == (1, "")
    assert complaint.startswith("pytest-subnet: tensors do not pair: 1 only tuned (of 5 tensors)\n")


def test_hostile_names_are_written_as_they_are_and_steer_nothing(suggest):
    name = 'model.layers.0.\x1b[31m"]\n[assert_finite]\nbase = "x.weight'
    base = {name: np.ones((4, 4), np.float32), "norm.weight": np.ones(4, np.float32)}
    tuned = {**base, name: base[name] + np.eye(4, dtype=np.float32)}

    code, text, _ = suggest(base, tuned)

    assert code == 0
    assert text.replace("\n", "").isprintable()
    policy = tomllib.loads(text)
    assert (policy["base"], policy["tuned"]) == ("base", "tuned")
    assert judge(text, open_pair("base", "tuned"))


def test_addresses_with_secrets_are_not_written(pair):
    text = suggested(open_pair(*pair), "https://me:secret@host/base", "hf://org/name")

    assert "secret@" not in text
    assert "base" not in tomllib.loads(text)
    assert tomllib.loads(text)["tuned"] == "hf://org/name"
    assert "# base is not named: its address may hold a secret.\n" in text


def test_tokens_in_paths_are_not_written(pair):
    token = "hf_AbCdEfGhIjKlMnOpQrStUvWx"
    for name in pair:
        Path(token).mkdir(exist_ok=True)
        Path(name).rename(Path(token, name))
    paths = [f"{token}/{name}" for name in pair]

    text = suggested(open_pair(*paths), *paths)

    assert token not in text
    assert text.startswith("# What hf_…/base -> hf_…/tuned shows, as bounds for the next run:")
    assert not {"base", "tuned"} & tomllib.loads(text).keys()
