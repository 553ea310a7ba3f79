"""Whether two runs from one base moved the same way: the cosine of their task vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_subnet import progress
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.errors import PairMismatchError, Problem, SelectionError
from pytest_subnet.findings.common.fingerprints import of_sides
from pytest_subnet.findings.geometry.cosine_result import (
    Products,
    TaskVectorCosine,
    TensorCosine,
)
from pytest_subnet.pairs.problems import describe
from pytest_subnet.pairs.selection import select
from pytest_subnet.recording import record
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.pairs.selection import Patterns

_ENTRIES = 1 << 20
"""How many entries are in float64 at a time."""


def task_vector_cosine(
    a: ModelPair,
    b: ModelPair,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> TaskVectorCosine:
    """Measure how far two runs from one base moved it the same way.

    With a and b the updates, tuned - base, of all selected weights as two long vectors, it is
    Σ a b / √(Σ a² Σ b²), in all and for each tensor. Two directions drawn at random have 0 ± 1/√n
    over n entries. Updates that share few entries, as two unrelated ones in bfloat16, vary more,
    and `z` is taken against what they have if their signs are drawn, √(Σ a² b²) / √(Σ a² Σ b²).

    Args:
        a: base and tuned of one run; read in blocks of rows, summed in float64.
        b: those of the other; its base has the same content.
        include: glob or globs on base names; None takes all weights, vectors too.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"norm"`, …).

    Returns:
        Cosine, what it is by chance, and z, in all and for each tensor.

    Raises:
        PairMismatchError: the bases differ, both are one run, or the tensors do not align.
        SelectionError: nothing is selected, a run did not move in what is, or a tensor holds NaN or
            Inf or is of a dtype without arithmetic.
        TypeError: `a` or `b` is no pair.

    Source: Ilharco et al., arXiv 2212.04089 (task vectors and their cosine); the null by signs is
    ours.

    >>> other = open_pair(pair.base, {
    ...     name: pair.tuned.read(name) * 2 for name in pair.tuned.names()
    ... })
    >>> round(task_vector_cosine(pair, other, include="*up_proj*").cosine, 3)
    0.447
    """
    tensors = _aligned(a, b, include, exclude, kinds)
    _check_runs(a, b)
    rows: list[TensorCosine] = []
    with a.lock, b.lock:
        for pair in (a, b):
            pair.check_unchanged()
            pair.check_second_names()
        nbytes = [one.numel * 3 * DTYPES[one.dtype].itemsize for one, _ in tensors]
        with progress.bar(sum(nbytes), "task vectors") as advance:
            for (one, other), size in zip(tensors, nbytes, strict=True):
                products = _products(a, one, b, other)
                rows.append(
                    TensorCosine(one.name, one.shape, one.dtype, one.layer, one.kind, products)
                )
                advance(size)
        for pair in (a, b):
            pair.check_unchanged()
    products = _in_all([each.products for each in rows])
    still = [
        name
        for name, squares in (("a", products.squares_a), ("b", products.squares_b))
        if not squares
    ]
    if still:
        raise SelectionError(
            f"run {' and run '.join(still)} did not move in {plural(len(rows), 'selected tensor')} "
            "and has no direction there; did it save its base again?"
        )
    result = TaskVectorCosine(
        a=a.label,
        b=b.label,
        products=products,
        per_tensor=tuple(rows),
        notes=tuple(dict.fromkeys((*a.notes, *b.notes))),
        fingerprints=of_sides(
            {"base": (a, a.base), "tuned_a": (a, a.tuned), "tuned_b": (b, b.tuned)}
        ),
    )
    record(result)
    return result


def _aligned(
    a: ModelPair,
    b: ModelPair,
    include: Patterns | None,
    exclude: Patterns | None,
    kinds: Patterns | None,
) -> list[tuple[TensorPair, TensorPair]]:
    """The selected weights on both sides."""
    ones, others = (
        {pair.tensors[row].name: pair.tensors[row] for row in rows}
        for pair, rows in ((each, select(each, include, exclude, kinds).rows) for each in (a, b))
    )
    problems = [
        Problem("only a" if name in ones else "only b", name, "") for name in ones.keys() ^ others
    ]
    problems += [
        Problem("reshaped", name, f"{list(one.shape)} against {list(others[name].shape)}")
        for name, one in ones.items()
        if name in others and one.shape != others[name].shape
    ]
    if problems:
        problems.sort(key=lambda each: each.name)
        label = f"{a.label} against {b.label}"
        text = describe(problems, pair=label, total=len(ones.keys() | others))
        raise PairMismatchError(text, problems)
    if not ones:
        raise SelectionError(
            "only buffers and integer tensors are selected, which are no part of a task vector"
        )
    refused = [
        f"{each.name} ({each.dtype})"
        for each in (*ones.values(), *others.values())
        if each.dtype not in ARITHMETIC
    ]
    if refused:
        raise SelectionError(
            f"no arithmetic is known for {plural(len(refused), 'selected tensor')}: "
            f"{first_few(refused)}; leave them out with exclude="
        )
    return [(one, others[name]) for name, one in ones.items()]


def _check_runs(a: ModelPair, b: ModelPair) -> None:
    if a is b or a.tuned is b.tuned or a.tuned.identity() == b.tuned.identity():
        raise PairMismatchError(
            f"a and b are the same run: {a.label}; its cosine with itself is 1, which says "
            "nothing. Was one given twice?"
        )
    if a.base is b.base or a.base.identity() == b.base.identity():
        return
    bases = a.base.fingerprint(), b.base.fingerprint()
    if bases[0] != bases[1]:
        raise PairMismatchError(
            f"{a.label} and {b.label} are runs from different bases (fingerprints {bases[0]} and "
            f"{bases[1]}), and the difference of the bases is in one of the vectors; compare runs "
            "from one base"
        )


def _products(a: ModelPair, one: TensorPair, b: ModelPair, other: TensorPair) -> Products:
    sums = [0.0, 0.0, 0.0, 0.0]
    for left, right in zip(_update(a, one), _update(b, other), strict=True):
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise SelectionError(
                f"{safe(one.name)} of {a.label} or {b.label} holds NaN or Inf, and its update has "
                "no direction; leave it out with exclude="
            )
        squares = left.square(), right.square()
        for at, each in enumerate(
            (left @ right, *(s.sum() for s in squares), squares[0] @ squares[1])
        ):
            sums[at] += float(each)
    return Products(one.numel, *sums)


def _update(pair: ModelPair, tensor: TensorPair) -> Iterator[torch.Tensor]:
    """The update in float64, in runs of entries that depend on the shape alone."""
    import torch

    dtype = getattr(torch, tensor.dtype)
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _ENTRIES * rows // max(1, tensor.numel))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows)) if tensor.shape else None
        base = pair.base.read(tensor.base_name, block).to(dtype).reshape(-1)
        tuned = pair.tuned.read(tensor.tuned_name, block).to(dtype).reshape(-1)
        for first in range(0, base.numel(), _ENTRIES):
            piece = slice(first, first + _ENTRIES)
            yield (tuned[piece].double() - base[piece].double()).cpu()


def _in_all(parts: Sequence[Products]) -> Products:
    columns = list(zip(*parts, strict=True))
    return Products(int(sum(columns[0])), *(math.fsum(column) for column in columns[1:]))
