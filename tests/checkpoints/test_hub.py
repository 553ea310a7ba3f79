"""Repositories on the hub, served on loopback by as much of its HTTP as a download needs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save

from pytest_subnet import open_checkpoint
from pytest_subnet.checkpoints.hub import parse_hub_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Files = dict[str, bytes]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((3, 2), value), "b.weight": torch.full((4,), value)}


def torch_file(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def sharded(tensors: dict[str, torch.Tensor]) -> Files:
    shards = {
        name: f"model-{number:05}-of-{len(tensors):05}.safetensors"
        for number, name in enumerate(tensors, 1)
    }
    index = json.dumps({"weight_map": shards}).encode()
    files = {shards[name]: save({name: tensor}) for name, tensor in tensors.items()}
    return {**files, "model.safetensors.index.json": index}


CONFIG = b'{"model_type": "llama"}'
SIDE_FILES = {"config.json": CONFIG, "README.md": b"# Model", "run.py": b"import os"}
UNWANTED = {
    "consolidated.safetensors": save(weights(9)),
    "pytorch_model.bin": torch_file(weights(9)),
    "onnx/model.safetensors": save(weights(9)),
    "onnx/settings.json": b"{}",
}
REPOSITORIES: dict[str, dict[str, Files]] = {
    "org/single": {
        "main": {"model.safetensors": save(weights(1)), **SIDE_FILES, **UNWANTED},
        "v2": {"model.safetensors": save(weights(2)), **SIDE_FILES},
    },
    "org/sharded": {"main": {**sharded(weights(1)), **SIDE_FILES}},
    "org/odd-name": {"main": {"weights.safetensors": save(weights(3)), **SIDE_FILES}},
    "org/old": {"main": {"pytorch_model.bin": torch_file(weights(4)), "config.json": CONFIG}},
    "org/empty": {"main": {"config.json": CONFIG}},
    "org/gated": {"main": {"model.safetensors": save(weights(1))}},
}


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The hub, and all that was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloaded(self) -> set[str]:
        return {line.rpartition("/")[2] for line in self.asked if line.startswith("GET /org/")}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        if is_api:
            parts = parts[2:]
        repo, what, revision, *path = "/".join(parts[:2]), *parts[2:]
        if repo == "org/private":
            return self.refuse(401, "RepoNotFound")
        if repo not in REPOSITORIES:
            return self.refuse(404, "RepoNotFound")
        revisions = {commit_of(repo, name): name for name in REPOSITORIES[repo]}
        name = revisions.get(revision, revision)
        if name not in REPOSITORIES[repo]:
            return self.refuse(404, "RevisionNotFound")
        files = REPOSITORIES[repo][name]
        if is_api and what == "revision":
            return self.send_json({"id": repo, "sha": commit_of(repo, name)})
        if is_api and what == "tree":
            return self.send_json([describe(each, data) for each, data in files.items()])
        if repo == "org/gated":
            return self.refuse(403, "GatedRepo")
        data = files.get("/".join(path))
        if data is None:
            return self.refuse(404, "EntryNotFound")
        self.send(data, {"X-Repo-Commit": commit_of(repo, name), "ETag": f'"{etag(data)}"'})

    do_HEAD = do_GET  # noqa: N815

    def send_json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send(b'{"error": "no"}', {"X-Error-Code": code}, status)

    def send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep the terminal clean."""


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def describe(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": etag(data)[:40]}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


class Client:
    """A process that opens checkpoints from a hub, with a cache of its own."""

    def __init__(self, cache: Path, address: str) -> None:
        self.environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("HF_") and not name.lower().endswith("_proxy")
        } | {
            "HF_HOME": str(cache),
            "HF_ENDPOINT": address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        self.directory = cache.parent
        self.shown = ""

    def open(self, *sources: str) -> list[str]:
        """For each source its fingerprint, or the message with which it was refused."""
        code = """if True:
            import sys
            from pytest_subnet import CheckpointError, open_checkpoint
            for source in sys.argv[1:]:
                try:
                    checkpoint = open_checkpoint(source)
                    print(checkpoint.label, checkpoint.config, checkpoint.fingerprint())
                except CheckpointError as error:
                    print(error)
        """
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *sources],
            env=self.environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=True,
        )
        self.shown = run.stderr
        return run.stdout.splitlines()


@pytest.fixture
def client(tmp_path: Path, hub: Hub) -> Client:
    return Client(tmp_path / "cache", hub.address)


def opened(source: str, value: float) -> str:
    return f"{source} {{'model_type': 'llama'}} {open_checkpoint(weights(value)).fingerprint()}"


