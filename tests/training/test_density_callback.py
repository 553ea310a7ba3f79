"""`DensityCallback`: density along a run, in the trainer's own log."""

from types import SimpleNamespace

import pytest
import torch

from pytest_subnet import DensityCallback

NUMBERS = ("subnet/density", "subnet/step_density", "subnet/stalled")


class Run:
    """Does to callbacks what a trainer does: events in its order, a log, steps on two matrices."""

    def __init__(self, callback, *, save_strategy="steps", save_steps=2, epoch=3, logging=100):
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 1, bias=False)
        )
        self.args = SimpleNamespace(save_strategy=save_strategy, gradient_accumulation_steps=2)
        self.state = SimpleNamespace(
            global_step=0, epoch=0.0, max_steps=100, save_steps=save_steps, log_history=[]
        )
        self.callback, self.epoch, self.logging = callback, epoch, logging
        self.tell("on_train_begin")

    def tell(self, event, **more):
        control = SimpleNamespace(should_log=False)
        getattr(self.callback, event)(
            self.args,
            self.state,
            control,
            model=self.model,
            train_dataloader=[None] * (2 * self.epoch),
            **more,
        )
        return control

    def step(self, *entries):
        """One step that moves the entries of the first matrix given by their number."""
        self.tell("on_step_begin")
        with torch.no_grad():
            for entry in entries:
                self.model[0].weight.view(-1)[entry] += 1
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.epoch
        control = self.tell("on_step_end")
        if control.should_log or self.state.global_step % self.logging == 0:
            logs = {"loss": 1.0}
            self.state.log_history.append({**logs, "step": self.state.global_step})
            self.tell("on_log", logs=logs)
            return logs
        return None

    def measured(self):
        return {
            row["step"]: tuple(row.get(name) for name in NUMBERS)
            for row in self.state.log_history
            if NUMBERS[0] in row
        }


def test_every_n_steps_the_three_numbers_are_in_the_row_of_that_step():
    run = Run(DensityCallback(every=2))
    assert run.step(0) is None
    logs = run.step(0, 1, 2)
    assert run.measured() == {2: (3 / 20, 3 / 20, 0.5)}
    assert logs == {"loss": 1.0, **dict(zip(NUMBERS, (0.15, 0.15, 0.5), strict=True))}
    run.step(5)
    run.step()
    assert run.measured()[4] == (4 / 20, 0.0, 1.0)
    assert [row["step"] for row in run.state.log_history] == [2, 4]


def test_an_entry_that_went_back_counts_in_the_step_and_not_in_the_density():
    run = Run(DensityCallback(every=1))
    run.model[0].weight.data.zero_()
    run.callback.on_train_begin(run.args, run.state, None, model=run.model)
    run.step(3)
    run.model[0].weight.data[0, 3] -= 1
    run.tell("on_step_begin")
    run.step(4)
    assert run.measured()[2] == (1 / 20, 1 / 20, 0.5)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"save_steps": 3}, {3, 6}),
        ({"save_strategy": "epoch", "epoch": 2}, {2, 4, 6}),
        ({"save_strategy": "no"}, set()),
    ],
)
def test_by_default_it_measures_the_steps_that_are_saved(options, steps):
    run = Run(DensityCallback(), **options)
    for _ in range(6):
        run.step(0)
    assert set(run.measured()) == steps


def test_the_last_step_is_saved_too():
    run = Run(DensityCallback(), save_steps=5)
    run.state.max_steps = 3
    for _ in range(3):
        run.step(0)
    assert set(run.measured()) == {3}


def test_a_save_that_nothing_foretold_has_a_row_of_its_own_without_the_step():
    run = Run(DensityCallback(), save_strategy="best")
    run.step(0, 1)
    run.tell("on_save")
    assert run.measured() == {}
    run.step(2)
    assert run.measured() == {1: (2 / 20, None, None)}
    run.tell("on_save")
    run.tell("on_train_end")
    assert run.measured()[2] == (3 / 20, None, None)
    assert run.state.log_history[-1] == {"epoch": 2 / 3, "subnet/density": 3 / 20, "step": 2}


def test_a_step_that_was_measured_is_not_measured_again_when_it_is_saved():
    run = Run(DensityCallback(), save_steps=1)
    run.step(0)
    run.tell("on_save")
    run.tell("on_train_end")
    assert len(run.state.log_history) == 1


def test_tied_weights_count_once_and_buffers_not():
    callback = DensityCallback(every=1)
    run = Run(callback)
    run.model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4))
    run.model[1].weight = run.model[0].weight
    run.model.register_buffer("seen", torch.zeros(4))
    callback.on_train_begin(run.args, run.state, None, model=run.model)
    run.model.seen += 1
    run.step(0)
    assert run.measured() == {1: (1 / 20, 1 / 20, 0.0)}


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="is not a whole number of steps above 0"):
        DensityCallback(every=every)


def test_repr():
    assert repr(DensityCallback()) == "DensityCallback()"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"save_strategy": "steps", "save_steps": 2, "max_steps": 5}, [2, 4, 5]),
        ({"save_strategy": "epoch", "num_train_epochs": 2}, [4, 8]),
    ],
)
def test_a_real_trainer(tmp_path, options, steps):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=32))
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        logging_steps=3,
        **options,
    )
    data = [{"input_ids": each, "labels": each} for each in torch.arange(64).reshape(8, 8) % 32]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[DensityCallback()])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "subnet/density" in row]
    assert [row["step"] for row in rows] == steps
    assert all(0 < row["subnet/step_density"] <= row["subnet/density"] <= 1 for row in rows)
    assert all("loss" in row for row in rows)
