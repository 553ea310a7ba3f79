"""record_update: before and after of a model in memory."""

import logging
from pathlib import Path

import pytest
import torch

from pytest_subnet import (
    CheckpointError,
    PairMismatchError,
    SubnetError,
    assert_frozen,
    assert_updated,
    record_update,
    update_movement,
    update_sparsity,
)
from pytest_subnet.scan import Tolerance


def test_what_a_step_did_is_counted(model, step):
    with record_update(model) as update:
        step(model)

    result = update_sparsity(update)
    assert (result.updated, result.numel) == (32, 32)
    assert update.label == "Sequential before -> Sequential after"


def test_one_recording_entered_twice_at_once_is_two_updates(model, step):
    recording = record_update(model)

    with recording as outer:
        step(model)
        with recording as inner:
            pass

    assert update_sparsity(outer).updated == 32
    assert update_sparsity(inner).updated == 0


def test_frozen_parts_are_told_from_trained_ones(model, step):
    model[0].requires_grad_(False)

    with record_update(model) as update:
        step(model)

    assert_frozen(update, "0.*")
    assert_updated(update, "1.*")
    with pytest.raises(AssertionError, match=r"1 of 2 tensors did not move"):
        assert_updated(update, "*")


def test_an_adapter_learns_and_its_base_does_not(step):
    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = torch.nn.Linear(4, 4)
            self.lora_A = torch.nn.Linear(4, 2, bias=False)
            self.lora_B = torch.nn.Linear(2, 4, bias=False)
            self.base_layer.requires_grad_(False)
            torch.nn.init.zeros_(self.lora_B.weight)

        def forward(self, x):
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    model = torch.nn.Sequential(Adapted(), torch.nn.Identity())
    with record_update(model) as update:
        step(model)

    assert_updated(update, "*lora_B*")
    assert_frozen(update, "*.base_layer.*")


def test_without_a_step_nothing_moved_and_assert_updated_says_so(model):
    with record_update(model) as update:
        model(torch.ones(2, 4)).sum().backward()

    assert_frozen(update, "*")
    with pytest.raises(AssertionError, match=r"^2 of 2 tensors did not move"):
        assert_updated(update, "*")


def test_parameters_may_be_replaced_in_the_block(model):
    with record_update(model) as update:
        model[0].weight = torch.nn.Parameter(torch.full((4, 4), 2.0))
        model[1] = torch.nn.Linear(4, 4, bias=False)

    assert_updated(update, "*")
    assert update_movement(update, include="0.*").max_change == 1


def test_a_model_that_was_rebuilt_to_other_shapes_is_a_problem(model):
    with record_update(model) as update:
        model[1] = torch.nn.Linear(4, 2)

    assert {problem.kind for problem in update.problems} == {"reshaped", "only tuned"}
    assert_frozen(update, "0.*")
    with pytest.raises(PairMismatchError, match=r"1\.weight"):
        update_sparsity(update)


def test_tied_weights_are_kept_and_counted_once(step):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(2)))
    model[1].weight = model[0].weight

    with record_update(model) as update:
        step(model)

    assert update.kept_bytes == 64
    assert update.tied == {"1.weight": "0.weight"}
    assert update_sparsity(update).numel == 16


def test_buffers_are_recorded_too():
    model = torch.nn.BatchNorm1d(4)

    with record_update(model) as update:
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

    assert_updated(update, ["running_mean", "running_var", "num_batches_tracked"])
    assert_frozen(update, ["weight", "bias"])


def test_weights_that_are_not_in_row_order_are_counted_where_they_are(step):
    model = torch.nn.Linear(4, 3, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(4, 3).t())

    with record_update(model) as update, torch.no_grad():
        model.weight[0, 1] = 2

    assert update_movement(update).updated == 1
    with pytest.raises(AssertionError, match=r"weight\[0, 1\]"):
        assert_frozen(update, "*")


@pytest.mark.parametrize("keep_on", ["cpu", "device"])
def test_the_copy_is_kept_where_the_caller_chooses(model, step, keep_on):
    with record_update(model, keep_on=keep_on) as update:
        step(model)

    assert update.kept_on == keep_on
    assert update_sparsity(update).updated == 32


def test_an_unknown_place_is_refused_before_anything_is_copied(model):
    with (
        pytest.raises(ValueError, match="keep_on='gpu' is not one of 'cpu', 'device'"),
        record_update(model, keep_on="gpu"),
    ):
        pass


