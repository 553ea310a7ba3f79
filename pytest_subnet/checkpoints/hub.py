"""A repository on the Hugging Face hub, downloaded once into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_TORCH = ["pytorch_model*.bin", "*.bin.index.json"]
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def parse_hub_id(source: str) -> tuple[str, str | None] | None:
    """Repository and revision of `"org/name[@revision]"`; None when `source` is no such id.

    >>> parse_hub_id("Qwen/Qwen2.5-0.5B@main"), parse_hub_id("./runs/one")
    (('Qwen/Qwen2.5-0.5B', 'main'), None)
    """
    match = _HUB_ID.fullmatch(source)
    return (match["repo"], match["revision"]) if match else None


def download(repo: str, revision: str | None) -> Path:
    """The local directory of `repo` at `revision`, downloaded if it is not there yet.

    Safetensors are taken where there are any, torch files otherwise. `huggingface_hub` shows its
    progress bar, and uses its own cache, token and `HF_ENDPOINT`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns + _SIDE_FILES)
        )

    name = safe(f"{repo}@{revision}" if revision else repo)
    try:
        directory = fetch(_SAFETENSORS)
        has_weights = any(directory.glob("*.safetensors"))
        return directory if has_weights else fetch(_TORCH)
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a path here nor in the hub's cache, and the hub cannot be reached; "
            "check the path, or the network and HF_ENDPOINT"
        ) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "?")
        raise CheckpointError(
            f"{name} is no path here, and the hub answered {status} for it; check the spelling and "
            "the revision, and log in with `hf auth login` if the repository is private or gated"
        ) from None
