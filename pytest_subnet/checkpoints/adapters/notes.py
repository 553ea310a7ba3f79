"""What a reader of any number must know of an adapter that was read as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.wording import short
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from peft import LoraConfig

    from pytest_subnet.checkpoints.adapters.keys import LowRank, Plan
    from pytest_subnet.checkpoints.base import Checkpoint

_HALVES = ("bfloat16", "float16")


def summary(
    label: str, base: Checkpoint, plan: Plan, lora: LoraConfig, reading: str
) -> Iterator[str]:
    """What was changed, by what, and how it is read."""
    method = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    what = []
    if plan.low_rank:
        what.append(f"{plural(len(plan.low_rank), 'matrix')} with an update by {method}")
    if plan.whole:
        what.append(f"{plural(len(plan.whole), 'tensor')} trained whole")
    text = f"{safe(label)} is an adapter on {safe(base.label)}: {' and '.join(what) or 'empty'}"
    dtypes = sorted({base.info(name).dtype for name in plan.low_rank})
    if not dtypes:
        yield text
    elif reading == "algebraic":
        yield f"{text}; read as base + update in float64, unrounded"
    elif set(dtypes) <= {"float32", "float64"}:
        yield f"{text}; merged in {' and '.join(dtypes)}"
    else:
        yield f"{text}; merged in float32 and rounded once to {' and '.join(dtypes)}"


def caveats(
    label: str,
    adapter: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    lora: LoraConfig,
    reading: str,
) -> Iterator[str]:
    """Where peft's own merge gives other bits, and where there is no update at all."""
    updates = list(plan.low_rank.values())
    if reading == "merged":
        own = {adapter.info(key).dtype for each in updates for key in (each.a, each.b)}
        halves = sorted(own.intersection(_HALVES))
        if halves:
            yield (
                f"{safe(label)} holds A and B in {' and '.join(halves)}, to which peft would round "
                "their product before it adds it"
            )
        twice = [
            each.target
            for each in updates
            if each.form == "embedding"
            and not lora.use_dora
            and base.info(each.target).dtype in _HALVES
        ]
        if twice:
            yield (
                f"{first_few(twice)}: peft would round the update of an embedding to the base's "
                "dtype before it adds it"
            )
    if updates and not lora.use_dora and all(_is_zero(each, adapter) for each in updates):
        rest = "only what it trained whole can differ" if plan.whole else "it changes nothing"
        yield f"every update in {safe(label)} is zero, as before the first step of training: {rest}"


def oddities(
    label: str,
    base: Checkpoint,
    plan: Plan,
    named: str | None,
    cast: Sequence[str],
    untied: Sequence[str],
) -> Iterator[str]:
    """What was cast, untied or renamed, and another base in the config."""
    if cast:
        yield f"{first_few(cast)}: trained whole in another dtype, cast to the base's"
    if untied:
        yield (
            f"{first_few(untied)}: one matrix in the base, two in the merged model, as the adapter "
            "trained one of them whole"
        )
    if plan.renaming != ("", ""):
        taken, put = plan.renaming
        how = f"without {taken}" if taken else f"with {put} before them"
        yield f"names in {safe(label)} are read {how}, as the base writes them"
    if named and Path(named).name != Path(base.label.partition("@")[0]).name:
        yield f"{safe(label)} says that it was trained on {short(named)}"


def _is_zero(update: LowRank, adapter: Checkpoint) -> bool:
    """Whether B, or the A of an embedding, is what it was at first; then the product is zero."""
    return any(not adapter.read(key).any() for key in (update.b, update.a))