@pytest.mark.slow
def test_repository_is_downloaded_with_a_progress_bar(client: Client, hub: Hub) -> None:
    assert client.open("org/single") == [opened("org/single", 1)]
    assert hub.downloaded() == {"model.safetensors", "config.json"}
    assert re.search(r"Fetching (2 files|.* 2it)", client.shown)
    assert "100%" in client.shown


@pytest.mark.slow
def test_revision_is_a_name_or_a_commit(client: Client, hub: Hub) -> None:
    commit = commit_of("org/single", "v2")
    sources = ["org/single@v2", f"org/single@{commit}", "org/single@main"]
    assert client.open(*sources) == [opened(s, v) for s, v in zip(sources, (2, 2, 1), strict=True)]
    downloads = [line for line in hub.asked if line.startswith("GET") and "model.safe" in line]
    assert len(downloads) == 2


@pytest.mark.slow
def test_shards_are_downloaded(client: Client) -> None:
    assert client.open("org/sharded") == [opened("org/sharded", 1)]
    assert re.search(r"Fetching (4 files|.* 4it)", client.shown)


@pytest.mark.slow
def test_weights_under_another_name_are_found(client: Client) -> None:
    assert client.open("org/odd-name") == [opened("org/odd-name", 3)]


@pytest.mark.slow
def test_torch_files_are_taken_where_there_are_no_safetensors(client: Client, hub: Hub) -> None:
    assert client.open("org/old") == [opened("org/old", 4)]
    assert hub.downloaded() == {"pytorch_model.bin", "config.json"}
    client.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody answers there
    assert client.open("org/old") == [opened("org/old", 4)]


@pytest.mark.slow
def test_second_time_nothing_is_downloaded(client: Client, hub: Hub) -> None:
    first = client.open("org/single", "org/sharded")
    hub.asked.clear()
    assert client.open("org/single", "org/sharded") == first
    assert hub.downloaded() == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "without", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_second_time_the_hub_is_not_needed(client: Client, without: dict[str, str]) -> None:
    sources = ["org/single@v2", "org/odd-name"]
    first = client.open(*sources)
    client.environ |= without
    assert client.open(*sources) == first == [opened(sources[0], 2), opened(sources[1], 3)]


@pytest.mark.slow
def test_what_the_hub_does_not_have(client: Client, tmp_path: Path) -> None:
    sources = ["org/none", "org/private", "org/gated", "org/single@v9", "org/empty"]
    advice = (
        "check the spelling, and log in with `hf auth login` if the repository is private or gated"
    )
    here = f"here (looked in {tmp_path})"
    assert client.open(*sources) == [
        f"org/none is no path {here}, and the hub answered 404 for it; {advice}",
        f"org/private is no path {here}, and the hub answered 401 for it; {advice}",
        f"org/gated is no path {here}, and the hub answered 403 for it; {advice}",
        "org/single on the hub has no revision v9; name a branch, a tag or a commit of it",
        "org/empty has no weights: it holds config.json; looked for *.safetensors, *.bin and *.pt "
        "with or without an index and for *.distcp with .metadata; did the trainer save the model "
        "into another directory?",
    ]


@pytest.mark.slow
def test_hub_that_cannot_be_reached(client: Client, tmp_path: Path) -> None:
    client.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    said = (
        f"org/name is neither a path here (looked in {tmp_path}) nor in the hub's cache, and the "
        "hub cannot be reached; check the path, or the network and HF_ENDPOINT"
    )
    assert client.open("org/name") == [said]
    client.environ["HF_HUB_OFFLINE"] = "1"
    assert client.open("org/name") == [said]


@pytest.mark.slow
def test_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    (line,) = client.open("org/single")
    assert line.startswith("org/single could not be downloaded from the hub (")
    assert line.endswith(
        "check the network and the space on disk, and run again: what is there is kept"
    )


@pytest.mark.slow
def test_name_that_the_hub_cannot_have(client: Client, hub: Hub, tmp_path: Path) -> None:
    assert client.open("runs/step--400") == [
        f"no checkpoint at runs/step--400: there is no such path (looked in {tmp_path}), "
        "and no repository on the hub can have this name"
    ]
    assert hub.asked == []


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("/org/name", None),
        ("org/name/more", None),
        ("org/name@", None),
        ("org/na me", None),
        ("org/name\n", None),
        ("", None),
    ],
)
def test_hub_ids_are_told_from_paths(source: str, parsed: tuple[str, str | None] | None) -> None:
    assert parse_hub_id(source) == parsed
