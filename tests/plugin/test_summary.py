"""What the end of a run shows: what moved, by layer and by kind."""

import numpy as np
import pytest

SECTION = """\
base -> tuned
85.71% same bits, density 14.29% (f32, 4/4 tensors, 84 entries)

  layer    entries    updated    same bits    within 1e-05  tensor
-------  ---------  ---------  -----------  --------------  --------------------------------------
      1         32          8       75.00%          75.00%  model.layers.1.mlp.up_proj.weight
      0         16          4       75.00%          75.00%  model.layers.0.self_attn.q_proj.weight

layers 0-1  ██
            █ = 25.00% updated, . = nothing

kind       entries    updated    same bits    within 1e-05
-------  ---------  ---------  -----------  --------------
q_proj          16          4       75.00%          75.00%
up_proj         32          8       75.00%          75.00%
embed           32          0      100.00%         100.00%
norm             4          0      100.00%         100.00%"""
VERBOSE = """\
base -> tuned
85.71% same bits, density 14.29% (f32, 4/4 tensors, 84 entries)

  layer    entries    updated    same bits    within 1e-05  moved
-------  ---------  ---------  -----------  --------------  -------
      0         16          4       75.00%          75.00%  █████
      1         32          8       75.00%          75.00%  █████
      -         36          0      100.00%         100.00%

kind       entries    updated    same bits    within 1e-05
-------  ---------  ---------  -----------  --------------
q_proj          16          4       75.00%          75.00%
up_proj         32          8       75.00%          75.00%
embed           32          0      100.00%         100.00%
norm             4          0      100.00%         100.00%

  layer    entries    updated    same bits    within 1e-05  tensor
-------  ---------  ---------  -----------  --------------  --------------------------------------
      1         32          8       75.00%          75.00%  model.layers.1.mlp.up_proj.weight
      0         16          4       75.00%          75.00%  model.layers.0.self_attn.q_proj.weight
      -         32          0      100.00%         100.00%  model.embed_tokens.weight
      -          4          0      100.00%         100.00%  model.norm.weight"""
MEASURES_ALL = """
    from pytest_subnet import update_sparsity

    def test_all(model_pair):
        update_sparsity(model_pair)
"""


def section(result):
    """The lines between the section's heading and the next one."""
    lines = result.outlines
    starts = [i for i, line in enumerate(lines) if "= subnet: what moved =" in line]
    if not starts:
        return None
    assert len(starts) == 1
    rest = lines[starts[0] + 1 :]
    end = next(i for i, line in enumerate(rest) if line.startswith("==="))
    return "\n".join(line.rstrip() for line in rest[:end])


@pytest.mark.parametrize("verdict", ["holds", "fails"])
def test_the_whole_section_after_a_pass_and_after_a_failure(project, gate, pair_options, verdict):
    result = project.runpytest(*pair_options, "-k", verdict)

    result.assert_outcomes(**{{"holds": "passed", "fails": "failed"}[verdict]: 1}, deselected=1)
    assert section(result) == SECTION


def test_it_says_how_much_of_the_model_was_looked_at(project, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_some(model_pair):
            update_sparsity(model_pair, include="*norm*")
        """
    )

    result = project.runpytest(*pair_options)

    assert "100.00% same bits, density 0.00% (f32, 1/4 tensors, 4 entries)" in section(result)


def test_it_is_shown_in_quiet_mode_too(project, gate, pair_options):
    assert section(project.runpytest("-q", *pair_options)) == SECTION


def test_every_layer_and_tensor_is_shown_with_v(project, gate, pair_options):
    assert section(project.runpytest("-v", *pair_options)) == VERBOSE


@pytest.mark.parametrize("columns", ["60", "80"])
def test_it_is_as_wide_as_the_terminal(project, gate, pair_options, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)

    lines = section(project.runpytest("-v", *pair_options)).splitlines()

    assert max(map(len, lines[2:])) <= int(columns)


def test_it_has_no_colour_unless_one_watches(project, gate, pair_options):
    assert "\x1b" not in project.runpytest("-v", *pair_options).stdout.str()


@pytest.mark.parametrize(
    "body",
    [
        "def test_unused(): ...",
        "def test_opened_not_read(model_pair): ...",
        "import pytest\n@pytest.mark.skip\ndef test_skipped(model_pair): ...",
    ],
)
def test_there_is_no_section_when_nothing_was_read(project, pair_options, body):
    project.makepyfile(body)

    assert section(project.runpytest(*pair_options)) is None


def test_notes_and_problems_are_told(project, save_checkpoint):
    weights = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32)}
    save_checkpoint("one", weights)
    save_checkpoint("two", {"a": weights["a"] + 1})
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_cast(open_model_pair):
            update_sparsity(open_model_pair("one", "two", as_dtype="bfloat16"), include="a")
        """
    )

    lines = section(project.runpytest()).splitlines()

    assert lines[:4] == [
        "one -> two",
        "0.00% same bits, density 100.00% (bf16, 1/1 tensors, 4 entries)",
        "note: 1 tensor cast to bfloat16",
        "note: 1 tensor not compared: no partner, or another shape",
    ]


