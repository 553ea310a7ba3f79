"""Files of `torch.save`: what is read is what torch loads, and nothing in them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_subnet import CheckpointError, open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]
    Refusal = Callable[[Any], str]


YOUNGER_THAN_ZIP = ("of_float8", "of_uint16", "of_uint32", "of_uint64")


@pytest.fixture(params=["zip", "legacy"])
def save(request: pytest.FixtureRequest) -> Callable[[Any, Path], Path]:
    """`torch.save` in the format of today and in that of before torch 1.6."""

    def write(value: Any, path: Path) -> Path:
        torch.save(value, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return write


@pytest.fixture
def tensors(request: pytest.FixtureRequest, every_dtype: Tensors) -> Tensors:
    """All sorts of tensors that the format of `save` can hold."""
    legacy = request.node.callspec.params["save"] == "legacy"
    return oddly_laid_out() | {
        name: tensor
        for name, tensor in every_dtype.items()
        if not (legacy and name.startswith(YOUNGER_THAN_ZIP))
    }


def rezip(path: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    """Write a zip file of `torch.save` again, each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name.partition("/")[2], data))
    return path


def capitals(path: Path) -> None:
    """Call a zip file's pickle DATA.PKL, which torch takes for data.pkl."""
    path.write_bytes(path.read_bytes().replace(b"/data.pkl", b"/DATA.PKL"))


def oddly_laid_out() -> Tensors:
    """Tensors whose bytes in the file are not what they hold in row order."""
    big = torch.arange(24.0).reshape(4, 6)
    complex_ones = torch.complex(torch.arange(3.0), torch.arange(3.0, 6.0))
    return {
        "transposed": big.t(),
        "strided": big[:, ::2],
        "middle": big[1:3],
        "expanded": torch.arange(3).expand(4, 3),
        "conjugate": complex_ones.conj(),
        "imaginary": complex_ones.clone().conj().imag,
        "channels_last": torch.arange(120.0)
        .reshape(2, 3, 4, 5)
        .to(memory_format=torch.channels_last),
    }


def test_reads_what_torch_loads(
    tmp_path: Path, save: Callable[[Any, Path], Path], tensors: Tensors, same_bits: Same
) -> None:
    path = save(tensors, tmp_path / "model.bin")
    theirs = torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert list(checkpoint.names()) == list(theirs)
    for name, tensor in theirs.items():
        assert same_bits(checkpoint.read(name), tensor), name
        if tensor.dim():
            assert same_bits(checkpoint.read(name, slice(1, 3)), tensor[1:3]), name
        info = checkpoint.info(name)
        assert (info.shape, info.nbytes) == (tensor.shape, tensor.numel() * tensor.element_size())


def test_fingerprint_is_that_of_the_tensors(
    tmp_path: Path, save: Callable[[Any, Path], Path], tensors: Tensors
) -> None:
    one, other = open_checkpoint(save(tensors, tmp_path / "model.pt")), open_checkpoint(tensors)
    assert one.fingerprint() == other.fingerprint()


def test_extents_are_where_the_bytes_lie(tmp_path: Path, every_dtype: Tensors) -> None:
    path = tmp_path / "model.pth"
    torch.save(every_dtype | oddly_laid_out(), path)
    raw = path.read_bytes()
    checkpoint = open_checkpoint(path)
    for name in [*every_dtype, "middle"]:
        nbytes = checkpoint.info(name).nbytes
        extents = checkpoint.extents(name, 0, nbytes)
        if nbytes == 0:
            continue
        assert extents is not None, name
        (extent,) = extents
        buffer = bytearray(nbytes)
        checkpoint.read_into(name, 0, memoryview(buffer))
        assert raw[extent.offset : extent.offset + nbytes] == buffer
        assert checkpoint.view(name) is None
    for name in set(oddly_laid_out()) - {"middle"}:
        assert checkpoint.extents(name, 0, 4) is None
        assert checkpoint.view(name) is None


def test_files_before_torch_1_6_are_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(path)
    assert checkpoint.extents("a", 0, 12) is None
    assert checkpoint.view("a") is not None


