"""Which old task's subnetwork tells the classes of new data apart (KKT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pytest_subnet.text import plural
from pytest_subnet.training.supermasks_choice import evaluating, outputs_of

if TYPE_CHECKING:
    from pytest_subnet.training.supermasks import Supermasks

_LEARN_FROM = 0.66
_AT_ONCE = 1024
"""Examples whose distances to all others are looked at together."""


class Nearest(NamedTuple):
    """The task to start a new one from.

    Attributes:
        task: the one of the highest accuracy, of equals the first; None where that is not above
            `1 / classes`.
        accuracies: by task, the share of examples that the vote of their neighbours gets right.
        classes: how many different labels there are.
    """

    task: str | None
    accuracies: dict[str, float]
    classes: int


def nearest_task(
    masks: Supermasks, inputs: torch.Tensor, labels: torch.Tensor, neighbours: int
) -> Nearest:
    """As `Supermasks.nearest`."""
    examples = len(inputs)
    known = int(examples * _LEARN_FROM)
    classes = _check(inputs, labels, neighbours, known)
    accuracies = {}
    for task in masks:
        with masks.apply(task) as model, evaluating(model), torch.no_grad():
            outputs = torch.cat([outputs_of(model, each) for each in torch.split(inputs, _AT_ONCE)])
        places = outputs.reshape(examples, -1).float()
        guessed = _vote(places[:known], labels[:known], places[known:], neighbours)
        accuracies[task] = float((guessed == labels[known:]).double().mean())
    best = max(accuracies, key=accuracies.__getitem__)
    return Nearest(best if accuracies[best] > 1 / classes else None, accuracies, classes)


def _vote(
    places: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor, neighbours: int
) -> torch.Tensor:
    """The commonest label of the nearest places; of equally common ones the smallest."""
    found = []
    for some in torch.split(asked, _AT_ONCE):
        near = torch.cdist(some, places).topk(neighbours, largest=False).indices
        found.append(labels.to(near.device)[near].mode(1).values)
    return torch.cat(found).to(labels.device)


def _check(inputs: torch.Tensor, labels: torch.Tensor, neighbours: int, known: int) -> int:
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, not a tensor")
    if labels.shape != (len(inputs),) or labels.is_floating_point():
        raise ValueError(
            f"labels is {labels.dtype} {list(labels.shape)}; one integer an example is needed: "
            f"[{len(inputs)}]"
        )
    classes = len(torch.unique(labels))
    if classes < 2:
        raise ValueError(
            f"labels hold {plural(classes, 'class').replace('classs', 'classes')}; two or more "
            "are needed to be told apart"
        )
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours={neighbours!r} is not an integer of at least 1")
    if neighbours > known or known == len(inputs):
        raise ValueError(
            f"neighbours={neighbours} is more than the {known} examples that are learnt from (66 % "
            f"of {len(inputs)}); give more examples, or a smaller number"
        )
    return classes