def test_every_pair_is_shown_apart(project):
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_two(open_model_pair):
            update_sparsity(open_model_pair("tuned", "base"), include="*norm*")
            update_sparsity(open_model_pair("base", "tuned"), include="*norm*")
            update_sparsity(open_model_pair("base", "tuned", as_dtype="float16"))
        """
    )

    shown = section(project.runpytest())

    heads = [line for line in shown.splitlines() if " -> " in line]
    assert heads == ["base -> tuned", "base -> tuned", "tuned -> base"]
    assert shown.count("(f32, 1/4 tensors, 4 entries)") == 2
    assert shown.count("(f16, 4/4 tensors, 84 entries)") == 1


def test_buffers_and_integers_are_not_counted_as_weights(project, save_checkpoint):
    save_checkpoint("one", {"w": np.zeros(2, np.float32), "steps": np.zeros(7, np.int64)})
    save_checkpoint("two", {"w": np.ones(2, np.float32), "steps": np.ones(7, np.int64)})
    project.makepyfile(
        """
        from pytest_subnet import update_movement

        def test_all(open_model_pair):
            update_movement(open_model_pair("one", "two"))
        """
    )

    assert "(f32, 1/1 tensors, 2 entries)" in section(project.runpytest())


def test_nothing_without_a_terminal(project, gate, pair_options):
    result = project.runpytest("-p", "no:terminal", *pair_options)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.outlines == []


@pytest.mark.parametrize(
    ("encoding", "bar"), [("ascii", "layers 0-1  88"), ("utf-8", "layers 0-1  ██")]
)
def test_bars_are_drawn_as_the_terminal_can(
    project, run_apart, pair_options, monkeypatch, encoding, bar
):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    project.makepyfile(MEASURES_ALL)

    result = run_apart(*pair_options)

    assert result.ret == 0
    result.stdout.fnmatch_lines([bar])


def test_hostile_names_are_escaped(project, save_checkpoint):
    name = "model.layers.0.evil\x1b[31m\nname.weight"
    save_checkpoint("one", {name: np.zeros(2, np.float32)})
    save_checkpoint("two\x1b[2J", {name: np.ones(2, np.float32)})
    project.makepyfile(
        r"""
        from pytest_subnet import update_sparsity

        def test_hostile(open_model_pair):
            update_sparsity(open_model_pair("one", "two\x1b[2J"))
        """
    )

    result = project.runpytest()

    assert "\x1b" not in result.stdout.str()
    assert r"one -> two\x1b[2J" in section(result)
    assert r"evil\x1b[31m\nname" in section(result)


def test_a_pair_that_is_gone_at_the_end_is_still_shown(project, pair_options):
    project.makepyfile(
        MEASURES_ALL
        + """
        import shutil
        shutil.rmtree("base")
        shutil.rmtree("tuned")
        """
    )

    assert section(project.runpytest(*pair_options)) == SECTION


def test_a_scan_that_failed_leaves_nothing_to_show(project, pair_options):
    project.makepyfile(
        """
        from pytest_subnet import update_sparsity

        def test_cut(model_pair):
            with open("tuned/model.safetensors", "r+b") as file:
                file.truncate(50)
            update_sparsity(model_pair)
        """
    )

    result = project.runpytest(*pair_options)

    result.assert_outcomes(failed=1)
    assert section(result) is None


def test_recorded_updates_are_not_shown(project):
    project.makepyfile(
        """
        import torch
        from pytest_subnet import update_sparsity

        def test_record(record_update):
            model = torch.nn.Linear(2, 2)
            with record_update(model) as update: ...
            update_sparsity(update)
        """
    )

    assert section(project.runpytest()) is None