ITSELF = "pass the model itself"
ON_DISK = "checkpoints on disk are compared by open_pair(base, tuned)"


@pytest.mark.parametrize(
    ("take", "kind", "hint"),
    [
        (lambda model: model.state_dict(), "OrderedDict", ITSELF),
        (lambda model: model.parameters(), "generator", ITSELF),
        (lambda model: "outputs/model", "str", ON_DISK),
        (lambda model: Path("outputs/model"), type(Path()).__name__, ON_DISK),
        (lambda model: torch.optim.SGD(model.parameters(), lr=0.5), "SGD", ITSELF),
        (lambda model: torch.nn.Linear, "type", ITSELF),
        (lambda model: None, "None", ITSELF),
    ],
)
def test_what_is_no_module_is_refused_with_what_it_is(model, take, kind, hint):
    with pytest.raises(TypeError) as caught:
        record_update(take(model))

    assert str(caught.value) == f"record_update takes an nn.Module, got {kind}; {hint}"


@pytest.mark.parametrize(
    ("tolerances", "message"),
    [
        ([1e-5], "tolerances takes objects of Tolerance, got float among them"),
        (["atol=1e-5"], "tolerances takes objects of Tolerance, got str among them"),
        (1e-5, "tolerances takes a list of Tolerance, got float"),
        (Tolerance(atol=1e-5), "tolerances takes a list of Tolerance, got Tolerance"),
        (None, "tolerances takes a list of Tolerance, got None"),
    ],
)
def test_tolerances_of_another_type_are_refused_before_the_block(model, tolerances, message):
    with pytest.raises(TypeError) as caught:
        record_update(model, tolerances=tolerances)

    assert str(caught.value) == message


def test_without_with_there_is_nothing_to_measure(model, step):
    recording = record_update(model)
    step(model)

    for ask in (lambda: assert_frozen(recording, "*"), lambda: update_sparsity(recording)):
        with pytest.raises(SubnetError) as caught:
            ask()
        assert str(caught.value) == (
            "nothing was recorded: use `with record_update(model) as update:` around the training "
            "step, and measure `update` after the block"
        )
    assert not hasattr(recording, "__len__")


def test_every_block_is_an_update_of_its_own(model, step):
    recording = record_update(model)

    with recording as first:
        step(model)
    with recording as second:
        pass

    assert_updated(first, "*")
    assert_frozen(second, "*")
    with pytest.raises(SubnetError, match="nothing was recorded"):
        assert_frozen(recording, "*")


def test_what_the_copy_costs_is_logged_before_it_is_made(model, caplog, monkeypatch):
    from pytest_subnet.training import recorder

    def no_copy(*_):
        raise MemoryError

    monkeypatch.setattr(recorder, "_copy", no_copy)
    with (
        caplog.at_level(logging.INFO, "pytest_subnet"),
        pytest.raises(MemoryError),
        record_update(model),
    ):
        pass

    assert caplog.messages == ["recording an update of Sequential: 128 B on cpu"]


def test_the_repr_says_what_it_costs_and_how_far_it_is(model):
    with record_update(model) as update:
        assert repr(update) == "<RecordedUpdate is still being recorded, 128 B kept on cpu>"

    assert repr(update) == (
        "<RecordedUpdate Sequential before -> Sequential after: 2 tensors, 128 B kept on cpu>"
    )


def test_inside_the_block_there_is_nothing_to_measure_yet(model):
    with record_update(model) as update, pytest.raises(SubnetError) as caught:
        assert_updated(update, "*")

    assert str(caught.value) == (
        "this update is still being recorded: measure it after the `with` block, when the block "
        "has ended"
    )
    assert_frozen(update, "*")


def test_after_an_exception_there_is_no_update(model):
    with pytest.raises(ZeroDivisionError), record_update(model) as update:
        _ = 1 / 0

    with pytest.raises(SubnetError) as caught:
        assert_updated(update, "*")

    assert str(caught.value) == "this update was not recorded: the block raised ZeroDivisionError"
    assert repr(update) == "<RecordedUpdate was not recorded, 128 B kept on cpu>"


def test_a_model_that_cannot_be_compared_afterwards_leaves_no_update(model):
    with pytest.raises(CheckpointError, match="meta device"), record_update(model) as update:
        model.to("meta")

    with pytest.raises(SubnetError, match="was not recorded: comparing before and after raised"):
        update_sparsity(update)


