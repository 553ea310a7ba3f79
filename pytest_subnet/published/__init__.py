"""The papers' numbers, as data, each with its source and what to know before comparing with it.

Numbers are as printed; where a source contradicts itself the row keeps its number and says so.
"""

from pytest_subnet.published.comparing import PublishedComparison, compare_published
from pytest_subnet.published.numbers import NUMBERS, OVERLAPS
from pytest_subnet.published.rows import PublishedNumber, PublishedOverlap, PublishedSparsity
from pytest_subnet.published.selecting import nearest, published_numbers, published_sparsities
from pytest_subnet.published.sparsities import SPARSITIES

__all__ = [
    "NUMBERS",
    "OVERLAPS",
    "SPARSITIES",
    "PublishedComparison",
    "PublishedNumber",
    "PublishedOverlap",
    "PublishedSparsity",
    "compare_published",
    "nearest",
    "published_numbers",
    "published_sparsities",
]
