"""What lies beside the weights and decides how a model is used: configs, tokenizer, chat template.

Each side becomes `file -> dotted key -> value`, spelled as one version of transformers would spell
both, so that saving a model again is no difference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from pytest_subnet.checkpoints.adapters.opening import is_adapter
from pytest_subnet.checkpoints.files import exists, stamp, unreadable
from pytest_subnet.checkpoints.json_files import read_json
from pytest_subnet.checkpoints.remote.urls import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pytest_subnet.checkpoints import Checkpoint

CONFIG = "config.json"
CHAT_TEMPLATE = "chat_template"
"""Under this name go the templates, in whichever file each side keeps them."""

_TOKENIZER_CONFIG = "tokenizer_config.json"
_JSON = (
    "generation_config.json",
    "tokenizer.json",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
)
_TABLES = ("vocab.json", "vocab.txt", "merges.txt")
_BINARY = (
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model"),
    *("qwen.tiktoken", "tekken.json"),
)
_SILENT = {
    CONFIG: ("_name_or_path", "transformers_version", "torch_dtype", "dtype"),
    "generation_config.json": ("_from_model_config", "transformers_version"),
    _TOKENIZER_CONFIG: (
        *("name_or_path", "tokenizer_file", "special_tokens_map_file"),
        *("backend", "is_local", "local_files_only"),
    ),
}
"""Keys that say where a file came from or as what weights are stored, not how a model behaves."""

_WHOLE = ("", "model.vocab")
"""Vocabularies, in a file of their own or not: a row a token would bury the rest."""
_MOST_KEYS = 500
"""A table with more is shown as one, too."""
_DEEPEST = 20


@dataclass(frozen=True, slots=True)
class Side:
    """What one checkpoint has beside its weights.

    Attributes:
        label: how messages name it.
        files: values by dotted key, by file.
        left_out: `file:key` of what says nothing about behaviour.
        is_directory: whether there is a place where files could be.
        is_adapter: whether what does not lie there is the base's.
        states_defaults: whether its config comes from a model in memory, and is longer for that.
    """

    label: str
    files: Mapping[str, Mapping[str, object]]
    left_out: frozenset[str]
    is_directory: bool
    is_adapter: bool
    states_defaults: bool


def read_side(checkpoint: Checkpoint) -> Side:
    """Read what `checkpoint` has; of one without a directory that is its config."""
    contents: dict[str, object] = {CONFIG: dict(checkpoint.config)} if checkpoint.config else {}
    directory = checkpoint.directory
    if directory is not None:
        contents.update(_read(_home(directory)))
    left_out = {f"{file}:{key}" for file, value in contents.items() for key in _silent(file, value)}
    files = {file: dict(_leaves(_spelled_alike(file, each))) for file, each in contents.items()}
    return Side(
        label=checkpoint.label,
        files=files,
        left_out=frozenset(left_out),
        is_directory=directory is not None,
        is_adapter=directory is not None and is_adapter(directory),
        states_defaults=directory is None and not is_url(checkpoint.label),
    )


def _home(directory: Path) -> Path:
    """Where the files lie: verl keeps them apart from its shards."""
    apart = directory / "huggingface"
    return apart if not exists(directory / CONFIG) and exists(apart / CONFIG) else directory


def _read(directory: Path) -> Iterator[tuple[str, object]]:
    """Every file that is there, and the chat templates."""
    inside: object = None
    for name in _JSON:
        if exists(directory / name):
            content = read_json(directory / name)
            if name == _TOKENIZER_CONFIG:
                inside = content.pop("chat_template", None)
            yield name, content
    for name in _TABLES:
        if exists(directory / name):
            is_json = name.endswith(".json")
            table = read_json(directory / name) if is_json else _lines(directory / name)
            yield name, {"": table}
    for name in _BINARY:
        if exists(directory / name):
            yield name, {"": _digest(directory / name)}
    templates = _templates(directory, inside)
    if templates:
        yield CHAT_TEMPLATE, templates


def _templates(directory: Path, inside: object) -> dict[str, object]:
    """The chat templates by name; a file of its own counts before the tokenizer's config."""
    found: dict[str, object] = {}
    if isinstance(inside, str):
        found["default"] = inside
    for each in inside if isinstance(inside, list) else []:
        if isinstance(each, dict):
            found[f"{each.get('name')}"] = each.get("template")
    as_json = directory / "chat_template.json"
    if exists(as_json):
        found["default"] = read_json(as_json).get("chat_template")
    files = {"default": directory / "chat_template.jinja"}
    more = directory / "additional_chat_templates"
    if exists(more) and more.is_dir():
        files.update({path.stem: path for path in sorted(more.glob("*.jinja"))})
    for name, path in files.items():
        if exists(path):
            found[name] = _bytes(path).decode("utf-8", "backslashreplace")
    return {name: _as_jinja_reads(text) for name, text in found.items()}


