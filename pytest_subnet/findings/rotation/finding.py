"""How far leading singular directions turned (arXiv 2509.12235, section 4; 2511.08567)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_limit, check_message
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.matrices.base_cache import remembered
from pytest_subnet.findings.matrices.fused import WHOLE, parts_of
from pytest_subnet.findings.matrices.updates import (
    read_side,
    read_update,
    side_blocks,
    update_blocks,
)
from pytest_subnet.findings.matrices.work import choose_matrices, measure_matrices
from pytest_subnet.findings.rotation.null import NULLS, turned_by_chance
from pytest_subnet.findings.rotation.result import SingularRotation, SingularRotations
from pytest_subnet.findings.rotation.texts import (
    CLEAR,
    by_chance,
    identical,
    no_excess,
    too_far,
    too_little,
)
from pytest_subnet.recording import record
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    import torch

    from pytest_subnet.findings.matrices.fused import Part
    from pytest_subnet.findings.matrices.subspaces import Subspace
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.findings.rotation.null import Null
    from pytest_subnet.findings.rotation.result import Side
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns

_SIDES: dict[str, tuple[str, ...]] = {
    "left": ("left",),
    "right": ("right",),
    "both": ("left", "right"),
}


def singular_rotation(
    pair: ModelPair,
    *,
    k: int,
    side: Side = "both",
    null: Null = "gaussian",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> SingularRotations:
    """Measure the angles between the k leading singular directions of base and tuned.

    Any small update turns directions: noise of 1 % of the weights' norm turns the vectors of a
    400 x 300 matrix by some 7° and moves its values by 0.05 %. So each angle stands beside that of
    random updates of the same norm. Fused matrices are taken apart by the model's config first.

    Args:
        pair: base and tuned; matrices are read one at a time and worked on where the pair's device
            is. What is found of a base is kept by its content.
        k: how many directions, from 1 to min(m, n) of the smallest matrix.
        side: `"left"` (outputs), `"right"` (inputs) or `"both"`.
        null: `"gaussian"`: eight random updates of the same norm; `"support"`: the same, zero where
            the update is zero; None leaves them out, and most of the time.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"down_proj"`, …).

    Returns:
        The profile of angles, the gap at k, bounds and the null, of each matrix.

    Raises:
        SelectionError: a pattern matches nothing, no matrix is selected, one holds NaN, Inf or, in
            the base, zeros alone, or is of a dtype without arithmetic.
        PairMismatchError: a selected tensor does not align.
        ValueError: `k` out of range, an unknown side or null.
        TypeError: `k` is no integer.

    Source: principal angles of arXiv 2509.12235, section 4, by the sines of Björck and Golub
    (1973); the bound is Wedin's (1972); the nulls are ours.

    >>> singular_rotation(pair, k=1, include="*up_proj*", null=None)
    SingularRotations(mean_deg=2.199, k=1, both, 1 matrix, bf16)
    """
    _check(k, side, null)
    chosen = choose_matrices(pair, include, exclude, kinds, what="singular directions")
    notes = list(chosen.notes)
    whole = [each for each in chosen.matrices if _parts(pair, each) is None]
    if whole:
        names = safe(pair.tensors[whole[0].row].name)
        notes.append(
            f"{plural(len(whole), 'fused matrix')} measured as a whole, such as {names}: the "
            "config does not say how it is made up"
        )
    _check_k(pair, chosen.matrices, k)
    rows = measure_matrices(pair, chosen.matrices, _Rotating(k, side, null))
    result = SingularRotations(
        pair=pair.label,
        side=side,
        null=null,
        matrices_total=chosen.total,
        notes=tuple(notes),
        per_tensor=tuple(part for parts in rows for part in parts),
        fingerprints=of_pair(pair),
    )
    record(result)
    return result


def _check_null(null: object) -> None:
    if null not in NULLS:
        raise ValueError(f"null={safe(repr(null))} is not one of 'gaussian', 'support', None")


def _check(k: int, side: str, null: object) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k={safe(repr(k))} is not an integer")
    if k < 1:
        raise ValueError(f"k={k} is below 1: of no direction there is no angle")
    if side not in _SIDES:
        raise ValueError(f"side={safe(repr(side))} is not one of 'left', 'right', 'both'")
    _check_null(null)


def _parts(pair: ModelPair, matrix: Matrix) -> tuple[Part, ...] | None:
    """What a matrix is made of; None where it is fused and nobody says how."""
    if matrix.at is not None:
        return (WHOLE,)
    return parts_of(pair.tensors[matrix.row].name, matrix.shape, pair.base.config)


def _check_k(pair: ModelPair, matrices: Sequence[Matrix], k: int) -> None:
    for matrix in matrices:
        for part in _parts(pair, matrix) or (WHOLE,):
            shape = part.shape(matrix.shape)
            if k > min(shape):
                raise ValueError(
                    f"k={k} is more than the {min(shape)} directions of "
                    f"{safe(matrix.name(pair.tensors[matrix.row]))}"
                    f"{f'[{part.name}]' if part.name else ''}; give a smaller one, or leave it out "
                    "with exclude="
                )


@dataclass(frozen=True)
class _Rotating:
    """`MatrixWork` that compares leading directions; gives a row for each part."""

    k: int
    side: Side
    null: Null
    title = "rotating"

    @property
    def key(self) -> Hashable:
        """As `MatrixWork.key`."""
        return "singular_rotation", self.k, self.side, self.null

    def measure(self, pair: ModelPair, matrix: Matrix) -> tuple[SingularRotation, ...]:
        """As `MatrixWork.measure`."""
        parts = _parts(pair, matrix) or (WHOLE,)
        return tuple(self._measure(pair, matrix, part) for part in parts)

    def _measure(self, pair: ModelPair, matrix: Matrix, part: Part) -> SingularRotation:
        from pytest_subnet.findings.matrices.subspaces import Subspace, leading

        tensor = pair.tensors[matrix.row]
        name = f"{matrix.name(tensor)}{f'[{part.name}]' if part.name else ''}"

        def of_base() -> tuple[torch.Tensor, ...]:
            import torch

            found = leading(_checked(part.of(read_side(pair, matrix, "base")), name), self.k)
            numbers = torch.tensor([found.beyond, found.error], dtype=torch.float64)
            return found.left, found.right, found.values, numbers

        left, right, values, numbers = remembered(pair, matrix, ("leading", self.k, part), of_base)
        beyond, error = numbers.tolist()
        base = Subspace(left, right, values, beyond, error, "eigh")
        if not float(base.values[0]):
            raise SelectionError(
                f"{safe(name)} of {pair.label} holds zeros alone in the base, and has no "
                "directions; leave it out with exclude="
            )
        stored = _checked(part.of(read_side(pair, matrix, "tuned")), name)
        tuned = leading(stored, self.k, start=base)
        compared = _compare(base, tuned, stored)
        del stored
        norm, support = self._update(pair, matrix, part)
        mean, spread = self._null(pair, matrix, part, base, norm, support)
        sides = _SIDES[self.side]
        return SingularRotation(
            name=name,
            shape=part.shape(matrix.shape),
            dtype=tensor.dtype,
            layer=tensor.layer,
            kind=f"{part.name}_proj" if part.name else tensor.kind,
            k=self.k,
            left_deg=compared.left if "left" in sides else None,
            right_deg=compared.right if "right" in sides else None,
            left_vectors_deg=compared.left_vectors if "left" in sides else None,
            right_vectors_deg=compared.right_vectors if "right" in sides else None,
            gap=tuned.gap,
            error_deg=min(90.0, math.degrees(base.error + tuned.error)),
            wedin_deg=compared.wedin,
            value_energy=compared.along / norm**2 if norm else 0.0,
            turn_energy=compared.between / norm**2 if norm else 0.0,
            change_norm=norm,
            null_deg=mean,
            null_spread_deg=spread,
            method=tuned.method,
        )

    def _update(
        self, pair: ModelPair, matrix: Matrix, part: Part
    ) -> tuple[float, torch.Tensor | None]:
        """The norm of the update and, where the null asks for it, which entries have one."""
        import torch

        from pytest_subnet.findings.matrices.spectra import frobenius_norm

        blocks: Iterable[torch.Tensor] = update_blocks(pair, matrix)
        if part.name:  # some rows or columns, of any block
            blocks = [part.of(read_update(pair, matrix, grids=()).delta)]
        norms, entries = [], []
        for block in blocks:
            norms.append(frobenius_norm(block))
            if self.null == "support":
                entries.append(block != 0)
        return math.hypot(*norms), torch.cat(entries) if entries else None

    def _null(
        self,
        pair: ModelPair,
        matrix: Matrix,
        part: Part,
        base: Subspace,
        norm: float,
        support: torch.Tensor | None,
    ) -> tuple[float | None, float | None]:
        if self.null is None:
            return None, None
        if not norm:
            return 0.0, 0.0
        turned = turned_by_chance(
            lambda: _base_of(pair, matrix, part),
            base,
            norm,
            _SIDES[self.side],
            support=support,
        )
        return turned.mean, turned.deviation


def _base_of(pair: ModelPair, matrix: Matrix, part: Part) -> Iterable[torch.Tensor]:
    """The base of a part, some rows at a time."""
    if part.name:
        return [part.of(read_side(pair, matrix, "base"))]
    return side_blocks(pair, matrix, "base")


@dataclass(frozen=True)
class _Compared:
    """What two subspaces say of each other; angles in degrees, energies of C = Uᵀ D V."""

    left: tuple[float, ...]
    right: tuple[float, ...]
    left_vectors: tuple[float, ...]
    right_vectors: tuple[float, ...]
    wedin: float | None
    along: float
    between: float


def _compare(base: Subspace, tuned: Subspace, stored: torch.Tensor) -> _Compared:
    import torch

    from pytest_subnet.findings.matrices.subspaces import (
        both_ways,
        principal_angles_deg,
        vector_angles_deg,
    )

    after, before = both_ways(stored, base.left, base.right)  # W_t V, W_tᵀ U
    inner = base.left.T @ after - torch.diag(base.values)
    along = float(inner.diagonal().square().sum())
    beside = float((after - base.left * base.values).square().sum())
    above = float((before - base.right * base.values).square().sum())
    gap = float(base.values[-1]) - tuned.beyond
    wedin = None
    if gap > 0:
        wedin = math.degrees(math.asin(min(1.0, math.sqrt(beside + above) / gap)))
    return _Compared(
        left=tuple(principal_angles_deg(base.left, tuned.left).tolist()),
        right=tuple(principal_angles_deg(base.right, tuned.right).tolist()),
        left_vectors=tuple(vector_angles_deg(base.left, tuned.left).tolist()),
        right_vectors=tuple(vector_angles_deg(base.right, tuned.right).tolist()),
        wedin=wedin,
        along=along,
        between=float(inner.square().sum()) - along,
    )


def _checked(matrix: torch.Tensor, name: str) -> torch.Tensor:
    from pytest_subnet.findings.matrices.spectra import is_finite

    if not is_finite(matrix):
        raise SelectionError(f"{safe(name)} holds NaN or Inf and has no singular directions")
    return matrix


def assert_singular_vector_rotation(
    pair: ModelPair,
    *,
    k: int,
    side: Side = "both",
    min_angle_deg: float | None = None,
    max_angle_deg: float | None = None,
    min_excess: float | None = None,
    null: Null = "gaussian",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    message: Message | None = None,
) -> SingularRotations:
    """Fail unless the leading singular directions of every matrix turned as far as required.

    Judges the mean principal angle of each matrix. With a null, `min_angle_deg` applies to the
    angle beyond that of random updates of the same norm, and both lower bounds also ask that it is
    three deviations above them: an update without a direction of its own must not pass.

    Valid usages:
        assert_singular_vector_rotation(pair, k=64, max_angle_deg=5)     # a gate: little turned
        assert_singular_vector_rotation(pair, k=64, min_excess=2)        # twice what noise would
        assert_singular_vector_rotation(pair, k=64, min_angle_deg=1)     # a degree beyond noise
        assert_singular_vector_rotation(pair, k=64, min_angle_deg=1, null=None)    # the bare angle

    Args:
        pair: base and tuned.
        k: as in `singular_rotation`.
        side: as in `singular_rotation`.
        min_angle_deg: degrees in [0, 90]: the least mean angle, beyond the null if there is one.
        max_angle_deg: degrees in [0, 90]: the largest mean angle, whatever the null.
        min_excess: above 0: the least ratio of the mean angle to the null's; needs a null.
        null: as in `singular_rotation`.
        include: as in `singular_rotation`.
        exclude: as in `singular_rotation`.
        kinds: as in `singular_rotation`.
        message: rewords a failure.

    Returns:
        What `singular_rotation` measured.

    Raises:
        AssertionError: a bound does not hold for a matrix, or none moved; under a lower bound, one
            did not move, or the null alone reaches it.
        ValueError: no bound, one out of range, reversed, or `min_excess` without a null; or as in
            `singular_rotation`.
        TypeError: as in `singular_rotation`.
        SelectionError: as in `singular_rotation`.
        PairMismatchError: as in `singular_rotation`.

    Source: as `singular_rotation`.

    >>> assert_singular_vector_rotation(pair, k=1, max_angle_deg=10, include="*up_proj*", null=None)
    SingularRotations(mean_deg=2.199, k=1, both, 1 matrix, bf16)
    """
    __tracebackhide__ = True
    _check_bounds(min_angle_deg, max_angle_deg, min_excess, null)
    check_message(message)
    # An upper bound needs no null: it would only take time.
    asked = null if min_angle_deg is not None or min_excess is not None else None
    result = singular_rotation(
        pair, k=k, side=side, null=asked, include=include, exclude=exclude, kinds=kinds
    )
    text = _verdict(result, min_angle_deg, max_angle_deg, min_excess)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


def _verdict(
    result: SingularRotations,
    min_angle_deg: float | None,
    max_angle_deg: float | None,
    min_excess: float | None,
) -> str | None:
    still = [each for each in result.per_tensor if not each.moved]
    lower = min_angle_deg is not None or min_excess is not None
    if result.nothing_moved or (lower and still):
        return identical(result, still)
    if max_angle_deg is not None and any(
        each.mean_deg > max_angle_deg for each in result.per_tensor
    ):
        return too_far(result, max_angle_deg)
    if min_angle_deg is not None and any(
        each.beyond_null_deg < min_angle_deg for each in result.per_tensor
    ):
        return too_little(result, min_angle_deg)
    if min_excess is not None and any(
        (each.excess or 0.0) < min_excess for each in result.per_tensor
    ):
        return no_excess(result, min_excess)
    if lower and any(each.z is not None and each.z < CLEAR for each in result.per_tensor):
        return by_chance(result)
    return None


def _check_bounds(
    min_angle_deg: float | None,
    max_angle_deg: float | None,
    min_excess: float | None,
    null: object,
) -> None:
    _check_null(null)
    if min_angle_deg is None and max_angle_deg is None and min_excess is None:
        raise ValueError(
            "no bound: give min_angle_deg, max_angle_deg or min_excess, or the assertion says "
            "nothing"
        )
    for name, value in (("min_angle_deg", min_angle_deg), ("max_angle_deg", max_angle_deg)):
        if value is not None:
            check_limit(name, value)
            if value > 90:
                raise ValueError(f"{name}={value!r} is above 90, the largest angle there is")
    if min_angle_deg is not None and max_angle_deg is not None and min_angle_deg > max_angle_deg:
        raise ValueError(
            f"min_angle_deg={min_angle_deg!r} is above max_angle_deg={max_angle_deg!r}: nothing "
            "can hold"
        )
    if min_excess is not None:
        check_limit("min_excess", min_excess)
        if min_excess == 0:
            raise ValueError("min_excess=0 could not fail")
        if null is None:
            raise ValueError("min_excess compares with a null, and null=None leaves none")
