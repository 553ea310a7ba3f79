"""Checkpoints that lie elsewhere, read by ranges."""
