"""What several runs agree on: the entries that all of their masks share."""

from __future__ import annotations

import itertools
import math
import os
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from pytest_subnet.errors import PairMismatchError
from pytest_subnet.findings.common.fingerprints import Fingerprints
from pytest_subnet.findings.geometry.consensus_result import ConsensusJaccard, TensorConsensus
from pytest_subnet.findings.overlap.counts import no_exponents
from pytest_subnet.findings.overlap.masks import two_masks
from pytest_subnet.findings.overlap.texts import exponents_missing
from pytest_subnet.masks.bits import popcount
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.pairs.kinds import kind_of, layer_of
from pytest_subnet.pairs.model_pair import ModelPair
from pytest_subnet.recording import record
from pytest_subnet.scan.found import STRATA
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.text import nearest, safe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.findings.overlap.masks import Masks, Source

ConsensusNull: TypeAlias = Literal["auto", "exponent", "matrix"]

_NULLS = ("auto", "exponent", "matrix")


def consensus_jaccard(
    masks: Iterable[Source], *, null: ConsensusNull | None = "auto"
) -> ConsensusJaccard:
    """Measure how many entries all of several masks share, beside what chance alone gives.

    It is |∩| / |∪|, the entries in all masks over those in any. Chance draws each mask anew with as
    many entries in every stratum: of N entries with c₁, c₂, … in the masks, N Π(cᵢ / N) are
    expected in all of them and N (1 - Π(1 - cᵢ / N)) in any. With every further mask the bare
    number falls, and in 16-bit storage the null by matrix is exceeded by rounding alone.

    Args:
        masks: at least two masks, mask files or pairs (whose entries with other bits are meant),
            over tensors of the same names and shapes.
        null: what a stratum is: `"exponent"`, `"matrix"` or `"auto"`, as in `mask_overlap`. None:
            no chance at all.

    Returns:
        The counts, in all and per tensor, and the Jaccard index of each two masks.

    Raises:
        PairMismatchError: two masks are one and the same, or cover other names or shapes; or
            `"exponent"` cannot be had.
        SelectionError: a mask is empty.
        CheckpointError: a mask file cannot be read, or contradicts itself.
        TypeError: something that gives no mask.
        ValueError: fewer than two masks, or an unknown null.

    Source: arXiv 2511.08567, section 4 (there the mean over pairs, `mean_pairwise`, against p q /
    (p + q - p q)).

    >>> from pytest_subnet import UpdateMask
    >>> rows = [[True, True, False], [True, False, False]], [[True, True, True], [False] * 3]
    >>> consensus_jaccard([UpdateMask.of({"weight": each}) for each in rows])
    ConsensusJaccard(jaccard=50.00% (by chance 33.33%), lift=1.333, 2 masks, null='matrix')
    """
    if null is not None and null not in _NULLS:
        hint = nearest(null, _NULLS) if isinstance(null, str) else ""
        raise ValueError(
            f"null={safe(repr(null))} is none of exponent, matrix, auto and None (the bare number)"
            f"{hint}"
        )
    opened = _opened(masks)
    compared = {
        (i, j): two_masks(opened[i], opened[j], SAME_BITS, include=None, exclude=None, kinds=None)
        for i, j in itertools.combinations(range(len(opened)), 2)
    }
    with_first = [compared[0, other] for other in range(1, len(opened))]
    if null == "auto":
        null = "exponent" if any(each.sixteen_bits() for each in with_first) else "matrix"
    if null == "exponent":
        for each in with_first:
            obstacle = no_exponents(each)
            if obstacle is not None:
                raise PairMismatchError(exponents_missing(each.label, obstacle))
    result = _measured(opened, with_first[0], null)
    record(result)
    return result


def _opened(masks: Iterable[Source]) -> list[UpdateMask]:
    if isinstance(masks, str | os.PathLike | UpdateMask | ModelPair):
        raise TypeError("masks is a list of masks, mask files or pairs, not one of them alone")
    found = [_mask(number, each) for number, each in enumerate(masks)]
    if len(found) < 2:
        raise ValueError(
            f"a consensus takes at least two masks, and masks has {len(found)}; one agrees with "
            "itself"
        )
    return found


def _mask(number: int, source: Source) -> UpdateMask:
    if isinstance(source, UpdateMask):
        return source
    if isinstance(source, str | os.PathLike):
        return UpdateMask.load(source)
    if not isinstance(source, ModelPair):
        raise TypeError(
            f"masks[{number}] is a mask, a mask file or a pair, not {type(source).__name__}"
        )
    from pytest_subnet.masks.building import update_mask  # deferred: mask files need no scan

    return update_mask(source)


