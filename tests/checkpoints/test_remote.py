"""Checkpoints on real servers: what is fetched, what is noticed, and how each failure reads."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections import deque
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from safetensors.torch import save

from pytest_subnet import CheckpointError, open_checkpoint, open_pair, update_sparsity
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.checkpoints.remote import http_ranges, ranges
from pytest_subnet.checkpoints.remote.urls import RemoteFile, masked, masked_text

from .servers import (
    FileServer,
    Hub,
    drop_after,
    ignore_range,
    redirect,
    refuse,
    running,
    send_range,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]

CONFIG = b'{"model_type": "llama", "tie_word_embeddings": false}'
MODEL = "/run/model.safetensors"
INDEX = "/run/model.safetensors.index.json"


@pytest.fixture(scope="module", autouse=True)
def _client() -> Iterator[None]:
    """Leave no connection open."""
    http_ranges.close()
    yield
    http_ranges.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries, no proxy, and no redirects known of a port used before."""
    http_ranges._moved.clear()
    monkeypatch.setattr(ranges, "PAUSE_SECONDS", 0.0)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with running(FileServer()) as started:
        yield started


def weights(value: float, rows: int = 64) -> Tensors:
    generator = torch.Generator().manual_seed(int(value))
    return {
        f"model.layers.{layer}.mlp.{kind}.weight": torch.randn(rows, 32, generator=generator)
        for layer in range(2)
        for kind in ("up_proj", "down_proj")
    }


def sharded(tensors: Tensors) -> dict[str, bytes]:
    shards = {
        name: f"model-{number:05}-of-{len(tensors):05}.safetensors"
        for number, name in enumerate(tensors, 1)
    }
    files = {f"/run/{shards[name]}": save({name: tensor}) for name, tensor in tensors.items()}
    return {**files, INDEX: json.dumps({"weight_map": shards}).encode()}


