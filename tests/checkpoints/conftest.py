"""What the tests of checkpoints share: tensors of every dtype, raw files, and refusals."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_subnet import CheckpointError, open_checkpoint
from pytest_subnet.checkpoints.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    itemsize = DTYPES[dtype].itemsize
    numel = torch.Size(shape).numel()
    high = 2 if dtype == "bool" else 256
    bits = torch.randint(0, high, (numel * itemsize,), dtype=torch.uint8, generator=generator)
    return bits.view(getattr(torch, dtype)).reshape(shape)


@pytest.fixture
def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of random bits in each dtype, and the shapes that readers get wrong."""
    tensors = {
        f"of_{dtype}.weight": _random_bits(dtype, (5, 3), seed) for seed, dtype in enumerate(DTYPES)
    }
    return tensors | {
        "single": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "deep": _random_bits("bfloat16", (2, 3, 4, 5), 99),
    }


@pytest.fixture
def storable(every_dtype: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that a safetensors file can hold, as its own library writes them."""
    return {
        name: tensor
        for name, tensor in every_dtype.items()
        if tensor.dtype not in (torch.complex128, torch.float8_e8m0fnu)
    }


@pytest.fixture
def same_bits() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Whether two tensors have one dtype, shape and bits; NaN equals itself, -0 is not 0."""

    def compare(one: torch.Tensor, other: torch.Tensor) -> bool:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        plain = (each.resolve_conj().resolve_neg().contiguous() for each in (one, other))
        return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in plain))

    return compare


@pytest.fixture
def write_raw() -> Callable[..., Path]:
    """Write a safetensors file from a header, which may be anything, and its data."""

    def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(raw) if length is None else length
        path.write_bytes(size.to_bytes(8, "little") + raw + data)
        return path

    return write


@pytest.fixture
def refusal() -> Callable[[Any], str]:
    """The message with which a source is refused, which must be one clean line."""

    def message(source: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(source)
        text = str(caught.value)
        assert text.isprintable()
        assert len(text) < 1500
        return text

    return message
