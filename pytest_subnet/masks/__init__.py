"""Sets of entries of a model, one bit an entry."""

from pytest_subnet.masks.update_mask import MaskTensor, UpdateMask

__all__ = ["MaskTensor", "UpdateMask"]
