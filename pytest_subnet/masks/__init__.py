"""Sets of entries of a model, one bit an entry."""

from pytest_subnet.masks.builders import magnitude_mask, principal_mask, random_mask_like
from pytest_subnet.masks.building import update_mask
from pytest_subnet.masks.update_mask import MaskTensor, UpdateMask

__all__ = [
    "MaskTensor",
    "UpdateMask",
    "magnitude_mask",
    "principal_mask",
    "random_mask_like",
    "update_mask",
]
