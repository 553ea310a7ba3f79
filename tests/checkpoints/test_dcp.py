"""Torch distributed checkpoints, as torch itself writes them, sharded and not."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from pytest_subnet import CheckpointError, open_checkpoint, open_pair, update_sparsity
from pytest_subnet.checkpoints.dcp.opening import open_directory, recognises

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.tensor.placement_types import Placement

    from pytest_subnet.checkpoints.base import Checkpoint

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]

NAME = "model.layers.0.mlp.up_proj.weight"


def save(state: dict[str, Any], directory: Path) -> Path:
    """A state dict of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is used
        dcp.save(state, checkpoint_id=directory, no_dist=True)
    return directory


def save_sharded(
    state: dict[str, Any], directory: Path, mesh: tuple[int, ...], placements: Sequence[Placement]
) -> Path:
    """What `dcp.save` does on every rank and between them, one rank after the other."""
    world = torch.Size(mesh).numel()
    planners, writers, plans = [], [], []
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            device_mesh = init_device_mesh("cpu", mesh)
            planner, writer = DefaultSavePlanner(), FileSystemWriter(directory, thread_count=1)
            writer.set_up_storage_writer(rank == 0)
            planner.set_up_planner(
                {
                    key: {
                        name: sharded(each, device_mesh, placements) for name, each in part.items()
                    }
                    for key, part in state.items()
                },
                storage_meta=writer.storage_meta(),
                is_coordinator=rank == 0,
            )
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
            planners.append(planner)
            writers.append(writer)
        finally:
            dist.destroy_process_group()
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for writer, planner, plan in zip(writers, planners, plans, strict=True)
    ]
    writers[0].finish(metadata, results)
    return directory


