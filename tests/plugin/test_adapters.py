"""An adapter as the tuned side: on the command line, and asked for by a test."""

from __future__ import annotations

import json

import peft  # noqa: F401  (a run in this process forgets what it was the first to import)
import torch
from safetensors.torch import save_file

SHOWS = """
    from pytest_subnet import update_sparsity

    def test_pair(model_pair):
        print("pair:", model_pair.label, update_sparsity(model_pair).updated)
        print("note:", model_pair.notes[0])
"""


def make_adapter(directory, *, rows=4):
    """LoRA of rank 1 on the 4 x 4 query projection of `base`."""
    directory.mkdir()
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(1, 4), f"{key}.lora_B.weight": torch.ones(rows, 1)},
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_is_merged_onto_the_base(project):
    make_adapter(project.path / "adapter")
    project.makepyfile(SHOWS)

    result = project.runpytest("-s", "--subnet-base=base", "--subnet-tuned=adapter")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "*pair: base -> adapter 16",
            "note: adapter is an adapter on base: 1 matrix with an update by LoRA; merged in*",
        ]
    )


def test_an_adapter_of_another_base_is_an_error_that_says_so(project):
    make_adapter(project.path / "adapter", rows=5)
    project.makepyfile(SHOWS)

    result = project.runpytest("--subnet-base=base", "--subnet-tuned=adapter")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["adapter does not fit base: *q_proj*"])