def test_an_attribute_that_no_pair_has_is_an_attribute_error(model):
    with record_update(model) as update:
        pass

    assert not hasattr(update, "sparsity")


def test_counts_stay_when_the_model_moves_on(model, step):
    with record_update(model) as update:
        step(model)
    before = update_movement(update)
    step(model)

    assert update_movement(update) == before
    assert update_sparsity(update, atol=1e-5).updated == 32


@pytest.mark.parametrize("through_data", [False, True])
def test_another_tolerance_is_refused_once_the_model_has_moved_on(model, step, through_data):
    with record_update(model) as update:
        step(model)
    assert update_sparsity(update, atol=0.5).updated == 32

    if through_data:
        model[1].weight.data += 1  # leaves no trace in autograd's version counter
    else:
        step(model)

    with pytest.raises(CheckpointError) as caught:
        update_sparsity(update, atol=0.75)
    assert str(caught.value) == (
        f"{'1' if through_data else '0'}.weight of Sequential after has changed since the recorded "
        "block ended; measure what needs the weights again (another tolerance, a matrix) before "
        "the model is trained on, or keep a checkpoint of it"
    )
    assert update_sparsity(update, atol=0.5).updated == 32


def test_another_tolerance_is_counted_as_long_as_the_model_stands_still(model, step):
    with record_update(model) as update:
        step(model)

    assert update_sparsity(update, rtol=0.1).updated == 32


def test_weights_that_were_replaced_afterwards_can_still_be_counted(model, step):
    with record_update(model) as update:
        step(model)
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 4))

    assert update_sparsity(update, rtol=0.1).updated == 32


def test_a_moved_weight_out_of_row_order_is_refused_too():
    model = torch.nn.Linear(4, 3, bias=False)
    model.weight = torch.nn.Parameter(torch.ones(4, 3).t())
    with record_update(model) as update:
        model.weight.data[0, 0] = 2
    model.weight.data += 1

    with pytest.raises(CheckpointError, match="has changed since"):
        update_sparsity(update, rtol=0.1)


def test_every_scan_checks_each_tensor_once(model, step, monkeypatch):
    from pytest_subnet.checkpoints.memory import TensorsCheckpoint
    from pytest_subnet.scan import units

    monkeypatch.setattr(units, "UNIT_BYTES", 16)  # four entries: four units a tensor
    with record_update(model) as update:
        step(model)
    checked = []
    fingerprint = TensorsCheckpoint.fingerprint
    monkeypatch.setattr(
        TensorsCheckpoint,
        "fingerprint",
        lambda self, name=None: checked.append(name) or fingerprint(self, name),
    )

    update_sparsity(update, rtol=0.1)

    assert sorted(checked) == ["0.weight", "1.weight"]


def test_tolerances_that_were_declared_are_counted_when_the_block_ends(model, step):
    with record_update(model, tolerances=[Tolerance(atol=1.5)]) as update:
        step(model)
    step(model)

    assert update_sparsity(update, atol=1.5).updated == 32


def test_matrices_are_given_out_while_the_model_stands_still(model, step):
    with record_update(model) as update:
        step(model)

    assert torch.equal(update.base.read("0.weight"), torch.ones(4, 4))
    assert torch.equal(update.tuned.read("0.weight"), model[0].weight)
    known = update.tuned.fingerprint("0.weight")
    step(model)
    with pytest.raises(CheckpointError, match="has changed since"):
        update.tuned.read("0.weight")
    assert update.tuned.fingerprint("0.weight") == known


def test_two_records_may_overlap(model, step):
    with record_update(model) as outer:
        step(model)
        with record_update(model[1]) as inner:
            pass

    assert_updated(outer, "*")
    assert_frozen(inner, "*")


def test_a_copy_that_does_not_fit_on_its_device_is_refused(monkeypatch):
    from pytest_subnet.training import recorder

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    device = torch.device("cuda", 0)

    recorder._check_room(device, 120)
    with pytest.raises(SubnetError) as caught:
        recorder._check_room(device, 121)

    assert str(caught.value) == (
        "the copy of the weights before needs 121 B more on cuda:0, which has 120 B free; "
        'keep it on the CPU with keep_on="cpu"'
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep_on", ["cpu", "device"])
def test_a_model_on_a_gpu_is_recorded(model, step, keep_on):
    model.cuda()

    with record_update(model, keep_on=keep_on) as update, torch.no_grad():
        model[0].weight[0] += 1

    assert update_sparsity(update).updated == 4
