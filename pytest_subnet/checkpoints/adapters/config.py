"""What an `adapter_config.json` says, as peft reads it; what is not handled is refused."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, TypeGuard

from pytest_subnet.checkpoints.json_files import read_json
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from peft import LoraConfig

CONFIG = "adapter_config.json"

_ELSEWHERE = {
    "target_parameters": "adapts parameters that are no matrices of their own (fused experts)",
    "trainable_token_indices": "trains single rows of an embedding",
    "layer_replication": "copies layers of the base",
    "lora_bias": "adds to the biases too",
    "megatron_config": "adapts Megatron's parallel layers",
    "use_qalora": "adapts a quantised base",
    "ensure_weight_tying": "ties adapters to each other",
}
"""Settings under which the weights are not base + scale * B @ A, matrix by matrix."""

_LEAVES_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start an adapter that do not also change the base it was trained on."""


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _is_number(value: object) -> TypeGuard[float]:
    if type(value) is int:
        return abs(value) < 2**53  # beyond that it is no float, or another one
    return type(value) is float and math.isfinite(value)


def _is_flag(value: object) -> TypeGuard[bool]:
    return isinstance(value, bool)


def _is_names(value: object) -> TypeGuard[str | list[str]]:
    return isinstance(value, str) or _is_list(value)


def _is_list(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_layers(value: object) -> TypeGuard[int | list[int]]:
    return all(type(each) is int for each in (value if isinstance(value, list) else [value]))


def _is_ranks(value: object) -> TypeGuard[dict[str, int]]:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_alphas(value: object) -> TypeGuard[dict[str, float]]:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


_COUNTS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (_is_count, "a whole number above 0"),
    "lora_alpha": (_is_number, "a finite number"),
    "rank_pattern": (_is_ranks, "a mapping to whole numbers above 0"),
    "alpha_pattern": (_is_alphas, "a mapping to finite numbers"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "modules_to_save": (_is_list, "a list of names"),
    "target_modules": (_is_names, "a list of names or a pattern"),
    "exclude_modules": (_is_names, "a list of names or a pattern"),
    "layers_to_transform": (_is_layers, "a number or a list of numbers"),
    "layers_pattern": (_is_names, "a list of names or a name"),
}
"""The settings that the merged weights depend on, and what each must be; null leaves its default"""


def read_config(directory: Path) -> tuple[LoraConfig, str | None]:
    """The config of the adapter in `directory`, and what it calls its base, which is not followed.

    Raises:
        CheckpointError: it cannot be read, is no LoRA, or has a setting that is not handled.
    """
    path = directory / CONFIG
    stated = read_json(path, unique=True)
    kind = stated.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{safe(directory)} is a PEFT adapter of type {short(kind)}, not LORA; merge it into "
            "its base (merge_and_unload, then save_pretrained) and pass the merged model"
        )
    lora = _peft_config(path)
    known = {field.name: field.metadata for field in lora.__dataclass_fields__.values()}
    for name, value in stated.items():
        if not value:
            continue
        if name not in known:
            raise CheckpointError(
                f"{safe(path)} sets {short(name)}, which the installed peft does not know; install "
                "the release of peft that wrote it, or a later one"
            )
        is_variant = known[name].get("is_lora_variant") and name != "use_dora"
        if is_variant or name in _ELSEWHERE:
            what = _ELSEWHERE.get(name, "is another arithmetic than that of LoRA")
            raise CheckpointError(
                f"{safe(path)} sets {name}, which {what}; that cannot be read here: merge it "
                "with peft (merge_and_unload, then save_pretrained) and pass the merged model"
            )
    init = stated.get("init_lora_weights")
    if not (init is None or init in _LEAVES_THE_BASE):
        raise CheckpointError(
            f"{safe(path)} sets init_lora_weights to {short(init)}, which changed the base as well "
            "when training started; save the adapter with "
            "path_initial_model_for_weight_conversion, or pass the merged model"
        )
    for name, (is_right, wanted) in _COUNTS.items():
        value = stated.get(name)
        if value is None:
            continue
        if not is_right(value):
            raise CheckpointError(f"{safe(path)}: {name} is {short(value)}, not {wanted}")
        setattr(lora, name, value)
    named = stated.get("base_model_name_or_path")
    return lora, named if isinstance(named, str) else None


def _peft_config(path: Path) -> LoraConfig:
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{safe(path.parent)} is a PEFT adapter, and {safe(error.name)} is not installed; "
            "pip install 'pytest-subnet[adapters]'"
        ) from error
    return LoraConfig(init_lora_weights=False)


def rank_and_alpha(lora: LoraConfig, module: str) -> tuple[int, float]:
    """Rank and alpha of `module`: those of the pattern that fits it, or those of all."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = lora.rank_pattern or {}, lora.alpha_pattern or {}
    try:
        rank = ranks.get(get_pattern_key(list(ranks), module), lora.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), lora.lora_alpha)
    except re.error as error:
        raise _not_a_pattern("rank_pattern or alpha_pattern", error) from None
    return rank, alpha


def is_targeted(lora: LoraConfig, module: str) -> bool:
    """Whether peft would give `module` an adapter, or the config leaves that open."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not lora.target_modules or lora.target_modules == "all-linear":
        return True
    try:
        return bool(check_target_module_exists(lora, module))
    except re.error as error:
        raise _not_a_pattern("target_modules", error) from None


def _not_a_pattern(where: str, error: re.error) -> CheckpointError:
    return CheckpointError(f"{CONFIG}: {where} holds no regular expression: {short(error)}")
