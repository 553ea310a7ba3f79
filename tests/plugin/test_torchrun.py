"""pytest under torchrun: one table for all processes, and the same verdicts in each."""

import os
import subprocess
import sys

import pytest

TOGETHER = """
    import pytest
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from pytest_subnet import assert_frozen, assert_update_sparsity, assert_updated

    def test_files(model_pair):
        assert_update_sparsity(model_pair, at_least=0.9)

    @pytest.mark.parametrize("sharded", [True, False])
    def test_memory(record_update, sharded):
        model = torch.nn.Linear(4, 3, bias=False)
        torch.nn.init.ones_(model.weight)
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with record_update(model) as update, torch.no_grad():
            model.weight.mul_(2)
        assert_updated(update, "weight")
        assert_frozen(update, "weight")
"""
CONFTEST = """
    import pytest
    import torch.distributed as dist

    def pytest_sessionstart():
        dist.init_process_group("gloo")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure():
        dist.barrier()  # torchrun ends all processes when the first one fails
        dist.destroy_process_group()
"""


@pytest.fixture
def torchrun(project):
    """Runs pytest in two processes, and gives what each of them printed, the first one's first."""

    def torchrun(*arguments):
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "2", "--log-dir", "logs", "--redirects", "3"),
                *("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            cwd=project.path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        logs = sorted((project.path / "logs").glob("*/*/*/stdout.log"))
        assert [log.parent.name for log in logs] == ["0", "1"], finished.stderr
        return [log.read_text().splitlines() for log in logs]

    return torchrun


@pytest.mark.slow
def test_the_first_process_reports_and_all_fail_alike(project, torchrun, pair_options):
    project.makeconftest(CONFTEST)
    project.makepyfile(test_together=TOGETHER)

    first, second = torchrun(*pair_options)

    assert sum("subnet: what moved" in line for line in first) == 1
    assert not any("subnet: what moved" in line for line in second)
    failures = [[line for line in each if line.startswith("E  ")] for each in (first, second)]
    assert failures[0] == failures[1]
    assert len([line for line in failures[0] if "AssertionError" in line]) == 3
    assert sum("weight[0, 0] 1 -> 2" in line for line in failures[0]) == 2
    assert all("= 3 failed in " in each[-1] for each in (first, second))
