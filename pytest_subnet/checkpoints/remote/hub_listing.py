"""What a repository of the Hugging Face hub holds at one commit, for reading it by ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.checkpoints.remote.http_ranges import BUSY, refuse_untrusted, transport_errors
from pytest_subnet.checkpoints.remote.ranges import Interrupted, persist
from pytest_subnet.checkpoints.remote.urls import RemoteFile
from pytest_subnet.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Listing(NamedTuple):
    """A place in a repository at a commit.

    Attributes:
        place: the address that was given, with the commit in place of the branch or tag. Whoever
            reads from it reads that commit, whatever is pushed meanwhile.
        files: all files of the repository, by their addresses.
    """

    place: RemoteFile
    files: Mapping[str, RemoteFile]


def list_repository(given: RemoteFile) -> Listing:
    """Ask the hub which commit `given` names and what it holds; `huggingface_hub` asks.

    Raises:
        CheckpointError: there is no such repository or revision, none that may be read, or the hub
            is not to be asked (`HF_HUB_OFFLINE`) or not to be reached.
    """
    where, told = persist(given, lambda: _ask(given))
    kind = "" if where.repo_type == "model" else f"{where.repo_type}s/"
    root = f"hf://{kind}{where.repo_id}@{told.sha}"
    files = [
        RemoteFile(
            f"{root}/{each.rfilename}",
            each.size,
            f"etag {each.lfs.sha256 if each.lfs else each.blob_id}",
        )
        for each in told.siblings or []
    ]
    place = RemoteFile(f"{root}/{where.path_in_repo}".rstrip("/"))
    return Listing(place, {file.address: file for file in files})


def _ask(given: RemoteFile) -> tuple[Any, Any]:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    unspelled = CheckpointError(
        f"{given} names no repository on the hub; spell it hf://org/name, "
        "hf://org/name@revision or hf://org/name@revision/directory"
    )
    try:
        # A filesystem of its own: one that is shared remembers what branches pointed to.
        where: Any = HfFileSystem(skip_instance_cache=True).resolve_path(given.address)
        if not hasattr(where, "repo_id"):
            raise unspelled
        return where, HfApi().repo_info(
            where.repo_id,
            repo_type=where.repo_type,
            revision=where.revision,
            files_metadata=True,
        )
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{given} is read over the network, and HF_HUB_OFFLINE is set; unset it, or download "
            "the repository where there is a network and pass its id (org/name)"
        ) from None
    except (HFValidationError, NotImplementedError):
        raise unspelled from None
    except FileNotFoundError as error:
        if isinstance(error.__cause__, HFValidationError):
            raise unspelled from None
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise CheckpointError(
                f"{given} does not exist: the repository has no such revision; name a branch, a "
                "tag or a commit of it"
            ) from None
        raise _no_repository(given) from None
    except HfHubHTTPError as error:
        if error.response.status_code in BUSY:
            raise Interrupted(f"the hub answered {error.response.status_code}") from None
        raise _no_repository(given) from None
    except transport_errors() as error:
        refuse_untrusted(given, "the hub", error)
        raise Interrupted("the hub cannot be reached (HF_ENDPOINT says where it is)") from None
    except ValueError:
        raise unspelled from None


def _no_repository(given: RemoteFile) -> CheckpointError:
    return CheckpointError(
        f"{given} does not exist, or must not be read: the hub shows no such repository; check the "
        "spelling, and log in with `hf auth login` if it is private or gated"
    )