def sharded(tensor: torch.Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    part = tensor
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        part = part.narrow(dim, min(offset, tensor.shape[dim]), size)
    return DTensor.from_local(
        part.clone(memory_format=torch.contiguous_format),
        mesh,
        placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def change(directory: Path, edit: Callable[[Metadata], None]) -> Path:
    """Write `.metadata` again, changed."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return directory


def opened(directory: Path) -> Checkpoint:
    return open_directory(directory, directory.name)


def refused(directory: Path) -> str:
    """The message with which a directory is refused, its path left out."""
    with pytest.raises(CheckpointError) as caught:
        opened(directory)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1500
    return text.replace(f"{directory}", "run")


def matrices(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        NAME: (7, 6),
        "model.norm.weight": (5,),
        "model.experts": (3, 4, 5),
        "lm_head.weight": (2, 8),
    }
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows, uneven": ((3,), (Shard(0),)),
    "rows, on one rank": ((1,), (Shard(0),)),
    "replicated": ((2,), (Replicate(),)),
    "replicated and rows": ((2, 2), (Replicate(), Shard(0))),
    "rows twice": ((2, 2), (Shard(0), Shard(0))),
}
GRIDS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "columns": ((3,), (Shard(1),)),
    "grid": ((2, 3), (Shard(0), Shard(1))),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small checkpoint with a model, an optimizer, and more."""
    state = {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}
    return save(
        {
            "model": matrices(),
            "optim": {"state": {NAME: state}, "param_groups": [{"lr": 0.1}]},
            "train_state": {"step": torch.tensor(3)},
            "step": 3,
        },
        tmp_path / "run",
    )


def test_reads_what_was_saved(tmp_path: Path, every_dtype: Tensors, same_bits: Same) -> None:
    checkpoint = opened(save({"model": every_dtype}, tmp_path / "run"))
    assert set(checkpoint.names()) == set(every_dtype)
    for name, tensor in every_dtype.items():
        assert same_bits(checkpoint.read(name), tensor), name
        if tensor.dim():
            assert same_bits(checkpoint.read(name, slice(1, 3)), tensor[1:3]), name
        info = checkpoint.info(name)
        assert (info.shape, info.nbytes) == (tensor.shape, tensor.numel() * tensor.element_size())


@pytest.mark.parametrize("layout", [*LAYOUTS, *GRIDS])
def test_reads_what_was_sharded(tmp_path: Path, layout: str, same_bits: Same) -> None:
    tensors = matrices()
    if layout in GRIDS:
        del tensors["model.norm.weight"]
    mesh, placements = (LAYOUTS | GRIDS)[layout]
    directory = save_sharded({"model": tensors}, tmp_path / "run", mesh, placements)
    checkpoint = opened(directory)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.read(name), tensor), name
        assert same_bits(checkpoint.read(name, slice(1, 3)), tensor[1:3]), name
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for start in range(0, len(raw), 7):
            buffer = bytearray(min(23, len(raw) - start))
            checkpoint.read_into(name, start, memoryview(buffer))
            assert buffer == raw[start : start + 23], (name, start)
    assert checkpoint.fingerprint() == open_checkpoint(tensors).fingerprint()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extents_are_where_the_bytes_lie(tmp_path: Path, layout: str) -> None:
    tensors = matrices()
    checkpoint = opened(save_sharded({"model": tensors}, tmp_path / "run", *LAYOUTS[layout]))
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        for start, stop in ((0, len(raw)), (2, len(raw)), (3, 9), (4, 4)):
            extents = checkpoint.extents(name, start, stop - start)
            assert extents is not None, name
            found = b""
            for path, offset, nbytes in extents:
                with open(path, "rb") as file:
                    file.seek(offset)
                    found += file.read(nbytes)
            assert found == raw[start:stop], name
        assert checkpoint.view(name) is None


@pytest.mark.parametrize("layout", GRIDS)
def test_columns_have_no_extents(tmp_path: Path, layout: str) -> None:
    tensors = {NAME: matrices()[NAME]}
    checkpoint = opened(save_sharded({"model": tensors}, tmp_path / "run", *GRIDS[layout]))
    assert checkpoint.extents(NAME, 0, 4) is None


def test_chunks_larger_than_a_few_pages(tmp_path: Path, same_bits: Same) -> None:
    tensors = {"w": torch.randn(300, 100, generator=torch.Generator().manual_seed(1))}
    checkpoint = opened(save({"model": tensors}, tmp_path / "run"))
    assert checkpoint.extents("w", 0, 120_000) is not None
    assert same_bits(checkpoint.read("w"), tensors["w"])


def test_what_is_not_in_row_order_is_read_through_torch(tmp_path: Path, same_bits: Same) -> None:
    tensors = {
        "transposed": torch.arange(24.0).reshape(4, 6).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugate": torch.complex(torch.arange(3.0), torch.arange(3.0, 6.0)).conj(),
        "middle": torch.arange(24.0).reshape(4, 6)[1:3],
    }
    checkpoint = opened(save({"model": tensors}, tmp_path / "run"))
    assert checkpoint.extents("middle", 0, 8) is not None
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.read(name), tensor), name
        if name not in ("middle", "conjugate"):
            assert checkpoint.extents(name, 0, 8) is None, name
    assert checkpoint.fingerprint() == open_checkpoint(tensors).fingerprint()


def test_files_before_torch_1_6_are_read_through_torch(tmp_path: Path, same_bits: Same) -> None:
    directory = save({"w": torch.zeros(2)}, tmp_path / "run")
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save(tensor, directory / "__0_0.distcp", _use_new_zipfile_serialization=False)

    def describe_as_that(metadata: Metadata) -> None:
        (entry,) = metadata.state_dict_metadata.values()
        entry.size = entry.chunks[0].sizes = torch.Size((2, 3))
        entry.chunks[0].offsets = torch.Size((0, 0))
        ((index, place),) = metadata.storage_data.items()
        place.length = (directory / "__0_0.distcp").stat().st_size
        metadata.storage_data = {type(index)("w", (0, 0)): place}

    checkpoint = opened(change(directory, describe_as_that))
    assert checkpoint.extents("w", 0, 24) is None
    assert same_bits(checkpoint.read("w"), tensor)


