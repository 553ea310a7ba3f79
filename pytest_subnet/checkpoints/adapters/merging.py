"""The arithmetic of an adapter, one matrix at a time; scales and DoRA are peft's own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from pytest_subnet.arithmetic import plain_arithmetic
from pytest_subnet.checkpoints.base import Checkpoint

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from pytest_subnet.checkpoints.adapters.keys import LowRank

_NAME = "default"

_BLOCK = 4 * 1024 * 1024
"""Entries added at once: torch makes a copy of what it adds to another dtype."""


@plain_arithmetic()
def merge(
    update: LowRank, adapter: Checkpoint, base: Checkpoint, lora: LoraConfig, dtype: torch.dtype
) -> torch.Tensor:
    """The matrix with its update.

    Args:
        update: of which matrix, and by what.
        adapter: where A and B are read from.
        base: where the matrix is read from.
        lora: the adapter's config.
        dtype: float64 calculates in float64 throughout; any other calculates in float32 (in
            float64 for a float64 base) and rounds once, to `dtype`.

    Returns:
        A tensor of its own, in row order. Beside it, the update takes the matrix once in the
        dtype of the calculation; with DoRA, about four times.
    """
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Not base.read: of what is in memory that is no copy, and it is added to below.
    weight = Checkpoint.read(base, update.target).to(dtype)
    a, b = (adapter.read(key).to(wide) for key in (update.a, update.b))
    layer = _layer(update, lora, tuple(weight.shape))
    if update.magnitude is None:
        # What the layer's own merge does, but without its three temporary matrices.
        product = (b @ a).mul_(layer.scaling[_NAME])
        delta = product if update.form == "linear" else product.T
        rows = max(_BLOCK // max(weight.shape[1], 1), 1)
        for start in range(0, weight.shape[0], rows):
            weight[start : start + rows] += delta[start : start + rows]
        return weight
    parameter = torch.nn.Parameter
    layer.base_layer.weight = parameter(weight, requires_grad=False)
    if update.form == "embedding":
        layer.lora_embedding_A[_NAME], layer.lora_embedding_B[_NAME] = parameter(a), parameter(b)
    else:
        layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight = parameter(a), parameter(b)
    magnitude = adapter.read(update.magnitude).to(wide)
    layer.lora_magnitude_vector[_NAME].weight = parameter(magnitude)
    with torch.no_grad():
        layer.merge()
    merged: torch.Tensor = layer.base_layer.weight.data.contiguous()
    return merged


def _layer(update: LowRank, lora: LoraConfig, shape: tuple[int, ...]) -> Any:  # of peft's: untyped
    """The layer that peft makes of one matrix, without memory for it."""
    import torch
    from peft.tuners.lora.layer import Embedding, Linear
    from transformers.pytorch_utils import Conv1D

    config = copy.copy(lora)
    config.fan_in_fan_out = update.form == "conv1d"
    rows, columns = shape
    settings: Any = {"r": update.rank, "lora_alpha": update.alpha}  # peft takes any number
    with torch.device("meta"):
        if update.form == "embedding":
            inner: Any = torch.nn.Embedding(rows, columns)
            return Embedding(inner, _NAME, config, **settings)
        if update.form == "conv1d":
            inner = Conv1D(columns, rows)  # type: ignore[no-untyped-call]
        else:
            inner = torch.nn.Linear(columns, rows, bias=False)
        return Linear(inner, _NAME, config, **settings)
