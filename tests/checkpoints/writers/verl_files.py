"""Checkpoints by verl's own manager: FSDP2, its replicated form, FSDP1, and one exported as well.

Usage: python verl_files.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from groups import run_ranks, tiny_model, train_a_step
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_full_state_dict, get_fsdp_wrap_policy


def sharded(kind: str, world: int) -> Any:
    """The model as verl's worker wraps it."""
    model = tiny_model()
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp"))
    else:
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    if kind == "fsdp1":
        return FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            use_orig_params=False,
            auto_wrap_policy=get_fsdp_wrap_policy(model),
            device_id=torch.device("cpu"),
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    apply_fsdp2(model, {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}, {})
    return model


def save(root: Path, kind: str, world: int) -> None:
    model = sharded(kind, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_a_step(model, optimizer)
    contents = ["model", "optimizer", "extra", *(["hf_model"] if kind == "exported" else [])]
    manager = FSDPCheckpointManager(
        model,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer),
        checkpoint_config=OmegaConf.create({"save_contents": contents, "load_contents": contents}),
    )
    run = root / f"{kind}_{world}"
    manager.save_checkpoint(str(run / "global_step_1" / "actor"), global_step=1)
    is_old = kind == "fsdp1"  # on the CPU it cannot move to the CPU what it puts together
    whole = get_fsdp_full_state_dict(model, offload_to_cpu=not is_old, rank0_only=not is_old)
    if dist.get_rank() == 0:
        tensors = {name: tensor.contiguous() for name, tensor in whole.items()}
        save_file(tensors, root / f"{kind}_{world}.safetensors")


def save_sharded(root: Path, world: int) -> None:
    for kind in ("fsdp2", "hsdp", "fsdp1", "exported"):
        save(root, kind, world)


def save_alone(root: Path, world: int) -> None:
    for kind in ("fsdp2", "fsdp1"):
        save(root, kind, world)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    run_ranks(directory, 4, save_sharded)
    run_ranks(directory, 1, save_alone)
    tiny_model().save_pretrained(directory / "base")
