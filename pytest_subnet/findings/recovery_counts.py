"""Three checkpoints and a mask, counted together: what base, full and sub share inside it."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.findings.result import Coverage
from pytest_subnet.masks.building import update_mask
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.pairs.selection import select
from pytest_subnet.text import nearest, plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.masks.update_mask import UpdateMask
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.tolerance import Tolerance

    Words = NDArray[np.uint64]


class Recovered(NamedTuple):
    """How one tensor agrees; "agrees" is with full, within the tolerance.

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

    @property
    def match(self) -> float | None:
        """Share of its entries in the mask in which sub agrees; None where there are none."""
        return self.matching / self.inside if self.inside else None

    @property
    def recovered(self) -> float | None:
        """Share of what the base misses in which sub agrees; None where it misses nothing."""
        return self.regained / self.missed if self.missed else None


class Three:
    """Base, full and sub, aligned with each other: three pairs under the base's names."""

    def __init__(
        self,
        base: Checkpoint,
        full: Checkpoint,
        sub: Checkpoint,
        patterns: tuple[Patterns | None, Patterns | None, Patterns | None],
        as_dtype: str | None,
    ) -> None:
        """Open the pairs, and select by include, exclude and kinds; only headers are read."""
        self.full = open_pair(base, full, as_dtype=as_dtype)
        self.sub = open_pair(base, sub, as_dtype=as_dtype)
        self.between = open_pair(full, sub, as_dtype=as_dtype)
        self._selects = any(each is not None for each in patterns)
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
        )

    def compared(self, atol: float, mask: UpdateMask | None) -> list[Recovered]:
        """Each tensor, counted a run of packed words at a time."""
        names = {each.name: each for each in self.tensors}
        if mask is not None:
            _check_mask(mask, names, [each.name for each in self.full.tensors])
        between_names = _names_of(self.between, [each.tuned_name for each in self.tensors])
        sub_names = _names_of(self.sub, [each.base_name for each in self.tensors])
        full_names = list(names)
        inside = self._mask(self.full, full_names, None) if mask is None else mask
        base_differs = self._mask(self.full, full_names, atol)
        sub_moved = self._mask(self.sub, sub_names, None)
        sub_differs = self._mask(self.between, between_names, atol)
        named = set(inside.names())
        return [
            _counted(
                tensor,
                inside.words(tensor.name) if tensor.name in named else None,
                base_differs.words(tensor.name),
                sub_moved.words(sub_name),
                sub_differs.words(between_name),
            )
            for tensor, sub_name, between_name in zip(
                self.tensors, sub_names, between_names, strict=True
            )
        ]

    def _mask(self, pair: ModelPair, names: Sequence[str], atol: float | None) -> UpdateMask:
        # Names are globs to a selection: without one no pattern is needed, with one each is quoted.
        include = [glob.escape(name) for name in names] if self._selects else None
        return update_mask(pair, atol=atol, include=include)


def _counted(
    tensor: TensorPair,
    inside: Iterator[Words] | None,
    base_differs: Iterator[Words],
    sub_moved: Iterator[Words],
    sub_differs: Iterator[Words],
) -> Recovered:
    totals = np.zeros(7, np.int64)
    for base, moved, differs in zip(base_differs, sub_moved, sub_differs, strict=True):
        mask = np.zeros_like(base) if inside is None else next(inside)
        totals += [
            int(np.bitwise_count(words).sum(dtype=np.int64))
            for words in (
                mask,
                mask & ~differs,
                mask & base,
                mask & base & ~differs,
                differs,
                base,
                moved & ~mask,
            )
        ]
    within, matching, missed, regained, differing, base_differing, outside = totals.tolist()
    return Recovered(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tensor.numel,
        within,
        matching,
        missed,
        regained,
        tensor.numel - differing,
        tensor.numel - base_differing,
        outside,
    )


def _names_of(pair: ModelPair, base_names: Sequence[str]) -> list[str]:
    """What `pair` calls the tensors that its base stores as `base_names`."""
    select(pair, [glob.escape(name) for name in base_names] if pair.problems else None)
    known = {each.base_name: each.name for each in pair.tensors}
    lost = [name for name in base_names if name not in known]
    if lost:
        raise PairMismatchError(
            f"{pair.label} does not compare {plural(len(lost), 'tensor')} that the others do, "
            f"{safe(lost[0])} first; are base, full and sub one model, with the same ties?"
        )
    return [known[name] for name in base_names]


def _check_mask(mask: UpdateMask, tensors: dict[str, TensorPair], known: Sequence[str]) -> None:
    shared = [name for name in mask.names() if name in tensors]
    for name in shared:
        if mask.info(name).shape != tensors[name].shape:
            raise PairMismatchError(
                f"the mask of {mask.origin.what} has shape {list(mask.info(name).shape)} for "
                f"{safe(name)}, the base {list(tensors[name].shape)}; make it from checkpoints of "
                "this model"
            )
    if not shared:
        first = next(iter(mask.names()), "")
        raise PairMismatchError(
            f"the mask of {mask.origin.what} names none of the "
            f"{plural(len(tensors), 'tensor')} compared{nearest(first, tensors)}; "
            "its names are to be those of the base"
        )
    lost = sorted(set(mask.names()).difference(known))
    if lost:
        raise PairMismatchError(
            f"the mask of {mask.origin.what} names {safe(lost[0])}, which what is compared lacks "
            f"({plural(len(lost), 'tensor')} in all); make it from checkpoints of this model"
        )