def test_opening_reads_no_data_and_needs_no_torch(run: Path) -> None:
    for chunks in run.glob("*.distcp"):
        os.truncate(chunks, 0)
        os.truncate(chunks, 1 << 30)  # holes
    code = (
        "import sys; from pathlib import Path\n"
        "from pytest_subnet.checkpoints.dcp.opening import open_directory\n"
        f"found = open_directory(Path({str(run)!r}), 'run')\n"
        f"assert found.info({NAME!r}).shape == (7, 6)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_those_of_the_model(run: Path) -> None:
    checkpoint = opened(run)
    assert set(checkpoint.names()) == set(matrices())
    assert checkpoint.notes == (
        "run: names are without model., where the model was saved",
        "run: 3 tensors left out, no weights: optim.state.model.layers.0.mlp.up_proj.weight.exp_avg"
        ", … 2 more",
    )


@pytest.mark.parametrize(
    ("state", "prefix"),
    [
        (lambda model: {"app": {"model": model, "optim": {"lr": torch.ones(1)}}}, "app.model."),
        (lambda model: {"model": model}, "model."),
        (lambda model: model, None),
        (lambda model: {"step": torch.tensor(3), **model}, None),
    ],
)
def test_the_keys_above_the_model_are_stripped(
    tmp_path: Path, state: Callable[[Tensors], dict[str, Any]], prefix: str | None
) -> None:
    checkpoint = opened(save(state(matrices()), tmp_path / "run"))
    assert set(checkpoint.names()) == set(matrices())
    stripped = [note for note in checkpoint.notes if "without" in note]
    assert stripped == (
        [f"run: names are without {prefix}, where the model was saved"] if prefix else []
    )


def test_two_models_keep_their_keys(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}, "reference": {"w": torch.ones(2)}}
    checkpoint = opened(save(state, tmp_path / "run"))
    assert set(checkpoint.names()) == {"model.w", "reference.w"}


def test_without_notes_on_the_state_dict_names_stay(run: Path) -> None:
    def forget(metadata: Metadata) -> None:
        metadata.planner_data = None

    checkpoint = opened(change(run, forget))
    assert set(checkpoint.names()) == {f"model.{name}" for name in matrices()}


def test_extra_state_is_no_weight(tmp_path: Path) -> None:
    state = {"attention._extra_state": torch.ones(2), "attention.weight": torch.ones(2)}
    assert opened(save({"model": state}, tmp_path / "run")).names() == ["attention.weight"]


@pytest.mark.parametrize("layout", [*LAYOUTS, *GRIDS])
def test_pairs_with_safetensors(tmp_path: Path, layout: str) -> None:
    tensors = {name: t for name, t in matrices().items() if t.dim() > 1 or layout in LAYOUTS}
    mesh, placements = (LAYOUTS | GRIDS)[layout]
    save_sharded({"model": tensors}, tmp_path / "run", mesh, placements)
    save_file(tensors, tmp_path / "model.safetensors")
    same = open_pair(opened(tmp_path / "run"), tmp_path / "model.safetensors")
    assert (same.problems, update_sparsity(same).updated) == ((), 0)
    assert same.base.fingerprint() == same.tuned.fingerprint()

    tensors[NAME][5, 4] += 1
    tensors[NAME][0] += 1
    tensors["lm_head.weight"][1, 7] += 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    moved = update_sparsity(open_pair(opened(tmp_path / "run"), tmp_path / "tuned.safetensors"))
    assert {row.name: row.updated for row in moved.per_tensor if row.updated} == {
        NAME: 7,
        "lm_head.weight": 1,
    }


