"""Which weights supermasks cover, their scores, and the best of them as a mask."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.parametrize import ParametrizationList

from pytest_subnet.errors import SelectionError, SubnetError
from pytest_subnet.pairs.selection import matching
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_subnet.pairs.selection import Patterns


class Layer(NamedTuple):
    """A weight that supermasks cover.

    Attributes:
        name: of the weight, in the model.
        module: that owns it.
        leaf: its name in the module.
        kept: how many of its entries are in each mask.
    """

    name: str
    module: torch.nn.Module
    leaf: str
    kept: int

    @property
    def weight(self) -> torch.nn.Parameter:
        """The weight as it is now."""
        found = self.module._parameters[self.leaf]
        if found is None:
            raise SubnetError(f"{safe(self.name)} is gone: the model was changed under its masks")
        return found


def choose_layers(
    model: torch.nn.Module,
    density: float,
    include: Patterns | None,
    exclude: Patterns | None,
) -> list[Layer]:
    """The weights of `model` to cover: of two or more dimensions, outside embeddings.

    Raises:
        SelectionError: a pattern matches nothing, nothing is left, or a weight cannot be masked.
        SubnetError: a module keeps statistics of what it has seen.
    """
    _refuse_statistics(model)
    owners = {
        f"{path}.{leaf}" if path else leaf: (module, leaf)
        for path, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }
    names = list(owners)
    included = matching("include", include, names)
    excluded = matching("exclude", exclude, names) or set()
    layers = []
    for name, (module, leaf) in owners.items():
        weight = module._parameters[leaf]
        if weight is None or name in excluded:
            continue
        if included is None and (
            weight.dim() < 2 or isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        ):
            continue
        if included is None or name in included:
            _check_maskable(name, module, weight)
            # To the nearest whole entry, half to even; a layer without any would cut the model.
            layers.append(Layer(name, module, leaf, max(1, round(density * weight.numel()))))
    if not layers:
        raise SelectionError(
            "nothing is selected: supermasks cover weights of two or more dimensions outside "
            f"embeddings, and the model has none ({first_few(names, 2) or 'no parameters'})"
        )
    _refuse_shared(model, layers)
    return layers


def draw_scores(layer: Layer, seed: int, task: int) -> torch.Tensor:
    """Float32 scores of one weight, Kaiming-uniform with a = √5: uniform in ±1/√fan_in.

    Args:
        layer: the weight.
        seed: of all tasks.
        task: its number. The same seed and task give the same scores on every device.
    """
    numbers = [seed, task, *layer.name.encode("utf-8", "surrogatepass")]
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64).tolist()
    generator = torch.Generator().manual_seed(state >> 1)
    limit = 1 / math.sqrt(_fan_in(layer.weight))
    scores = torch.empty(layer.weight.shape, dtype=torch.float32)
    return scores.uniform_(-limit, limit, generator=generator)


def sign_constant_(layers: Iterable[Layer], density: float, seed: int) -> None:
    """Set each weight to ±√(2 / (density · fan_in)), the signs drawn.

    What a mask keeps of it then has the variance of a whole layer of Kaiming's.
    """
    for layer in layers:
        signs = torch.where(draw_scores(layer, seed, 0) < 0, -1.0, 1.0)
        constant = math.sqrt(2 / (density * _fan_in(layer.weight)))
        with torch.no_grad():
            layer.weight.copy_(signs * constant)


def top_k(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of `sizes`: bool, in its shape. Of equals the first in row order win."""
    flat = sizes.detach().reshape(-1)
    least = _least_of(flat, count)
    chosen = flat > least
    equals = (flat == least).nonzero()[:, 0]
    chosen[equals[: count - int(chosen.sum())]] = True
    return chosen.reshape(sizes.shape)


def _least_of(flat: torch.Tensor, count: int) -> torch.Tensor | float:
    """The smallest of the `count` largest."""
    place = flat.numel() - count
    if flat.device.type == "cpu" and flat.dtype == torch.float32:
        return float(np.partition(flat.numpy(), place)[place])  # 8 times as fast as kthvalue
    return flat.kthvalue(place + 1).values


class BestScores(torch.nn.Module):
    """A parametrisation: a weight at the entries of the largest scores, 0 elsewhere."""

    def __init__(self, scores: torch.Tensor, kept: int) -> None:
        """Take `scores` as they are; they are what is trained."""
        super().__init__()
        self.scores = torch.nn.Parameter(scores)
        self.kept = kept

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that the model sees."""
        masked: torch.Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
            weight, self.scores, self.kept
        )
        return masked


class Inside(torch.nn.Module):
    """A parametrisation: a weight at the entries of a mask, 0 elsewhere."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        """Of a bool mask in the weight's shape."""
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight that the model sees."""
        return torch.where(self.mask, weight, 0)


class _StraightThrough(torch.autograd.Function):
    """Mask forwards; backwards as if the mask were the sizes of the scores themselves."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(weight, scores)
        return torch.where(top_k(scores.abs(), count), weight, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        weight, scores = ctx.saved_tensors
        return None, (gradients[0] * weight).to(scores.dtype) * scores.sign(), None


def finite_scores(scores: Mapping[str, torch.Tensor], task: str) -> None:
    """Raise unless all scores are finite."""
    for name, each in scores.items():
        bad = int((~each.isfinite()).sum())
        if bad:
            raise SubnetError(
                f"the scores of {safe(name)} hold {bad:,} NaN or Inf after {safe(task)} was "
                "learnt, and order nothing; train with a smaller learning rate"
            )


def _fan_in(weight: torch.Tensor) -> int:
    return max(1, weight[0].numel())


def _check_maskable(name: str, module: torch.nn.Module, weight: torch.Tensor) -> None:
    why = None
    if weight.dim() < 2:
        why = "has fewer than two dimensions"
    elif not weight.is_floating_point() or weight.itemsize < 2:
        why = f"is {weight.dtype}, which is not trained"
    elif weight.is_meta or hasattr(weight, "to_local") or not weight.numel():
        why = "has no values here (meta device, sharded or empty)"
    elif isinstance(module, torch.nn.RNNBase):
        why = f"is kept a second time by its {type(module).__name__}, which would not see a mask"
    elif isinstance(module, ParametrizationList) or hasattr(module, "weight_g"):
        why = "is computed from others (parametrised)"
    if why is not None:
        raise SelectionError(f"{safe(name)} {why}; leave it out with exclude=")


def _refuse_statistics(model: torch.nn.Module) -> None:
    """Statistics of one task would change what all others compute."""
    found = [
        f"{path or 'the model'} ({type(module).__name__})"
        for path, module in model.named_modules()
        if module._buffers.get("running_mean") is not None
    ]
    if found:
        raise SubnetError(
            f"{first_few(found)}: keeps running statistics, which learning one task changes for "
            "all others; build it with track_running_stats=False, or normalise by layer or group"
        )


def _refuse_shared(model: torch.nn.Module, layers: Iterable[Layer]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for layer in layers:
        others = [name for name in names[id(layer.weight)] if name != layer.name]
        if others:
            raise SelectionError(
                f"{safe(layer.name)} is one tensor with {first_few(others)}, and a mask of one "
                "would not be seen in the other; untie them, or leave all out with exclude="
            )
