"""For the tests of pairs: checkpoints on disk, and tiny models of every family."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors into a directory as safetensors, beside a config if one is given."""

    def write(
        name: str, tensors: dict[str, torch.Tensor], config: dict[str, object] | None = None
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors")
        if config is not None:
            (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model from its transformers config."""

    def build(model_type: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {} if model_type == "gpt2" else SIZES
        config = AutoConfig.for_model(model_type, **{**sizes, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config)

    return build
