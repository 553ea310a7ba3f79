"""Three checkpoints and a mask, counted together: what base, full and sub share inside it."""

from __future__ import annotations

import glob
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.findings.common.fingerprints import of_sides
from pytest_subnet.findings.common.result import Coverage, measure
from pytest_subnet.findings.recovery.texts import not_of_one_model
from pytest_subnet.masks.bits import PIECE_BYTES, pack
from pytest_subnet.masks.building import update_mask
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.pairs.selection import select
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.text import nearest, plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.masks.update_mask import UpdateMask
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.tolerance import Tolerance

    Words = NDArray[np.uint64]


class Recovered(NamedTuple):
    """How one tensor agrees; "agrees" is with full, within the tolerance.

    With a NaN or Inf of full nothing agrees, not even the same bits.

    Attributes:
        name: its name in the base.
        shape: what was compared.
        dtype: in which dtype.
        numel: its entries.
        inside: of these, in the mask.
        matching: of those inside, in which sub agrees.
        missed: of those inside, in which the base does not agree.
        regained: of those missed, in which sub agrees.
        matching_everywhere: entries, in and out of the mask, in which sub agrees.
        base_matching_everywhere: in which the base agrees.
        outside_moved: entries outside the mask that sub does not have as the base has them.
        full_moved: entries, in and out of the mask, that full does not.
        nonfinite_full: NaN and Inf in full.
        nonfinite_inside: of these, in the mask.
        nonfinite_sub: NaN and Inf in sub.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    inside: int
    matching: int
    missed: int
    regained: int
    matching_everywhere: int
    base_matching_everywhere: int
    outside_moved: int
    full_moved: int = 0
    nonfinite_full: int = 0
    nonfinite_inside: int = 0
    nonfinite_sub: int = 0

    @property
    def match(self) -> float | None:
        """Share of its entries in the mask in which sub agrees; None where there are none."""
        return self.matching / self.inside if self.inside else None

    @property
    def recovered(self) -> float | None:
        """Share of what the base misses in which sub agrees; None where it misses nothing."""
        return self.regained / self.missed if self.missed else None


class ThreeAligned:
    """Full, sub and base, aligned with each other: three pairs under the base's names.

    Attributes:
        full: the pair base → full.
        sub: the pair base → sub.
        between: the pair full → sub.
        tensors: those compared, as `full` has them.
    """

    def __init__(
        self,
        *,
        full: Checkpoint,
        sub: Checkpoint,
        base: Checkpoint,
        patterns: tuple[Patterns | None, Patterns | None, Patterns | None],
        as_dtype: str | None,
    ) -> None:
        """Open the pairs, and select by include, exclude and kinds; only headers are read."""
        self.full = _opened("base and full", base, full, as_dtype)
        self.sub = _opened("base and sub", base, sub, as_dtype)
        self.between = _opened("full and sub", full, sub, as_dtype)
        self._selects = any(each is not None for each in patterns)
        with _naming("base and full", self.full):
            rows = select(self.full, *patterns).rows
        if not rows:
            raise SelectionError(
                "only buffers and integer tensors are selected, which training inside a mask "
                "leaves alone; assert_frozen and assert_updated compare them by bits"
            )
        self.tensors = [self.full.tensors[row] for row in rows]

    def coverage(self, tolerance: Tolerance) -> Coverage:
        """What is compared, for messages."""
        dtypes = sorted({short_dtype(each.dtype) for each in self.tensors})
        return Coverage(
            pair=f"{safe(self.full.tuned.label)} against {safe(self.sub.tuned.label)}, both from "
            f"{safe(self.full.base.label)}",
            tolerance=tolerance,
            dtype="+".join(dtypes),
            tensors=len(self.tensors),
            tensors_total=sum(each.is_weight for each in self.full.tensors),
            numel=sum(each.numel for each in self.tensors),
            notes=tuple(dict.fromkeys((*self.full.notes, *self.sub.notes, *self.between.notes))),
            fingerprints=of_sides(
                {
                    "base": (self.full, self.full.base),
                    "full": (self.full, self.full.tuned),
                    "sub": (self.sub, self.sub.tuned),
                }
            ),
        )

    def count(self, atol: float, mask: UpdateMask | None) -> list[Recovered]:
        """Count each tensor, a run of packed words at a time."""
        names = {each.name: each for each in self.tensors}
        mask_names = {name: name for name in names}
        if mask is not None:
            ties = {**self.full.base.ties, **self.full.tied}
            mask_names = _names_in(mask, names, [each.name for each in self.full.tensors], ties)
        between_names = _names_of(
            "full and sub", self.between, [each.tuned_name for each in self.tensors]
        )
        sub_names = _names_of("base and sub", self.sub, [each.base_name for each in self.tensors])
        full_names = list(names)
        inside = self._mask(self.full, full_names, None) if mask is None else mask
        base_differs = self._mask(self.full, full_names, atol)
        sub_moved = self._mask(self.sub, sub_names, None)
        sub_differs = self._mask(self.between, between_names, atol)
        full_moves = _movements(self.full, full_names)
        sub_moves = _movements(self.sub, sub_names)
        return [
            _counted(
                tensor,
                inside=(
                    inside.words(mask_names[tensor.name]) if tensor.name in mask_names else None
                ),
                base_differs=base_differs.words(tensor.name),
                sub_moved=sub_moved.words(sub_name),
                sub_differs=sub_differs.words(between_name),
                nonfinite=self._nonfinite(tensor) if full_move.nonfinite_tuned else None,
            )._replace(
                full_moved=full_move.changed,
                nonfinite_full=full_move.nonfinite_tuned,
                nonfinite_sub=sub_move.nonfinite_tuned,
            )
            for tensor, sub_name, between_name, full_move, sub_move in zip(
                self.tensors, sub_names, between_names, full_moves, sub_moves, strict=True
            )
        ]

    def _nonfinite(self, tensor: TensorPair) -> Iterator[Words]:
        """Where full has a NaN or Inf, in runs as masks have them; few tensors ever have one."""
        import torch

        values = self.full.tuned.read(tensor.tuned_name).cpu().to(getattr(torch, tensor.dtype))
        words = pack((~values.double().isfinite()).numpy()).view(np.uint64)
        step = PIECE_BYTES // 8
        return (words[at : at + step] for at in range(0, words.size, step))

    def _mask(self, pair: ModelPair, names: Sequence[str], atol: float | None) -> UpdateMask:
        # Names are globs to a selection: without one no pattern is needed, with one each is quoted.
        include = [glob.escape(name) for name in names] if self._selects else None
        return update_mask(pair, atol=atol, include=include)


def _counted(
    tensor: TensorPair,
    *,
    inside: Iterator[Words] | None,
    base_differs: Iterator[Words],
    sub_moved: Iterator[Words],
    sub_differs: Iterator[Words],
    nonfinite: Iterator[Words] | None,
) -> Recovered:
    totals: Counter[str] = Counter()
    for base, moved, differs in zip(base_differs, sub_moved, sub_differs, strict=True):
        mask = np.zeros_like(base) if inside is None else next(inside)
        if nonfinite is not None:  # which an arithmetic of its own calls the same as its copy
            lost = next(nonfinite)
            base, differs = base | lost, differs | lost
            totals["nonfinite_inside"] += _ones(mask & lost)
        missed = mask & base
        totals["inside"] += _ones(mask)
        totals["matching"] += _ones(mask & ~differs)
        totals["missed"] += _ones(missed)
        totals["regained"] += _ones(missed & ~differs)
        totals["differing"] += _ones(differs)
        totals["base_differing"] += _ones(base)
        totals["outside_moved"] += _ones(moved & ~mask)
    return Recovered(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        numel=tensor.numel,
        inside=totals["inside"],
        matching=totals["matching"],
        missed=totals["missed"],
        regained=totals["regained"],
        matching_everywhere=tensor.numel - totals["differing"],
        base_matching_everywhere=tensor.numel - totals["base_differing"],
        outside_moved=totals["outside_moved"],
        nonfinite_inside=totals["nonfinite_inside"],
    )


def _ones(words: Words) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def _opened(roles: str, one: Checkpoint, other: Checkpoint, as_dtype: str | None) -> ModelPair:
    try:
        return open_pair(one, other, as_dtype=as_dtype)
    except PairMismatchError:  # it knows the two as base and tuned, which here are other names
        labels = " and ".join(dict.fromkeys((safe(one.label), safe(other.label))))
        raise PairMismatchError(
            f"{roles} are the same: {labels}; base, full and sub are to be three checkpoints. Was "
            "a path given twice, or a model kept without a copy (copy.deepcopy it, or clone each "
            "tensor of its state_dict)?"
        ) from None


@contextmanager
def _naming(roles: str, pair: ModelPair) -> Iterator[None]:
    """Name the roles of the two that do not pair, and what mends it here."""
    try:
        yield
    except PairMismatchError as error:
        raise PairMismatchError(
            not_of_one_model(roles, pair.label, error.problems), error.problems
        ) from None


def _names_of(roles: str, pair: ModelPair, base_names: Sequence[str]) -> list[str]:
    """What `pair` calls the tensors that its base stores as `base_names`."""
    with _naming(roles, pair):
        select(pair, [glob.escape(name) for name in base_names] if pair.problems else None)
    known = {each.base_name: each.name for each in pair.tensors}
    lost = [name for name in base_names if name not in known]
    if lost:
        raise PairMismatchError(
            f"{pair.label} does not compare {plural(len(lost), 'tensor')} that the others do, "
            f"{safe(lost[0])} first; are base, full and sub one model, with the same ties?"
        )
    return [known[name] for name in base_names]


def _movements(pair: ModelPair, names: Sequence[str]) -> tuple[Movement, ...]:
    """What the masks' scan has counted besides; nothing is read again but what is in memory."""
    row_of = {each.name: row for row, each in enumerate(pair.tensors)}
    return measure(pair, [row_of[name] for name in names], SAME_BITS)


