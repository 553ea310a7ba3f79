"""One attempt at a subnetwork: a soft mask, its optimiser, and the steps they take."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pytest_subnet.errors import SubnetError
from pytest_subnet.text import plural, safe
from pytest_subnet.training.finding_result import SearchStep
from pytest_subnet.training.finding_rules import is_settled
from pytest_subnet.training.soft_mask import SoftMask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    Loss = Callable[[torch.nn.Module, object], torch.Tensor]
    Batches = Callable[[int], object] | Sequence[object]

_MOST_EXPONENT = 69.0
"""A temperature of 1e30: times a number of the mask, still within float32."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides how a search goes, as `find_subnetwork` takes it."""

    lambdas: tuple[float, ...]
    learning_rate: float
    temperature_growth: float
    max_steps: int
    attempts: int
    seed: int


class Attempt:
    """A soft mask on its way.

    Attributes:
        mask: where it is.
        optimizer: of its numbers.
        history: the steps taken.
        settled: whether it has ended.
    """

    def __init__(
        self, model: torch.nn.Module, names: tuple[str, ...], lambda_: float, settings: Settings
    ) -> None:
        """Before its first step."""
        import torch

        self.mask = SoftMask(model, names)
        # Decay moves nothing at the paper's rate, and at higher ones draws numbers to undecided.
        self.optimizer = torch.optim.AdamW(
            self.mask.numbers, lr=settings.learning_rate, weight_decay=0
        )
        self.history: list[SearchStep] = []
        self.settled = False
        self._lambda = lambda_
        self._settings = settings

    def step(self, loss: Loss, batch: object) -> None:
        """Move the numbers once, and see whether they have settled."""
        import torch

        number = len(self.history)
        growth = math.log(self._settings.temperature_growth)
        temperature = math.exp(min(number * growth, _MOST_EXPONENT))
        with torch.enable_grad():
            gates = self.mask.gates(temperature)
            value = _checked(self.mask.call(loss, gates, batch), number, self._lambda)
            total = value
            if self._lambda:
                size = cast("torch.Tensor", sum(each.sum().to(value.device) for each in gates))
                total = value.float() + self._lambda / self.mask.numel * size
            gradients = torch.autograd.grad(total, self.mask.numbers, allow_unused=True)
        if not any(each is not None for each in gradients):
            raise ValueError(_no_gradient("has no gradient towards the weights masked"))
        for numbers, gradient in zip(self.mask.numbers, gradients, strict=True):
            numbers.grad = torch.zeros_like(numbers) if gradient is None else gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        counted = self.mask.counts(temperature)
        self.history.append(SearchStep(float(value.detach()), *counted))
        self.settled = is_settled(*counted)


def pick(batches: Batches, settings: Settings, attempt: int, step: int) -> object:
    """The batch of a step, the same whenever it is asked for.

    Of a function, that of a number which goes on from attempt to attempt; of a sequence, the next
    one round, in another order in each attempt after the first.
    """
    import torch

    if callable(batches):
        return batches(attempt * settings.max_steps + step)
    if not attempt:
        return batches[step % len(batches)]
    generator = torch.Generator().manual_seed(settings.seed + attempt)
    order = torch.randperm(len(batches), generator=generator)
    return batches[int(order[step % len(batches)])]


def seed_step(settings: Settings, attempt: int, step: int) -> None:
    """Random numbers of a step's own, so that one that is repeated draws the same ones."""
    import torch

    # Generators look at 32 bits of a seed, some at the lowest only.
    digest = hashlib.sha256(f"{settings.seed} {attempt} {step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:4], "little"))


def _checked(value: object, step: int, lambda_: float) -> torch.Tensor:
    """`value` as a loss, a tensor without dimensions."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"loss gave {safe(type(value).__name__)}, not a tensor; it takes (model, batch) and "
            "gives the loss of the model on the batch"
        )
    if value.numel() != 1:
        raise ValueError(
            f"loss gave {plural(value.numel(), 'number')}, a tensor of shape {list(value.shape)}, "
            "and not one; give their mean"
        )
    if not value.requires_grad:
        raise ValueError(_no_gradient("has no gradient"))
    value = value.reshape(())
    if not math.isfinite(float(value.detach())):
        raise SubnetError(
            f"the loss is {float(value.detach())} at step {step:,} of λ = {lambda_:g}, and no mask "
            "can be found from it; look for NaN in the batch and in the weights, or lower "
            "learning_rate"
        )
    return value


def _no_gradient(what: str) -> str:
    return (
        f"the loss {what}; compute it from the model that loss is called with, without "
        "torch.no_grad(), detach() or item()"
    )
