"""Torch distributed checkpoints, Megatron's among them."""
