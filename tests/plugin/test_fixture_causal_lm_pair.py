"""The fixture causal_lm_pair: both models whole, or a failure that says why not."""

import shutil

import pytest

from pytest_subnet import open_checkpoint
from pytest_subnet.pairs import causal_lm

USES_PAIR = """
    import torch

    def test_forward(causal_lm_pair, subnet_device):
        base, tuned, tokenizer = causal_lm_pair
        assert not base.training and not tuned.training
        assert base.device == tuned.device == torch.device(subnet_device)
        assert tokenizer is None
        tokens = torch.tensor([[1, 2, 3]])
        assert not torch.equal(base(tokens).logits, tuned(tokens).logits)

    def test_again(causal_lm_pair):
        assert causal_lm_pair.base is not causal_lm_pair.tuned
"""
CPU = "--subnet-device=cpu"


@pytest.fixture
def llamas(project, llama_pair):
    """A project whose pair is a pair of Llamas that transformers can load."""
    # What transformers imports when it loads a model stays imported in the runs below.
    causal_lm._load(open_checkpoint(llama_pair / "base"), "cpu")
    for name in ("base", "tuned"):
        shutil.rmtree(project.path / name)
        shutil.copytree(llama_pair / name, project.path / name)
    project.makepyfile(USES_PAIR)
    return project


def has_memory(project, free):
    """Make the runs of `project` believe that `free` bytes are free."""
    project.makeconftest(
        f"""
        import pytest
        from pytest_subnet.pairs import causal_lm

        @pytest.fixture(scope="session", autouse=True)
        def memory():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(causal_lm, "free_bytes", lambda device: {free})
                yield
        """
    )


def test_both_models_are_loaded_once(llamas, pair_options, monkeypatch):
    loaded = []
    load = causal_lm._load
    monkeypatch.setattr(causal_lm, "_load", lambda c, d: loaded.append(c.label) or load(c, d))

    llamas.runpytest(*pair_options, CPU).assert_outcomes(passed=2)

    assert loaded == ["base", "tuned"]


def test_the_marker_names_the_models(llamas):
    llamas.makepyfile(
        """
        import pytest

        @pytest.mark.model_pair(base="base", tuned="tuned")
        def test_marked(causal_lm_pair):
            assert causal_lm_pair.tuned.name_or_path.endswith("tuned")
        """
    )

    llamas.runpytest(CPU).assert_outcomes(passed=1)


def test_the_need_is_shown_on_the_terminal_before_anything_is_loaded(
    llamas, pair_options, monkeypatch
):
    def no_load(*_):
        raise AssertionError("loading starts here")

    monkeypatch.setattr(causal_lm, "_load", no_load)
    has_memory(llamas, 3_000_000)

    result = llamas.runpytest(*pair_options, CPU, "--show-capture=no")

    result.stdout.fnmatch_lines(
        [
            "causal_lm_pair: 230 kB + 230 kB needed on cpu, 3 MB free",
            "E       AssertionError: loading starts here",
        ]
    )


@pytest.mark.slow
def test_a_process_of_its_own_with_warnings_as_errors(llamas, run_apart, pair_options):
    has_memory(llamas, 3_000_000)

    result = run_apart(*pair_options, CPU, "-W", "error")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["causal_lm_pair: 230 kB + 230 kB needed on cpu, 3 MB free"])


def test_models_that_do_not_fit_are_a_failure_and_not_loaded(llamas, pair_options, monkeypatch):
    monkeypatch.setattr(causal_lm, "_load", None)
    has_memory(llamas, 400_000)

    result = llamas.runpytest(*pair_options, CPU)

    result.assert_outcomes(errors=2)
    assert (
        "both models do not fit: 230 kB + 230 kB needed on cpu, 400 kB free; take a larger device "
        "with --subnet-device, or free memory"
    ) in result.outlines
    result.stdout.no_fnmatch_line("*causal_lm.py*")


def test_weights_that_are_missing_are_a_failure_without_a_traceback(llamas, pair_options):
    from safetensors.torch import load_file, save_file

    path = llamas.path / "tuned" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})

    result = llamas.runpytest(*pair_options, CPU)

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        [
            "tuned lacks model.norm.weight, which transformers would fill with random numbers; "
            "save the whole model again"
        ]
    )
    result.stdout.no_fnmatch_line("*causal_lm.py*")


def test_a_pair_that_is_no_language_model_is_a_failure(project, pair_options):
    project.makepyfile(USES_PAIR)

    result = project.runpytest(*pair_options, CPU)

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["base has no config.json beside its weights; *"])


def test_without_a_terminal_the_need_is_in_the_captured_output(llamas, pair_options):
    has_memory(llamas, 3_000_000)

    llamas.runpytest(
        *("-p", "no:terminal"), *pair_options, CPU, "--junit-xml=report.xml", "-ojunit_logging=all"
    )

    assert "causal_lm_pair: 230 kB + 230 kB needed" in (llamas.path / "report.xml").read_text()


def test_a_parameter_asks_to_hold_once_what_is_bit_identical(llamas, pair_options):
    has_memory(llamas, 3_000_000)
    llamas.makepyfile(
        """
        import pytest

        def places(causal_lm_pair):
            models = causal_lm_pair[:2]
            return [{each.data_ptr() for each in model.parameters()} for model in models]

        @pytest.mark.parametrize("causal_lm_pair", [{"share_identical": True}], indirect=True)
        def test_once(causal_lm_pair):
            base, tuned = places(causal_lm_pair)
            assert len(base & tuned) == len(base) - 14  # the projections of two blocks moved

        def test_twice(causal_lm_pair):
            base, tuned = places(causal_lm_pair)
            assert not base & tuned
        """
    )

    result = llamas.runpytest(*pair_options, CPU)

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines_random(
        [
            "causal_lm_pair: 230 kB + up to 230 kB needed on cpu, 3 MB free",
            "causal_lm_pair: 230 kB + 230 kB needed on cpu, 3 MB free",
        ]
    )


def test_a_parameter_of_another_kind_is_refused_before_anything_is_loaded(
    llamas, pair_options, monkeypatch
):
    monkeypatch.setattr(causal_lm, "_load", None)
    llamas.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("causal_lm_pair", ["shared"], indirect=True)
        def test_once(causal_lm_pair): ...
        """
    )

    result = llamas.runpytest(*pair_options, CPU)

    result.assert_outcomes(errors=1)
    assert (
        'parametrize("causal_lm_pair", …, indirect=True) takes {"share_identical": True} or '
        "{\"share_identical\": False}, not 'shared'"
    ) in result.outlines
