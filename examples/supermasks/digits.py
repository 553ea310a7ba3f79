"""Permuted digits: one task an order of the pixels, all of them the same ten classes."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

HELD_OUT = 450  # of 1,797 digits


class Task(NamedTuple):
    """Real digits of 8 x 8 pixels, as rows of 64 numbers around 0, in an order of their own."""

    name: str
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def tasks(count: int) -> list[Task]:
    """Return the first `count` tasks; the digits held out are the same in each."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.data).float() / 8 - 1
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(labels), generator=generator)
    test, train = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    found = []
    for number in range(1, count + 1):
        order = torch.randperm(pixels.shape[1], generator=generator)
        seen = pixels[:, order]
        found.append(Task(f"order {number}", seen[train], labels[train], seen[test], labels[test]))
    return found
