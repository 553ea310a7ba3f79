"""Checkpoints: read-only mappings from name to tensor, one file per format."""

from pytest_subnet.checkpoints.base import Checkpoint, Extent, TensorInfo
from pytest_subnet.checkpoints.opening import open_checkpoint

__all__ = ["Checkpoint", "Extent", "TensorInfo", "open_checkpoint"]
