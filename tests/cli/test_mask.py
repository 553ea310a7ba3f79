"""`pytest-subnet mask`."""

import pytest

from pytest_subnet import UpdateMask, open_pair, update_mask


@pytest.mark.parametrize(
    ("options", "keywords", "said"),
    [
        ([], {}, "12 of 84 entries of 4 tensors (14.29%, same bits)"),
        (["--atol", "0.4"], {"atol": 0.4}, "12 of 84 entries of 4 tensors (14.29%, atol=0.4)"),
        (["--atol", "1"], {"atol": 1.0}, "0 of 84 entries of 4 tensors (0.00%, atol=1)"),
        (["--rtol", "1e-3"], {"rtol": 1e-3}, "12 of 84 entries of 4 tensors (14.29%, rtol=0.001)"),
        (
            ["--kinds", "q_proj"],
            {"kinds": "q_proj"},
            "4 of 16 entries of 1 tensor (25.00%, same bits)",
        ),
    ],
)
def test_the_mask_is_that_of_update_mask(run, pair, tmp_path, options, keywords, said):
    assert run("mask", *pair, "-o", "run.mask", *options) == (0, f"run.mask: {said}\n", "")

    saved, expected = (
        UpdateMask.load(tmp_path / "run.mask"),
        update_mask(open_pair(*pair), **keywords),
    )
    assert saved.names() == expected.names()
    assert all((saved[name] == expected[name]).all() for name in saved.names())


@pytest.mark.parametrize("target", ["base/model.safetensors", "tuned/new.safetensors"])
def test_the_weights_are_never_written_to(run, pair, tmp_path, target):
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    side = target.partition("/")[0]

    assert run("mask", *pair, "-o", target) == (
        1,
        "",
        f"pytest-subnet: cannot write to {target}: it would lie among the weights of {side}; name "
        "a file elsewhere\n",
    )
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "base", ["base/model.safetensors", "base/../base/model.safetensors", "base/x.index.json"]
)
def test_nor_is_a_file_of_them(run, pair, tmp_path, base):
    (tmp_path / "base" / "x.index.json").write_text("{}")

    code, _, complaint = run("mask", base, "tuned", "-o", "base/model.safetensors")

    assert code == 1
    assert "it would lie among the weights of base" in complaint


def test_a_failure_leaves_the_old_file(run, pair, tmp_path):
    (tmp_path / "run.mask").write_text("old")

    code, _, _ = run("mask", "base", "nowhere", "-o", "run.mask")

    assert code == 1
    assert (tmp_path / "run.mask").read_text() == "old"
