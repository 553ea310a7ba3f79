"""Quantised checkpoints, presented as what they stand for."""
