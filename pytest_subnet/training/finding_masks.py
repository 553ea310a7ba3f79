"""The bits of a search as a mask, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.masks.algebra import from_words
from pytest_subnet.masks.bits import pack
from pytest_subnet.masks.update_mask import Origin, UpdateMask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.training.soft_mask import SoftMask


def mask_of(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    bits: Sequence[NDArray[np.uint8]],
    lambda_: float,
    base: str,
) -> UpdateMask:
    """The mask of packed bits, by the order of the weights.

    Args:
        names: of the weights.
        shapes: of each.
        dtypes: of each, as torch names it.
        bits: uint8 `[bytes]` of each.
        lambda_: under which they were found, for messages.
        base: the fingerprint of the model.
    """
    place = {name: index for index, name in enumerate(names)}

    def words(name: str) -> Iterator[NDArray[np.uint64]]:
        yield np.ascontiguousarray(bits[place[name]]).view(np.uint64)

    origin = Origin(f"a subnetwork found, λ={lambda_:g}", base=base)
    return from_words(list(zip(names, shapes, dtypes, strict=True)), words, origin)


def of_soft(soft: SoftMask, lambda_: float, base: str) -> UpdateMask:
    """The mask that a soft one has come to."""
    bits = [pack(each.numpy()) for each in soft.bits()]
    return mask_of(soft.names, soft.shapes, soft.dtypes, bits, lambda_, base)


def packed(mask: UpdateMask, name: str) -> NDArray[np.uint8]:
    """The bits of one weight, uint8 `[bytes]`."""
    return np.concatenate(
        [np.empty(0, np.uint8), *(run.view(np.uint8) for run in mask.words(name))]
    )
