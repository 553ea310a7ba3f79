"""record_update where several processes train one model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pytest_subnet import CheckpointError, assert_frozen, record_update, update_sparsity
from pytest_subnet.devices import follows

HERE = Path(__file__).parent


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "count"), [("recorder", 2), ("grid", 4)])
def test_processes_count_the_same_and_fail_alike(tmp_path, script, count):
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", f"{count}", "--log-dir", str(tmp_path), "--redirects", "3"),
            *("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"),
            *("-p", "no:hypothesispytest", "-W", "error", str(HERE / f"torchrun_{script}.py")),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )

    printed = {log.parent.name: log.read_text() for log in tmp_path.glob("*/*/*/stdout.log")}
    assert launched.returncode == 0, launched.stderr + "\n".join(printed.values())
    assert sorted(printed) == [str(rank) for rank in range(count)]
    assert all(" passed in " in each for each in printed.values())


def test_shards_of_a_process_alone_are_the_whole_model(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))

    with record_update(model) as update, torch.no_grad():
        model[0].weight.add_(1)

    assert update_sparsity(update).updated == 12
    assert update_sparsity(update).numel == 12 + 3 + 6
    assert_frozen(update, ["1.*", "0.bias"])
    with pytest.raises(AssertionError, match=r"0\.weight\[0, 0\]"):
        assert_frozen(update, "*")


def test_a_sum_that_is_not_added_up_is_refused(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    model = torch.nn.Linear(4, 3, bias=False)
    mesh = init_device_mesh("cpu", (1,))
    model.weight = torch.nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Partial()]))

    with pytest.raises(CheckpointError) as caught, record_update(model):
        pass

    assert str(caught.value) == (
        "weight is a sum that is not added up yet; redistribute it to Shard or Replicate first"
    )


@pytest.mark.filterwarnings("ignore:FSDP")  # it says that it is of no use alone
def test_the_first_generation_of_fsdp_is_refused_with_what_to_do(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    inner = torch.nn.Linear(4, 3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), inner)
    model[1] = FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))

    with pytest.raises(CheckpointError) as caught, record_update(model):
        pass

    assert str(caught.value) == (
        "Sequential is wrapped in FullyShardedDataParallel (FSDP 1), which keeps no parameter as "
        "it is; shard it with torch.distributed.fsdp.fully_shard (FSDP 2), or save it and open the "
        "checkpoints"
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"RANK": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"RANK": "3", "WORLD_SIZE": "4"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"RANK": "one", "WORLD_SIZE": "2"}, False),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_all_but_the_first_process_of_a_launcher_follow(environ, expected):
    assert follows(environ) is expected
