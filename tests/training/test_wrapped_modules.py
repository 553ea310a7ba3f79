"""record_update looks through what torch wraps around a model."""

import pytest
import torch

from pytest_subnet import assert_frozen, assert_updated, record_update


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def assert_names(update):
    assert [tensor.name for tensor in update.tensors] == ["0.weight", "1.weight"]


def test_a_compiled_module(model, step):
    compiled = torch.compile(model, backend="eager")

    with record_update(compiled) as update:
        step(compiled)

    assert_names(update)
    assert_updated(update, "*")


def test_a_module_that_is_compiled_in_the_block(model, step):
    with record_update(model) as update:
        step(torch.compile(model, backend="eager"))

    assert_names(update)
    assert_updated(update, "*")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch warns itself
def test_a_model_with_a_compiled_part(model, step):
    model[1] = torch.compile(model[1], backend="eager")

    with record_update(model) as update:
        step(model)

    assert_names(update)
    assert_updated(update, "*")


@pytest.mark.usefixtures("process_group")
def test_a_data_parallel_module(model, step):
    model[0].requires_grad_(False)
    parallel = torch.nn.parallel.DistributedDataParallel(model)

    with record_update(parallel) as update:
        step(parallel)

    assert_names(update)
    assert_frozen(update, "0.*")
    assert_updated(update, "1.*")


@pytest.mark.usefixtures("process_group")
def test_a_compiled_data_parallel_module(model, step):
    wrapped = torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager")

    with record_update(wrapped) as update:
        step(wrapped)

    assert_names(update)
    assert_updated(update, "*")
