"""A repository on the Hugging Face hub, downloaded once into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SIDE_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# One after the other, until there are weights. Many repositories hold the same weights again, as
# consolidated.safetensors or in folders: what the first line finds is not downloaded twice.
_WEIGHTS = (
    ["model*.safetensors"],
    ["*.safetensors"],
    ["pytorch_model*.bin"],
)


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

    Raises:
        CheckpointError: the hub has no such repository or revision, or does not answer.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    name = safe(f"{repo}@{revision}" if revision else repo)
    try:
        return _snapshot(repo, revision)
    except HFValidationError:
        raise CheckpointError(
            f"no checkpoint at {name}: there is no such path (looked in {safe(Path.cwd())}), "
            "and no repository on the hub can have this name"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{safe(repo)} on the hub has no revision {safe(revision)}; name a branch, a tag or a "
            "commit of it"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is neither a path here (looked in {safe(Path.cwd())}) nor in the hub's cache, "
            "and the hub cannot be reached; check the path, or the network and HF_ENDPOINT"
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{name} is no path here (looked in {safe(Path.cwd())}), and the hub answered "
            f"{error.response.status_code} for it; check the spelling, and log in with `hf auth "
            "login` if the repository is private or gated"
        ) from None
    except Exception as error:  # its HTTP client, the disk it writes to: each raises its own kind
        raise CheckpointError(
            f"{name} could not be downloaded from the hub "
            f"({type(error).__name__}: {short(error)}); check the network and the space on disk, "
            "and run again: what is there is kept"
        ) from error


def _snapshot(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    for weights in _WEIGHTS:
        directory = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=weights + _SIDE_FILES,
                ignore_patterns=["*/*"],
            )
        )
        if any(path for pattern in weights for path in directory.glob(pattern)):
            break
    return directory
