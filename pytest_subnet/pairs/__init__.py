"""Pairs: base and tuned aligned tensor by tensor."""

from pytest_subnet.errors import Problem
from pytest_subnet.pairs.model_pair import ModelPair, TensorPair
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.pairs.selection import Selection, select

__all__ = ["ModelPair", "Problem", "Selection", "TensorPair", "open_pair", "select"]