def test_travels_to_a_worker(tmp_path: Path, same_bits: Same) -> None:
    tensors = {"transposed": torch.arange(24.0).reshape(4, 6).t()}
    checkpoint = opened(save({"model": tensors}, tmp_path / "run"))
    before = len(pickle.dumps(checkpoint))
    checkpoint.read("transposed")
    sent = pickle.dumps(checkpoint)
    assert len(sent) - before < 400  # the place of the chunk, not its data
    assert same_bits(pickle.loads(sent).read("transposed"), tensors["transposed"])


def test_a_change_is_noticed(run: Path) -> None:
    checkpoint = opened(run)
    assert checkpoint.identity() == checkpoint.identity_when_opened()
    checkpoint.check_unchanged()
    chunks = run / "__0_0.distcp"
    chunks.write_bytes(chunks.read_bytes())
    assert checkpoint.identity() != checkpoint.identity_when_opened()
    changed = f"{chunks} changed after it was opened; wait until it is written, then open it again"
    for call in (checkpoint.check_unchanged, lambda: checkpoint.read(NAME)):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert str(caught.value) == changed


def test_metadata_of_another_save_is_another_identity(run: Path) -> None:
    before = opened(run).identity()
    change(run, lambda metadata: metadata.planner_data.clear())
    assert opened(run).identity() != before


def test_config_is_read(run: Path) -> None:
    (run / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert opened(run).config == {"model_type": "llama"}


def drop_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata[f"model.{NAME}"].chunks.pop()


def overlap(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata[f"model.{NAME}"].chunks
    chunks[0].sizes = torch.Size((4, 6))


def reach_beyond(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata[f"model.{NAME}"].chunks
    chunks[-1].sizes = torch.Size((9, 6))


def lose_place(metadata: Metadata) -> None:
    for index in list(metadata.storage_data):
        if index.fqn == f"model.{NAME}" and index.offset[0] == 3:
            del metadata.storage_data[index]


def places(metadata: Metadata) -> list[Any]:
    return [place for index, place in metadata.storage_data.items() if index.fqn == f"model.{NAME}"]


def shorten(metadata: Metadata) -> None:
    places(metadata)[0].length = 35


def lead_outside(metadata: Metadata) -> None:
    places(metadata)[0].relative_path = "../other/__0_0.distcp"


def compress(metadata: Metadata) -> None:
    places(metadata)[0].transform_descriptors = ["stream.zstd"]


def flatten(metadata: Metadata) -> None:
    chunk = metadata.state_dict_metadata[f"model.{NAME}"].chunks[0]
    chunk.offsets, chunk.sizes = torch.Size((0,)), torch.Size((18,))


def shrink_below_zero(metadata: Metadata) -> None:
    metadata.state_dict_metadata[f"model.{NAME}"].size = (-7, 6)


def quantise(metadata: Metadata) -> None:
    metadata.state_dict_metadata[f"model.{NAME}"].properties.dtype = torch.qint8


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            drop_chunk,
            f"lists chunks of model.{NAME} [7, 6] that don't make it up: they hold 36 of its 42 "
            "entries; save the checkpoint again",
        ),
        (
            overlap,
            f"lists chunks of model.{NAME} [7, 6] that don't make it up: those at [0, 0] and "
            "[3, 0] overlap; save the checkpoint again",
        ),
        (
            reach_beyond,
            f"lists chunks of model.{NAME} [7, 6] that don't make it up: the one at [6, 0] reaches "
            "to [15, 6]; save the checkpoint again",
        ),
        (
            lose_place,
            f"lists a chunk of model.{NAME} at [3, 0], but no file that holds it; save the "
            "checkpoint again",
        ),
        (
            shorten,
            f"gives 35 bytes to a chunk of model.{NAME} that takes 36; save the checkpoint again",
        ),
        (
            lead_outside,
            f"points outside its directory: model.{NAME} in ../other/__0_0.distcp; a chunk is in a "
            "file beside it, this checkpoint was not written by a trainer",
        ),
        (
            compress,
            f"stores model.{NAME} through the extension stream.zstd, which cannot be read; save "
            "the checkpoint without extensions",
        ),
        (
            flatten,
            f"lists a chunk of model.{NAME} [7, 6] with 1 dimensions at [0]; save the checkpoint "
            "again",
        ),
        (
            shrink_below_zero,
            f"is truncated or corrupt: of model.{NAME} it says what torch does not write (tuple); "
            "save or download it again",
        ),
        (
            quantise,
            f"stores model.{NAME} as qint8, which cannot be compared; save the checkpoint again",
        ),
    ],
)
def test_refuses_what_does_not_add_up(
    tmp_path: Path, edit: Callable[[Metadata], None], message: str
) -> None:
    mesh, placements = LAYOUTS["rows, uneven"]
    directory = save_sharded({"model": matrices()}, tmp_path / "run", mesh, placements)
    assert refused(change(directory, edit)) == f"run/.metadata {message}"


