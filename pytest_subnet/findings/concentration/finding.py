"""In which part of a model a mask lies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_limit,
    check_message,
    warn_of_vacuous,
)
from pytest_subnet.findings.common.result import reworded
from pytest_subnet.findings.concentration.groups import (
    Piece,
    by_kind,
    by_layer,
    by_module,
    by_patterns,
    check_by,
    gathered,
    selected,
)
from pytest_subnet.findings.concentration.texts import (
    lift_below,
    no_plurality,
    share_below,
    share_by_size,
)
from pytest_subnet.pairs.selection import as_list, matching
from pytest_subnet.recording import record
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from pytest_subnet.findings.common.result import Message
    from pytest_subnet.findings.concentration.result import MaskConcentration
    from pytest_subnet.masks.update_mask import UpdateMask
    from pytest_subnet.pairs.selection import Patterns

By: TypeAlias = "Literal['kind', 'layer', 'module'] | Mapping[str, Patterns]"

_BY = ("kind", "layer", "module")


def mask_concentration(
    mask: UpdateMask,
    by: By = "kind",
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    config: Mapping[str, object] | None = None,
) -> MaskConcentration:
    """Measure in which groups of tensors the entries of a mask lie, beside how large these are.

    share = entries of the mask in the group / entries of the mask; lift = share / (entries of the
    group / entries of all groups), 1 where the mask is uniform. The denominators are the tensors
    that the mask covers and that are selected: leave embeddings, norms or biases out with
    `exclude` where shares of the matrices alone are meant.

    Args:
        mask: any mask.
        by: what a group is. `"kind"`: what a tensor is for (`q_proj`, `down_proj`, `norm`, …), the
            parts of a fused one apart. `"layer"`: its block. `"module"`: the attention or the MLP
            of a block. Or globs on names by the group's name; tensors that are in none are
            `"others"`.
        include: glob or globs on names; None takes all.
        exclude: glob or globs on names to leave out.
        config: the model's, as in `model.config.to_dict()` or `open_checkpoint(path).config`, which
            says how queries, keys and values lie in a fused tensor. Masks do not carry it. Without,
            only layouts that need no number of heads are known (GPT-2's); others stay whole, and a
            note says so. Only for `by="kind"`.

    Returns:
        A share and a lift for each group, the largest share first, and which has the plurality.

    Raises:
        SelectionError: the mask is empty in what is selected, a pattern matches nothing, or two
            groups have one tensor.
        TypeError: `mask` is no mask, or a pattern no string.
        ValueError: an unknown `by`, one with a group `"others"`, or `config` for another one than
            `"kind"`.

    Source: arXiv 2504.15471, section 5 (shares of attention and MLP, by layer).

    >>> entries = {"h.0.mlp.w": [True, True, True, False], "h.0.attn.w": [True, False]}
    >>> mask = UpdateMask.of(entries)
    >>> mask_concentration(mask, "module")["h.0.mlp"].lift
    1.125
    """
    mask, tensors = selected(mask, include, exclude)
    if config is not None and by != "kind":
        raise ValueError('config says how fused tensors are taken apart, which by="kind" does')
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"config is {type(config).__name__}, not a mapping; pass model.config.to_dict()"
        )
    notes: tuple[str, ...] = ()
    if isinstance(by, Mapping):
        group_of = by_patterns(tensors, by)
        pieces = [Piece(group_of(each), each.entries, each.numel) for each in tensors]
    else:
        check_by(by, _BY)
        if by == "kind":
            pieces, notes = by_kind(mask, tensors, config or {})
        else:
            group = by_layer if by == "layer" else by_module
            pieces = [Piece(group(each), each.entries, each.numel) for each in tensors]
    result = gathered(mask, "group" if isinstance(by, Mapping) else by, tensors, pieces, notes)
    record(result)
    return result


def assert_mask_concentration(
    mask: UpdateMask,
    pattern: Patterns,
    *,
    min_share: float | None = None,
    min_lift: float | None = None,
    plurality: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    message: Message | None = None,
) -> MaskConcentration:
    """Fail unless enough of a mask lies in the tensors that a pattern names.

    A group that has most of the parameters has most of any mask: `min_share` fails as well where
    the group's share of the parameters alone reaches it, or is as large as its share of the mask.

    Valid usages:
        assert_mask_concentration(mask, "*.layers.0.mlp.*", plurality=True)     # the first MLP
        assert_mask_concentration(mask, "*.mlp.*", min_share=0.8)               # most of it
        assert_mask_concentration(mask, ["*q_proj*", "*k_proj*"], min_lift=2)   # more than its size

    Args:
        mask: any mask.
        pattern: glob or globs on names; the tensors they match are one group.
        min_share: fraction in [0, 1]: entries of the mask in the group over entries of the mask.
        min_lift: finite number of at least 0: that share over the group's share of all entries.
        plurality: that the group has more of the mask than any other attention, MLP or other
            module of a block (`mask_concentration(mask, "module")`) has outside it.
        include: glob or globs on names; None takes all. Shares are of what is selected.
        exclude: glob or globs on names to leave out.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        The group, under `pattern` joined by commas, and the modules beside it.

    Raises:
        AssertionError: a bound does not hold, or the size of the group alone would meet it.
        SelectionError: as in `mask_concentration`; or the pattern matches all that is selected.
        TypeError: as in `mask_concentration`.
        ValueError: no bound, or one outside its range.

    Source: arXiv 2504.15471, section 5 (the first MLP has the plurality).

    >>> entries = {"h.0.mlp.w": [True, True, True, False], "h.1.mlp.w": [True, False, False, False]}
    >>> mask = UpdateMask.of(entries)
    >>> assert_mask_concentration(mask, "h.0.mlp.*", min_share=0.7, plurality=True).plurality
    'h.0.mlp.*'
    """
    __tracebackhide__ = True
    _check_bounds(min_share, min_lift, plurality)
    check_message(message)
    mask, tensors = selected(mask, include, exclude)
    group = ", ".join(as_list("pattern", pattern))
    named = matching("pattern", pattern, [each.name for each in tensors]) or set()
    if len(named) == len(tensors):
        raise SelectionError(
            f"pattern={safe(group)!r} matches all that is selected, which has all of the mask; "
            "name a part"
        )
    pieces = [
        Piece(group if each.name in named else by_module(each), each.entries, each.numel)
        for each in tensors
    ]
    result = gathered(mask, "module", tensors, pieces)
    record(result)
    found = result[group]
    text = None
    if min_share is not None and found.share < min_share:
        text = share_below(result, found, min_share)
    elif min_share is not None and found.parameter_share >= min_share:
        text = share_by_size(result, found, min_share)
    elif min_lift is not None and found.lift < min_lift:
        text = lift_below(result, found, min_lift)
    elif plurality and result.plurality != group:
        text = no_plurality(result, found)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_mask_concentration", min_lift=min_lift)
    return result


def _check_bounds(min_share: float | None, min_lift: float | None, plurality: object) -> None:
    if not isinstance(plurality, bool):
        raise TypeError(f"plurality={safe(repr(plurality))} is neither True nor False")
    if min_share is None and min_lift is None and not plurality:
        raise ValueError(
            "no bound: give one of min_share, min_lift, plurality=True, or the assertion says "
            "nothing"
        )
    if min_share is not None:
        check_fraction("min_share", min_share)
    if min_lift is not None:
        check_limit("min_lift", min_lift)