def _as_jinja_reads(text: object) -> object:
    """Jinja makes all line ends one, and drops that of the last line."""
    if not isinstance(text, str):
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _lines(path: Path) -> list[str]:
    """The lines of a vocabulary or of merges, without the comment that names the version."""
    lines = _bytes(path).decode("utf-8", "backslashreplace").removesuffix("\n").split("\n")
    return lines[1:] if lines[0].startswith("#version") else lines


def _digest(path: Path) -> str:
    import xxhash

    raw = _bytes(path)
    return f"{xxhash.xxh3_128_hexdigest(raw)}, {len(raw):,} bytes"


def _bytes(path: Path) -> bytes:
    stamp(path)  # to open a pipe would wait for ever
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _silent(file: str, content: object) -> Iterator[str]:
    """The keys of `content` that are left out."""
    if isinstance(content, dict):
        yield from (key for key in _SILENT.get(file, ()) if key in content)
        for name, part in content.items() if file == CONFIG else ():
            if _is_part(name, part):
                yield from (f"{name}.{key}" for key in _SILENT[CONFIG] if key in part)


def _is_part(name: object, value: object) -> TypeGuard[dict[str, object]]:
    """Whether a value in a config is the config of a part of the model."""
    return isinstance(value, dict) and name in ("text_config", "vision_config", "audio_config")


def _spelled_alike(file: str, content: object) -> object:
    """`content` without what is left out, as the newest and the oldest version both mean it."""
    if not isinstance(content, dict):
        return content
    kept = {key: value for key, value in content.items() if key not in _SILENT.get(file, ())}
    if file == CONFIG:
        kept = {
            key: _spelled_alike(file, value) if _is_part(key, value) else value
            for key, value in kept.items()
        }
        return _one_rope(kept)
    if file == "tokenizer.json":
        return _one_tokenizer(kept)
    return {key: _one_token(value) for key, value in kept.items()}


def _one_rope(config: dict[str, object]) -> dict[str, object]:
    """What transformers 5 calls `rope_parameters` was `rope_theta` and `rope_scaling` before."""
    config = {key: value for key, value in config.items() if (key, value) != ("rope_scaling", None)}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return config
    kept = {key: value for key, value in config.items() if key != "rope_parameters"}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "rope_theta" in rope:
        kept["rope_theta"] = rope["rope_theta"]
    if scaling not in ({}, {"rope_type": "default"}):
        kept["rope_scaling"] = scaling
    return kept


def _one_tokenizer(content: dict[str, object]) -> dict[str, object]:
    """Added tokens by their id; merges as pairs, which were strings before tokenizers 0.20."""
    added, model = content.get("added_tokens"), content.get("model")
    if isinstance(added, list) and all(isinstance(each, dict) and "id" in each for each in added):
        by_id = {f"{each['id']}": each for each in added}
        if len(by_id) == len(added):
            content = {**content, "added_tokens": by_id}
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]
        content = {**content, "model": {**model, "merges": merges}}
    return content


def _one_token(value: object) -> object:
    """A special token as its text, where a version spelled it out with nothing special to it."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = [flag for key, flag in value.items() if key not in ("content", "__type")]
        if all(flag is False for flag in flags):
            return value["content"]
    return value


def _leaves(value: object, path: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """The values in `value` by their dotted keys; of a list, those of the objects in it."""
    if isinstance(value, dict):
        parts = {_quoted(f"{key}"): part for key, part in value.items()}
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = {f"{index}": part for index, part in enumerate(value)}
    else:
        parts = {}
    if (depth and path in _WHOLE) or depth == _DEEPEST or not 0 < len(parts) <= _MOST_KEYS:
        yield path, value
        return
    for key, part in parts.items():
        yield from _leaves(part, f"{path}.{key}" if path else key, depth + 1)


def _quoted(key: str) -> str:
    """`key` as one step of a dotted path: no other keys make the same one."""
    return json.dumps(key, ensure_ascii=False) if "." in key or '"' in key else key