def message(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    text = str(caught.value)
    assert text.isprintable()
    assert caught.value.__cause__ is None  # a cause is printed too, and may hold the address
    return text


def refusal_of(source: str) -> str:
    return message(lambda: open_checkpoint(source))


@pytest.mark.parametrize("tells", ["etag", "weak", "date", "nothing"])
def test_reads_what_the_library_wrote(
    server: FileServer, storable: Tensors, same_bits: Same, tells: str
) -> None:
    server.tells = tells
    server.files = {MODEL: save(storable), "/run/config.json": CONFIG}
    for source in (f"{server.address}/run", f"{server.address}/run/", server.address + MODEL):
        checkpoint = open_checkpoint(source)
        assert set(checkpoint.names()) == set(storable)
        assert all(same_bits(checkpoint.read(name), storable[name]) for name in storable)
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.fingerprint() == open_checkpoint(storable).fingerprint()
        checkpoint.check_unchanged()
        assert checkpoint.label == source
        assert checkpoint.directory is None
    assert same_bits(checkpoint.read("deep", slice(1, 2)), storable["deep"][1:2])


def test_shards_give_the_same(server: FileServer, tmp_path: Path) -> None:
    tensors = weights(1)
    server.files = sharded(tensors)
    checkpoint = open_checkpoint(f"{server.address}/run")
    assert checkpoint.fingerprint() == open_checkpoint(tensors).fingerprint()
    assert open_checkpoint(server.address + INDEX).identity() == checkpoint.identity()
    assert checkpoint.identity() == checkpoint.identity_when_opened()
    assert checkpoint.config == {}


def test_pair_of_remote_and_local_counts_as_local(server: FileServer, tmp_path: Path) -> None:
    base, tuned = weights(1), weights(1)
    tuned["model.layers.1.mlp.up_proj.weight"][:3] += 1
    (tmp_path / "base.safetensors").write_bytes(save(base))
    server.files = {**sharded(base), "/tuned.safetensors": save(tuned)}
    local = update_sparsity(open_pair(tmp_path / "base.safetensors", tuned))
    run, there = f"{server.address}/run", f"{server.address}/tuned.safetensors"
    for left, right in ((run, there), (tmp_path / "base.safetensors", there), (run, tuned)):
        found = update_sparsity(open_pair(left, right))
        assert (found.updated, found.numel) == (local.updated, local.numel) == (96, 4 * 64 * 32)


def test_only_what_is_selected_is_fetched(server: FileServer) -> None:
    tensors = weights(1, rows=4096)
    tuned = {name: tensor + 1 for name, tensor in tensors.items()}
    server.files = {**sharded(tensors), "/tuned.safetensors": save(tuned)}
    pair = open_pair(f"{server.address}/run", f"{server.address}/tuned.safetensors")
    opening = sum(server.sent.values())
    assert opening < 10_000
    server.sent.clear()
    name = "model.layers.1.mlp.up_proj.weight"
    assert update_sparsity(pair, include=name).updated == tensors[name].numel()
    size = tensors[name].nbytes
    looks = 16 * 8  # whether the files are what they were: 8 bytes each time
    assert 2 * size <= sum(server.sent.values()) <= 2 * size + 2 * looks
    shard = next(path for path, data in server.files.items() if name.encode() in data[:300])
    assert server.sent["/tuned.safetensors"] - size < looks
    assert server.sent[shard] - size < looks


def test_neighbours_share_a_request_and_connections_are_used_again(server: FileServer) -> None:
    tensors = {f"layers.{number}.weight": torch.full((8,), 1.0) for number in range(200)}
    tuned = {name: tensor + 1 for name, tensor in tensors.items()}
    server.files = {"/base.safetensors": save(tensors), "/tuned.safetensors": save(tuned)}
    pair = open_pair(f"{server.address}/base.safetensors", f"{server.address}/tuned.safetensors")
    before, connections = len(server.asked), server.connections
    assert update_sparsity(pair).updated == 1600
    data = [each for each in server.asked[before:] if each.headers["Range"] != "bytes=0-7"]
    assert len(data) == 2
    assert server.connections - connections <= 2


def test_large_reads_are_cut_into_pieces(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, same_bits: Same
) -> None:
    monkeypatch.setattr(ranges, "PIECE_BYTES", 1000)
    tensors = weights(1)
    server.files = {MODEL: save(tensors)}
    checkpoint = open_checkpoint(server.address + MODEL)
    before = len(server.asked)
    name = checkpoint.names()[1]
    assert same_bits(checkpoint.read(name), tensors[name])
    assert len(server.asked) - before == 9  # 8192 bytes


def test_a_unit_travels_without_telling_its_secret(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    address = server.address.replace("//", "//me:pass@") + MODEL + "?sig=f00"
    checkpoint = open_checkpoint(address)
    (extent,) = checkpoint.extents(checkpoint.names()[0], 0, 16)
    again = pickle.loads(pickle.dumps(extent))
    assert again == extent == copy.deepcopy(extent)
    assert again.path == address
    assert (
        repr(again) == f"Extent(path='{server.address}{MODEL}', offset={extent.offset}, nbytes=16)"
    )
    buffer = bytearray(16)
    with FileReader() as reader:
        reader.read_into(again.path, again.offset, memoryview(buffer))
    assert buffer == checkpoint.read(checkpoint.names()[0]).numpy().tobytes()[:16]
    moved = pickle.loads(pickle.dumps(checkpoint))
    assert moved.fingerprint() == checkpoint.fingerprint()
    assert moved.identity() == checkpoint.identity()


def test_secrets_are_shown_nowhere(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    server.tells = "nothing"
    host = server.address.removeprefix("http://")
    checkpoint = open_checkpoint(f"http://me:pa%40ss@{host}{MODEL}?X-Amz-Signature=f00d")
    sent = {each.headers.get("Authorization") for each in server.asked}
    assert sent == {"Basic bWU6cGFAc3M="}
    assert all("X-Amz-Signature=f00d" in each.path for each in server.asked)
    shown = [
        checkpoint.label,
        repr(checkpoint),
        repr(checkpoint.identity()),
        repr(checkpoint.notes),
        checkpoint.fingerprint(),
        repr(checkpoint.extents(checkpoint.names()[0], 0, 4)),
        message(lambda: checkpoint.info("nothing")),
        message(lambda: checkpoint.check_range(checkpoint.names()[0], 0, 10**6)),
    ]
    for behave in (refuse(403), refuse(404), refuse(500), ignore_range, send_range(0, 9)):
        server.always[MODEL] = behave
        shown.append(message(lambda: checkpoint.read(checkpoint.names()[0])))
    for text in shown:
        assert not any(secret in text for secret in ("pa%40ss", "pa@ss", "f00d", "me:"))
    assert checkpoint.label == f"http://{host}{MODEL}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a/b", "https://host/a/b"),
        ("https://user:pass@host:1/a?b=c#d", "https://host:1/a"),
        ("https://user@host/a@b", "https://host/a@b"),
        ("https://user:p@ss@host/a", "https://host/a"),
        ("https://user:p/w@host/a", "https://…"),
        ("https://user:p?w@host/a", "https://…"),
        ("https://[::1]:80/a", "https://[::1]:80/a"),
        ("ftp://user:pass@host/a", "ftp://host/a"),
        ("s3://bucket/key?versionId=1", "s3://bucket/key"),
        ("hf://org/name@refs/pr/1/sub", "hf://org/name@refs/pr/1/sub"),
    ],
)
def test_addresses_are_masked(url: str, shown: str) -> None:
    assert masked(url) == shown == str(RemoteFile(url)) == f"{RemoteFile(url)}"
    assert masked_text(f"no {url}") == f"no {shown}"


def test_entries_of_a_directory_keep_its_token() -> None:
    directory = RemoteFile("https://host/run?sv=1&sig=f00")
    assert (directory / "a b#.json").address == "https://host/run/a%20b%23.json?sv=1&sig=f00"
    assert (directory / "a").parent.address == directory.address
    assert (RemoteFile("s3://bucket/r?n") / "a#?").address == "s3://bucket/r?n/a#?"


