"""How far a run has moved, in its trainer's own log."""

from __future__ import annotations

import math
import sys
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from pytest_subnet.checkpoints.memory import TensorsCheckpoint, from_module
from pytest_subnet.findings.common.result import measure
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.pairs.selection import select
from pytest_subnet.scan.tolerance import SAME_BITS

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from pytest_subnet.findings.common.result import Movement


class DensityCallback(TrainerCallback):
    """Logs how much of the model a `transformers.Trainer`, or one of TRL, has moved.

    At every save, or every N steps, three numbers go to `trainer.state.log_history`:
    `subnet/density`, the share of entries with other bits than when training began;
    `subnet/step_density`, the share that the last step alone changed; `subnet/stalled`, the share
    of matrices of which it changed none. A step density of 0 is a run that stands still, one near
    0.5 in bfloat16 a learning rate far above those of RL. In float32 nearly every entry moves in
    every step.

    Keeps one copy of the weights on the CPU, and during a step that is measured a second one.
    The numbers are added to the row that the trainer logs at that step, after callbacks that come
    before this one have seen it.

    Args:
        every: measure every so many steps; None measures at every save.

    Raises:
        ValueError: `every` is not a whole number above 0.

    Source: arXiv 2505.11711, section 6 (density along a run).

    >>> DensityCallback(every=100)
    DensityCallback(every=100)
    """

    def __init__(self, *, every: int | None = None) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"every={every!r} is not a whole number of steps above 0")
        self._every = every
        self._start: TensorsCheckpoint | None = None
        self._before: tuple[int, TensorsCheckpoint] | None = None
        self._pending: tuple[int, float | None, dict[str, float]] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Copy the weights before."""
        self._start = _copied(kwargs["model"], "the start")
        self._before = self._pending = None

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Copy the weights before a step that will be measured."""
        self._flush(state)
        step = state.global_step + 1
        if self._is_due(step, args, state, kwargs.get("train_dataloader")):
            self._before = step, _copied(kwargs["model"], f"before step {step}")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure, and have the trainer write its log now."""
        if self._before is None or self._before[0] != state.global_step:
            return
        before, self._before = self._before[1], None
        self._measure(kwargs["model"], state, before)
        control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the numbers to the row that was just written."""
        if self._pending is None or self._pending[0] != state.global_step:
            return
        numbers = self._pending[2]
        if logs is not None:
            logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
            self._pending = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure what no step told beforehand (`save_strategy="best"`): density alone."""
        known = {row["step"] for row in state.log_history if "subnet/density" in row}
        if self._every is None and self._pending is None and state.global_step not in known:
            self._measure(kwargs["model"], state, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let the copies go."""
        self._flush(state)
        self._start = self._before = None

    def _is_due(
        self, step: int, args: TrainingArguments, state: TrainerState, batches: object
    ) -> bool:
        """Whether to measure `step`, as far as that is known before it."""
        if self._every is not None:
            return step % self._every == 0
        if args.save_strategy == "steps":
            return step == state.max_steps or step % max(int(state.save_steps), 1) == 0
        return args.save_strategy == "epoch" and step % _steps_an_epoch(args, batches) == 0

    def _measure(
        self, model: torch.nn.Module, state: TrainerState, before: TensorsCheckpoint | None
    ) -> None:
        if self._start is None:
            return
        numbers = {"subnet/density": _density(_moved(self._start, model))}
        if before is not None:
            step = _moved(before, model)
            numbers["subnet/step_density"] = _density(step)
            matrices = [each for each in step if len(each.shape) > 1]
            if matrices:
                stalled = sum(not each.value_changes for each in matrices)
                numbers["subnet/stalled"] = stalled / len(matrices)
        self._pending = state.global_step, state.epoch, numbers

    def _flush(self, state: TrainerState) -> None:
        """Write a row of their own for numbers that no row of the trainer took."""
        if self._pending is not None:
            step, epoch, numbers = self._pending
            self._pending = None
            state.log_history.append(
                {**({} if epoch is None else {"epoch": epoch}), **numbers, "step": step}
            )

    def __repr__(self) -> str:
        return f"DensityCallback({'' if self._every is None else f'every={self._every}'})"


def _steps_an_epoch(args: TrainingArguments, batches: object) -> int:
    known = len(batches) if isinstance(batches, Sized) else sys.maxsize  # a stream has no length
    return math.ceil(known / args.gradient_accumulation_steps)


def _copied(model: torch.nn.Module, label: str) -> TensorsCheckpoint:
    source = from_module(model)
    copies: dict[str, torch.Tensor] = {}
    for name in source.names():
        first = source.ties.get(name)
        copies[name] = (
            source.tensor(name).detach().to("cpu", copy=True) if first is None else copies[first]
        )
    return TensorsCheckpoint(
        copies, label=label, config=source.config, buffers=source.buffers, shows_ties=True
    )


def _moved(before: TensorsCheckpoint, model: torch.nn.Module) -> tuple[Movement, ...]:
    pair = open_pair(before, from_module(model))
    return measure(pair, select(pair).rows, SAME_BITS)


def _density(tensors: tuple[Movement, ...]) -> float:
    moved = sum(each.updated for each in tensors)
    return moved / sum(each.numel for each in tensors)
