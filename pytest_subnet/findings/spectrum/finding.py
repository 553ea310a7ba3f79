"""How far the singular values moved (arXiv 2509.12235; the spectrum shift of 2511.08567)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_limit, check_message
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.findings.common.result import Message, measure, reworded
from pytest_subnet.findings.matrices.base_cache import remembered
from pytest_subnet.findings.matrices.updates import read_side
from pytest_subnet.findings.matrices.work import choose_matrices, measure_matrices
from pytest_subnet.findings.spectrum.result import SingularShift, SingularShifts
from pytest_subnet.findings.spectrum.texts import nothing_moved, too_far
from pytest_subnet.recording import record
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import torch

    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.findings.spectrum.result import RelativeTo
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns

_SLACK = 1e-5
"""Relative error allowed of norms that were added up in blocks of float32."""

_LOST = 2e-19
"""Changes smaller than this may be lost in the squares of a norm in float32."""

_EPS = 2.0**-23
"""Of float32: singular values below max(m, n) times it, relative to the first, are no values."""


def singular_shift(
    pair: ModelPair,
    *,
    relative_to: RelativeTo = "spectrum",
    max_shift: float | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> SingularShifts:
    """Measure how far the singular values of each matrix moved.

    With s of the base and t of the tuned matrix, both in order:

        "spectrum"  ‖t - s‖₂ / ‖s‖₂: the normalised spectrum shift, NSS
        "top"       max |tᵢ - sᵢ| / s₁
        "each"      max |tᵢ - sᵢ| / sᵢ over sᵢ > s₁ max(m, n) eps(float32)

    Args:
        pair: base and tuned; matrices are read one at a time and worked on where the pair's device
            is.
        relative_to: what a shift is relative to.
        max_shift: matrices whose norms alone prove a shift of at most this are not decomposed;
            theirs is then an upper bound (`SingularShift.is_bound`). None decomposes all that
            moved.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"down_proj"`, …).

    Returns:
        The shift of each matrix, and what proved it.

    Raises:
        SelectionError: a pattern matches nothing, no matrix is selected, one holds NaN, Inf or, in
            the base, zeros alone, or is of a dtype without arithmetic.
        PairMismatchError: a selected tensor does not align.
        ValueError: an unknown `relative_to`, or a negative `max_shift`.

    Source: "each": arXiv 2509.12235, section 4; "spectrum": arXiv 2511.08567, section 3 (NSS). The
    bound is Mirsky's (1960): ‖t - s‖₂ <= ‖tuned - base‖_F.

    >>> singular_shift(pair, include="*up_proj*")
    SingularShifts(shift=0.05549 at most, mean=0.05549, 1 matrix, relative to the spectrum, bf16)
    """
    if relative_to not in ("spectrum", "top", "each"):
        raise ValueError(
            f"relative_to={safe(repr(relative_to))} is not one of 'spectrum', 'top', 'each'"
        )
    if max_shift is not None:
        check_limit("max_shift", max_shift)
    chosen = choose_matrices(pair, include, exclude, kinds, what="singular values")
    counted = _counted(pair, chosen.matrices)
    bounds = [_certificate(each, counted.get(each.row), relative_to) for each in chosen.matrices]
    undecided = [
        matrix
        for matrix, bound in zip(chosen.matrices, bounds, strict=True)
        if bound is None or bound.shift > (0 if max_shift is None else max_shift)
    ]
    measured = measure_matrices(pair, undecided, _Shifting(relative_to))
    by_matrix = {
        matrix: row._replace(relative_change=counted[matrix.row].relative_change)
        if matrix.row in counted
        else row
        for matrix, row in zip(undecided, measured, strict=True)
    }
    result = SingularShifts(
        pair=pair.label,
        relative_to=relative_to,
        matrices_total=chosen.total,
        notes=chosen.notes,
        per_tensor=tuple(
            by_matrix.get(matrix) or _certain(bound)
            for matrix, bound in zip(chosen.matrices, bounds, strict=True)
        ),
        fingerprints=of_pair(pair),
    )
    record(result)
    return result


def _certain(bound: SingularShift | None) -> SingularShift:
    assert bound is not None, "what has no bound was measured"
    return bound


def _counted(pair: ModelPair, matrices: Sequence[Matrix]) -> dict[int, Movement]:
    """What the scan counted, by row; over whole tensors, so that a matrix in a stack has none."""
    whole = list(dict.fromkeys(each.row for each in matrices if each.at is None))
    counted = dict(zip(whole, measure(pair, whole, SAME_BITS), strict=True))
    _refuse(pair, counted)
    return counted


def _refuse(pair: ModelPair, counted: dict[int, Movement]) -> None:
    for what, names in (
        ("NaN or Inf", [each.name for each in counted.values() if each.nonfinite]),
        ("zeros alone", [each.name for each in counted.values() if each.base_norm == 0]),
    ):
        if names:
            where = "" if what == "NaN or Inf" else " in the base"
            raise SelectionError(
                f"{plural(len(names), 'selected matrix')} of {pair.label} hold {what}{where} and "
                f"have no singular values to compare: {first_few(names)}; leave them out with "
                "exclude="
            )


def _certificate(
    matrix: Matrix, counted: Movement | None, relative_to: RelativeTo
) -> SingularShift | None:
    """What the norms of a matrix and of its update prove; None where they prove nothing."""
    if counted is None:
        return None
    change = counted.change_norm * (1 + _SLACK) + math.sqrt(counted.changed) * _LOST
    if counted.changed == counted.zero_sign_flips:
        change = 0.0
    bound = change / (counted.base_norm * (1 - _SLACK))
    if relative_to == "top":  # s₁ is at least ‖s‖ / √min(m, n), and ‖D‖₂ at most ‖D‖_F
        bound *= math.sqrt(min(matrix.shape))
    elif relative_to == "each" and bound:
        return None
    return SingularShift(
        name=counted.name,
        shape=matrix.shape,
        dtype=counted.dtype,
        layer=counted.layer,
        kind=counted.kind,
        shift=bound,
        moved_most=None,
        relative_change=counted.relative_change,
        method="certificate:mirsky",
    )


@dataclass(frozen=True)
class _Shifting:
    """`MatrixWork` that compares singular values; on a GPU of matrices of one shape together."""

    relative_to: RelativeTo
    title = "singular values"

    @property
    def key(self) -> Hashable:
        """As `MatrixWork.key`."""
        return "singular_shift", self.relative_to

    def measure(self, pair: ModelPair, matrix: Matrix) -> SingularShift:
        """As `MatrixWork.measure`."""
        (row,) = self.measure_alike(pair, [matrix])
        return row

    def measure_alike(self, pair: ModelPair, batch: Sequence[Matrix]) -> list[SingularShift]:
        """As `MeasuresAlike.measure_alike`."""
        tuned = _values(pair, batch, "tuned")

        @cache  # none of them is needed where all are remembered
        def base() -> list[torch.Tensor]:
            return _values(pair, batch, "base")

        rows = []
        for at, matrix in enumerate(batch):
            (values,) = remembered(pair, matrix, ("values",), lambda at=at: (base()[at],))  # type: ignore[misc]
            rows.append(self._row(pair, matrix, values, tuned[at]))
        return rows

    def _row(
        self, pair: ModelPair, matrix: Matrix, base: torch.Tensor, tuned: torch.Tensor
    ) -> SingularShift:
        tensor = pair.tensors[matrix.row]
        name = matrix.name(tensor)
        if not float(base[0]):
            raise SelectionError(
                f"{safe(name)} of {pair.label} holds zeros alone in the base, and nothing is "
                "relative to them; leave it out with exclude="
            )
        shift, index = _shift(base, tuned, self.relative_to, max(matrix.shape))
        return SingularShift(
            name=name,
            shape=matrix.shape,
            dtype=tensor.dtype,
            layer=tensor.layer,
            kind=tensor.kind,
            shift=shift,
            moved_most=index,
            relative_change=None,
            method="gram",
        )


def _values(
    pair: ModelPair, batch: Sequence[Matrix], side: Literal["base", "tuned"]
) -> list[torch.Tensor]:
    """All singular values of each in order, float64, by the Gram matrix in float64."""
    import torch

    from pytest_subnet.findings.matrices.batched import spectra_of
    from pytest_subnet.findings.matrices.spectra import Spectrum, is_finite

    sides = []
    for matrix in batch:
        stored = read_side(pair, matrix, side)
        if not is_finite(stored):
            name = safe(matrix.name(pair.tensors[matrix.row]))
            raise SelectionError(f"{name} holds NaN or Inf and has no singular values")
        sides.append(stored)
    if len(sides) > 1:
        spectra = spectra_of(sides, all_values=True)
    else:
        spectra = [Spectrum(stored, all_values=True) for stored in sides]
    found = []
    for matrix, spectrum in zip(batch, spectra, strict=True):
        values = torch.zeros(min(matrix.shape), dtype=torch.float64)
        some = spectrum.values()  # rows and columns of zeros may have been dropped
        values[: len(some)] = some.sort(descending=True).values
        found.append(values)
    return found


def _shift(
    base: torch.Tensor, tuned: torch.Tensor, relative_to: RelativeTo, longest: int
) -> tuple[float, int]:
    """The shift, and the number of the singular value that moved most, from 0 on."""
    moved = (tuned - base).abs()
    if relative_to == "each":
        kept = base > base[0] * longest * _EPS
        relative = moved[kept] / base[kept]
        return float(relative.max()), int(relative.argmax())
    if relative_to == "top":
        return float(moved.max() / base[0]), int(moved.argmax())
    return float(moved.norm() / base.norm()), int(moved.argmax())


def assert_singular_values_stable(
    pair: ModelPair,
    *,
    max_shift: float,
    relative_to: RelativeTo = "spectrum",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    message: Message | None = None,
) -> SingularShifts:
    """Fail unless the singular values of every matrix stayed where they were.

    Any small update leaves the spectrum where it is: of noise of 1 % of the weights' norm the shift
    is 0.05 %. So this is a gate against large updates, and no evidence of a rotation by itself;
    for that see `assert_singular_vector_rotation`. Most pairs are proven by their norms alone,
    without a decomposition.

    Valid usages:
        assert_singular_values_stable(pair, max_shift=0.01)
        assert_singular_values_stable(pair, max_shift=0.05, relative_to="each", kinds="q_proj")

    Args:
        pair: base and tuned.
        max_shift: relative, at least 0: 0.01 for one per cent.
        relative_to: as in `singular_shift`.
        include: as in `singular_shift`.
        exclude: as in `singular_shift`.
        kinds: as in `singular_shift`.
        message: rewords a failure.

    Returns:
        What `singular_shift` measured.

    Raises:
        AssertionError: the singular values of a matrix moved further, or no matrix moved at all.
        ValueError: `max_shift` is negative or no number; or as in `singular_shift`.
        SelectionError: as in `singular_shift`.
        PairMismatchError: as in `singular_shift`.

    Source: as `singular_shift`.

    >>> assert_singular_values_stable(pair, max_shift=0.1, include="*up_proj*").shift < 0.1
    True
    """
    __tracebackhide__ = True
    check_limit("max_shift", max_shift)
    check_message(message)
    result = singular_shift(
        pair,
        relative_to=relative_to,
        max_shift=max_shift,
        include=include,
        exclude=exclude,
        kinds=kinds,
    )
    text = None
    if result.nothing_moved:
        text = nothing_moved(result)
    elif result.shift > max_shift:
        text = too_far(result, max_shift)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result