def test_identity_is_what_the_server_says_of_each_file(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1)), "/copy.safetensors": save(weights(2))}
    one, again = (open_checkpoint(server.address + MODEL) for _ in range(2))
    assert one.identity() == again.identity() == one.identity_when_opened()
    assert one.notes == ()
    other = open_checkpoint(f"{server.address}/copy.safetensors")
    assert other.identity() != one.identity()
    server.files[MODEL] = save(weights(3))
    assert one.identity() != one.identity_when_opened()
    said = message(one.check_unchanged)
    assert said == (
        f"{server.address}{MODEL} changed after it was opened; wait until it is written, then open "
        "it again"
    )


def test_signed_again_it_is_the_same_file(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    one, other = (open_checkpoint(f"{server.address}{MODEL}?sig={sig}") for sig in "ab")
    assert one.identity() == other.identity()
    server.tells = "date"  # which says less: the query may choose the file
    one, other = (open_checkpoint(f"{server.address}{MODEL}?sig={sig}") for sig in "ab")
    assert one.identity() != other.identity()


def test_without_etag_and_date_no_cache_is_believed(server: FileServer) -> None:
    server.tells = "nothing"
    server.files = {MODEL: save(weights(1))}
    one, other = (open_checkpoint(server.address + MODEL) for _ in range(2))
    assert one.identity() == one.identity_when_opened()
    assert one.identity() != other.identity()
    assert one.notes == (
        f"{server.address}{MODEL}: the server tells neither etag nor date of model.safetensors, "
        "so that a change while it was read would not have been noticed",
    )
    pair = open_pair(one, weights(2))
    assert one.notes[0] in pair.notes


@pytest.mark.parametrize("tells", ["etag", "weak", "date"])
def test_file_replaced_in_mid_scan_is_found(server: FileServer, tells: str) -> None:
    server.tells = tells
    server.files = {MODEL: save(weights(1))}
    checkpoint = open_checkpoint(server.address + MODEL)
    (extent,) = checkpoint.extents(checkpoint.names()[0], 0, 16)
    server.files[MODEL] = save(weights(2))
    before = server.sent[MODEL]
    said = message(
        lambda: FileReader().read_into(extent.path, extent.offset, memoryview(bytearray(16)))
    )
    assert said == (
        f"{server.address}{MODEL} changed after it was opened; wait until it is written, then open "
        "it again"
    )
    header = server.asked[-1].headers
    assert ("If-Match" in header, "If-Unmodified-Since" in header) == (
        tells == "etag",
        tells == "date",
    )
    assert server.sent[MODEL] - before == (16 if tells == "weak" else 0)


def test_file_that_another_size_gives_away(server: FileServer) -> None:
    server.tells = "nothing"
    server.files = {MODEL: save(weights(1))}
    checkpoint = open_checkpoint(server.address + MODEL)
    server.files[MODEL] = save(weights(1, rows=128))
    assert message(lambda: checkpoint.read(checkpoint.names()[0])) == (
        f"{server.address}{MODEL} changed after it was opened; wait until it is written, then open "
        "it again"
    )


def test_connection_that_drops_costs_the_rest_of_a_piece(
    server: FileServer, same_bits: Same
) -> None:
    tensors = weights(1)
    server.files = {MODEL: save(tensors)}
    checkpoint = open_checkpoint(server.address + MODEL)
    server.next[MODEL].extend([drop_after(100), refuse(503), drop_after(0), drop_after(1)])
    before = len(server.asked)
    name = checkpoint.names()[0]
    assert same_bits(checkpoint.read(name), tensors[name])
    starts = [
        int(each.headers["Range"].removeprefix("bytes=").split("-")[0])
        for each in server.asked[before:]
    ]
    first = starts[0]
    assert starts == [first, first + 100, first + 100, first + 100, first + 101]


def test_connection_that_drops_again_and_again(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    checkpoint = open_checkpoint(server.address + MODEL)
    (extent,) = checkpoint.extents(checkpoint.names()[0], 0, 8192)
    server.always[MODEL] = drop_after(100)
    before = len(server.asked)
    assert message(lambda: checkpoint.read(checkpoint.names()[0])) == (
        f"{server.address}{MODEL} could not be read in 5 tries: the connection was dropped after "
        f"500 of 8,192 bytes from byte {extent.offset:,} on; check the network and the server, and "
        "run again"
    )
    assert len(server.asked) - before == 5


def test_fewer_bytes_than_asked(server: FileServer, same_bits: Same) -> None:
    tensors = weights(1)
    server.files = {MODEL: save(tensors)}
    checkpoint = open_checkpoint(server.address + MODEL)
    name = checkpoint.names()[0]
    (extent,) = checkpoint.extents(name, 0, 8192)
    server.next[MODEL].append(send_range(extent.offset, extent.offset + 9))
    assert same_bits(checkpoint.read(name), tensors[name])
    for number in range(5):
        at = extent.offset + 10 * number
        server.next[MODEL].append(send_range(at, at + 9))
    assert message(lambda: checkpoint.read(name)) == (
        f"{server.address}{MODEL} could not be read in 5 tries: the server sent fewer bytes than "
        f"it was asked for after 50 of 8,192 bytes from byte {extent.offset:,} on; check the "
        "network and the server, and run again"
    )


def test_more_bytes_than_announced(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    checkpoint = open_checkpoint(server.address + MODEL)
    name = checkpoint.names()[0]
    (extent,) = checkpoint.extents(name, 0, 8192)
    size = len(server.files[MODEL])
    lie = f"bytes {extent.offset}-{extent.offset + 9}/{size}"
    server.next[MODEL].append(send_range(extent.offset, extent.offset + 5000, lie=lie))
    assert message(lambda: checkpoint.read(name)) == (
        f"the server of {server.address}{MODEL} sends more bytes than it announces; download it "
        "first and pass the path"
    )


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        (
            refuse(403),
            "{} must not be read: the server answered 403 (Forbidden); has the link expired, or "
            "does it need a user and a password?",
        ),
        (
            refuse(401),
            "{} must not be read: the server answered 401 (Unauthorized); has the link expired, or "
            "does it need a user and a password?",
        ),
        (refuse(404), "{} does not exist: the server answered 404 (Not Found); check the address"),
        (refuse(410), "{} does not exist: the server answered 410 (Gone); check the address"),
        (
            refuse(500),
            "{} could not be read in 5 tries: the server answered 500 (Internal Server Error); "
            "check the network and the server, and run again",
        ),
        (
            refuse(429),
            "{} could not be read in 5 tries: the server answered 429 (Too Many Requests); check "
            "the network and the server, and run again",
        ),
        (
            refuse(418),
            "{} cannot be read: the server answered 418 (I'm a Teapot); check the address, or "
            "download it first and pass the path",
        ),
        (
            refuse(299),
            "{} cannot be read: the server answered 299; check the address, or download it first "
            "and pass the path",
        ),
        (
            refuse(200, b"<html>log in</html>", Content_Type="text/html; charset=utf-8"),
            "{} is a web page, not a file of weights; does it need a login, or is it a page about "
            "the file (on the hub: /blob/ where the file is at /resolve/)?",
        ),
        (
            redirect("/run/model.safetensors"),
            "{} is redirected more than 5 times; is this its address?",
        ),
        (
            redirect("ftp://host/file?token=f00"),
            "{} is redirected to ftp://host/file, which is not encrypted; download it first and "
            "pass the path",
        ),
        (
            redirect("http://192.0.2.1/file"),
            "{} is redirected to http://192.0.2.1/file, which is not encrypted; download it first "
            "and pass the path",
        ),
        pytest.param(
            redirect("http://[::/"),
            "{} is redirected to no valid address",
            marks=pytest.mark.skipif(
                find_spec("httpx2") is None, reason="a broken connection to httpx 0.28"
            ),
        ),
        (
            refuse(206, b"12345678", Content_Range="bytes 0-7/*"),
            "the server of {} answers with another range than it was asked for: bytes 0 to 7, and "
            "it says 'bytes 0-7/*'; download it first and pass the path",
        ),
        (
            refuse(206, b"1234567", Content_Range="bytes 1-7/100"),
            "the server of {} answers with another range than it was asked for: bytes 0 to 7, and "
            "it says 'bytes 1-7/100'; download it first and pass the path",
        ),
        (
            refuse(206, b"12345678", Content_Range="bytes 0-7/100", Content_Encoding="gzip"),
            "the server of {} sends it encoded (gzip), so that ranges of it are no ranges of the "
            "file; download it first and pass the path",
        ),
    ],
)
def test_answers_that_are_no_weights(
    server: FileServer, behave: Callable[[Any], None], said: str
) -> None:
    server.always[MODEL] = behave
    assert refusal_of(server.address + MODEL) == said.format(server.address + MODEL)


def test_server_that_is_busy_is_asked_again(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    server.next[MODEL].extend([refuse(503), refuse(429), refuse(500), drop_after(3)])
    checkpoint = open_checkpoint(server.address + MODEL)
    assert checkpoint.fingerprint() == open_checkpoint(weights(1)).fingerprint()


def test_range_that_is_no_longer_there(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1))}
    checkpoint = open_checkpoint(server.address + MODEL)
    name = checkpoint.names()[1]
    (extent,) = checkpoint.extents(name, 0, 8192)
    server.always[MODEL] = refuse(416)
    assert message(lambda: checkpoint.read(name)) == (
        f"{server.address}{MODEL} has no bytes {extent.offset:,} to {extent.offset + 8191:,}: the "
        "server answered 416 (Requested Range Not Satisfiable); was it replaced by a shorter file? "
        "Open it again"
    )


