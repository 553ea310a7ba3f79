"""Which tensor of the tuned checkpoint is which tensor of the base.

Names first. Names left over on both sides meet without their wrappers, then without the prefix of
the backbone, only where that is one-to-one and the shapes agree. What cannot be decided is a
problem with a name, never a guess.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.experts import FUSED_FROM, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.experts import Part

_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
_BACKBONES = frozenset({"model", "transformer", "gpt_neox", "language_model", "backbone"})
# The same module, in memory and on disk, in transformers 5.
_SYNONYMS = {"embed_out": "lm_head", "block_sparse_moe": "mlp"}

_FUSED = re.compile(rf"(.*\.experts)\.({'|'.join(FUSED_FROM)})")
_SPLIT = re.compile(r"(.*\.experts)\.(\d+\..*)")


class Match(NamedTuple):
    """How the names of two checkpoints meet.

    Attributes:
        met: the tuned checkpoint's name for each base name that met, in the base's order.
        ambiguous: names of either side that could meet several, or one that others could meet too,
            with the names of the other side that they could meet (the tuned checkpoint's after the
            user's rename).
    """

    met: dict[str, str]
    ambiguous: dict[str, list[str]]


def without_wrappers(name: str) -> str:
    """A name without what `torch.compile`, data parallelism and adapters add to it.

    >>> without_wrappers("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    parts = [_SYNONYMS.get(part, part) for part in name.split(".") if part not in _WRAPPERS]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def without_backbone(name: str) -> str:
    """A name also without the leading names of the backbone.

    >>> without_backbone("transformer.h.0.attn.c_attn.weight")
    'h.0.attn.c_attn.weight'
    """
    parts = without_wrappers(name).split(".")
    while len(parts) > 1 and parts[0] in _BACKBONES:
        parts = parts[1:]
    return ".".join(parts)


def names_in_base(names: Iterable[str], base_names: Iterable[str]) -> dict[str, str]:
    """What the base would call tensors that it does not have, with their names in `names`.

    A pattern that is written for the base is meant for them too.

    >>> names_in_base(["module.layers.2.w"], ["model.layers.0.w", "model.layers.1.w"])
    {'model.layers.2.w': 'module.layers.2.w'}
    """
    prefixes = defaultdict(set)
    for name in base_names:
        short = without_backbone(name)
        if name.endswith(short):
            prefixes[short.partition(".")[0]].add(name.removesuffix(short))
    return {
        prefix + short: name
        for name in names
        for short in [without_backbone(name)]
        for prefix in prefixes[short.partition(".")[0]]
    }


def match_names(
    base: Checkpoint,
    tuned: Checkpoint,
    base_names: Iterable[str],
    tuned_names: Mapping[str, str],
) -> Match:
    """Pair names one to one.

    Args:
        base: looked at for shapes.
        tuned: looked at for shapes.
        base_names: the base's names, in storage order.
        tuned_names: the tuned checkpoint's names, by what they are called after the user's rename.

    Returns:
        What met, and what could not be decided.
    """
    base_names = list(base_names)
    met = {name: tuned_names[name] for name in base_names if name in tuned_names}
    ambiguous: dict[str, list[str]] = {}
    for shorten in (without_wrappers, without_backbone):
        if len(met) == len(base_names) or len(met) == len(tuned_names):
            break
        left = _grouped(shorten, (name for name in base_names if name not in met))
        used = set(met.values())
        right = _grouped(shorten, (new for new, old in tuned_names.items() if old not in used))
        for key, names in left.items():
            others = right.get(key, [])
            if len(names) == len(others) == 1:
                old = tuned_names[others[0]]
                if _shapes_agree(base.info(names[0]).shape, tuned.info(old).shape):
                    met[names[0]] = old
            elif others:
                ambiguous.update(dict.fromkeys(names, others))
                ambiguous.update(dict.fromkeys(others, names))
    return Match({name: met[name] for name in base_names if name in met}, ambiguous)


def _shapes_agree(base: tuple[int, ...], tuned: tuple[int, ...]) -> bool:
    # A grown vocabulary has more rows; that it differs is said by whoever compares the two.
    return base == tuned or (len(base) > 1 and base[1:] == tuned[1:])


def _grouped(shorten: Callable[[str], str], names: Iterable[str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[shorten(name)].append(name)
    return groups


def experts_to_split(
    fused: Checkpoint,
    fused_names: Mapping[str, str],
    split: Checkpoint,
    split_names: Mapping[str, str],
) -> dict[str, list[Part]]:
    """The matrices in the fused experts of one side that are, one by one, those of the other.

    A block is split whole or not at all: every matrix of every expert must be there under its name
    and with its shape, and no other. So what is fused in another way (transposed, as by gpt_oss
    and llama4) never fits: gate and up would need hidden = 2 * intermediate, down hidden =
    intermediate.

    Args:
        fused: the side that may have all experts of a block in one tensor.
        fused_names: its names, by what they are called after the user's rename.
        split: the side that may have a matrix an expert.
        split_names: likewise.

    Returns:
        The parts of each tensor to split, by what it is called.
    """
    whole, single = _by_block(_FUSED, fused_names), _by_block(_SPLIT, split_names)
    taken = set(fused.names())
    found: dict[str, list[Part]] = {}
    for block, tensors in whole.items():
        if block in single:
            parts = _fitting(fused, fused_names, tensors, split, split_names, single[block])
            if not any(part.name in taken for each in parts.values() for part in each):
                found.update(parts)
    return found


def _fitting(
    fused: Checkpoint,
    fused_names: Mapping[str, str],
    tensors: Mapping[str, str],
    split: Checkpoint,
    split_names: Mapping[str, str],
    single: Mapping[str, str],
) -> dict[str, list[Part]]:
    """The parts of the fused tensors of one block; nothing unless they are all there is."""
    matrices = {leaf.partition(".")[2].removesuffix(".weight") for leaf in single}
    found: dict[str, list[Part]] = {}
    used = 0
    for leaf, called in tensors.items():
        info = fused.info(fused_names[called])
        order = next((each for each in FUSED_FROM[leaf] if matrices.issuperset(each)), None)
        if order is None or len(info.shape) != 3 or 0 in info.shape:
            return {}
        if info.shape[1] % len(order) or info.shape[0] * len(order) > len(single):
            return {}
        found[called] = list(parts_of(info, order))
        experts = info.name.rpartition(".")[0]
        for part in found[called]:
            other = single.get(part.name.removeprefix(f"{experts}."))
            if other is None or split.info(split_names[other]).shape != part.shape:
                return {}
        used += len(found[called])
    return found if used == len(single) else {}


def _by_block(pattern: re.Pattern[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The names that fit `pattern`, by block and what they are called in it.

    A block in which two names would be called the same is left out.
    """
    blocks: dict[str, dict[str, str]] = defaultdict(dict)
    unclear = set()
    for name in names:
        match = pattern.fullmatch(without_backbone(name))
        if match and blocks[match[1]].setdefault(match[2], name) != name:
            unclear.add(match[1])
    return {block: found for block, found in blocks.items() if block not in unclear}


def experts_stored_otherwise(names: Iterable[str], others: Iterable[str]) -> set[str]:
    """Those of `names` that are experts in one tensor where `others` has one a matrix, or reversed.

    transformers 5 fuses the experts of a block in memory and splits them again when it saves.
    """
    names, others = list(names), list(others)
    return {
        name
        for here, there in ((_FUSED, _SPLIT), (_SPLIT, _FUSED))
        for blocks in [{_block(there, other) for other in others} - {None}]
        for name in names
        if _block(here, name) in blocks
    }


def _block(pattern: re.Pattern[str], name: str) -> str | None:
    match = pattern.fullmatch(without_backbone(name))
    return match[1] if match else None
