"""What is compared in an overlap: two masks over the same tensors, and what is counted of them."""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.errors import PairMismatchError, Problem, SelectionError
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.pairs.kinds import kind_of
from pytest_subnet.pairs.model_pair import ModelPair
from pytest_subnet.pairs.problems import describe
from pytest_subnet.pairs.selection import as_list, matching
from pytest_subnet.scan.counters import NONFINITE_BASE, NONFINITE_TUNED
from pytest_subnet.scan.found import STRATA
from pytest_subnet.text import nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.scan.tolerance import Tolerance

Source: TypeAlias = "UpdateMask | ModelPair | str | os.PathLike[str]"


@dataclass(frozen=True, slots=True)
class Masks:
    """Two masks over the same tensors.

    Attributes:
        a: one mask.
        b: the other.
        names: the selected tensors, in the order of `a`.
        total: how many tensors the masks have.
        one_base: whether both are known to be of one base without asking for fingerprints.
        nonfinite_a: NaN and Inf in the selected tensors of the pair `a`, in its base and its tuned
            checkpoint; None where `a` is a mask, which does not know.
        nonfinite_b: likewise.
    """

    a: UpdateMask
    b: UpdateMask
    names: tuple[str, ...]
    total: int
    one_base: bool
    nonfinite_a: int | None
    nonfinite_b: int | None

    @property
    def label(self) -> str:
        """As messages name the two."""
        return f"{safe(self.a.origin.what)} against {safe(self.b.origin.what)}"

    def dtype(self, name: str) -> str:
        """In which dtype the weights of a tensor are stored, as far as either mask knows."""
        known = [mask.info(name).dtype for mask in (self.a, self.b)]
        return next((dtype for dtype in known if dtype != "bool"), "bool")

    def sixteen_bits(self) -> bool:
        """Whether one of them is of weights in 16-bit storage, where rounding makes overlap."""
        dtypes = {mask.info(name).dtype for mask in (self.a, self.b) for name in self.names}
        return not dtypes.isdisjoint(STRATA)


def two_masks(
    a: Source,
    b: Source,
    tolerance: Tolerance,
    *,
    include: Patterns | None,
    exclude: Patterns | None,
    kinds: Patterns | None,
) -> Masks:
    """The masks meant by `a` and `b`, over the tensors selected; raise if they do not go together.

    Raises:
        PairMismatchError: both are one thing, or a selected tensor is missing or has another shape.
        SelectionError: nothing is selected, or a mask has no entry in what is.
        TypeError: `a` or `b` is nothing that gives a mask.
        ValueError: a tolerance without a pair.
    """
    _refuse_same(a, b)
    if not tolerance.same_bits and not any(isinstance(each, ModelPair) for each in (a, b)):
        raise ValueError(
            f"{tolerance} says which entries of a pair are updated; a mask has its entries already"
        )
    opened = _opened("a", a), _opened("b", b)
    wanted = _select([name for each in opened for name in _names(each)], include, exclude, kinds)
    mask_a, mask_b = (_mask(each, tolerance, include, exclude, kinds) for each in opened)
    if mask_a.is_same(mask_b):  # a pair and its own mask, a mask and the file it was saved to
        raise _the_same(mask_a.origin.what)
    weights = {name for each in opened for name in _weights(each)}
    names = tuple(name for name in wanted if name in weights)
    broken = [_nonfinite(each, names) for each in opened]
    chosen = Masks(mask_a, mask_b, names, len(weights), _one_base(a, b), *broken)
    problems = list(_problems(mask_a, mask_b, names))
    if problems:
        text = describe(problems, pair=chosen.label, total=len(weights))
        raise PairMismatchError(text, problems)
    for side, mask in (("a", mask_a), ("b", mask_b)):
        if not any(mask.info(name).entries for name in names):
            raise SelectionError(
                f"mask {side} is empty: {safe(mask.origin.what)} has no entry in "
                f"{plural(len(names), 'selected tensor')}, and what share of it lies in the other "
                "mask is undefined; did the run save its base again?"
            )
    return chosen


def _opened(side: str, source: Source) -> UpdateMask | ModelPair:
    if isinstance(source, UpdateMask | ModelPair):
        return source
    if isinstance(source, str | os.PathLike):
        return UpdateMask.load(source)
    raise TypeError(f"{side} is a mask, a mask file or a pair, not {type(source).__name__}")


