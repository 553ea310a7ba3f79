"""Run by `test_sharded_recorder.py` in two processes: record_update where they share a model."""

import copy
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pytest_subnet import (
    SubnetError,
    assert_frozen,
    assert_updated,
    open_pair,
    record_update,
    update_mask,
    update_movement,
    update_rank,
    update_sparsity,
)
from pytest_subnet.checkpoints import processes


@pytest.fixture(scope="session", autouse=True)
def group():
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank():
    return dist.get_rank()


@pytest.fixture
def mesh():
    return init_device_mesh("cpu", (2,))


def everywhere(value):
    """What `value` is in each process."""
    found = [None, None]
    dist.all_gather_object(found, value)
    return found


def said(call):
    """The type and the text of what `call` raises."""
    with pytest.raises((SubnetError, AssertionError, ArithmeticError)) as caught:
        call()
    return type(caught.value).__name__, str(caught.value)


def everywhere_said(call):
    """The same, which must be the same in both processes."""
    first, second = everywhere(said(call))
    assert first == second
    return first


class Model(torch.nn.Module):
    """Shards that are even, uneven and empty, a number alone, a tie and a buffer."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"even": (6, 8), "odd": (5, 3), "flat": (1, 7), "bias": (3,), "cube": (3, 2, 2)}
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=generator)
            self.register_parameter(name, torch.nn.Parameter(values))
        self.tied = self.flat
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def moved(model):
    """`model` after a change that no two of its tensors have in common."""
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.even[0, 0] += 1
        after.even[4:, 2:5] -= 0.25
        after.odd[4] = float("nan")
        after.flat[0, 3] *= -100
        after.cube[2, 1, 0] += 2**-20
        after.steps += 1
    return after


def become(model, values):
    """Write whole tensors into the shards of `model`."""
    for name, each in [*model.named_parameters(), *model.named_buffers()]:
        target, value = each.detach(), values[name]
        if hasattr(target, "to_local"):
            value = distribute_tensor(value, target.device_mesh, target.placements).to_local()
            target = target.to_local()
        target.copy_(value)


def as_counted(pair, **options):
    """All that a scan counts of each tensor, but for its name."""
    return [
        (each._replace(change_norm=0.0, base_norm=0.0, tuned_norm=0.0), each.change_norm)
        for each in update_movement(pair, **options).per_tensor
    ]


def shard_by(placements, mesh_shape=(2,)):
    """Spreads each parameter of a model over a mesh, as `placements` says."""

    def shard(model):
        mesh = init_device_mesh("cpu", mesh_shape)
        spread = {
            id(each): torch.nn.Parameter(distribute_tensor(each.detach(), mesh, placements))
            for each in model.parameters()
        }
        for name, each in list(model.named_parameters(remove_duplicate=False)):
            model.register_parameter(name, spread[id(each)])

    return shard


WAYS = {
    "fsdp": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,))),
    "rows": shard_by([Shard(0)]),
    "columns": shard_by([Shard(-1)]),
    "copies": shard_by([Replicate()]),
    "hybrid": shard_by([Replicate(), Shard(0)], (2, 1)),
    "hybrid-fsdp": lambda model: fully_shard(
        model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("ddp", "fsdp"))
    ),
    "none": lambda model: None,
}


@pytest.mark.parametrize("way", WAYS)
def test_counts_are_those_of_the_whole_model_in_every_process(way):
    model = Model()
    before, after = copy.deepcopy(model), moved(model)
    WAYS[way](model)

    with record_update(model) as update:
        become(model, after.state_dict())

    whole = open_pair(before, after)
    counted, expected = as_counted(update, atol=0.1), as_counted(whole, atol=0.1)
    assert [each for each, _ in counted] == [each for each, _ in expected]
    assert [norm for _, norm in counted] == pytest.approx([norm for _, norm in expected])
    assert [each.updated for each, _ in counted] == [7, 3, 1, 0, 0, 1]
    assert update.tied == {"tied": "flat"}
    assert update_sparsity(update).numel == 48 + 15 + 7 + 3 + 12
    first, second = everywhere(as_counted(update))
    assert first == second


def test_each_process_keeps_its_own_shards_alone(mesh):
    model = torch.nn.Linear(4, 3, bias=False)
    fully_shard(model, mesh=mesh)

    with record_update(model) as update:
        pass

    assert everywhere(update.kept_bytes) == [32, 16]
    assert update_sparsity(update).numel == 12


def test_a_step_of_fsdp_is_recorded(mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5, bias=False) for _ in range(3)))
    model[1].requires_grad_(False)
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    with record_update(model) as update:
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()

    assert_updated(update, ["0.*", "2.*"])
    assert_frozen(update, "1.*")
    kind, text = everywhere_said(lambda: assert_updated(update, "*"))
    assert kind == "AssertionError"
    assert text.startswith("1 of 3 tensors did not move")


def test_a_failed_gate_says_the_same_everywhere_and_names_the_first_entry(mesh):
    model = torch.nn.Linear(4, 3, bias=False)
    fully_shard(model, mesh=mesh)
    with record_update(model) as update:
        if dist.get_rank() == 1:  # row 2 alone
            model.weight.detach().to_local()[0, 1] += 1

    kind, text = everywhere_said(lambda: assert_frozen(update, "*"))

    assert kind == "AssertionError"
    assert "weight[2, 1]" in text


def test_16_bit_weights_have_the_expected_sparsity_of_the_whole_model(mesh):
    generator = torch.Generator().manual_seed(1)
    before = {"weight": torch.randn(9, 64, generator=generator).bfloat16()}
    after = {"weight": before["weight"] + (torch.rand(9, 64, generator=generator) < 0.2) * 0.01}
    after = {name: each.bfloat16() for name, each in after.items()}
    model = torch.nn.Linear(64, 9, bias=False, dtype=torch.bfloat16)
    model.load_state_dict(before)
    fully_shard(model, mesh=mesh)

    with record_update(model) as update:
        become(model, after)

    whole = update_sparsity(open_pair(before, after))
    assert update_sparsity(update).expected_sparsity == pytest.approx(whole.expected_sparsity)
    assert update_sparsity(update).updated == whole.updated


@pytest.mark.parametrize("way", ["fsdp", "columns", "none"])
def test_matrices_are_read_together(way):
    model = Model()
    before, after = copy.deepcopy(model), moved(model)
    with torch.no_grad():
        after.odd.copy_(before.odd + 1)
    WAYS[way](model)
    with record_update(model) as update:
        become(model, after.state_dict())

    whole = open_pair(before, after)
    for name, values in before.state_dict().items():
        assert torch.equal(update.base.read(name), values)
        assert torch.equal(update.tuned.read(name), after.state_dict()[name])
        assert update.base.fingerprint(name) == whole.base.fingerprint(name)
    assert torch.equal(update.tuned.read("odd", slice(2, 4)), after.odd[2:4])
    ranks = [
        [each.rank for each in update_rank(pair, include=["even", "odd"]).per_tensor]
        for pair in (update, whole)
    ]
    assert ranks[0] == ranks[1]


def test_masks_of_shards_are_refused(mesh):
    model = torch.nn.Linear(4, 3, bias=False)
    fully_shard(model, mesh=mesh)
    with record_update(model) as update:
        model.weight.detach().to_local().add_(1)

    assert everywhere_said(lambda: update_mask(update)) == (
        "CheckpointError",
        "weight of FSDPLinear before is spread over 2 ranks, which can only read it together: "
        "it can be counted and its matrices can be read, but what threads read side by side, "
        "as masks, cannot be had; save the model and open the checkpoints",
    )


def test_masks_of_copies_are_built():
    model = torch.nn.Linear(4, 3, bias=False)
    with record_update(model) as update, torch.no_grad():
        model.weight.fill_(2)

    assert update_mask(update).count == 12


def test_once_a_shard_has_moved_on_no_process_counts_again(mesh, rank):
    model = torch.nn.Linear(4, 3, bias=False)
    fully_shard(model, mesh=mesh)
    with record_update(model) as update:
        pass
    assert update_sparsity(update, atol=0.5).updated == 0
    if rank == 1:
        model.weight.detach().to_local().add_(1)

    own, other = everywhere(said(lambda: update_sparsity(update, atol=0.75)))[:: 1 - 2 * rank]

    moved_on = "weight of FSDPLinear after has changed since the recorded block ended; measure "
    if rank == 1:
        assert own[0] == "CheckpointError"
        assert own[1].startswith(moved_on)
        assert other[1].startswith(
            "rank 1 failed at counting FSDPLinear before -> FSDPLinear after: CheckpointError: "
            f"{moved_on}"
        )
    assert update_sparsity(update, atol=0.5).updated == 0


def test_a_model_that_is_sharded_in_the_block_is_refused(mesh):
    model = torch.nn.Linear(4, 3, bias=False)

    def shard():
        with record_update(model):
            fully_shard(model, mesh=mesh)

    assert everywhere_said(shard) == (
        "CheckpointError",
        "weight of Linear after is spread over the ranks otherwise than before the block; "
        "shard the model before it is recorded",
    )


def test_a_part_that_no_process_holds_is_refused(rank):
    model = torch.nn.Linear(4, 3, bias=False)
    spread = distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    cut = type(spread).from_local(
        spread.to_local() if rank == 0 else spread.to_local()[:0],
        spread.device_mesh,
        [Shard(0)],
        run_check=False,
        shape=spread.shape,
        stride=spread.stride(),
    )
    model.weight = torch.nn.Parameter(cut)

    assert everywhere_said(lambda: record_update(model).__enter__()) == (
        "CheckpointError",
        "weight of Linear has 12 entries, and the 2 ranks of the default process group hold 8 "
        "of them; record it where every rank that holds the model takes part",
    )


def test_another_model_in_another_process_is_refused(rank):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3 + rank, bias=False))

    assert everywhere_said(lambda: record_update(model).__enter__()) == (
        "CheckpointError",
        "Sequential is another model on rank 1 than on rank 0: 0.weight; every rank must "
        "record the same model (stages of a pipeline cannot be recorded as one)",
    )


def test_copies_under_ddp_are_counted_once():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    with record_update(model) as update:
        model(torch.full((1, 4), 1.0 + dist.get_rank())).sum().backward()
        optimizer.step()

    assert update_sparsity(update).updated == 12
    assert update_sparsity(update).numel == 12
    first, second = everywhere(as_counted(update))
    assert first == second


@pytest.mark.parametrize("to", [(5.0, 6.0), (4.0, 6.0), (6.0, 6.0)])
def test_copies_that_drifted_apart_are_an_error_everywhere(rank, to):
    # Moved in one process alone; in both, to other values; in one, to what the other had before.
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 3, bias=False) for _ in range(2)))
    model[1].weight.data[2, 1] = 6.0 if to == (6.0, 6.0) and rank == 0 else 5.0

    def drift():
        with record_update(model), torch.no_grad():
            model[1].weight[2, 1] = to[rank]

    assert everywhere_said(drift) == (
        "PairMismatchError",
        "1.weight of Sequential before -> Sequential after is not the same on rank 1 as on "
        "rank 0: the copies of the model have drifted apart, and no number is that of all of "
        "them; look for a step that one rank skipped, or for gradients that were not averaged",
    )


def test_buffers_may_drift_and_count_as_the_first_process_has_them(rank):
    model = torch.nn.BatchNorm1d(4)

    with record_update(model) as update:
        model.running_mean[: 1 + rank] += 1

    counted = {each.name: each.updated for each in update_movement(update).per_tensor}
    assert counted["running_mean"] == 1


def test_a_block_that_raised_in_one_process_is_over_in_all(rank):
    model = torch.nn.Linear(4, 3)

    def train():
        with record_update(model):
            _ = 1 // (1 - rank)

    assert everywhere(said(train)) == [
        (
            "SubnetError",
            "rank 1 failed at the end of the block that records Linear: ZeroDivisionError: "
            "integer division or modulo by zero",
        ),
        ("ZeroDivisionError", "integer division or modulo by zero"),
    ]


def test_processes_that_record_other_things_are_told_apart(rank):
    model = torch.nn.Linear(4, 3) if rank else torch.nn.Bilinear(4, 3, 2)

    assert everywhere_said(lambda: record_update(model).__enter__()) == (
        "SubnetError",
        "the processes do not measure the same: rank 0 at the start of the block that records "
        "Bilinear, rank 1 at the start of the block that records Linear; every rank must "
        "record and measure the same updates in the same order",
    )


def test_processes_that_measure_other_tensors_are_told_apart(rank):
    model = torch.nn.Bilinear(2, 2, 2)
    model.bias.data.zero_()
    model.weight.data.zero_()
    with record_update(model) as update:
        pass

    other = everywhere_said(lambda: update_movement(update, include="wb"[rank] + "*", atol=0.7))

    assert other == (
        "SubnetError",
        "the processes do not measure the same: rank 1 counts other tensors of Bilinear before -> "
        "Bilinear after than rank 0, or under other tolerances; every rank must measure the same "
        "in the same order",
    )
    assert update_movement(update, atol=0.7).updated == 0


def test_a_process_that_does_not_come_is_named(rank, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=1))
    model = torch.nn.Linear(4, 3)
    if rank == 1:
        time.sleep(3)
        return

    assert said(lambda: record_update(model).__enter__()) == (
        "SubnetError",
        "not every process came to the start of the block that records Linear within 1 second "
        "(torch: [Rank 0]: Ranks 1 failed to pass monitoredBarrier in 1000 ms); every rank of the "
        "process group must record and measure the same updates in the same order",
    )
