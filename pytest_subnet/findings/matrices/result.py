"""What all results on the matrices of a pair have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pytest_subnet.text import short_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Measured(Protocol):
    @property
    def dtype(self) -> str: ...

    @property
    def numel(self) -> int: ...


class OfMatrices:
    """A result with a row for each matrix."""

    __slots__ = ()

    per_tensor: Sequence[_Measured]

    @property
    def numel(self) -> int:
        """Entries measured."""
        return sum(each.numel for each in self.per_tensor)

    @property
    def dtype(self) -> str:
        """The dtype compared; several are joined by `+`."""
        return "+".join(sorted({short_dtype(each.dtype) for each in self.per_tensor}))
