"""One fine-tuning of a tiny decoder: what was drawn, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pytest_subnet.checkpoints.memory import TensorsCheckpoint
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.text import nearest, plural, safe
from pytest_subnet.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from pytest_subnet.pairs import ModelPair

OptimizerOf: TypeAlias = Callable[..., Any]
"""Takes parameters, `lr=` and `weight_decay=`, and gives a `torch.optim.Optimizer`."""

OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {},
    "SGD+momentum": {"momentum": 0.9},
    "Adam": {},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {},
    "Adagrad": {},
    "Adafactor": {},
}
"""Those of torch that are known by name, with what they take besides rate and decay."""

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True, repr=False)
class Finetune:
    """A fine-tuning of a tiny decoder, run when something of it is asked for, and then kept.

    Two layers of width 8 with the names of a Llama's weights, 1,576 entries, trained on random
    tokens. The run depends on nothing but the fields below: its repr, pasted, is the same run, and
    `dataclasses.replace` makes the run that differs in one thing.

    The optimiser works on float32 copies of the weights, and the weights in `dtype` follow them
    after each step. With master weights the copies stay; without, what the rounding took is lost,
    as the copies are made anew from the weights before the next step.

    Args:
        optimizer: a name (`"SGD"`, `"SGD+momentum"`, `"Adam"`, `"AdamW"`, `"NAdam"`, `"RAdam"`,
            `"RMSprop"`, `"Adagrad"`, `"Adafactor"`), or whatever makes an optimiser out of
            parameters, `lr=` and `weight_decay=`: a class of your own.
        learning_rate: constant through the run.
        weight_decay: as the optimiser understands it.
        steps: how many, at least 1, each on a batch of its own.
        dtype: as which the model is stored, runs forward and backward: `"bfloat16"`, `"float16"`
            or `"float32"`.
        master_weights: whether what the rounding to `dtype` takes is kept for the next step;
            float32 loses nothing either way.
        frozen: names of parameters with `requires_grad=False`; the optimiser has them too.
        seed: of the weights before.
        data_seed: of the tokens.

    Raises:
        TypeError: `optimizer` is neither a name nor callable.
        ValueError: an unknown optimiser, dtype or parameter, everything frozen, a learning rate
            that is not positive, a negative decay, or no step.

    >>> run = Finetune(optimizer="AdamW", learning_rate=1e-4, frozen=("lm_head.weight",))
    >>> run.pair
    <ModelPair step 0 -> step 1: 21 tensors>
    >>> update_sparsity(run.pair)
    UpdateSparsity(sparsity=..., updated=... of 1,576, same bits, bf16)
    >>> torch.equal(run.base["lm_head.weight"], run.tuned["lm_head.weight"])
    True
    """

    optimizer: str | OptimizerOf = "AdamW"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    steps: int = 1
    dtype: str = "bfloat16"
    master_weights: bool = False
    frozen: Sequence[str] = ()
    seed: int = 0
    data_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be run, before anything is."""
        object.__setattr__(self, "frozen", tuple(self.frozen))
        _check_optimizer(self.optimizer)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate={self.learning_rate!r} is not a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay={self.weight_decay!r} is not 0 or a positive number")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps!r} is not at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={safe(repr(self.dtype))} is not one of {', '.join(DTYPES)}")
        _check_frozen(self.frozen)

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        """The weights before, by name, in `dtype`."""
        return _copied(dict(self.model().named_parameters()))

    @property
    def tuned(self) -> dict[str, torch.Tensor]:
        """The weights after."""
        return self._result.states[-1]

    @cached_property
    def pair(self) -> ModelPair:
        """`base` and `tuned`, as `open_pair` aligns them."""
        start, *_, end = self._checkpoints()
        return open_pair(start, end)

    @cached_property
    def trajectory(self) -> FinetuneTrajectory:
        """The weights before and after each step."""
        checkpoints = self._checkpoints()
        pairs = [open_pair(checkpoints[0], each) for each in checkpoints[1:]]
        return FinetuneTrajectory(self, checkpoints, pairs)

    @property
    def largest_steps(self) -> dict[str, torch.Tensor]:
        """Of each entry the largest |step| of the run, float32, before it was rounded to `dtype`.

        Decay is part of a step. In float32 a step is what it did to the weight as it is stored.
        """
        return self._result.largest_steps

    @property
    def largest_step(self) -> float:
        """The largest of all of them."""
        return max(float(each.max()) for each in self.largest_steps.values())

    def model(self) -> torch.nn.Module:
        """The decoder as it is before the run, to be trained in some other way: tokens to logits.

        What is in `frozen` does not require a gradient.
        """
        import torch

        from pytest_subnet.strategies.tiny_models import make_decoder

        model = make_decoder(self.seed, getattr(torch, self.dtype))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        return model

    def optimizer_of(self, parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimiser of the run, on `parameters`."""
        import torch

        make, options = self.optimizer, {}
        if isinstance(make, str):
            options = OPTIMIZERS[make]
            make = getattr(torch.optim, make.partition("+")[0])
        optimizer: torch.optim.Optimizer = make(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, **options
        )
        return optimizer

    def losses(self, model: torch.nn.Module) -> Iterator[torch.Tensor]:
        """For each step the loss of `model`, as it then is, on the tokens of that step."""
        from pytest_subnet.strategies.tiny_models import loss_of, make_batches

        for batch in make_batches(self.data_seed, self.steps):
            yield loss_of(model, batch)

    @cached_property
    def _result(self) -> _Result:
        import torch

        model = self.model()
        weights = dict(model.named_parameters())
        masters = {name: each.detach().float().clone() for name, each in weights.items()}
        optimizer = self.optimizer_of(masters.values())
        largest = {name: torch.zeros_like(each) for name, each in masters.items()}
        states = [self.base]
        for loss in self.losses(model):
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            before = _copied(masters)
            for name, weight in weights.items():
                masters[name].grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            for name, weight in weights.items():
                step = (masters[name] - before[name]).abs_()
                largest[name] = torch.maximum(largest[name], step)
                weight.detach().copy_(masters[name])
                if not self.master_weights:
                    masters[name].copy_(weight.detach())
            states.append(_copied(weights))
        return _Result(states, largest)

    def _checkpoints(self) -> list[TensorsCheckpoint]:
        states = self._result.states
        return [
            TensorsCheckpoint(state, label=f"step {step}", is_live=True)
            for step, state in enumerate(states)
        ]

    def __repr__(self) -> str:
        """What was drawn; pasted, it is this run."""
        drawn = [f"{field.name}={_spelt(getattr(self, field.name))}" for field in fields(self)]
        return f"Finetune({', '.join(drawn)})"


class FinetuneTrajectory(Trajectory):
    """The checkpoints of a `Finetune`: before it, and after each of its steps.

    Attributes:
        run: the run they are of.
    """

    def __init__(
        self, run: Finetune, checkpoints: list[TensorsCheckpoint], pairs: list[ModelPair]
    ) -> None:
        super().__init__([each.label for each in checkpoints], checkpoints, pairs)
        self.run = run

    def __repr__(self) -> str:
        """What gives it again."""
        return f"{self.run!r}.trajectory"


class _Result(NamedTuple):
    """What a run leaves behind: the weights before it and after each step, and its steps."""

    states: list[dict[str, torch.Tensor]]
    largest_steps: dict[str, torch.Tensor]


def _copied(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _spelt(value: object) -> str:
    return getattr(value, "__name__", "") or repr(value)


def _check_optimizer(optimizer: object) -> None:
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer={safe(repr(optimizer))} is not one of {', '.join(OPTIMIZERS)}"
            )
    elif not callable(optimizer):
        raise TypeError(
            f"optimizer={safe(repr(optimizer))} is neither a name nor a class of optimisers"
        )


def _check_frozen(frozen: Sequence[str]) -> None:
    from pytest_subnet.strategies.tiny_models import PARAMETERS

    for name in frozen:
        if name not in PARAMETERS:
            raise ValueError(
                f"frozen: the decoder has no parameter {safe(name)}{nearest(name, PARAMETERS)}"
            )
    if set(frozen) >= set(PARAMETERS):
        raise ValueError(f"frozen: all {plural(len(PARAMETERS), 'parameter')}, nothing is trained")