def test_server_that_ignores_ranges_is_refused_unread(server: FileServer) -> None:
    server.files = {MODEL: save(weights(1, rows=40_000))}
    server.always[MODEL] = ignore_range
    assert refusal_of(server.address + MODEL) == (
        f"the server of {server.address}{MODEL} ignores ranges: asked for bytes 0 to 7 it sends "
        "the whole file; download it first and pass the path"
    )
    server.shutdown()  # waits for nothing: the answer was hung up on


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "{} is truncated or corrupt: it has only 0 bytes; save or download it again"),
        (b"12345", "{} is truncated or corrupt: it has only 5 bytes; save or download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "{} is a Git LFS pointer, not weights; pass the address of the file itself (on the hub "
            "/resolve/ instead of /raw/)",
        ),
        (
            b"<!DOCTYPE html><html></html>",
            "{} is not a safetensors file (its first bytes are b'<!DOCTYP'); was an error page or "
            "another format saved under this name?",
        ),
        (
            save(weights(1))[:-1],
            "{} is truncated or corrupt: model.layers.1.mlp.up_proj.weight ends at byte 32,768 of "
            "its data, which has 32,767; save or download it again",
        ),
        (
            (1000).to_bytes(8, "little") + b"{}",
            "{} is truncated or corrupt: its header needs 1,000 bytes, the file has 2; save or "
            "download it again",
        ),
        (save({}), "{} holds no tensors; was the model saved empty?"),
    ],
)
def test_files_that_are_no_weights(server: FileServer, data: bytes, said: str) -> None:
    server.files = {MODEL: data}
    assert refusal_of(server.address + MODEL) == said.format(server.address + MODEL)


