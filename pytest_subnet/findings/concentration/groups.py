"""The tensors of a mask in groups, fused ones taken apart where their layout is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.fingerprints import Fingerprints
from pytest_subnet.findings.concentration.result import GroupShare, MaskConcentration
from pytest_subnet.findings.matrices.fused import parts_of
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.pairs.kinds import kind_of, layer_of
from pytest_subnet.pairs.selection import matching
from pytest_subnet.text import first_few, nearest, plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pytest_subnet.masks.update_mask import MaskTensor
    from pytest_subnet.pairs.selection import Patterns

OTHERS = "others"
"""The group of tensors that are in no group of the caller's."""

_KINDS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "gate_proj", "up": "up_proj"}
_BEHIND = ("weight", "bias")


class Piece(NamedTuple):
    """A tensor, or a part of a fused one, in its group."""

    group: str
    inside: int
    numel: int


def selected(
    mask: object, include: Patterns | None, exclude: Patterns | None
) -> tuple[UpdateMask, list[MaskTensor]]:
    """The tensors of `mask` that are meant, those without entries left out.

    Raises:
        SelectionError: a pattern matches nothing, nothing is left, or no entry in it is in the
            mask.
        TypeError: `mask` is no mask.
    """
    if not isinstance(mask, UpdateMask):
        raise TypeError(
            f"mask is {type(mask).__name__}, not an UpdateMask; make one with update_mask(pair), "
            "UpdateMask.of({name: booleans}) or UpdateMask.load(path)"
        )
    names = mask.names()
    included, excluded = matching("include", include, names), matching("exclude", exclude, names)
    tensors = [
        each
        for each in mask.tensors
        if each.numel
        and (included is None or each.name in included)
        and (excluded is None or each.name not in excluded)
    ]
    if not tensors:
        raise SelectionError(
            f"nothing is selected: include={include!r} and exclude={exclude!r} leave none of "
            f"{plural(len(names), 'tensor')}"
        )
    if not any(each.entries for each in tensors):
        raise SelectionError(
            f"the mask of {mask.origin.what} has no entry in {plural(len(tensors), 'tensor')} "
            "selected: it is empty, and has no shares"
        )
    return mask, tensors


def by_kind(
    mask: UpdateMask, tensors: Sequence[MaskTensor], config: Mapping[str, object]
) -> tuple[list[Piece], tuple[str, ...]]:
    """Tensors by what they are for; queries, keys and values of a fused tensor apart."""
    pieces, whole = [], []
    for each in tensors:
        parts = list(_parts(mask, each, config))
        if not parts:
            whole.append(each.name)
        kind = kind_of(each.name, is_parameter=True)
        pieces += parts or [Piece(kind, each.entries, each.numel)]
    if not whole:
        return pieces, ()
    stays = "is" if len(whole) == 1 else "are"
    return pieces, (
        f"{plural(len(whole), 'fused tensor')} {stays} one group whole: how queries, keys and "
        f"values lie in {first_few(whole)} is known from the model's config=",
    )


def _parts(mask: UpdateMask, tensor: MaskTensor, config: Mapping[str, object]) -> Iterator[Piece]:
    """The parts of a tensor, which may be one; none where it is fused, and how is not known."""
    kind = kind_of(tensor.name, is_parameter=True)
    parts = None
    if len(tensor.shape) == 2:
        parts = parts_of(tensor.name, (tensor.shape[0], tensor.shape[1]), config)
        if parts is None:
            return
    if parts is None or len(parts) == 1:
        yield Piece(kind, tensor.entries, tensor.numel)
        return
    flags = mask[tensor.name]
    for part in parts:
        runs = [slice(run.start, run.stop) for run in part.runs]
        inside = [flags[run] if part.axis == 0 else flags[:, run] for run in runs]
        count = sum(int(each.sum()) for each in inside)
        yield Piece(_KINDS[part.name], count, sum(each.size for each in inside))


def by_layer(tensor: MaskTensor) -> str:
    """The number of the block; what lies outside the blocks is one group."""
    layer = layer_of(tensor.name)
    return "outside" if layer is None else str(layer)


def by_module(tensor: MaskTensor) -> str:
    """The attention or the MLP of a block, a norm, an embedding: what the tensor is a part of.

    >>> from pytest_subnet.masks.update_mask import MaskTensor
    >>> by_module(MaskTensor("model.layers.0.mlp.up_proj.weight", (2, 2), "bfloat16", 1))
    'model.layers.0.mlp'
    """
    parts = tensor.name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is not None and len(parts) > at + 2:
        return ".".join(parts[: at + 2])
    return ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] in _BEHIND else tensor.name


def by_patterns(
    tensors: Sequence[MaskTensor], groups: Mapping[str, Patterns]
) -> Callable[[MaskTensor], str]:
    """The caller's group of each tensor; those in none are one group of their own.

    Raises:
        SelectionError: a pattern matches nothing, or two groups have one tensor.
        TypeError: `groups` is no mapping from names to patterns.
        ValueError: a group is called as the tensors in none are.
    """
    names = [each.name for each in tensors]
    group_of: dict[str, str] = {}
    for group, patterns in groups.items():
        if not isinstance(group, str):
            raise TypeError(f"by has a group named {safe(repr(group))}; names are strings")
        if group == OTHERS:
            raise ValueError(
                f"by has a group named {OTHERS!r}, which is what tensors in no group are called; "
                "name it otherwise"
            )
        for name in sorted(matching(f"by[{safe(group)!r}]", patterns, names) or names):
            if group_of.setdefault(name, group) != group:
                raise SelectionError(
                    f"{safe(name)} is in two groups, {safe(group_of[name])} and {safe(group)}; "
                    "shares would count it twice"
                )
    return lambda tensor: group_of.get(tensor.name, OTHERS)


def gathered(
    mask: UpdateMask,
    by: str,
    tensors: Sequence[MaskTensor],
    pieces: Sequence[Piece],
    notes: tuple[str, ...] = (),
) -> MaskConcentration:
    """The result, from a piece for each tensor or part of one."""
    count, numel = sum(each.inside for each in pieces), sum(each.numel for each in pieces)
    groups: dict[str, list[Piece]] = {}
    for each in pieces:
        groups.setdefault(each.group, []).append(each)
    shares = [_share(name, found, count, numel) for name, found in groups.items()]
    return MaskConcentration(
        mask=mask.origin.what,
        by=by,
        tensors=len(tensors),
        tensors_total=len(mask.tensors),
        count=count,
        numel=numel,
        groups=tuple(sorted(shares, key=lambda each: -each.inside)),
        notes=notes,
        fingerprints=fingerprints_of(mask),
    )


def fingerprints_of(mask: UpdateMask) -> Fingerprints:
    """Of what the mask was made from, as far as it knows; each is taken when it is asked for."""
    origin = mask.origin
    return Fingerprints({"base": lambda: origin.base, "tuned": lambda: origin.tuned})


def check_by(by: object, known: Sequence[str]) -> None:
    """Raise unless `by` is one of `known`."""
    if by not in known:
        hint = nearest(by, known) if isinstance(by, str) else ""
        raise ValueError(
            f"by={safe(repr(by))} is none of {', '.join(known)}, nor a mapping from names of "
            f"groups to globs{hint}"
        )


def _share(name: str, pieces: Sequence[Piece], count: int, numel: int) -> GroupShare:
    inside, entries = sum(each.inside for each in pieces), sum(each.numel for each in pieces)
    # One division: a uniform mask has a lift of 1 to the bit.
    lift = inside * numel / (count * entries)
    return GroupShare(name, len(pieces), inside, entries, inside / count, entries / numel, lift)