@pytest.mark.skipif(sys.platform != "linux", reason="compares resident memory in kB")
def test_opening_reads_no_data(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "model.bin"
    with torch.serialization.skip_data():  # leaves a hole of 1 GB
        torch.save({"a": torch.empty(2**18, 2**10)}, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_checkpoint(path)
    assert checkpoint.info("a").shape == (2**18, 2**10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert torch.equal(checkpoint.read("a", slice(-1, None)), torch.zeros(1, 2**10))


def test_shared_storage_is_a_tie(tmp_path: Path, save: Callable[[Any, Path], Path]) -> None:
    embed = torch.ones(4, 3)
    tensors = {"embed.weight": embed, "lm_head.weight": embed, "part": embed[:2]}
    checkpoint = open_checkpoint(save(tensors, tmp_path / "model.bin"))
    assert checkpoint.ties == {"lm_head.weight": "embed.weight"}
    assert not checkpoint.shows_ties


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_weights_in_a_trainers_file(
    tmp_path: Path, save: Callable[[Any, Path], Path], key: str
) -> None:
    state = {key: {"a": torch.ones(2)}, "optimizer": {"exp_avg": torch.zeros(2)}, "epoch": 3}
    checkpoint = open_checkpoint(save(state, tmp_path / "last.pt"))
    assert checkpoint.names() == ["a"]


@pytest.mark.parametrize(
    "beside",
    [
        {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}], "lr_schedulers": []},
        {"rng_state": torch.zeros(2).byte(), "scaler": {"scale": torch.ones(1)}},
        {"args": {"lr": 0.1, "betas": (0.9, 0.95)}, "head": {"kind": "linear"}, "epoch": 3},
    ],
)
def test_what_trainers_save_beside_the_weights_is_left_out(
    tmp_path: Path, beside: dict[str, Any]
) -> None:
    torch.save({"model": {"a": torch.ones(2)}, **beside}, tmp_path / "last.pt")
    assert open_checkpoint(tmp_path / "last.pt").names() == ["a"]


def test_settings_beside_the_weights_are_no_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "step": 3, "args": {"lr": 0.1}}, tmp_path / "last.pt")
    assert open_checkpoint(tmp_path / "last.pt").names() == ["a"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "holds no tensors; was it saved or built empty?"),
        ({"epoch": 3}, "holds no tensors; was it saved or built empty?"),
        (
            [torch.ones(2)],
            "holds list, not a mapping from names to tensors; "
            "pass the file with the model's state_dict",
        ),
        (
            torch.ones(2),
            "holds Tensor, not a mapping from names to tensors; "
            "pass the file with the model's state_dict",
        ),
        (
            {"model": {"a": torch.ones(2)}, "state_dict": {"b": torch.ones(2)}},
            "holds tensors under model, state_dict; which of them are the weights cannot be known, "
            "save the model's state_dict alone",
        ),
        (
            {"a": torch.ones(2), "encoder": {"b": torch.ones(2)}},
            "holds tensors under encoder; which of them are the weights cannot be known, "
            "save the model's state_dict alone",
        ),
        *(
            (
                value,
                f"holds tensors under {keys}; which of them are the weights cannot be known, "
                "save the model's state_dict alone",
            )
            for value, keys in (
                ({"w": torch.ones(2), "experts": [torch.ones(2)]}, "experts"),
                ({"w": torch.ones(2), "x": {"y": ({"z": torch.ones(2)},)}}, "x"),
                ({"w": torch.ones(2), "optimizer": {"w": torch.ones(2)}}, "optimizer"),
                ({"model": {"w": torch.ones(2)}, "head": torch.ones(2)}, "model, head"),
                ({"model": {"w": torch.ones(2)}, "lora": {"a": torch.ones(2)}}, "model, lora"),
                ({"model": {"w": torch.ones(2)}, "ema": [torch.ones(2)]}, "model, ema"),
                ({"model": {"w": torch.ones(2), "x": [torch.ones(2)]}}, "x"),
            )
        ),
    ],
)
def test_what_is_no_mapping_of_tensors_is_refused(
    tmp_path: Path, save: Callable[[Any, Path], Path], refusal: Refusal, value: Any, said: str
) -> None:
    path = save(value, tmp_path / "model.bin")
    assert refusal(path) == f"{path} {said}"


def test_pickle_that_holds_itself_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "model.bin")
    assert "not a mapping from names to tensors" in refusal(tmp_path / "model.bin")


def test_name_that_is_no_text_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "model.bin"
    torch.save({0: torch.ones(2)}, path)
    assert refusal(path) == f"0 of {path} is Tensor, not a tensor under a name; pass a state_dict"


def test_sparse_tensor_is_refused_by_name(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2), "evil\x1b[2J": torch.ones(2).to_sparse()}, path)
    assert refusal(path).startswith(f"evil\\x1b[2J of {path} is stored as torch.sparse_coo; only")