def _names(source: UpdateMask | ModelPair) -> list[str]:
    """What a pattern may match."""
    if isinstance(source, UpdateMask):
        return source.names()
    tensors, problems = source.tensors, source.problems
    return [each.name for each in tensors] + [each.name for each in problems]


def _weights(source: UpdateMask | ModelPair) -> list[str]:
    """What may have entries."""
    if isinstance(source, UpdateMask):
        return source.names()
    return [tensor.name for tensor in source.tensors if tensor.is_weight]


def _mask(
    source: UpdateMask | ModelPair,
    tolerance: Tolerance,
    include: Patterns | None,
    exclude: Patterns | None,
    kinds: Patterns | None,
) -> UpdateMask:
    if isinstance(source, UpdateMask):
        return source
    from pytest_subnet.masks.building import update_mask  # deferred: mask files need no scan

    # A pattern may be there for a tensor that only the other mask has.
    names = _names(source)
    return update_mask(
        source,
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        include=_matching_here(include, names) or include,
        exclude=_matching_here(exclude, names),
        kinds=kinds,
    )


def _nonfinite(source: UpdateMask | ModelPair, names: Sequence[str]) -> int | None:
    """NaN and Inf that were counted when the mask of a pair was made."""
    if isinstance(source, UpdateMask):
        return None
    from pytest_subnet.scan.gathering import ledger  # deferred, as the scan

    wanted = set(names)
    rows = [row for row, tensor in enumerate(source.tensors) if tensor.name in wanted]
    return int(ledger(source).integers[rows][:, [NONFINITE_BASE, NONFINITE_TUNED]].sum())


def _matching_here(patterns: Patterns | None, names: Sequence[str]) -> list[str] | None:
    if patterns is None:
        return None
    matches = {each: re.compile(fnmatch.translate(each)).match for each in as_list("", patterns)}
    return [each for each, match in matches.items() if any(map(match, names))] or None


def _refuse_same(a: Source, b: Source) -> None:
    same = a is b
    if isinstance(a, str | os.PathLike) and isinstance(b, str | os.PathLike):
        same = os.path.realpath(a) == os.path.realpath(b)
    if isinstance(a, ModelPair) and isinstance(b, ModelPair):
        same = same or (_one_base(a, b) and _same_checkpoint(a.tuned, b.tuned))
    if same:
        raise _the_same(a.origin.what if isinstance(a, UpdateMask) else getattr(a, "label", a))


def _the_same(what: object) -> PairMismatchError:
    return PairMismatchError(
        f"a and b are the same: {safe(what)}; a mask overlaps with itself entirely, which says "
        "nothing. Was one given twice?"
    )


def _one_base(a: Source, b: Source) -> bool:
    return (
        isinstance(a, ModelPair) and isinstance(b, ModelPair) and _same_checkpoint(a.base, b.base)
    )


def _same_checkpoint(one: Checkpoint, other: Checkpoint) -> bool:
    return one is other or one.identity() == other.identity()


def _problems(a: UpdateMask, b: UpdateMask, names: Sequence[str]) -> Iterator[Problem]:
    names_a, names_b = set(a.names()), set(b.names())
    for name in names:
        if name not in names_a or name not in names_b:
            yield Problem("only a" if name in names_a else "only b", name, "")
        elif a.info(name).shape != b.info(name).shape:
            shapes = [str(list(mask.info(name).shape)) for mask in (a, b)]
            yield Problem("reshaped", name, " against ".join(shapes))


def _select(
    found: Sequence[str],
    include: Patterns | None,
    exclude: Patterns | None,
    kinds: Patterns | None,
) -> tuple[str, ...]:
    names = list(dict.fromkeys(found))
    included, excluded = matching("include", include, names), matching("exclude", exclude, names)
    of_kind = None if kinds is None else set(as_list("kinds", kinds))
    known = {kind_of(name) for name in names}
    for kind in of_kind or ():
        if kind not in known:
            raise SelectionError(f"kinds={safe(kind)!r} is no kind here{nearest(kind, known)}")
    chosen = tuple(
        name
        for name in names
        if (included is None or name in included)
        and (excluded is None or name not in excluded)
        and (of_kind is None or kind_of(name) in of_kind)
    )
    if not chosen:
        raise SelectionError(
            f"nothing is selected: include={include!r}, exclude={exclude!r} and kinds={kinds!r} "
            f"leave none of {plural(len(names), 'tensor')}"
        )
    return chosen