def test_a_fault_in_the_optimizer_is_none_of_the_weights(run: Path) -> None:
    def spoil(metadata: Metadata) -> None:
        metadata.state_dict_metadata[f"optim.state.{NAME}.exp_avg"].chunks.clear()

    assert set(opened(change(run, spoil)).names()) == set(matrices())


def test_refuses_missing_chunks(tmp_path: Path) -> None:
    mesh, placements = LAYOUTS["rows, uneven"]
    directory = save_sharded({"model": matrices()}, tmp_path / "run", mesh, placements)
    (directory / "__1_0.distcp").unlink()
    assert refused(directory) == (
        "run/.metadata lists 3 files of chunks, 1 missing: __1_0.distcp; every node writes its "
        "own, copy them all into run"
    )


def test_refuses_short_chunks(tmp_path: Path) -> None:
    directory = save({"w": torch.ones(4)}, tmp_path / "run")
    size = (directory / "__0_0.distcp").stat().st_size
    os.truncate(directory / "__0_0.distcp", size - 1)
    assert refused(directory) == (
        f"run/__0_0.distcp has {size - 1:,} bytes, but .metadata places a chunk of w up to byte "
        f"{size:,}; it was cut short, save or copy it again"
    )


def test_refuses_to_go_without_metadata(tmp_path: Path) -> None:
    directory = save({"w": torch.ones(4)}, tmp_path / "run")
    (directory / ".metadata").unlink()
    assert refused(directory) == (
        "run has no .metadata, which says what is in its chunks (found __0_0.distcp); it is "
        "written last and by one node, wait for the save to end or copy it from there"
    )


def test_refuses_an_optimizer_alone(tmp_path: Path) -> None:
    directory = save({"optimizer": {"state": {"w": torch.ones(4)}}}, tmp_path / "run")
    assert refused(directory) == (
        "run/.metadata lists 1 tensor, none of a model: optimizer.state.w; pass the directory that "
        "the model was saved to"
    )


def test_refuses_an_empty_save(tmp_path: Path) -> None:
    assert refused(save({"step": 3}, tmp_path / "run")) == (
        "run/.metadata lists no tensors; was the model saved empty?"
    )


def test_its_metadata_stands_for_its_directory(run: Path) -> None:
    whole = open_checkpoint(run)
    checkpoint = open_checkpoint(run / ".metadata")
    assert checkpoint.identity() == whole.identity()
    assert checkpoint.directory == run
    save_file(matrices(), run / "model.safetensors")  # which counts has been said
    assert open_checkpoint(run / ".metadata").fingerprint() == whole.fingerprint()


