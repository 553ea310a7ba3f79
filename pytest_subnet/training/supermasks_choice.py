"""Which task data belongs to, by the entropy of the outputs under all masks at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_subnet.errors import SubnetError
from pytest_subnet.text import safe
from pytest_subnet.training.supermasks_blocks import swapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.masks.update_mask import UpdateMask
    from pytest_subnet.training.supermasks_layers import Layer


class Choice(NamedTuple):
    """A task, guessed from data.

    Attributes:
        task: the one whose mask lowers the entropy of the outputs most; of equals the first.
        slopes: ∂H/∂α_t in nats, by task: the lower, the more likely.
    """

    task: str
    slopes: dict[str, float]


def choose(
    model: torch.nn.Module,
    layers: Sequence[Layer],
    masks: Mapping[str, UpdateMask],
    inputs: object,
) -> Choice:
    """As `Supermasks.choose`."""
    with torch.inference_mode(False), torch.enable_grad():
        return _choose(model, layers, masks, differentiable(inputs))


def _choose(
    model: torch.nn.Module,
    layers: Sequence[Layer],
    masks: Mapping[str, UpdateMask],
    inputs: object,
) -> Choice:
    weights = {each.name: each.weight.detach() for each in layers}
    mixed = {
        name: (weight * _mean(masks, name).to(weight)).requires_grad_()
        for name, weight in weights.items()
    }
    with evaluating(model), swapped(layers, mixed):
        seen = [each.weight for each in layers]
        entropy = _entropy(outputs_of(model, inputs))
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(entropy, seen, allow_unused=True)
    slopes = dict.fromkeys(masks, 0.0)
    for layer, gradient in zip(layers, found, strict=True):
        if gradient is None:
            continue
        each_entry = gradient.double() * weights[layer.name].double()
        for task, mask in masks.items():
            inside = torch.from_numpy(mask[layer.name]).to(each_entry.device)
            slopes[task] += float(each_entry[inside].sum())
    if not all(map(math.isfinite, slopes.values())):
        raise SubnetError(
            "the entropy of the outputs has no finite slope; a task cannot be told from them"
        )
    return Choice(min(slopes, key=slopes.__getitem__), slopes)


def differentiable(inputs: object) -> object:
    """`inputs`, with copies of the tensors that were made in inference mode."""
    if isinstance(inputs, Mapping):
        return {key: differentiable(each) for key, each in inputs.items()}
    if isinstance(inputs, torch.Tensor) and inputs.is_inference():
        return inputs.clone()
    return inputs


def outputs_of(model: torch.nn.Module, inputs: object) -> torch.Tensor:
    """What the model gives for `inputs`; `SubnetError` unless it is finite."""
    given = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    outputs = getattr(given, "logits", given)
    if not isinstance(outputs, torch.Tensor):
        raise TypeError(
            f"the model gave {safe(type(given).__name__)}, neither a tensor nor anything with "
            ".logits"
        )
    bad = int((~outputs.detach().isfinite()).sum())
    if bad:
        raise SubnetError(f"the outputs hold {bad:,} NaN or Inf; a task cannot be told from them")
    return outputs


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout in the block; after it each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _mean(masks: Mapping[str, UpdateMask], name: str) -> torch.Tensor:
    """Σ α_t M_t with α_t = 1/T, unpacked one mask at a time."""
    counts: torch.Tensor | None = None
    for mask in masks.values():
        entries = torch.from_numpy(mask[name]).double()
        counts = entries if counts is None else counts + entries
    if counts is None:
        raise ValueError("there is no mask")
    return counts / len(masks)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    if logits.dim() < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"the outputs have shape {list(logits.shape)}, and an entropy needs […, classes] with "
            "two classes or more"
        )
    # In 16 bits, logits far apart would give 0 * Inf.
    logs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(logs.exp() * logs).sum(-1).mean()
