"""The fixture open_model_pair: a pair for any two sources, the same one for the same sources."""

import shutil

import pytest


def passes(project, body, tests=1):
    project.makepyfile(body)
    project.runpytest().assert_outcomes(passed=tests)


def test_the_same_arguments_give_the_same_scanned_pair(project, scans):
    passes(
        project,
        """
        from pathlib import Path
        from pytest_subnet import assert_update_sparsity

        def test_names(open_model_pair):
            assert_update_sparsity(open_model_pair("base", "tuned"), at_least=0.8)

        def test_names_again(open_model_pair):
            assert_update_sparsity(open_model_pair("base", "tuned"), at_least=0.8)

        def test_paths(open_model_pair, pytestconfig):
            pair = open_model_pair(Path("base"), pytestconfig.rootpath / "tuned")
            assert pair is open_model_pair("base", "tuned")
            assert_update_sparsity(pair, at_least=0.8)
        """,
        tests=3,
    )

    assert scans == [("base -> tuned", 4)]


def test_it_gives_what_the_options_name(project, pair_options):
    project.makepyfile(
        """
        def test_same(open_model_pair, model_pair):
            assert open_model_pair("base", "tuned") is model_pair
        """
    )

    project.runpytest(*pair_options).assert_outcomes(passed=1)


def test_other_arguments_give_another_pair(project):
    passes(
        project,
        """
        def test_other(open_model_pair):
            pair = open_model_pair("base", "tuned")
            cast = open_model_pair("base", "tuned", as_dtype="bfloat16")
            assert cast is not pair
            assert cast.notes == ("4 tensors cast to bfloat16",)
            assert open_model_pair("base", "tuned", vocab="common") is not pair
            assert open_model_pair("tuned", "base") is not pair
        """,
    )


def test_equal_renames_are_the_same_argument(project):
    passes(
        project,
        """
        def test_rename(open_model_pair):
            first, second = (
                open_model_pair("base", "tuned", rename={"model.norm.weight": "norm"})
                for _ in range(2)
            )
            assert first is second
            assert [problem.name for problem in first.problems] == ["model.norm.weight", "norm"]
        """,
    )


def test_paths_are_relative_to_the_rootdir_wherever_the_test_is(project, scans):
    passes(
        project,
        """
        from pytest_subnet import assert_update_sparsity

        def test_elsewhere(open_model_pair, tmp_path, monkeypatch):
            pair = open_model_pair("base", "tuned")
            monkeypatch.chdir(tmp_path)
            assert open_model_pair("base", "tuned") is pair
            assert_update_sparsity(pair, at_least=0.8)
        """,
    )

    assert scans == [("base -> tuned", 4)]


def test_a_checkpoint_that_was_saved_again_is_read_again(project, save_checkpoint):
    import numpy as np

    weights = {"w": np.arange(8, dtype=np.float32)}
    save_checkpoint("before", weights)
    save_checkpoint("now", {"w": weights["w"] + 1})
    save_checkpoint("later", {"w": np.append(weights["w"][:7], 9).astype(np.float32)})
    passes(
        project,
        """
        import shutil
        from pytest_subnet import CheckpointError, update_sparsity
        import pytest

        def test_now(open_model_pair):
            assert update_sparsity(open_model_pair("before", "now")).updated == 8

        def test_later(open_model_pair, pytestconfig):
            known = open_model_pair("before", "now")
            root = pytestconfig.rootpath
            shutil.copy(root / "later" / "model.safetensors", root / "now" / "model.safetensors")
            assert update_sparsity(open_model_pair("before", "now")).updated == 1
            with pytest.raises(CheckpointError, match="now changed after the pair was opened"):
                update_sparsity(known)

        def test_gone(open_model_pair, pytestconfig):
            (pytestconfig.rootpath / "now" / "model.safetensors").unlink()
            with pytest.raises(CheckpointError, match="now has no weights"):
                open_model_pair("before", "now")
        """,
        tests=3,
    )


def test_a_model_that_was_trained_is_another_pair(project):
    passes(
        project,
        """
        import torch
        from pytest_subnet import update_sparsity

        def test_trained(open_model_pair):
            before, model = {"weight": torch.ones(2, 2)}, torch.nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                model.weight.fill_(1)
            pair = open_model_pair(before, model)
            assert update_sparsity(pair).updated == 0
            assert open_model_pair(before, model) is pair

            with torch.no_grad():
                model.weight[0, 0] = 2
            assert update_sparsity(open_model_pair(before, model)).updated == 1

            model.weight = torch.nn.Parameter(torch.zeros(2, 2))
            assert update_sparsity(open_model_pair(before, model)).updated == 4
        """,
    )


def test_what_cannot_be_opened_ends_at_the_line_that_asked(project):
    shutil.rmtree("tuned")
    project.makepyfile(
        """
        def test_asks(open_model_pair):
            open_model_pair("base", "./tuned")
        """
    )

    result = project.runpytest()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '>       open_model_pair("base", "./tuned")',
            "E       pytest_subnet.errors.CheckpointError: no checkpoint at */tuned: *",
            "",
            "test_*.py:2: CheckpointError",
        ],
        consecutive=True,
    )


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ('vocab=["common"]', "vocab=['common'] is not a string"),
        ("as_dtype={}", "as_dtype={} is not a string"),
        (
            'rename=["w"]',
            "rename=['w'] is neither a mapping from names in tuned to names in base nor a function",
        ),
        ('rename={1: "a"}', "rename maps names to names; 1 is not a string"),
        ('rename={"a": [1]}', "rename maps names to names; [1] is not a string"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(project, keyword, message):
    project.makepyfile(
        f"""
        def test_asks(open_model_pair):
            open_model_pair("base", "tuned", {keyword})
        """
    )

    result = project.runpytest()

    result.assert_outcomes(failed=1)
    assert f"E       TypeError: {message}" in result.outlines
    result.stdout.no_fnmatch_line("*fixtures.py*")