def test_refuses_one_file_of_chunks(run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(run / "__0_0.distcp")
    assert str(caught.value) == (
        f"{run}/__0_0.distcp holds chunks of a distributed checkpoint, and which ones is said in "
        f"the .metadata beside it; pass the directory, {run}"
    )


def test_refuses_a_second_checkpoint_beside_it(run: Path) -> None:
    save_file(matrices(), run / "model.safetensors")
    assert refused(run) == (
        "run holds two checkpoints: model.safetensors, __0_0.distcp; remove the stale one, or "
        "pass the file that counts"
    )


def swap_places(directory: Path, one: str, other: str) -> Path:
    def swap(metadata: Metadata) -> None:
        where = {index.fqn: index for index in metadata.storage_data}
        data = metadata.storage_data
        data[where[one]], data[where[other]] = data[where[other]], data[where[one]]

    return change(directory, swap)


@pytest.mark.parametrize("other", [torch.ones(2, 2), torch.ones(4, dtype=torch.int32)])
def test_refuses_chunks_of_another_tensor(tmp_path: Path, other: torch.Tensor) -> None:
    directory = save({"a": torch.ones(4), "b": other}, tmp_path / "run")
    checkpoint = opened(swap_places(directory, "a", "b"))
    assert checkpoint.extents("a", 0, 16) is None
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("a")
    spelled = {4: "i32[4]", 2: "f32[2,2]"}[other.shape[0]]
    message = str(caught.value)
    assert message.startswith(f"{directory}/__0_0.distcp from byte 1,")
    assert message.endswith(
        f"holds {spelled}, where .metadata lists f32[4] of a; were two checkpoints mixed?"
    )


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            Hostile(),
            "refusing to unpickle {}: it needs `posix.system`, which is not a tensor class; a "
            "checkpoint holds weights only, save it again as safetensors",
        ),
        ({"w": torch.ones(4)}, "{} holds dict, not a plain tensor; save the checkpoint again"),
        (
            torch.eye(2).to_sparse(),
            "{} holds Tensor, not a plain tensor; save the checkpoint again",
        ),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="os.system is nt.system there")
def test_refuses_chunks_that_are_no_tensor(tmp_path: Path, value: Any, message: str) -> None:
    directory = save({"w": torch.ones(4)}, tmp_path / "run")
    torch.save(value, directory / "__0_0.distcp")

    def measure(metadata: Metadata) -> None:
        (place,) = metadata.storage_data.values()
        place.length = (directory / "__0_0.distcp").stat().st_size

    checkpoint = opened(change(directory, measure))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("w")
    assert str(caught.value) == message.format(f"{directory}/__0_0.distcp from byte 0 on")


def test_damaged_chunks_are_refused_or_left_alone(tmp_path: Path) -> None:
    tensor = torch.arange(8.0)
    directory = save({"w": tensor}, tmp_path / "run")
    path = directory / "__0_0.distcp"
    whole = path.read_bytes()
    refusals = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        checkpoint = opened(directory)
        try:
            changed = int((checkpoint.read("w") != tensor).sum())
        except CheckpointError:
            refusals += 1
        else:
            assert changed <= 1  # a flipped bit of data is a weight that moved
    assert refusals


@pytest.mark.parametrize("shift", [8, 64])
def test_a_damaged_length_does_not_shift_the_data(tmp_path: Path, shift: int) -> None:
    directory = save({"w": torch.arange(64.0)}, tmp_path / "run")
    path = directory / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    extra = raw.index(b"archive/data/0") - 2
    raw[extra : extra + 2] = (int.from_bytes(raw[extra : extra + 2], "little") + shift).to_bytes(
        2, "little"
    )
    path.write_bytes(raw)
    checkpoint = opened(directory)
    for call in (lambda: checkpoint.extents("w", 0, 256), lambda: checkpoint.read("w")):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert str(caught.value) == (
            f"{path} from byte 0 on is truncated or corrupt: its data is not where torch.save puts "
            "it; save or download it again"
        )


def megatron(tensors: Tensors, root: Path, step: int, backend: str = "torch_dist") -> Path:
    """What Megatron writes of a model: a directory an iteration, and a file that names the last."""
    directory = save(tensors, root / f"iter_{step:07d}")
    (root / "latest_checkpointed_iteration.txt").write_text(f"{step}")
    (directory / "common.pt").write_bytes(b"never opened")
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": backend, "sharded_backend_version": 1})
    )
    return directory