def test_shards_and_index_that_disagree(server: FileServer) -> None:
    files = sharded(weights(1))
    run = f"{server.address}/run"
    shards = sorted(path for path in files if path.endswith(".safetensors"))
    server.files = {**files}
    del server.files[shards[2]]
    assert refusal_of(run) == (
        f"{server.address}{INDEX} lists 4 shards, 1 missing: {shards[2].removeprefix('/run/')}; "
        "upload them beside it"
    )
    server.files = {**files, shards[2]: files[shards[1]]}
    assert "but it does not; save the checkpoint again" in refusal_of(run)
    server.files = {**files, MODEL: save(weights(1))}
    assert refusal_of(run) == (
        f"{run} holds two checkpoints: model.safetensors.index.json, model.safetensors; remove the "
        "stale one, or pass the file that counts"
    )
    outside = json.dumps({"weight_map": {"a": "../b.safetensors"}}).encode()
    server.files = {INDEX: outside}
    assert refusal_of(run) == (
        f"{server.address}{INDEX} points outside its directory: a in ../b.safetensors; a shard is "
        "a file beside its index, this checkpoint was not written by a trainer"
    )
    for raw, what in (
        (b"[]", "holds no JSON object; save it again"),
        (
            b"{",
            "is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)); save it again",
        ),
        (b'{"a": 1, "a": 2}', "lists a twice; which one counts cannot be known, save it again"),
    ):
        server.files = {INDEX: raw}
        assert refusal_of(run) == f"{server.address}{INDEX} {what}"


def test_directories_without_remote_weights(server: FileServer) -> None:
    run = f"{server.address}/run"
    assert refusal_of(run) == (
        f"{run} has no weights that can be read from afar: it has neither "
        "model.safetensors.index.json nor model.safetensors, nothing else was found there either; "
        "other formats are only read from disk, download it first and pass the directory"
    )
    server.files = {"/run/pytorch_model.bin": b"x"}
    assert refusal_of(run) == (
        f"{run} has no weights that can be read from afar: it has neither "
        "model.safetensors.index.json nor model.safetensors, it holds pytorch_model.bin; "
        "other formats are only read from disk, download it first and pass the directory"
    )
    server.files = {"/run/adapter_model.safetensors": save(weights(1))}
    assert refusal_of(run) == (
        f"{run} holds a PEFT adapter (adapter_model.safetensors), which is only read from disk; "
        "download it first and pass the directory"
    )
    server.always[INDEX] = refuse(403)
    assert "holds a PEFT adapter" in refusal_of(run)
    server.files = {}
    assert refusal_of(run).startswith(f"{server.address}{INDEX} must not be read: the server answ")


def test_other_formats_are_refused_by_name(server: FileServer) -> None:
    for name in ("pytorch_model.bin", "weights.pt", "model.gguf", "pytorch_model.bin.index.json"):
        assert refusal_of(f"{server.address}/run/{name}") == (
            f"{server.address}/run/{name} is no safetensors file, and other formats are only read "
            "from disk; download it first and pass the path"
        )
    assert server.asked == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "http://192.0.2.1/run",
            "would be read unencrypted, and whoever is on the way could change the weights; use "
            "https://, or download it first and pass the path",
        ),
        ("https://host:port/run", "is no valid address; check its spelling"),
        (
            "nope://host/run",
            "is no address that can be read; hf://, https://, s3:// and gs:// can, and what else "
            "fsspec has a filesystem for",
        ),
        (
            "s3://bucket/run::zip://inside",
            "chains filesystems, which would keep copies; pass the address of the files themselves",
        ),
        (
            "s3://bucket/model.safetensors",
            "needs a package that is not installed: pip install s3fs; or download it first and "
            "pass the path",
        ),
        (
            "gs://bucket/model.safetensors",
            "needs a package that is not installed: pip install gcsfs; or download it first and "
            "pass the path",
        ),
    ],
)
def test_addresses_that_are_refused(source: str, said: str) -> None:
    assert refusal_of(source).endswith(said)