def _measured(masks: Sequence[UpdateMask], first: Masks, null: str | None) -> ConsensusJaccard:
    shared = np.zeros((len(masks), len(masks)), np.int64)
    rows = [_row(masks, first, name, null, shared) for name in first.names]
    counts = np.array([[row.counts[at] for row in rows] for at in range(len(masks))]).sum(axis=1)
    pairwise = tuple(
        int(shared[i, j]) / int(counts[i] + counts[j] - shared[i, j])
        for i, j in itertools.combinations(range(len(masks)), 2)
    )
    return ConsensusJaccard(
        null=null,
        masks=tuple(safe(each.origin.what) for each in masks),
        numel=sum(row.numel for row in rows),
        intersection=sum(row.intersection for row in rows),
        union=sum(row.union for row in rows),
        expected=math.fsum(row.expected or 0.0 for row in rows) if null else None,
        variance=math.fsum(row.variance or 0.0 for row in rows) if null else None,
        expected_union=math.fsum(row.expected_union or 0.0 for row in rows) if null else None,
        pairwise=pairwise,
        per_tensor=tuple(rows),
        fingerprints=_fingerprints(masks),
    )


def _row(
    masks: Sequence[UpdateMask],
    first: Masks,
    name: str,
    null: str | None,
    shared: NDArray[np.int64],
) -> TensorConsensus:
    """Counts one tensor, and adds what each two masks share to `shared`."""
    intersection = union = 0
    for words in zip(*(each.words(name) for each in masks), strict=True):
        intersection += popcount(np.bitwise_and.reduce(words))
        union += popcount(np.bitwise_or.reduce(words))
        for i, j in itertools.combinations(range(len(masks)), 2):
            shared[i, j] += popcount(words[i] & words[j])
    info = masks[0].info(name)
    counts = tuple(each.info(name).entries for each in masks)
    expected = variance = expected_union = None
    if null is not None:
        population, members = _strata(masks, name, first.dtype(name), null)
        expected, variance, expected_union = shared_by_chance(population, members)
    return TensorConsensus(
        name=name,
        shape=info.shape,
        dtype=first.dtype(name),
        layer=layer_of(name),
        kind=kind_of(name),
        numel=info.numel,
        counts=counts,
        intersection=intersection,
        union=union,
        expected=expected,
        variance=variance,
        expected_union=expected_union,
    )


def _strata(
    masks: Sequence[UpdateMask], name: str, dtype: str, null: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Entries of each stratum, int64 `[strata]`, and those in each mask, `[masks, strata]`."""
    strata = [each.strata(name) for each in masks] if null == "exponent" else []
    known = [each for each in strata if each is not None]
    if dtype in STRATA and len(known) == len(masks):
        population, members = known[0].population, np.stack([each.members for each in known])
        return population[population > 0], members[:, population > 0]
    infos = [each.info(name) for each in masks]
    return np.array([infos[0].numel]), np.array([[each.entries] for each in infos])


def shared_by_chance(
    population: NDArray[np.int64], members: NDArray[np.int64]
) -> tuple[float, float, float]:
    """What several random sets of fixed size share, summed over strata.

    Args:
        population: int64 `[strata]`, entries, at least 1 each.
        members: int64 `[sets, strata]`, those in each set.

    Returns:
        Mean and variance of the size of the intersection, and mean of that of the union.

    >>> mean, variance, union = shared_by_chance(np.array([5000]), np.array([[400], [700]]))
    >>> round(mean, 3), round(variance, 3), round(union, 3)
    (56.0, 44.316, 1044.0)
    """
    shares = members / population
    expected = population * np.prod(shares, axis=0)
    # Of two entries: both are in all sets with probability Π c (c - 1) / (N (N - 1)).
    others = np.prod((members - 1) / np.maximum(population - 1, 1), axis=0)
    variance = expected * np.maximum(0.0, 1 + (population - 1) * others - expected)
    fixed = ((members == 0).any(axis=0)) | ((members < population).sum(axis=0) == 0)
    one = (members < population).sum(axis=0) == 1  # the others are full: the counts decide
    variance = np.where(fixed | one, 0.0, variance)
    union = population * (1 - np.prod(1 - shares, axis=0))
    return math.fsum(expected), math.fsum(variance), math.fsum(union)


def _fingerprints(masks: Sequence[UpdateMask]) -> Fingerprints:
    return Fingerprints(
        {
            f"{side}_{number}": partial(getattr, mask.origin, side)
            for side in ("base", "tuned")
            for number, mask in enumerate(masks, 1)
        }
    )
