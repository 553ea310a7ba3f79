"""Checkpoints by DeepSpeed's engine at ZeRO stages 1, 2 and 3.

Usage: python deepspeed_files.py DIRECTORY
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from groups import run_ranks, tiny_model, train_a_step
from safetensors.torch import save_file


def engine_of(model: Any, stage: int, world: int) -> Any:
    settings = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        # Large models have matrices beyond the default, below which stage 3 keeps tensors whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return deepspeed.initialize(model=model, config=settings, optimizer=optimizer)[0]


def save(root: Path, world: int) -> None:
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world))
    # Its own collectives in C++, compiled at the first use: torch's do here.
    deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    for stage in (1, 2, 3):
        model = tiny_model().bfloat16()
        engine = engine_of(model, stage, world)
        train_a_step(engine, engine)
        run = root / f"zero_{stage}"
        engine.save_checkpoint(str(run))
        masters = {name: safe_get_full_fp32_param(each) for name, each in model.named_parameters()}
        if rank == "0":
            save_file(masters, root / f"masters_{stage}.safetensors")
    # As a trainer that does not gather writes the model beside the last of them.
    engine.save_checkpoint(str(root / "ungathered"))
    if rank == "0":
        save_file(dict(model.named_parameters()), root / "ungathered" / "model.safetensors")


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    run_ranks(directory, 2, save)
    tiny_model().bfloat16().save_pretrained(directory / "base")
