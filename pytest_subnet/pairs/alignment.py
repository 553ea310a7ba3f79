"""Which tensor of the tuned checkpoint is which tensor of the base.

Names first. Names left over on both sides meet without their wrappers, then without the prefix of
the backbone, only where that is one-to-one and the shapes agree. What cannot be decided is a
problem with a name, never a guess.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pytest_subnet.checkpoints import Checkpoint

_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
_BACKBONES = frozenset({"model", "transformer", "gpt_neox", "language_model", "backbone"})
# The same module, in memory and on disk, in transformers 5.
_SYNONYMS = {"embed_out": "lm_head", "block_sparse_moe": "mlp"}


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


def match_names(
    base: Checkpoint,
    tuned: Checkpoint,
    base_names: Iterable[str],
    tuned_names: Mapping[str, str],
) -> dict[str, str]:
    """Pair names one to one.

    Args:
        base: looked at for shapes.
        tuned: looked at for shapes.
        base_names: the base's names, in storage order.
        tuned_names: the tuned checkpoint's names, by what they are called after the user's rename.

    Returns:
        The tuned checkpoint's name for each base name that met, in the base's order.
    """
    base_names = list(base_names)
    met = {name: tuned_names[name] for name in base_names if name in tuned_names}
    for shorten in (without_wrappers, without_backbone):
        if len(met) == len(base_names) or len(met) == len(tuned_names):
            break
        left = _unique(shorten, (name for name in base_names if name not in met))
        used = set(met.values())
        right = _unique(shorten, (new for new, old in tuned_names.items() if old not in used))
        for key in left.keys() & right.keys():
            name, old = left[key], tuned_names[right[key]]
            if _shapes_agree(base.info(name).shape, tuned.info(old).shape):
                met[name] = old
    return {name: met[name] for name in base_names if name in met}


def _shapes_agree(base: tuple[int, ...], tuned: tuple[int, ...]) -> bool:
    # A grown vocabulary has more rows; that it differs is said by whoever compares the two.
    return base == tuned or (len(base) > 1 and base[1:] == tuned[1:])


def _unique(shorten: Callable[[str], str], names: Iterable[str]) -> dict[str, str]:
    groups = defaultdict(list)
    for name in names:
        groups[shorten(name)].append(name)
    return {key: group[0] for key, group in groups.items() if len(group) == 1}
