"""Which parameters of a model a mask speaks of, and which an optimiser moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.pairs.alignment import match_names
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    import torch

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.memory import TensorsCheckpoint
    from pytest_subnet.masks.update_mask import UpdateMask


class Part(NamedTuple):
    """A parameter with entries outside the mask.

    Attributes:
        name: in the model.
        packed: the mask, one bit an entry, uint8 `[bytes]`; None where every entry is outside.
    """

    name: str
    packed: torch.Tensor | None


class Parts(NamedTuple):
    """A model divided by a mask.

    Attributes:
        outside: by `id` of the parameter; those that lie inside whole are not there.
        trained: the names of those with entries inside that the optimiser owns, by `id`.
        known: every parameter of the model, which keeps its `id` its own.
        entries: how many entries the optimiser can move inside the mask.
        mask_bytes: what the packed bits take.
    """

    outside: dict[int, Part]
    trained: dict[int, str]
    known: dict[int, torch.Tensor]
    entries: int
    mask_bytes: int


def divide(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    owned: set[int],
    mask: UpdateMask,
) -> Parts:
    """Divide the parameters of `model` by `mask`.

    Args:
        model: a module, or its parameters by name.
        owned: the `id` of each tensor that the optimiser moves.
        mask: over tensors of the model; what it does not name is outside.

    Raises:
        PairMismatchError: the mask names tensors that the model does not have so.
        SelectionError: the mask covers nothing that can be trained, or the optimiser does not own
            a parameter that it covers.
    """
    weights = _weights(model)
    if not mask.count:
        raise SelectionError(
            f"{mask!r} is empty: nothing could be trained inside it; was it made from two "
            "checkpoints that are the same under its tolerance?"
        )
    mask_names = _mask_names(mask, weights)
    outside: dict[int, Part] = {}
    trained: dict[int, str] = {}
    known: dict[int, torch.Tensor] = {}
    covered: list[str] = []
    not_owned: list[str] = []
    entries = mask_bytes = 0
    for name in weights.names():
        if name in weights.buffers:
            continue
        parameter = weights.tensor(name)
        known[id(parameter)] = parameter
        mask_name = mask_names.get(weights.ties.get(name, name))
        inside = 0 if mask_name is None else mask.info(mask_name).entries
        if inside and name not in weights.ties:
            covered.append(name)
            # Masters get their gradients by hand, and need not require any.
            can_train = parameter.requires_grad or isinstance(model, Mapping)
            if can_train and id(parameter) in owned:
                trained[id(parameter)] = name
                entries += inside
            elif can_train:
                not_owned.append(name)
        if id(parameter) in outside or inside == parameter.numel():
            continue
        packed = _packed(mask, mask_name, parameter) if mask_name is not None and inside else None
        outside[id(parameter)] = Part(name, packed)
        mask_bytes += 0 if packed is None else packed.numel()
    _check_trainable(mask, covered, trained, not_owned, entries)
    return Parts(outside, trained, known, entries, mask_bytes)


def inside_of(part: Part, parameter: torch.Tensor) -> torch.Tensor:
    """Which entries of `parameter` are in the mask: bool, in its shape, where it is."""
    import torch

    packed = part.packed
    if packed is None:
        return torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    packed = packed.to(parameter.device)  # the model may have been moved
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> places).bitwise_and_(1).view(torch.bool)
    return bits.reshape(-1)[: parameter.numel()].reshape(parameter.shape)


def check_model(model: object) -> None:
    """Raise `TypeError` unless `model` is a module, or looks like its parameters by name."""
    import torch

    if not isinstance(model, torch.nn.Module | Mapping):
        raise TypeError(
            "train_inside takes a module, or its parameters by name (float32 masters), not "
            f"{type(model).__name__}"
        )


def _weights(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> TensorsCheckpoint:
    for name, tensor in parameters_of(model):
        if hasattr(tensor, "to_local"):
            raise SelectionError(
                f"{safe(name)} is sharded over several processes, where a mask of whole tensors "
                "does not fit; train inside a mask without FSDP or tensor parallelism"
            )
    return cast("TensorsCheckpoint", open_checkpoint(model))


def parameters_of(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
) -> list[tuple[str, torch.Tensor]]:
    """The parameters of `model` as they are now, by name."""
    return list(model.items() if isinstance(model, Mapping) else model.named_parameters())


def _mask_names(mask: UpdateMask, weights: TensorsCheckpoint) -> dict[str, str]:
    """The mask's name of each tensor of the model that it names, second names of ties left out."""
    own = {name: name for name in weights.names()}
    # Only names and shapes are looked at, and a mask has both.
    met = match_names(cast("Checkpoint", mask), weights, mask.names(), own).met
    lost = [name for name in mask.names() if name not in met]
    if lost:
        raise PairMismatchError(
            f"the mask of {mask.origin.what} names {plural(len(lost), 'tensor')} that "
            f"{safe(weights.label)} does not have: {first_few(lost)}; make the mask from "
            "checkpoints of this model"
        )
    names: dict[str, str] = {}
    for mask_name, name in met.items():
        expected, found = mask.info(mask_name).shape, weights.info(name).shape
        if expected != found:
            raise PairMismatchError(
                f"{safe(name)} of {safe(weights.label)} has shape {list(found)}, the mask of "
                f"{mask.origin.what} was made for {list(expected)}; make it from checkpoints of "
                "this model (of weights that are sharded or partitioned, gather them first)"
            )
        known = names.setdefault(weights.ties.get(name, name), mask_name)
        if known != mask_name and not np.array_equal(mask[known], mask[mask_name]):
            raise PairMismatchError(
                f"{safe(known)} and {safe(mask_name)} are one tensor in {safe(weights.label)}, and "
                "the mask holds other entries of each; leave one of them out of the mask"
            )
    return names


def _packed(mask: UpdateMask, name: str, parameter: torch.Tensor) -> torch.Tensor:
    import torch

    words = np.concatenate([run.view(np.uint8) for run in mask.words(name)])
    return torch.from_numpy(words).to(parameter.device)


def _check_trainable(
    mask: UpdateMask,
    covered: list[str],
    trained: Mapping[int, str],
    not_owned: list[str],
    entries: int,
) -> None:
    if not_owned:
        some = f"{len(not_owned):,} of {plural(len(covered), 'parameter')}"
        hint = "build it from all of model.parameters()"
        if not trained:
            hint += (
                ", after the model was wrapped or moved, and if it owns float32 copies of them "
                "(masters), pass those: train_inside({name: master, …}, optimizer, mask)"
            )
        raise SelectionError(
            f"the optimiser does not own {some} that the mask covers: {first_few(not_owned)}; "
            f"{hint}"
        )
    if not entries:
        why = (
            f"{first_few(covered)} {'has' if len(covered) == 1 else 'have'} requires_grad=False"
            if covered
            else "it has entries in buffers only"
        )
        raise SelectionError(
            f"{mask!r} covers nothing that can be trained: {why}; unfreeze what is to be trained, "
            "or take a mask of the part that is"
        )
