"""Run by `test_sharded_recorder.py` in four processes: FSDP over tensor parallelism."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from pytest_subnet import open_pair, record_update, update_movement


class Block(torch.nn.Module):
    """Ten rows over four processes; the norm's weights are in two of them each."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 10)
        self.down = torch.nn.Linear(10, 8)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))


def counts(pair):
    """The exact numbers of each tensor."""
    return [
        (each.name, each.shape, each.updated, each.max_change)
        for each in update_movement(pair).per_tensor
    ]


def test_a_grid_of_shards_is_counted_as_one_model():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Block()
    before = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with record_update(model) as update:
        model(torch.ones(2, 8) * torch.arange(1, 9)).square().sum().backward()
        optimizer.step()

    after = {name: each.full_tensor() for name, each in model.state_dict().items()}
    assert counts(update) == counts(open_pair(before, after))
    for name, values in after.items():
        assert torch.equal(update.tuned.read(name), values)
    kept = [0] * 4
    dist.all_gather_object(kept, update.kept_bytes)
    assert sum(kept) == 4 * (80 + 10 + 80 + 2 * (8 + 8 + 8))  # each norm and bias of `down` twice
    dist.destroy_process_group()