def test_nobody_there(server: FileServer) -> None:
    address = server.address + MODEL
    server.shutdown()
    server.server_close()
    assert refusal_of(address) == (
        f"{address} could not be read in 5 tries: no connection to the server; "
        "check the network and the server, and run again"
    )


def test_encrypted_and_redirected_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    tensors = weights(1)
    with (
        running(FileServer(), certificate) as front,
        running(FileServer({"/there": save(tensors)}), certificate) as back,
        running(FileServer({"/there": save(tensors)})) as plain,
    ):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.delenv("SSL_CERT_DIR", raising=False)
        http_ranges.close()  # the next client trusts the certificate
        source = front.address.replace("//", "//me:pass@") + MODEL
        front.always[MODEL] = redirect("/moved")
        front.always["/moved"] = redirect(f"{back.address}/there?X-Amz-Signature=f00")
        checkpoint = open_checkpoint(source)
        assert checkpoint.fingerprint() == open_checkpoint(tensors).fingerprint()
        assert {each.headers.get("Authorization") for each in front.asked} == {"Basic bWU6cGFzcw=="}
        assert {each.headers.get("Authorization") for each in back.asked} == {None}
        front.always["/moved"] = redirect(f"{plain.address}/there")
        assert message(checkpoint.check_unchanged) == (
            f"{front.address}{MODEL} is redirected to {plain.address}/there, which is not "
            "encrypted; download it first and pass the path"
        )
        assert plain.asked == []
        monkeypatch.delenv("SSL_CERT_FILE")
        http_ranges.close()
        assert refusal_of(source) == (
            f"{front.address}{MODEL} cannot be read: the certificate of 127.0.0.1 is not trusted "
            "(self-signed certificate); if the server is your own, put the path of its authority's "
            "certificate into SSL_CERT_FILE; if not, somebody may be in between"
        )


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """A filesystem of fsspec under the name of an object store, which fails where it is told to.

    Attributes:
        store: what it holds, by path.
        faults: what to do instead of the next reads.
        listed: what it told of files before.
        fetched: how many bytes were given.
    """

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012 - one for all instances, as in its parent
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    faults: deque[Exception | int] = deque()  # noqa: RUF012
    listed: dict[str | None, dict[str, Any]] = {}  # noqa: RUF012
    fetched = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        fault = Bucket.faults.popleft() if Bucket.faults else None
        if isinstance(fault, Exception):
            raise fault
        raw: bytes = super().cat_file(path, start, end)
        raw = raw if fault is None else raw[:fault] if fault >= 0 else raw + b"x"
        Bucket.fetched += len(raw)
        return raw

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Remembered, as the listings of object stores are."""
        if path not in Bucket.listed:
            told: dict[str, Any] = super().info(path)
            if told["type"] == "file":
                told["ETag"] = f'"{hash(self.store[self._strip_protocol(path)].getvalue())}"'
            Bucket.listed[path] = told
        return Bucket.listed[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        Bucket.listed.pop(path, None)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.faults.clear()
    Bucket.store.clear()
    Bucket.listed.clear()
    yield Bucket()
    Bucket.clear_instance_cache()
    _registry.pop("s3")


def test_object_store_is_read_through_fsspec(
    bucket: Bucket, storable: Tensors, same_bits: Same
) -> None:
    bucket.pipe_file("/bucket/run/model.safetensors", save(storable))
    bucket.pipe_file("/bucket/run/config.json", CONFIG)
    for source in ("s3://bucket/run", "s3://bucket/run/model.safetensors"):
        checkpoint = open_checkpoint(source)
        assert all(same_bits(checkpoint.read(name), storable[name]) for name in storable)
        assert checkpoint.fingerprint() == open_checkpoint(storable).fingerprint()
        assert checkpoint.config["model_type"] == "llama"
        assert (checkpoint.label, checkpoint.notes) == (source, ())
    assert checkpoint.identity() == checkpoint.identity_when_opened()
    assert pickle.loads(pickle.dumps(checkpoint)).identity() == checkpoint.identity()
    replaced = save(storable | {"deep": storable["deep"] + 1})
    bucket.pipe_file("/bucket/run/model.safetensors", replaced)
    assert checkpoint.identity() != checkpoint.identity_when_opened()
    for attempt in (checkpoint.check_unchanged, lambda: checkpoint.read("deep")):
        assert message(attempt) == (
            "s3://bucket/run/model.safetensors changed after it was opened; wait until it is "
            "written, then open it again"
        )


def test_pair_in_an_object_store(bucket: Bucket) -> None:
    base, tuned = weights(1, rows=512), weights(1, rows=512)
    tuned["model.layers.1.mlp.up_proj.weight"][:3] += 1
    for path, data in sharded(base).items():
        bucket.pipe_file(f"/bucket{path}", data)
    bucket.pipe_file("/bucket/tuned.safetensors", save(tuned))
    pair = open_pair("s3://bucket/run", "s3://bucket/tuned.safetensors")
    Bucket.fetched = 0
    name = "model.layers.1.mlp.up_proj.weight"
    assert update_sparsity(pair, include=name).updated == 96
    assert 0 <= Bucket.fetched - 2 * base[name].nbytes < 1000
    assert update_sparsity(pair).updated == 96


def test_object_store_that_fails(bucket: Bucket, same_bits: Same) -> None:
    tensors = weights(1)
    address = "s3://bucket/model.safetensors"
    bucket.pipe_file("/bucket/model.safetensors", save(tensors))
    checkpoint = open_checkpoint(address)
    name = checkpoint.names()[0]
    (extent,) = checkpoint.extents(name, 0, 8192)
    bucket.faults.extend([TimeoutError("slow"), 100, OSError("reset"), 50])
    assert same_bits(checkpoint.read(name), tensors[name])

    def said_after(*faults: Exception | int) -> str:
        bucket.faults.clear()
        bucket.faults.extend(faults)
        return message(lambda: checkpoint.read(name))

    assert said_after(*[OSError("GET https://store/key?X-Amz-Signature=f00 failed")] * 5) == (
        f"{address} could not be read in 5 tries: OSError: GET https://store/key failed after 0 of "
        f"8,192 bytes from byte {extent.offset:,} on; check the network and the server, and run "
        "again"
    )
    assert said_after(*[100] * 5) == (
        f"{address} could not be read in 5 tries: fewer bytes came than were asked for after 500 "
        f"of 8,192 bytes from byte {extent.offset:,} on; check the network and the server, and run "
        "again"
    )
    assert said_after(-1) == (
        f"{address}: fsspec's Bucket gave 8,193 bytes where 8,192 were asked for; download it "
        "first and pass the path"
    )
    assert said_after(PermissionError("key f00")) == (
        f"{address} must not be read; check the credentials that its filesystem looks for"
    )
    assert said_after(FileNotFoundError("gone")) == f"{address} does not exist; check the address"
    assert said_after(RuntimeError("no region")) == (
        f"{address} could not be read (RuntimeError: no region); check the address and the "
        "credentials"
    )
    assert refusal_of("s3://bucket/none.safetensors") == (
        "s3://bucket/none.safetensors does not exist; check the address"
    )
    assert refusal_of("s3://bucket/none").startswith(
        "s3://bucket/none has no weights that can be read from afar: it has neither "
    )


HUB = {
    "org/model": {
        "main": {
            "model.safetensors": save(weights(1)),
            "config.json": CONFIG,
            "sub/model.safetensors": save(weights(2)),
        },
        "v2": {"model.safetensors": save(weights(3)), "config.json": CONFIG},
        "refs/pr/1": {"model.safetensors": save(weights(4))},
    },
    "org/sharded": {
        "main": {path.removeprefix("/run/"): data for path, data in sharded(weights(1)).items()}
    },
    "org/old": {"main": {"pytorch_model.bin": b"x", "config.json": CONFIG}},
    "org/gated": {"main": {"model.safetensors": save(weights(1))}},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    started = Hub(copy.deepcopy(HUB))
    started.gated = {"org/gated"}
    with running(started), running(started.store):
        constants = "huggingface_hub.constants"
        template = f"{started.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.ENDPOINT", started.address)
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield started
    from huggingface_hub.utils import close_session

    close_session()


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("hf://org/model", 1),
        ("hf://org/model@v2", 3),
        ("hf://org/model/sub", 2),
        ("hf://org/model@main/sub/model.safetensors", 2),
        ("hf://org/model@refs/pr/1", 4),
        ("hf://org/sharded", 1),
    ],
)
def test_hub_is_read_by_ranges(hub: Hub, source: str, value: int) -> None:
    checkpoint = open_checkpoint(source)
    opening = sum(hub.store.sent.values())
    assert opening < 5_000
    assert checkpoint.label == source
    name = checkpoint.names()[0]
    checkpoint.read(name)
    assert sum(hub.store.sent.values()) - opening == checkpoint.info(name).nbytes
    assert checkpoint.fingerprint() == open_checkpoint(weights(value)).fingerprint()
    asked = len(hub.asked)
    assert checkpoint.identity() == checkpoint.identity_when_opened()
    checkpoint.check_unchanged()
    assert len(hub.asked) == asked  # a commit stays what it is


def test_hub_token_goes_to_the_hub_alone(hub: Hub) -> None:
    checkpoint = open_checkpoint("hf://org/model")
    assert checkpoint.config["model_type"] == "llama"
    resolved = [each for each in hub.asked if "/resolve/" in each.path]
    sent = {each.headers.get("authorization") for each in resolved}
    assert sent == {"Bearer hf_secret"}
    assert hub.store.asked
    assert not any("authorization" in map(str.lower, each.headers) for each in hub.store.asked)
    extents = checkpoint.extents(checkpoint.names()[0], 0, 4)
    assert "hf_secret" not in repr((checkpoint.identity(), extents, checkpoint.label))


def test_what_is_pushed_meanwhile_is_another_checkpoint(hub: Hub) -> None:
    checkpoint = open_checkpoint("hf://org/model")
    before = checkpoint.fingerprint()
    pushed = {"model.safetensors": save(weights(9))}
    hub.repositories["org/model"] |= {"main": pushed, "old": hub.repositories["org/model"]["main"]}
    assert checkpoint.fingerprint() == before
    again = open_checkpoint("hf://org/model")
    assert again.fingerprint() == open_checkpoint(weights(9)).fingerprint()
    assert again.identity() != checkpoint.identity()
    assert update_sparsity(open_pair(checkpoint, again)).numel == 4 * 64 * 32


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    unspelled = (
        "names no repository on the hub; spell it hf://org/name, hf://org/name@revision or "
        "hf://org/name@revision/directory"
    )
    nowhere = (
        "does not exist, or must not be read: the hub shows no such repository; check the "
        "spelling, and log in with `hf auth login` if it is private or gated"
    )
    assert refusal_of("hf://org/none") == f"hf://org/none {nowhere}"
    assert refusal_of("hf://org/model@v9") == (
        "hf://org/model@v9 does not exist: the repository has no such revision; name a branch, a "
        "tag or a commit of it"
    )
    for source in ("hf://org", "hf://", "hf://org/na--me"):
        assert refusal_of(source) == f"{source} {unspelled}"
    commit = hub.commit("org/gated", "main")
    assert refusal_of("hf://org/gated") == (
        f"hf://org/gated@{commit}/model.safetensors must not be read: the server answered 403 "
        "(Forbidden); log in with `hf auth login` if the repository is private or gated"
    )
    assert refusal_of("hf://org/old") == (
        "hf://org/old has no weights that can be read from afar: it has neither "
        "model.safetensors.index.json nor model.safetensors, it holds config.json, "
        "pytorch_model.bin; other formats are only read from disk, download it first and pass the "
        "directory"
    )
    commit = hub.commit("org/model", "main")
    assert refusal_of("hf://org/model/none.safetensors") == (
        f"hf://org/model@{commit}/none.safetensors does not exist: the repository has no such "
        "file; check its name"
    )


def test_hub_that_is_busy_is_asked_again(hub: Hub) -> None:
    path = "/api/models/org/model/revision/main"
    hub.next[path].extend([refuse(503)])
    assert open_checkpoint("hf://org/model").fingerprint()
    hub.always[path] = refuse(503)
    assert refusal_of("hf://org/model") == (
        "hf://org/model could not be read in 5 tries: the hub answered 503; check the network and "
        "the server, and run again"
    )


def test_environment_of_the_hub_is_heeded(hub: Hub, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pytest_subnet import CheckpointError, open_checkpoint
        from pytest_subnet.checkpoints.remote import ranges
        ranges.PAUSE_SECONDS = 0
        try:
            print(open_checkpoint("hf://org/model@v2").fingerprint())
        except CheckpointError as error:
            print(error)
        print("torch" in sys.modules)
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environ |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def said(**more: str) -> list[str]:
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=environ | more,
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.splitlines()

    fingerprint = open_checkpoint(weights(3)).fingerprint()
    assert said(HF_ENDPOINT=hub.address) == [fingerprint, "False"]
    assert said(HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1") == [
        "hf://org/model@v2 is read over the network, and HF_HUB_OFFLINE is set; unset it, or "
        "download the repository where there is a network and pass its id (org/name)",
        "False",
    ]


def test_hub_whose_certificate_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(FileServer(), tmp_path / "certificate.pem") as there:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", there.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert refusal_of("hf://org/model@v2") == (
            "hf://org/model@v2 cannot be read: the certificate of the hub is not trusted "
            "(self-signed certificate); if the server is your own, put the path of its authority's "
            "certificate into SSL_CERT_FILE; if not, somebody may be in between"
        )


def test_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert refusal_of("hf://org/model@v2") == (
        "hf://org/model@v2 could not be read in 5 tries: the hub cannot be reached (HF_ENDPOINT "
        "says where it is); check the network and the server, and run again"
    )


def test_signed_address_is_used_until_it_expires(hub: Hub) -> None:
    checkpoint = open_checkpoint("hf://org/model")
    first, second = checkpoint.names()[:2]
    checkpoint.read(first)
    asked = len(hub.asked)
    checkpoint.read(second)
    assert len(hub.asked) == asked
    (blob,) = hub.store.files
    hub.store.next[blob].append(refuse(403))
    checkpoint.read(first)
    assert len(hub.asked) == asked + 1
    hub.store.always[blob] = refuse(403)
    commit = hub.commit("org/model", "main")
    assert message(lambda: checkpoint.read(first)) == (
        f"hf://org/model@{commit}/model.safetensors must not be read: the server answered 403 "
        "(Forbidden); log in with `hf auth login` if the repository is private or gated"
    )


def test_index_and_config_need_no_ranges(server: FileServer) -> None:
    server.files = {**sharded(weights(1)), "/run/config.json": CONFIG}
    server.always[INDEX] = server.always["/run/config.json"] = ignore_range
    checkpoint = open_checkpoint(f"{server.address}/run")
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.identity() == checkpoint.identity_when_opened()
    server.files[INDEX] += b" "
    assert message(checkpoint.check_unchanged).startswith(f"{server.address}{INDEX} changed after")
