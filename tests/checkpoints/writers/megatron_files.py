"""Checkpoints by Megatron's own dist_checkpointing, of one model in three layouts.

Usage: python megatron_files.py DIRECTORY

Beside each lies what Megatron says of its parts, put together: `{layout}.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from groups import run_ranks
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from safetensors.torch import save_file

LAYOUTS = {"one": (1, 1), "tensor": (2, 1), "pipeline": (1, 2)}


def build(tensor: int, pipeline: int) -> Any:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=32,
        max_sequence_length=8,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
    )


def put_together(sharded: Any, path: Path) -> None:
    """Write the tensors whole, by the offsets that Megatron gives each part."""
    mine = [
        (part.key, part.global_shape, part.global_slice(), part.data)
        for part in nested_values(sharded)
        if isinstance(part, ShardedTensor)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for key, shape, box, data in (part for rank in everyone for part in rank):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan, dtype=data.dtype))
        tensor[box] = data
    if dist.get_rank() == 0:
        save_file(whole, path)


def save(root: Path, world: int) -> None:
    # What Megatron asks of CUDA while it saves.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    for layout, (tensor, pipeline) in LAYOUTS.items():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        model = build(tensor, pipeline)
        optimizer = torch.optim.Adam(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if layout == "pipeline":
            with torch.no_grad():
                model.decoder.layers[0].mlp.linear_fc2.weight[::3] += 1  # on both ranks: 2 layers
        weights = model.sharded_state_dict()
        of_parameters = get_param_id_to_sharded_param_map(weights, model.parameters())
        state = optimizer.state_dict()
        optim_state_to_sharding_state(state, of_parameters, exclude_keys=("step",))
        apply_factories(weights)
        put_together(weights, root / f"{layout}.safetensors")
        step = root / layout / "iter_0000010"
        step.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        saved = {"model": weights, "optimizer": state, "iteration": 10}
        dist_checkpointing.save(saved, str(step))
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]), 2, save)
