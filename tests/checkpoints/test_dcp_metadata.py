"""`.metadata`: what torch wrote is understood, and nothing in it runs."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor import metadata as before_2_3
from torch.distributed.checkpoint.metadata import Metadata

from pytest_subnet import CheckpointError
from pytest_subnet.checkpoints.dcp.boxes import Box
from pytest_subnet.checkpoints.dcp.metadata import Chunk, Description, StoredTensor, read_metadata

if TYPE_CHECKING:
    from pathlib import Path

REFUSED = (
    "which says nothing of a checkpoint's tensors; save it again with torch.distributed.checkpoint,"
    " or as safetensors"
)


def everything(_name: str, _keys: tuple[str, ...]) -> bool:
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `.metadata` of a model and its optimizer; not to be written to."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    state = {
        "model": {"a.weight": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.tensor(1.5)},
        "optim": {"exp_avg": torch.ones(3, 2), "groups": [{"lr": 0.1}]},
        "step": 3,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is used
        dcp.save(state, checkpoint_id=directory, no_dist=True)
    return directory / ".metadata"


def written(path: Path, value: object) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
    return path


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_metadata(path, everything)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1500
    return text.removeprefix(f"{path} ").replace(f"{path}", ".metadata")


def test_describes_what_was_saved(saved: Path) -> None:
    theirs = pickle.loads(saved.read_bytes())
    places = {index.fqn: place for index, place in theirs.storage_data.items()}

    def chunk(name: str, *sizes: int) -> Chunk:
        place = places[name]
        box = Box((0,) * len(sizes), sizes)
        return Chunk(box, place.relative_path, place.offset, place.length)

    found = read_metadata(saved, lambda name, keys: keys[0] == "model")
    assert found == Description(
        tensors={
            "model.a.weight": StoredTensor("bfloat16", (3, 2), (chunk("model.a.weight", 3, 2),)),
            "model.b": StoredTensor("float32", (), (chunk("model.b"),)),
        },
        others=["optim.exp_avg"],
        paths={"model.a.weight": ("model", "a.weight"), "model.b": ("model", "b")},
        digest=found.digest,
    )


def test_understands_torch_before_2_3(saved: Path, tmp_path: Path) -> None:
    metadata = pickle.loads(saved.read_bytes())
    for entry in metadata.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties = before_2_3.TensorProperties(dtype=entry.properties.dtype)
    path = written(tmp_path / ".metadata", metadata)
    assert b"_shard.sharded_tensor.metadata" in path.read_bytes()
    assert read_metadata(path, everything).tensors == read_metadata(saved, everything).tensors


@pytest.fixture
def mcore(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Megatron's module, with the two classes that its `.metadata` may name, and one more."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        parent = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = sys.modules[name]
    for each in ("MCoreMetadata", "MCoreSavePlan", "MCoreOther"):
        setattr(module, each, type(each, (Metadata,), {"__module__": name}))
    return module


def test_understands_the_classes_of_megatron(saved: Path, tmp_path: Path, mcore: Any) -> None:
    metadata = mcore.MCoreMetadata(**vars(pickle.loads(saved.read_bytes())))
    metadata.mcore_data = {"w": {"nd_reformulated_orig_global_shape": (3, 2)}}
    metadata.storage_meta = mcore.MCoreSavePlan({})
    path = written(tmp_path / ".metadata", metadata)
    assert read_metadata(path, everything).tensors == read_metadata(saved, everything).tensors


def test_refuses_other_classes_of_megatron(tmp_path: Path, mcore: Any) -> None:
    path = written(tmp_path / ".metadata", mcore.MCoreOther({}))
    assert refused(path) == (
        "refusing to unpickle .metadata: it needs "
        f"`megatron.core.dist_checkpointing.strategies.torch.MCoreOther`, {REFUSED}"
    )


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["itself", "planner_data", "storage_meta", "chunks", "key"])
def test_nothing_in_it_runs(saved: Path, tmp_path: Path, place: str) -> None:
    proof = tmp_path / "ran"
    value: Any = pickle.loads(saved.read_bytes())
    if place == "itself":
        value = Runs(proof)
    elif place == "chunks":
        value.state_dict_metadata["model.b"].chunks[0] = Runs(proof)
    elif place == "key":
        value.storage_data[Runs(proof)] = None
    else:
        setattr(value, place, Runs(proof))
    path = written(tmp_path / ".metadata", value)
    assert refused(path) == f"refusing to unpickle .metadata: it needs `{os.name}.mkdir`, {REFUSED}"
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists()  # it would have


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch", "float32.__class__"),
        ("torch", "bool8.__reduce__"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        ("collections", "defaultdict"),
        ("evil\x1b[31m", "name" * 1000),
    ],
)
def test_refuses_what_it_does_not_need(tmp_path: Path, module: str, name: str) -> None:
    def text(value: str) -> bytes:
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw

    path = written(tmp_path / ".metadata", b"\x80\x04" + text(module) + text(name) + b"\x93.")
    message = refused(path)
    assert message.startswith("refusing to unpickle .metadata: it needs `")
    assert message.endswith(REFUSED)
    if len(name) < 200:
        assert f"`{module}.{name}`" in message


def test_what_a_file_sets_on_a_class_does_not_stay(saved: Path, tmp_path: Path) -> None:
    """A pickle may fill what it was given: the classes that stand for torch's must not take it."""
    before = read_metadata(saved, everything)
    for name in ("Metadata", "TensorStorageMetadata", "MetadataIndex"):
        where = f"ctorch.distributed.checkpoint.metadata\n{name}\n".encode()
        for state in (b"}X\x01\x00\x00\x00xK\x01s", b"N}X\x01\x00\x00\x00xK\x01s\x86"):
            path = written(tmp_path / ".metadata", b"\x80\x04" + where + state + b"b.")
            assert "it is no pickle of metadata" in refused(path)
    assert read_metadata(saved, everything) == before


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it is no pickle of metadata (Ran out of input)"),
        (b"<html>", "it is no pickle of metadata (opcode '<' at byte 0)"),
        (b"\x80\x04N\x86.", "it is no pickle of metadata (it takes what was not put there)"),
        (b"\x80\x04h\x07.", "it is no pickle of metadata (it takes what was not put there)"),
        (b"\x80\x04N2.", "it is no pickle of metadata (opcode '2' at byte 3)"),
        (
            b"\x80\x04ctorch\nSize\nN\x85\x85\x85R.",
            "it is no pickle of metadata (a size is no row of numbers)",
        ),
        (b"\x80\x04N.", "of itself it says what torch does not write (NoneType)"),
        (
            b"\x80\x02X\x01\x00\x00\x00aQ.",
            "it is no pickle of metadata (it refers to data outside of it)",
        ),
        (
            pickle.dumps(Metadata(state_dict_metadata=3)),  # type: ignore[arg-type]
            "of state_dict_metadata it says what torch does not write (int)",
        ),
        (
            pickle.dumps(Metadata({"w": 3})),  # type: ignore[dict-item]
            "of w it says what torch does not write (int)",
        ),
        (
            pickle.dumps(Metadata({3: None})),  # type: ignore[dict-item]
            "of a name it says what torch does not write (int)",
        ),
        (
            pickle.dumps(Metadata({}, storage_data=[])),
            "of storage_data it says what torch does not write (list)",
        ),
        (
            pickle.dumps(Metadata({}, storage_data={"w": 3})),
            "of storage_data it says what torch does not write (str)",
        ),
    ],
)
def test_refuses_what_is_no_metadata(tmp_path: Path, raw: bytes, message: str) -> None:
    path = written(tmp_path / ".metadata", raw)
    assert refused(path) == f"is truncated or corrupt: {message}; save or download it again"


