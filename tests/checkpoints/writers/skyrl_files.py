"""A checkpoint by SkyRL's own FSDP strategy: shards, and the model as it exports it.

Usage: python skyrl_files.py DIRECTORY

SkyRL needs CUDA for more than it computes on it. What it asks of CUDA here is answered by the CPU;
what shards the model and what writes the files is its own.
"""

from __future__ import annotations

import sys
import typing
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typing_extensions
from groups import run_ranks, tiny_model, train_a_step
from torch.distributed.device_mesh import init_device_mesh

typing.TypedDict = typing_extensions.TypedDict  # pydantic wants this one before Python 3.12
for name in ("flash_attn", "flash_attn.bert_padding"):  # an extension for CUDA, imported unasked
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = module
module.pad_input = module.unpad_input = None

from skyrl.backends.skyrl_train.distributed.fsdp_strategy import FSDPStrategy  # noqa: E402
from skyrl.train.config import FSDPConfig  # noqa: E402

EMPTY = torch.empty


def empty(*sizes: Any, device: Any = None, **settings: Any) -> torch.Tensor:
    return EMPTY(*sizes, device="cpu" if device == "cuda" else device, **settings)


def save(root: Path, world: int) -> None:
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda tensor, *_: tensor
    torch.empty = empty
    strategy = FSDPStrategy(FSDPConfig())
    strategy.world_size = world
    strategy.device_mesh = init_device_mesh("cpu", (world,), mesh_dim_names=["fsdp"])
    model = strategy.prepare(tiny_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_a_step(model, optimizer)
    rank, run = strategy.get_rank(), root / f"run_{world}"
    strategy.save_checkpoint(model, f"{run}/global_step_1/policy", rank, optimizer=optimizer)
    strategy.save_hf_model(model, f"{root}/exported_{world}")


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    run_ranks(directory, 3, save)
    run_ranks(directory, 1, save)
    tiny_model().save_pretrained(directory / "base")
