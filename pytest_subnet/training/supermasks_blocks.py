"""What a model is for a while: one task's subnetwork, with what may not change guarded."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import parametrize

from pytest_subnet.errors import SubnetError
from pytest_subnet.text import first_few, plural

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pytest_subnet.training.supermasks_layers import Layer


@contextmanager
def swapped(layers: Iterable[Layer], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put other tensors in the place of the weights, which themselves are left alone.

    Args:
        layers: whose weights.
        weights: by name, what the model sees in the block.
    """
    own = []
    try:
        for layer in layers:
            own.append((layer, layer.weight))
            needs = weights[layer.name].requires_grad
            layer.module._parameters[layer.leaf] = torch.nn.Parameter(
                weights[layer.name], requires_grad=needs
            )
        yield
    finally:
        for layer, weight in own:
            layer.module._parameters[layer.leaf] = weight


@contextmanager
def computed(
    layers: Iterable[Layer], parametrisations: Mapping[str, torch.nn.Module]
) -> Iterator[None]:
    """Have the model compute each weight whenever it reads it."""
    done = []
    try:
        for layer in layers:
            order = list(layer.module._parameters)
            parametrize.register_parametrization(
                layer.module, layer.leaf, parametrisations[layer.name], unsafe=True
            )
            done.append((layer, order))
        yield
    finally:
        for layer, order in reversed(done):
            parametrize.remove_parametrizations(layer.module, layer.leaf, leave_parametrized=False)
            # They were taken out and put back last; optimisers count them in order.
            parameters = layer.module._parameters
            back = {leaf: parameters[leaf] for leaf in order}
            parameters.clear()
            parameters.update(back)


@contextmanager
def training_only(model: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Only the parameters `names` require gradients in the block; after it, those that did."""
    wanted = set(names)
    before = [(each, each.requires_grad) for each in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    try:
        yield
    finally:
        for parameter, needs in before:
            parameter.requires_grad_(needs)


@contextmanager
def guarded(model: torch.nn.Module, free: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Hold every parameter and buffer to its bits, but for entries that may change.

    Args:
        model: as it is named outside blocks.
        free: by name, which entries of a parameter may change, bool in its shape.

    Raises:
        SubnetError: something else has changed when the block ends; all is put back then, as it is
            when the block raises.
    """
    before = {name: each.clone() for name, each in _tensors(model).items()}
    try:
        yield
    except BaseException:
        _put_back(model, before)
        raise
    moved = [
        name
        for name, now in _tensors(model).items()
        if name in before and not _same_bits(now, _expected(now, before[name], free.get(name)))
    ]
    if moved:
        _put_back(model, before)
        raise SubnetError(
            f"{plural(len(moved), 'tensor')} changed that this task may not change: "
            f"{first_few(moved)}; all of them are put back. Was something trained besides, by "
            "another optimiser, or does a module change its buffers?"
        )


def _expected(now: torch.Tensor, before: torch.Tensor, free: torch.Tensor | None) -> torch.Tensor:
    return before if free is None else torch.where(free.to(now.device), now, before)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers as they are now: a module may have put others in their place."""
    now = (*model.named_parameters(), *model.named_buffers())
    return {name: each.detach() for name, each in now}


def _put_back(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    for name, each in _tensors(model).items():
        if name in before:
            each.copy_(before[name])


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = (each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*flat)