LEVELS = 60
SHARED = {
    "by its number": b")\x94"
    + b"".join(b"h%ch%c\x86\x94" % (level, level) for level in range(LEVELS)),
    "by a number it was given": b")q\x00" + b"h\x00h\x00\x86q\x00" * LEVELS,
    "in many": b")\x94" + b"".join(b"(%bt\x94" % (b"h%c" % level * 100) for level in range(LEVELS)),
    "without an end": b")" + b"\x85" * 1_000_000,
}
"""Opcodes that leave a tuple on the stack whose hash takes for ever, or needs an endless stack."""


@pytest.mark.parametrize("how", SHARED)
def test_refuses_tuples_that_take_for_ever(tmp_path: Path, how: str) -> None:
    """In a process of its own: nothing interrupts the hash of a tuple."""
    path = written(tmp_path / ".metadata", b"\x80\x04" + SHARED[how] + b"q\xff}h\xffNs.")
    code = (
        "import pathlib, sys\n"
        "from pytest_subnet import CheckpointError\n"
        "from pytest_subnet.checkpoints.dcp.metadata import read_metadata\n"
        "try: read_metadata(pathlib.Path(sys.argv[1]), print)\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == (
        f"refusing to unpickle {path}: tuples are nested in it so that to look at one could take "
        "for ever, which torch does not write; save it again with torch.distributed.checkpoint, "
        "or as safetensors\n"
    ), done.stderr


def test_what_is_no_text_is_not_spelled_out(saved: Path, tmp_path: Path) -> None:
    """Lists may hold each other as often as they like: nothing looks through them."""
    nested: list[Any] = []
    for _ in range(LEVELS):
        nested = [nested, nested]
    metadata = pickle.loads(saved.read_bytes())
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    places["model.b"].transform_descriptors = [nested, "zstd"]
    path = written(tmp_path / ".metadata", metadata)
    assert "through the extension list, zstd, which" in refused(path)
    places["model.b"].relative_path = nested
    path = written(tmp_path / ".metadata", metadata)
    assert "points outside its directory: model.b in list; a chunk" in refused(path)


def test_refuses_a_pointer(tmp_path: Path) -> None:
    path = written(tmp_path / ".metadata", b"version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refused(path)


@pytest.mark.parametrize("field", ["properties", "size", "chunks"])
def test_refuses_fields_that_torch_does_not_write(saved: Path, tmp_path: Path, field: str) -> None:
    metadata = pickle.loads(saved.read_bytes())
    setattr(metadata.state_dict_metadata["model.b"], field, "evil\x1b[31m")
    path = written(tmp_path / ".metadata", metadata)
    assert refused(path) == (
        "is truncated or corrupt: of model.b it says what torch does not write (str); save or "
        "download it again"
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.metadata"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2]))])
    try:
        found = read_metadata(path, everything)
    except CheckpointError:
        return
    for stored in found.tensors.values():
        assert sum(torch.Size(chunk.box.sizes).numel() for chunk in stored.chunks) == (
            torch.Size(stored.shape).numel()
        )
