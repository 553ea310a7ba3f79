"""Displacement operators: what a structured matrix is turned into, and of low rank after.

    Sylvester   A M - M B        Stein   M - A M B

`A` and `B` are factors that move or weight rows and columns; none is ever formed as a matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from pytest_subnet.text import nearest, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

Blocks: TypeAlias = "Callable[[], Iterable[torch.Tensor]]"
"""A matrix some rows at a time, in order, as often as it is asked for."""

Form: TypeAlias = Literal["sylvester", "stein"]
FORMS = ("sylvester", "stein")

_ENTRIES = 1 << 24
"""How many entries of a matrix are in memory at a time, beside its displacement."""

_APART = 1e-10
"""Eigenvalues nearer than this are the same one; those of shifts are further apart, or equal."""


class Factor(Protocol):
    """A square matrix that is only ever multiplied with."""

    def add_left(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """Add `scale * (A @ matrix)` to `out`."""
        ...

    def add_right(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """Add `scale * (matrix @ B)` to `out`."""
        ...

    def eigenvalues(self, size: int) -> NDArray[np.complex128]:
        """Those of the factor as a matrix of `size` rows."""
        ...

    def mean_square(self, size: int) -> float:
        """Its squares added up, for each of its `size` rows: what it does to independent noise."""
        ...

    def check_size(self, size: int) -> None:
        """Raise `ValueError` where there is no such factor of `size` rows."""
        ...


@dataclass(frozen=True)
class Shift:
    """Ones below the diagonal and `corner` in the upper right corner: Z_f of the literature.

    Attributes:
        corner: 1 for the cyclic shift, 0 for one that loses the last row, -1 for the skew one.
        transposed: ones above the diagonal, and the corner in the lower left.
    """

    corner: float
    transposed: bool = False

    def add_left(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `Factor.add_left`: moves rows down, or up where transposed."""
        if self.transposed:
            out[:-1].add_(matrix[1:], alpha=scale)
            out[-1].add_(matrix[0], alpha=scale * self.corner)
        else:
            out[1:].add_(matrix[:-1], alpha=scale)
            out[0].add_(matrix[-1], alpha=scale * self.corner)

    def add_right(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `Factor.add_right`: moves columns left, or right where transposed."""
        Shift(self.corner, not self.transposed).add_left(matrix.T, out.T, scale)

    def eigenvalues(self, size: int) -> NDArray[np.complex128]:
        """The roots of `corner`."""
        import numpy as np

        if self.corner == 0:
            return np.zeros(size, np.complex128)
        turns = 2 * np.arange(size) + (self.corner < 0)
        length = abs(self.corner) ** (1 / size)
        roots: NDArray[np.complex128] = length * np.exp(1j * np.pi * turns / size)
        return roots

    def mean_square(self, size: int) -> float:
        """As `Factor.mean_square`: one a row."""
        return 1 + (self.corner**2 - 1) / size

    def check_size(self, size: int) -> None:
        """There is one of every size."""


@dataclass(frozen=True)
class Path:
    """Ones above and below the diagonal, and numbers in the upper left and lower right corner.

    Attributes:
        first: in the upper left corner.
        last: in the lower right corner.
    """

    first: float
    last: float

    def add_left(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `Factor.add_left`."""
        Shift(0).add_left(matrix, out, scale)
        Shift(0, transposed=True).add_left(matrix, out, scale)
        out[0].add_(matrix[0], alpha=scale * self.first)
        out[-1].add_(matrix[-1], alpha=scale * self.last)

    def add_right(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `Factor.add_right`; the factor is symmetric."""
        self.add_left(matrix.T, out.T, scale)

    def eigenvalues(self, size: int) -> NDArray[np.complex128]:
        """Of a tridiagonal matrix."""
        import numpy as np
        from scipy.linalg import eigvalsh_tridiagonal

        diagonal = np.zeros(size)
        diagonal[0] += self.first
        diagonal[-1] += self.last
        values = eigvalsh_tridiagonal(diagonal, np.ones(size - 1)) if size > 1 else diagonal
        found: NDArray[np.complex128] = values.astype(np.complex128)
        return found

    def mean_square(self, size: int) -> float:
        """As `Factor.mean_square`: two a row."""
        return 2 + (self.first**2 + self.last**2 - 2) / size

    def check_size(self, size: int) -> None:
        """There is one of every size."""


@dataclass(frozen=True)
class Diagonal:
    """Nodes on the diagonal.

    Attributes:
        nodes: real, finite, no two equal: two rows of one node say the same thing.
    """

    nodes: tuple[float, ...]

    def __post_init__(self) -> None:
        """Take any sequence of numbers."""
        nodes = tuple(float(node) for node in self.nodes)
        if not all(map(math.isfinite, nodes)):
            raise ValueError("the nodes of an operator are finite numbers")
        if len(set(nodes)) < len(nodes):
            twice = next(node for node in nodes if nodes.count(node) > 1)
            raise ValueError(f"node {twice!r} is there twice; the nodes of an operator differ")
        object.__setattr__(self, "nodes", nodes)

    def add_left(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `Factor.add_left`: weights rows."""
        out.addcmul_(self._on(out)[:, None], matrix.to(out.dtype), value=scale)

    def add_right(self, matrix: torch.Tensor, out: torch.Tensor, scale: float) -> None:
        """As `Factor.add_right`: weights columns."""
        out.addcmul_(self._on(out), matrix.to(out.dtype), value=scale)

    def _on(self, out: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.tensor(self.nodes, dtype=out.dtype, device=out.device)

    def eigenvalues(self, size: int) -> NDArray[np.complex128]:
        """The nodes."""
        import numpy as np

        return np.asarray(self.nodes, np.complex128)

    def mean_square(self, size: int) -> float:
        """As `Factor.mean_square`."""
        return math.fsum(node * node for node in self.nodes) / len(self.nodes)

    def check_size(self, size: int) -> None:
        """There are as many rows as nodes."""
        if size != len(self.nodes):
            raise ValueError(f"{len(self.nodes)} nodes do not fit a side of {size}")


@dataclass(frozen=True)
class DisplacementOperator:
    """What `displacement_rank` applies to a matrix before it asks for its rank.

    Attributes:
        name: as messages call it.
        left: `A`, of as many rows as the matrix.
        right: `B`, of as many rows as the matrix has columns.

    >>> DisplacementOperator.cauchy(rows=[1.0, 2.0], columns=[0.5, 0.25, 0.125]).name
    'cauchy'
    """

    name: str
    left: Factor
    right: Factor

    @classmethod
    def vandermonde(cls, nodes: Sequence[float]) -> DisplacementOperator:
        """For matrices whose row i holds powers of node i: displacement of rank 1.

        Args:
            nodes: one a row, no two equal.
        """
        return cls("vandermonde", Diagonal(tuple(nodes)), Shift(0))

    @classmethod
    def cauchy(cls, rows: Sequence[float], columns: Sequence[float]) -> DisplacementOperator:
        """For matrices of 1 / (rows[i] - columns[j]): displacement of rank 1.

        Args:
            rows: one a row, no two equal, and none of `columns`.
            columns: one a column, no two equal.
        """
        left, right = Diagonal(tuple(rows)), Diagonal(tuple(columns))
        both = set(left.nodes) & set(right.nodes)
        if both:
            raise ValueError(
                f"node {min(both)!r} is of a row and of a column: such a matrix has no entry there"
            )
        return cls("cauchy", left, right)

    def displacement(self, matrix: torch.Tensor, form: Form = "sylvester") -> torch.Tensor:
        """`A M - M B`, or `M - A M B`, without ever forming `A` or `B`.

        Args:
            matrix: `[m, n]`; 16-bit floats are displaced in float32.
            form: `"sylvester"` or `"stein"`.

        Returns:
            `[m, n]`, float64 of float64 and float32 of all others.

        >>> moved = resolve_operator("toeplitz").displacement(torch.eye(3))
        >>> int(torch.linalg.matrix_rank(moved))
        1
        """
        return self.displacement_of(lambda: [matrix], (matrix.shape[0], matrix.shape[1]), form)

    def displacement_of(
        self,
        blocks: Blocks,
        shape: tuple[int, int],
        form: Form = "sylvester",
    ) -> torch.Tensor:
        """The same of a matrix that is never in memory as a whole.

        `A` moves rows, and takes some columns at a time; `B` moves columns, and takes some rows.

        Args:
            blocks: gives the matrix some rows at a time, in order, as often as it is asked.
            shape: `(m, n)`.
            form: as in `displacement`.
        """
        import torch

        self.check_shape(shape)
        out = _zeros(blocks, shape)
        width = max(1, _ENTRIES // shape[0])
        for panel in (slice(start, start + width) for start in range(0, shape[1], width)):
            self.left.add_left(_columns(blocks, panel, out), out[:, panel], 1.0)
        start, step = 0, max(1, _ENTRIES // shape[1])
        for block in (part for whole in blocks() for part in torch.split(whole, step)):
            rows = out[start : start + block.shape[0]]
            start += block.shape[0]
            if form == "sylvester":
                self.right.add_right(block.to(out.dtype), rows, -1.0)
            else:
                left = block.to(out.dtype, copy=True)
                self.right.add_right(rows, left, -1.0)
                rows.copy_(left)
        return out

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise `ValueError` unless the operator fits a matrix of `shape`."""
        for factor, size, side in zip(
            (self.left, self.right), shape, ("rows", "columns"), strict=True
        ):
            try:
                factor.check_size(size)
            except ValueError as error:
                raise ValueError(f"operator {self.name}, {side}: {error}") from None

    def noise(self, shape: tuple[int, int], form: Form = "sylvester") -> float:
        """How much larger independent noise of the matrix is in its displacement."""
        left, right = self.left.mean_square(shape[0]), self.right.mean_square(shape[1])
        return math.sqrt(left + right if form == "sylvester" else 1 + left * right)

    def nullity(self, shape: tuple[int, int], form: Form = "sylvester") -> int:
        """Of how many dimensions are the matrices of `shape` without any displacement.

        Where it is not 0, a displacement does not determine its matrix: a displacement of zero is
        that of a matrix that need not be zero. Exact for the named operators; for others at least
        whether it is 0.

        >>> resolve_operator("toeplitz").nullity((4096, 14336))
        2048
        """
        import numpy as np
        from scipy.spatial import KDTree

        left = self.left.eigenvalues(shape[0])
        right = self.right.eigenvalues(shape[1])
        if form == "stein":  # M = A M B needs eigenvalues a b = 1
            right = right[right != 0]
            right = 1 / right
        if not len(right):
            return 0
        trees = [KDTree(np.column_stack([each.real, each.imag])) for each in (left, right)]
        return int(trees[0].count_neighbors(trees[1], _APART))


_SYLVESTER: dict[str, Callable[[], DisplacementOperator]] = {
    "toeplitz": lambda: DisplacementOperator("toeplitz", Shift(1), Shift(-1)),
    "hankel": lambda: DisplacementOperator("hankel", Shift(1), Shift(0, transposed=True)),
    "toeplitz+hankel": lambda: DisplacementOperator("toeplitz+hankel", Path(0, 0), Path(1, 1)),
}
_STEIN: dict[str, Callable[[], DisplacementOperator]] = {
    "toeplitz": lambda: DisplacementOperator("toeplitz", Shift(0), Shift(0, transposed=True)),
    "hankel": lambda: DisplacementOperator("hankel", Shift(0), Shift(0)),
}
_WITH_NODES = ("vandermonde", "cauchy")


def _zeros(blocks: Blocks, shape: tuple[int, int]) -> torch.Tensor:
    """Room for a displacement, where the matrix is."""
    import torch

    first = next(iter(blocks()))
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    return torch.zeros(shape, dtype=wide, device=first.device)


def _columns(blocks: Blocks, panel: slice, like: torch.Tensor) -> torch.Tensor:
    """Some columns of the matrix, all rows of them."""
    found, start = like.new_empty(0), 0
    for block in blocks():
        part = block[:, panel]
        if part.shape[0] == like.shape[0]:
            return part
        if not start:
            found = like.new_empty(like.shape[0], part.shape[1])
        found[start : start + part.shape[0]] = part
        start += part.shape[0]
    return found


def resolve_operator(
    operator: str | DisplacementOperator, form: Form = "sylvester"
) -> DisplacementOperator:
    """The operator that is meant by its name.

    Args:
        operator: `"toeplitz"`, `"hankel"`, `"toeplitz+hankel"`, or an operator.
        form: the form it will be used in.

    Raises:
        ValueError: there is no such operator or form, or it needs nodes.
    """
    if form not in FORMS:
        raise ValueError(f"form={safe(repr(form))} is not one of 'sylvester', 'stein'")
    if isinstance(operator, DisplacementOperator):
        return operator
    if not isinstance(operator, str):
        raise TypeError(f"operator={safe(repr(operator))} is neither a name nor an operator")
    known = _SYLVESTER if form == "sylvester" else _STEIN
    if operator in known:
        return known[operator]()
    if operator in _WITH_NODES:
        raise ValueError(
            f"operator={operator!r} needs its nodes: DisplacementOperator.{operator}(…)"
        )
    hint = "" if operator in _SYLVESTER else nearest(operator, [*_SYLVESTER, *_WITH_NODES])
    raise ValueError(
        f"operator={safe(repr(operator))} is not one of {', '.join(map(repr, known))} in the form "
        f"{form}{hint}"
    )