MCORE = {
    "decoder.layers.mlp.linear_fc1.weight": torch.arange(64.0).reshape(2, 8, 4),
    "decoder.final_layernorm.weight": torch.ones(4),
    "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(4),
    "rng_state": torch.zeros(3),
    "decoder.layers.self_attention.core_attention._extra_state": torch.zeros(3),
}


def test_megatron_opens_at_the_directory_and_above_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    directory = megatron(MCORE, root, 10)
    for checkpoint in (opened(directory), open_checkpoint(root)):
        assert set(checkpoint.names()) == set(list(MCORE)[:2])
        assert checkpoint.directory == directory
        assert torch.equal(checkpoint.read(next(iter(MCORE))), next(iter(MCORE.values())))


def test_megatron_pairs_with_megatron(tmp_path: Path) -> None:
    base = megatron(MCORE, tmp_path / "base", 1)
    moved = {name: tensor.clone() for name, tensor in MCORE.items()}
    moved["decoder.layers.mlp.linear_fc1.weight"][1, 2] += 1
    tuned = megatron(moved, tmp_path / "tuned", 2)
    pair = open_pair(opened(base), opened(tuned))
    assert pair.problems == ()
    assert update_sparsity(pair).updated == 4


def test_megatron_in_another_backend_is_refused_by_name(tmp_path: Path) -> None:
    directory = megatron(MCORE, tmp_path / "run", 10, backend="zarr")
    (directory / ".metadata").unlink()
    (directory / "__0_0.distcp").unlink()
    assert recognises(sorted(entry.name for entry in directory.iterdir()))
    assert refused(directory) == (
        "run is a Megatron checkpoint with the sharded backend zarr, which cannot be read; save it "
        "with --ckpt-format torch_dist"
    )


def test_a_converted_model_of_megatron_is_its_release(tmp_path: Path) -> None:
    directory = megatron(MCORE, tmp_path / "run", 10)
    directory.rename(tmp_path / "run" / "release")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release\n")
    checkpoint = open_checkpoint(tmp_path / "run")
    assert checkpoint.directory == tmp_path / "run" / "release"


@pytest.mark.parametrize(
    ("present", "verdict"),
    [
        ([".metadata", "__0_0.distcp"], True),
        (["__0_0.distcp"], True),
        ([".metadata"], True),
        ([".metadata", "model.safetensors"], False),
        (["common.pt", "metadata.json"], True),
        (["metadata.json", "model.safetensors"], False),
        (["iter_0000010", "latest_checkpointed_iteration.txt"], False),  # the folder above one
        (["config.json", "model.safetensors"], False),
        ([], False),
    ],
)
def test_recognises_a_directory_by_its_names(present: list[str], verdict: bool) -> None:
    assert recognises(present) is verdict


SAVE = """
import os, sys, torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

directory, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
build = lambda: torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7)).bfloat16()
sharded, parallel = build(), build()
if rank == 0:
    torch.save([sharded.state_dict(), parallel.state_dict()], f"{directory}/whole.pt")
mesh = init_device_mesh("cpu", (2,))
fully_shard(sharded, mesh=mesh)
parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
for name, model in (("fsdp", sharded), ("tensor_parallel", parallel)):
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{directory}/{name}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_reads_what_two_processes_saved(tmp_path: Path, same_bits: Same) -> None:
    arguments = [str(tmp_path), str(tmp_path / "store")]
    processes = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", SAVE, *arguments, str(rank)])
        for rank in range(2)
    ]
    assert [process.wait(180) for process in processes] == [0, 0]
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, tensors in zip(("fsdp", "tensor_parallel"), whole, strict=True):
        checkpoint = opened(tmp_path / name)
        assert set(checkpoint.names()) == set(tensors)
        for key, tensor in tensors.items():
            assert same_bits(checkpoint.read(key), tensor), (name, key)
        assert len(list((tmp_path / name).glob("*.distcp"))) == 2