def _names_in(
    mask: UpdateMask,
    tensors: Mapping[str, TensorPair],
    known: Sequence[str],
    ties: Mapping[str, str],
) -> dict[str, str]:
    """What `mask` calls each of `tensors` that it names, by any of the names of a tied one.

    Args:
        mask: as it was given.
        tensors: those compared, by name.
        known: the names of all that could be.
        ties: second names in the base, with the one that is counted.
    """
    counted = {name: name if name in known else ties.get(name, name) for name in mask.names()}
    found: dict[str, str] = {}
    for mask_name, name in counted.items():
        if name not in tensors:
            continue
        if mask.info(mask_name).shape != tensors[name].shape:
            raise PairMismatchError(
                f"the mask of {mask.origin.what} has shape {list(mask.info(mask_name).shape)} for "
                f"{safe(mask_name)}, the base {list(tensors[name].shape)}; make it from "
                "checkpoints of this model"
            )
        first = found.setdefault(name, mask_name)
        if first != mask_name and not np.array_equal(mask[first], mask[mask_name]):
            raise PairMismatchError(
                f"{safe(first)} and {safe(mask_name)} are one tensor in the base, and the mask of "
                f"{mask.origin.what} holds other entries of each; leave one of them out of the mask"
            )
    if not found:
        first = next(iter(mask.names()), "")
        raise PairMismatchError(
            f"the mask of {mask.origin.what} names none of the "
            f"{plural(len(tensors), 'tensor')} compared{nearest(first, tensors)}; "
            "its names are to be those of the base"
        )
    lost = sorted(name for name, own in counted.items() if own not in known)
    if lost:
        raise PairMismatchError(
            f"the mask of {mask.origin.what} names {safe(lost[0])}, which what is compared lacks "
            f"({plural(len(lost), 'tensor')} in all); make it from checkpoints of this model"
        )
    return found