class Runs:
    """Unpickled, it would make a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("force", ["0", "1"])
def test_pickle_that_wants_code_is_refused(
    tmp_path: Path,
    save: Callable[[Any, Path], Path],
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
    force: str,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    value = {"a": torch.ones(2), "b": Runs(tmp_path / "ran")}
    path = save(value, tmp_path / "model.bin")
    assert refusal(path) == (
        f"refusing to unpickle {path}: it needs `{os.mkdir.__module__}.mkdir`, which is not a "
        "tensor class; a checkpoint holds weights only, save it again as safetensors"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "needed"),
    [
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(2), "args": Namespace(lr=1)}, "argparse.Namespace"),
    ],
)
def test_pickle_of_another_class_is_refused(
    tmp_path: Path,
    save: Callable[[Any, Path], Path],
    refusal: Refusal,
    value: Any,
    needed: str,
) -> None:
    path = save(value, tmp_path / "model.bin")
    assert f"it needs `{needed}`, which is not a tensor class" in refusal(path)


def write_shards(root: Path, tensors: Tensors) -> Path:
    """One shard a tensor, as transformers 4 wrote them; their index."""
    names = {
        name: f"pytorch_model-{number:05}-of-{len(tensors):05}.bin"
        for number, name in enumerate(tensors, 1)
    }
    for name, shard in names.items():
        torch.save({name: tensors[name].clone()}, root / shard)
    index = root / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return index


def test_reads_shards(tmp_path: Path, every_dtype: Tensors, same_bits: Same) -> None:
    index = write_shards(tmp_path, every_dtype)
    for source in (tmp_path, index):
        checkpoint = open_checkpoint(source)
        assert list(checkpoint.names()) == list(every_dtype)
        assert all(same_bits(checkpoint.read(n), every_dtype[n]) for n in every_dtype)
    assert checkpoint.fingerprint() == open_checkpoint(every_dtype).fingerprint()
    before = checkpoint.identity()
    os.utime(index, ns=(0, 0))
    assert checkpoint.identity() != before


HEAVY = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s."
"""A dictionary with a key of tuples that hold each other twice: its hash takes for ever."""


@pytest.mark.parametrize("save", ["zip", "legacy"], indirect=True)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_world_size_1_rank_0.pt"])
def test_tuples_that_take_for_ever_are_refused(
    tmp_path: Path, save: Callable[[Any, Path], Path], request: pytest.FixtureRequest, name: str
) -> None:
    """In a process of its own: nothing interrupts the hash of a tuple."""
    path = save({"a": 1}, tmp_path / name)
    if request.node.callspec.params["save"] == "zip":
        rezip(path, lambda name, data: HEAVY if name == "data.pkl" else data)
        capitals(path)
    else:
        saved = pickle.dumps({"a": 1}, protocol=2)
        assert saved in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(saved, HEAVY))
    code = (
        "import sys\n"
        "from pytest_subnet import CheckpointError, open_checkpoint\n"
        "try: open_checkpoint(sys.argv[1])\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == (
        f"refusing to unpickle {path}: tuples are nested in it so that to look at one could take "
        "for ever, which torch does not write; save it again as safetensors\n"
    ), done.stderr


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model_world_size_1_rank_0.pt"])
def test_a_compressed_pickle_is_not_unpacked(tmp_path: Path, name: str, refusal: Refusal) -> None:
    path = tmp_path / name
    torch.save({"a": torch.ones(2)}, path)
    rezip(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert refusal(tmp_path) == (
        f"{path} was compressed after it was saved; unpack it, load it with torch and save it again"
    )


def test_shard_that_wants_code_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    write_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    second = tmp_path / "pytorch_model-00002-of-00002.bin"
    torch.save({"b": torch.ones(2), "c": Runs(tmp_path / "ran")}, second)
    assert refusal(tmp_path).startswith(f"refusing to unpickle {second}: it needs `")
    assert not (tmp_path / "ran").exists()


def test_missing_shard(tmp_path: Path, refusal: Refusal) -> None:
    index = write_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    assert refusal(tmp_path) == (
        f"{index} lists 2 shards, 1 missing: pytorch_model-00001-of-00002.bin; "
        f"copy or download them into {tmp_path}"
    )


def test_shard_that_holds_another_tensor(tmp_path: Path, refusal: Refusal) -> None:
    index = write_shards(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    torch.save({"c": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    assert refusal(tmp_path) == (
        f"{index} says that pytorch_model-00002-of-00002.bin holds b, but it does not; "
        "save the checkpoint again"
    )


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is truncated or corrupt: it is empty; save or download it again"),
        (
            b"<!DOCTYPE html>",
            "is not a torch file (its first bytes are b'<!DOCTYP'); "
            "was an error page or another format saved under this name?",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not weights; run `git lfs pull` in its repository",
        ),
        (
            b"PK\x03\x04" + bytes(100),
            "is truncated or corrupt: File is not a zip file; save or download it again",
        ),
    ],
)
def test_what_is_no_torch_file_is_refused(
    tmp_path: Path, refusal: Refusal, raw: bytes, said: str
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(raw)
    assert refusal(path) == f"{path} {said}"


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(
    tmp_path: Path, save: Callable[[Any, Path], Path], refusal: Refusal, kept: float
) -> None:
    path = save({"a": torch.ones(1000)}, tmp_path / "model.bin")
    os.truncate(path, int(path.stat().st_size * kept))
    assert refusal(path).startswith(f"{path} is truncated or corrupt: ")


def test_program_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    source = """
        def forward(self, x):
            return x
    """
    path = tmp_path / "model.pt"
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(path, "a") as archive:  # what tells a TorchScript archive
        archive.writestr("archive/constants.pkl", source)
    assert refusal(path) == (
        f"{path} is a TorchScript program, not weights; "
        "save the module's state_dict, best as safetensors"
    )


def test_archive_that_was_packed_again_without_compression_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(100.0)}, path)
    rezip(path, lambda _, data: data)
    assert torch.equal(open_checkpoint(path).read("a"), torch.arange(100.0))


def test_compressed_archive_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(100.0)}, path)
    rezip(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert refusal(path) == (
        f"{path} was compressed after it was saved; unpack it, load it with torch and save it again"
    )


@pytest.mark.parametrize("change", [lambda d: d[:-4], lambda d: d + bytes(4)])
def test_archive_whose_data_is_of_another_size_is_refused(
    tmp_path: Path, refusal: Refusal, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(100.0), "b": torch.ones(7)}, path)
    rezip(path, lambda name, data: change(data) if name == "data/0" else data)
    assert refusal(path) == (
        f"{path} is truncated or corrupt: its list of tensors and the data stored with it "
        "disagree; save or download it again"
    )


def test_numbers_of_a_big_endian_machine_are_turned(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(100.0)}, path)
    other = "little" if sys.byteorder == "big" else "big"

    def turn(name: str, data: bytes) -> bytes:
        if name == "data/0":
            return b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))
        return other.encode() if name == "byteorder" else data

    rezip(path, turn)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read("a"), torch.arange(100.0))
    assert checkpoint.extents("a", 0, 4) is None


def test_pickle_of_a_later_protocol_is_read_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2)}, path, pickle_protocol=3)
    assert open_checkpoint(path).names() == ["a"]


def test_file_that_changes_after_it_was_opened_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2)}, path)
    checkpoint = open_checkpoint(path)
    before = checkpoint.identity()
    assert checkpoint.identity() == before
    os.utime(path, ns=(0, 0))
    assert checkpoint.identity() != before
    with pytest.raises(CheckpointError, match=r"model\.bin changed after it was opened"):
        checkpoint.read("a")


def test_file_that_is_cut_short_after_it_was_opened_ends_no_process(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.ones(1_000_000)}, path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, 100_000)
    with pytest.raises(CheckpointError, match=r"model\.bin ends at byte 100,000"):
        checkpoint.read("a")


@pytest.mark.parametrize("access", ["fingerprint", "view", "read"])
def test_tensor_in_another_order_of_a_file_that_was_cut_short_ends_no_process(
    tmp_path: Path, access: str
) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a": torch.arange(400_000.0).view(200, 2000).t()}, path)
    checkpoint = open_checkpoint(path)
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError) as caught:
        getattr(checkpoint, access)("a")
    assert str(caught.value) == (
        f"{path} changed after it was opened; wait until it is written, then open it again"
    )


def test_unknown_name_and_range(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, path)
    checkpoint = open_checkpoint(path)
    attempts: list[Callable[[], Any]] = [
        lambda: checkpoint.info("a.wait"),
        lambda: checkpoint.view("a.wait"),
        lambda: checkpoint.extents("a.wait", 0, 1),
        lambda: checkpoint.read("a.wait"),
    ]
    for attempt in attempts:
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert str(caught.value) == f"{path} has no tensor a.wait; did you mean a.weight?"
    with pytest.raises(CheckpointError, match="has 8 bytes; bytes 4 to 12 were asked for"):
        checkpoint.read_into("a.weight", 4, memoryview(bytearray(8)))
