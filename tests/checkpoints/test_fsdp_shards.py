"""FSDP shards: written by torch's own DTensor and FSDP, put together from their parts."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pytest_subnet import CheckpointError, open_checkpoint, open_pair, update_sparsity
from pytest_subnet.checkpoints.fsdp.opening import open_directory, recognises
from pytest_subnet.checkpoints.zip_records import Records, mapped_from_some

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Tensors = dict[str, torch.Tensor]
    Same = Callable[[torch.Tensor, torch.Tensor], bool]

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(autouse=True)
def excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group puts its rank before every traceback, also after its end."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


class Group:
    """One rank of a run, in a process group that sends nothing."""

    def __init__(self, rank: int, world: int, mesh: Sequence[int] = ()) -> None:
        self.rank, self.world, self.mesh = rank, world, tuple(mesh or (world,))

    def __enter__(self) -> Any:
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        return init_device_mesh("cpu", self.mesh)

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()


def file_of(root: Path, rank: int, world: int) -> Path:
    return root / f"model_world_size_{world}_rank_{rank}.pt"


def place(tensor: torch.Tensor, mesh: Any, placements: Sequence[Any] | None) -> torch.Tensor:
    """This rank's part of `tensor`, cut by DTensor itself; the tensor where nothing is placed."""
    if placements is None:
        return tensor
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


def write(
    root: Path,
    tensors: Tensors,
    placements: dict[str, Sequence[Any] | None] | Sequence[Any] | None,
    mesh: Sequence[int],
) -> Path:
    """The files of all ranks; `placements` for all tensors, or by name."""
    root.mkdir(parents=True, exist_ok=True)
    world = torch.Size(mesh).numel()
    for rank in range(world):
        with Group(rank, world, mesh) as device_mesh:
            parts = {
                name: place(
                    tensor,
                    device_mesh,
                    placements[name] if isinstance(placements, dict) else placements,
                )
                for name, tensor in tensors.items()
            }
            torch.save(parts, file_of(root, rank, world))
    return root


def refused(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_directory(root, str(root))
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 1500
    return text


def model(seed: int = 0) -> Tensors:
    """Names and shapes of a small model; five rows, one row, a buffer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(16, 4, generator=generator).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=generator).bfloat16(),
        "model.norm.weight": torch.randn(5, generator=generator).bfloat16(),
        "one.weight": torch.randn(1, 8, generator=generator),
        "rotary.inv_freq": torch.randn(3, generator=generator),
    }


def sharded(tensors: Tensors) -> dict[str, Sequence[Any] | None]:
    """As FSDP does: rows, and the buffer on every rank."""
    return {name: None if "inv_freq" in name else [Shard(0)] for name in tensors}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 11])
def test_shards_are_put_together(tmp_path: Path, same_bits: Same, world: int) -> None:
    tensors = model()
    checkpoint = open_directory(write(tmp_path / "actor", tensors, sharded(tensors), [world]), "a")
    assert list(checkpoint.names()) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.read(name), tensor), name
        assert same_bits(checkpoint.read(name, slice(1, 3)), tensor[1:3]), name
        info = checkpoint.info(name)
        assert (info.shape, info.nbytes) == (tensor.shape, tensor.nbytes)
    assert checkpoint.fingerprint() == open_checkpoint(tensors).fingerprint()
    assert checkpoint.label == "a"
    assert checkpoint.directory == tmp_path / "actor"


def test_plain_tensors_of_a_single_rank(tmp_path: Path, every_dtype: Tensors) -> None:
    torch.save(every_dtype, file_of(tmp_path, 0, 1))
    checkpoint = open_directory(tmp_path, "a")
    assert checkpoint.fingerprint() == open_checkpoint(every_dtype).fingerprint()


def test_rank_10_comes_after_rank_9(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(24.0).reshape(12, 2)}
    checkpoint = open_directory(write(tmp_path, tensors, [Shard(0)], [12]), "a")
    extents = checkpoint.extents("a", 0, 96)
    assert extents is not None
    assert [extent.path for extent in extents] == [
        str(file_of(tmp_path, rank, 12)) for rank in range(12)
    ]
    assert torch.equal(checkpoint.read("a"), tensors["a"])


def test_extents_are_where_the_bytes_lie(tmp_path: Path) -> None:
    tensors = model()
    checkpoint = open_directory(write(tmp_path, tensors, sharded(tensors), [4]), "a")
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else b""
        for start, stop in ((0, len(raw)), (3, len(raw) - 1), (len(raw) // 2, len(raw) // 2)):
            extents = checkpoint.extents(name, start, stop - start)
            assert extents is not None, name
            joined = b""
            for path, offset, nbytes in extents:
                with open(path, "rb") as file:
                    file.seek(offset)
                    joined += file.read(nbytes)
            assert joined == raw[start:stop], name
        assert checkpoint.view(name) is None


PLACEMENTS = [Replicate(), Shard(0), Shard(1), Shard(2)]


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    mesh=st.sampled_from([(1,), (3,), (2, 2), (2, 3), (4, 1)]),
    data=st.data(),
)
def test_any_mesh_is_put_together_as_torch_cut_it(
    tmp_path: Path, same_bits: Same, shape: list[int], mesh: tuple[int, ...], data: st.DataObject
) -> None:
    fit = [each for each in PLACEMENTS if not isinstance(each, Shard) or each.dim < len(shape)]
    placements = data.draw(
        st.lists(st.sampled_from(fit), min_size=len(mesh), max_size=len(mesh)).filter(
            lambda drawn: (
                len({each for each in drawn if each != Replicate()})
                == sum(each != Replicate() for each in drawn)
            )
        )
    )
    shutil.rmtree(tmp_path / "actor", ignore_errors=True)
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    tensors = {"a": tensor, "b": torch.ones(2)}
    wanted = {"a": placements, "b": [Replicate()] * len(mesh)}
    checkpoint = open_directory(write(tmp_path / "actor", tensors, wanted, mesh), "a")
    assert same_bits(checkpoint.read("a"), tensor)
    first = data.draw(st.integers(0, tensor.nbytes))
    last = data.draw(st.integers(first, tensor.nbytes))
    buffer = bytearray(last - first)
    checkpoint.read_into("a", first, memoryview(buffer))
    assert buffer == tensor.numpy().tobytes()[first:last]


def test_hybrid_sharding_reads_one_replica(tmp_path: Path, same_bits: Same) -> None:
    tensors = {"a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0))}
    write(tmp_path, tensors, [Replicate(), Shard(0)], [2, 2])
    checkpoint = open_directory(tmp_path, "a")
    assert same_bits(checkpoint.read("a"), tensors["a"])
    extents = checkpoint.extents("a", 0, 60)
    assert extents is not None
    assert [extent.path for extent in extents] == [
        str(file_of(tmp_path, rank, 4)) for rank in (0, 1)
    ]


def test_columns_have_no_extents(tmp_path: Path, same_bits: Same) -> None:
    tensors = {"a": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}
    checkpoint = open_directory(write(tmp_path, tensors, [Shard(1)], [4]), "a")
    assert checkpoint.extents("a", 0, 96) is None
    assert checkpoint.view("a") is None
    assert same_bits(checkpoint.read("a", slice(1, 3)), tensors["a"][1:3])


def test_parts_that_are_no_rows_in_the_file_are_read(tmp_path: Path, same_bits: Same) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    for rank in range(2):
        with Group(rank, 2) as mesh:
            part = whole.t().contiguous().t()[2 * rank : 2 * rank + 2]
            even = DTensor.from_local(part.contiguous(), mesh, [Shard(0)], run_check=False)
            odd = DTensor.from_local(part.contiguous(), mesh, [Shard(0)], run_check=False)
            odd._local_tensor = part
            torch.save({"odd": odd, "even": even}, file_of(tmp_path, rank, 2))
    checkpoint = open_directory(tmp_path, "a")
    assert checkpoint.extents("odd", 0, 96) is None
    assert checkpoint.extents("even", 0, 96) is not None
    assert same_bits(checkpoint.read("odd"), whole)
    assert same_bits(checkpoint.read("odd", slice(1, 3)), whole[1:3])
    assert same_bits(checkpoint.read("even"), whole)


def test_ties_are_found(tmp_path: Path) -> None:
    embed = torch.ones(6, 2)
    for rank in range(2):
        with Group(rank, 2) as mesh:
            part = place(embed, mesh, [Shard(0)])
            again = place(embed, mesh, [Shard(0)]).to_local().clone()
            alike = DTensor.from_local(again, mesh, [Shard(0)], run_check=False)
            torch.save({"embed": part, "head": part, "alike": alike}, file_of(tmp_path, rank, 2))
    assert open_directory(tmp_path, "a").ties == {"head": "embed"}


FSDP2_RUN = """
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

root, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=3)
mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("fsdp",))
torch.manual_seed(0)
parts = [torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3, bias=False)]
model = torch.nn.Sequential(*parts)
for part in parts:
    fully_shard(part, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
model(torch.randn(2, 6, generator=torch.Generator().manual_seed(rank))).sum().backward()
optimizer.step()
state = model.state_dict()
torch.save(state, root / f"model_world_size_3_rank_{rank}.pt")
torch.save(optimizer.state_dict(), root / f"optim_world_size_3_rank_{rank}.pt")
whole = {name: part.full_tensor() for name, part in state.items()}
if rank == 0:
    torch.save(whole, root / "whole.pth")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_fsdp2_itself(tmp_path: Path) -> None:
    """As verl's checkpoint manager saves them, after a step of training in real processes."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", FSDP2_RUN, str(tmp_path), str(rank)])
        for rank in range(3)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0, 0]
    checkpoint = open_directory(tmp_path, "a")
    whole = open_checkpoint(tmp_path / "whole.pth")
    assert len(checkpoint.names()) == 5
    assert checkpoint.fingerprint() == whole.fingerprint()


def test_pair_with_safetensors_counts_what_differs(tmp_path: Path) -> None:
    base = model()
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["model.embed_tokens.weight"][::3, 1] += 1
    tuned["model.norm.weight"][4] += 1
    tuned["one.weight"][0, 0] += 1
    save_file(base, tmp_path / "model.safetensors")
    columns = sharded(base) | {"model.layers.0.mlp.up_proj.weight": [Shard(1)]}
    shards = open_directory(write(tmp_path / "actor", tuned, columns, [3]), "shards")
    whole = open_checkpoint(tmp_path / "model.safetensors")
    for pair in (open_pair(whole, shards), open_pair(shards, whole)):
        assert update_sparsity(pair).updated == 6 + 1 + 1
    same = open_directory(write(tmp_path / "again", base, columns, [4]), "shards")
    assert update_sparsity(open_pair(whole, same)).updated == 0


def test_checkpoint_travels_to_workers(tmp_path: Path) -> None:
    tensors = model()
    checkpoint = open_directory(write(tmp_path, tensors, sharded(tensors), [2]), "a")
    raw = pickle.dumps(checkpoint)
    assert pickle.loads(raw).fingerprint() == checkpoint.fingerprint()


def test_config_is_that_beside_the_shards(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    assert open_directory(tmp_path, "a").config == {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_directory(tmp_path, "a").config == {"model_type": "llama"}
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert open_directory(tmp_path, "a").config == {"model_type": "qwen3"}


def test_states_of_the_trainer_are_no_weights(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    for rank in range(2):
        (tmp_path / f"optim_world_size_2_rank_{rank}.pt").write_bytes(b"not read")
        (tmp_path / f"extra_state_world_size_2_rank_{rank}.pt").write_bytes(b"not read")
    (tmp_path / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
    assert open_directory(tmp_path, "a").names() == ["a"]


def test_shards_saved_on_gpus_are_read_without_one(tmp_path: Path, same_bits: Same) -> None:
    tensors = {"a": torch.arange(6.0).reshape(3, 2)}
    write(tmp_path, tensors, [Shard(0)], [2])

    def to_cuda(name: str, data: bytes) -> bytes:
        there = b"X\x06\x00\x00\x00cuda:0"
        return data.replace(b"X\x03\x00\x00\x00cpu", there) if name == "data.pkl" else data

    for rank in range(2):
        rezip(file_of(tmp_path, rank, 2), to_cuda)
    assert same_bits(open_directory(tmp_path, "a").read("a"), tensors["a"])


def rezip(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write a zip file of `torch.save` again, each record changed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, change(name.partition("/")[2], data))


def test_opening_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    capfd.readouterr()
    caplog.clear()
    open_directory(tmp_path, "a")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_change_after_opening_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    checkpoint = open_directory(tmp_path, "a")
    assert checkpoint.identity() == checkpoint.identity_when_opened()
    checkpoint.check_unchanged()
    os.utime(file_of(tmp_path, 1, 2), ns=(0, 0))
    assert checkpoint.identity() != checkpoint.identity_when_opened()
    for read in (checkpoint.check_unchanged, lambda: checkpoint.read("a")):
        with pytest.raises(CheckpointError, match=r"rank_1\.pt changed after it was opened"):
            read()


def test_names_that_are_recognised() -> None:
    assert recognises(["config.json", "model_world_size_16_rank_3.pt"])
    for name in (
        "optim_world_size_2_rank_0.pt",
        "model_world_size_2_rank_0.pth",
        "model_world_size_0_rank_0.pt",
        "model_world_size_2_rank_01.pt",
        "xmodel_world_size_2_rank_0.pt",
        "model_world_size_2_rank_0.pt\n",
    ):
        assert not recognises([name])


def test_missing_rank(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(12)}, [Shard(0)], [12])
    file_of(tmp_path, 3, 12).unlink()
    file_of(tmp_path, 10, 12).unlink()
    assert refused(tmp_path) == (
        f"{tmp_path} holds 10 shards of 12, 2 missing: model_world_size_12_rank_3.pt, "
        "model_world_size_12_rank_10.pt; on multi-node runs each node keeps its own ranks: copy "
        "the files of all nodes here"
    )


def test_rank_beyond_the_world(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(12)}, [Shard(0)], [2])
    shutil.copy(file_of(tmp_path, 1, 2), file_of(tmp_path, 2, 2))
    assert refused(tmp_path) == (
        f"{tmp_path} holds model_world_size_2_rank_2.pt, but 2 ranks count from 0 to 1; remove "
        "what is not of this run"
    )


def test_two_world_sizes(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [4])
    assert refused(tmp_path) == (
        f"{tmp_path} holds shards of several runs: 2 files of world size 2, 4 files of world size "
        "4; remove the files of all but one"
    )


@pytest.mark.parametrize(
    ("other", "placements", "said"),
    [
        (
            {"a": torch.ones(4, 3), "c": torch.ones(4)},
            [Shard(0)],
            "b is missing in the former, f32[4] as Shard(0) on a mesh of 2 in the latter",
        ),
        (
            {"a": torch.ones(4, 3), "b": torch.ones(4), "c": torch.ones(4)},
            [Shard(0)],
            "c is f32[4] as Shard(0) on a mesh of 2 in the former, missing in the latter",
        ),
        (
            {"a": torch.ones(4, 2), "b": torch.ones(4)},
            [Shard(0)],
            "a is f32[4,2] as Shard(0) on a mesh of 2 in the former, f32[4,3] as Shard(0) on a "
            "mesh of 2 in the latter",
        ),
        (
            {"a": torch.ones(4, 3).bfloat16(), "b": torch.ones(4)},
            [Shard(0)],
            "a is bf16[4,3] as Shard(0) on a mesh of 2 in the former, f32[4,3] as Shard(0) on a "
            "mesh of 2 in the latter",
        ),
        (
            {"a": torch.ones(4, 3), "b": torch.ones(4)},
            {"a": [Shard(1)], "b": [Shard(0)]},
            "a is f32[4,3] as Shard(1) on a mesh of 2 in the former, f32[4,3] as Shard(0) on a "
            "mesh of 2 in the latter",
        ),
        (
            {"a": torch.ones(4, 3), "b": torch.ones(4)},
            {"a": None, "b": [Shard(0)]},
            "a is f32[4,3], not sharded in the former, f32[4,3] as Shard(0) on a mesh of 2 in the "
            "latter",
        ),
    ],
)
def test_ranks_of_two_runs(tmp_path: Path, other: Tensors, placements: Any, said: str) -> None:
    write(tmp_path / "one", {"a": torch.ones(4, 3), "b": torch.ones(4)}, [Shard(0)], [2])
    write(tmp_path / "other", other, placements, [2])
    shutil.copy(file_of(tmp_path / "other", 1, 2), file_of(tmp_path / "one", 1, 2))
    root = tmp_path / "one"
    assert refused(root) == (
        f"{file_of(root, 1, 2)} and model_world_size_2_rank_0.pt are not of one checkpoint: {said};"
        " were the files of two runs or steps mixed?"
    )


def test_ranks_on_two_meshes(tmp_path: Path) -> None:
    write(tmp_path / "one", {"a": torch.ones(4)}, [Replicate(), Shard(0)], [2, 2])
    write(tmp_path / "other", {"a": torch.ones(4)}, [Replicate(), Shard(0)], [1, 4])
    shutil.copy(file_of(tmp_path / "other", 0, 4), file_of(tmp_path / "one", 0, 4))
    assert (
        "rank_1.pt and model_world_size_4_rank_0.pt are not of one checkpoint: a is f32[4] as "
        "Replicate, Shard(0) on a mesh of 2x2 in the former, f32[4] as Replicate, Shard(0) on a "
        "mesh of 1x4 in the latter"
    ) in refused(tmp_path / "one")


def test_file_of_another_rank(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    shutil.copy(file_of(tmp_path, 0, 2), file_of(tmp_path, 1, 2))
    assert refused(tmp_path) == (
        f"{file_of(tmp_path, 1, 2)} was not written by rank 1: its mesh of 2 puts it at (0,), not "
        "at (1,); was the file renamed, or copied from another rank?"
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_that_do_not_add_up(tmp_path: Path, rows: int) -> None:
    for rank, held in enumerate((2, rows)):
        with Group(rank, 2) as mesh:
            part = DTensor.from_local(
                torch.ones(held, 3),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size((4, 3)),
                stride=(3, 1),
            )
            torch.save({"a": part}, file_of(tmp_path, rank, 2))
    assert refused(tmp_path) == (
        f"the shards in {tmp_path} do not add up: a is f32[4,3] as Shard(0) on a mesh of 2, but "
        f"along dimension 0 the ranks hold 2, {rows}; were the files of two runs or steps mixed?"
    )


def test_part_that_is_too_wide(tmp_path: Path) -> None:
    for rank, width in enumerate((3, 2)):
        with Group(rank, 2) as mesh:
            part = DTensor.from_local(
                torch.ones(2, width),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size((4, 3)),
                stride=(3, 1),
            )
            torch.save({"a": part}, file_of(tmp_path, rank, 2))
    assert "but along dimension 1 the ranks hold 3, 2; were" in refused(tmp_path)


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (Partial(), "Partial(sum)"),
        (_StridedShard(0, split_factor=2), "_StridedShard(dim=0, sf=2)"),
    ],
)
def test_unknown_placement(tmp_path: Path, placement: Any, said: str) -> None:
    for rank in range(2):
        with Group(rank, 2) as mesh:
            part = DTensor.from_local(torch.ones(2), mesh, [placement], run_check=False)
            torch.save({"evil\x1b[2J": part}, file_of(tmp_path, rank, 2))
    assert refused(tmp_path) == (
        f"{file_of(tmp_path, 0, 2)} holds evil\\x1b[2J as {said}, a placement that cannot be put "
        "together here; merge the shards with the tool of the trainer that wrote them, and pass "
        "the result"
    )


def test_dimension_split_twice(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(8)}, [Shard(0), Shard(0)], [2, 2])
    assert "holds a as f32[8] as Shard(0), Shard(0) on a mesh of 2x2, split twice along one" in (
        refused(tmp_path)
    )


def test_mesh_over_some_of_the_ranks(tmp_path: Path) -> None:
    for rank in range(4):
        with Group(rank, 4, (2, 2)) as mesh:
            del mesh
            inner = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))["inner"]
            part = DTensor.from_local(torch.ones(2), inner, [Shard(0)], run_check=False)
            torch.save({"a": part}, file_of(tmp_path, rank, 4))
    assert (
        "rank_0.pt holds a on a mesh of 2, which are not the 4 ranks of this checkpoint; merge"
        in refused(tmp_path)
    )


def test_plain_tensors_of_several_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"a": torch.ones(2)}, file_of(tmp_path, rank, 2))
    assert refused(tmp_path) == (
        f"{file_of(tmp_path, 0, 2)} holds plain tensors only, no DTensor that says which part of "
        "the model it is; if every rank holds the whole model, pass this file"
    )


@pytest.mark.parametrize(
    ("place_of", "named"),
    [("huggingface", "huggingface/model.safetensors"), (".", "model.safetensors")],
)
def test_whole_weights_beside_the_shards(tmp_path: Path, place_of: str, named: str) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    (tmp_path / place_of).mkdir(exist_ok=True)
    save_file({"a": torch.ones(4)}, tmp_path / named)
    assert refused(tmp_path) == (
        f"{tmp_path} holds two checkpoints: FSDP shards, and {named}; pass {tmp_path / named} for "
        "the latter, or move it away for the shards"
    )


class Runs:
    """Unpickled, it would make a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickle_that_wants_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    path = file_of(tmp_path, 1, 2)
    torch.save({"a": Runs(tmp_path / "ran")}, path)
    assert refused(tmp_path) == (
        f"refusing to unpickle {path}: it needs `{os.mkdir.__module__}.mkdir`, which is not a "
        "tensor class; a checkpoint holds weights only, save it again as safetensors"
    )
    assert not (tmp_path / "ran").exists()


def lying(root: Path, change: Callable[[Any], None]) -> None:
    """Two ranks, of which the second's pickle says what is not so."""
    for rank in range(2):
        with Group(rank, 2) as mesh:
            part = place(torch.ones(4, 2), mesh, [Shard(0)])
            if rank == 1:
                change(part)
            torch.save({"a": part}, file_of(root, rank, 2))


def no_tensor(part: Any) -> None:
    part._local_tensor = {"a": 1}


def another_dtype(part: Any) -> None:
    part._local_tensor = torch.ones(2, 2).half()


def no_mesh(part: Any) -> None:
    part._spec.mesh = 3


def no_spec(part: Any) -> None:
    part._spec = [1, 2]


def no_dim(part: Any) -> None:
    part._spec.placements = (Shard(7),)


def no_placements(part: Any) -> None:
    part._spec.placements = ()


@pytest.mark.parametrize(
    "change", [no_tensor, another_dtype, no_mesh, no_spec, no_dim, no_placements]
)
def test_what_the_pickle_says_is_not_trusted(tmp_path: Path, change: Callable[[Any], None]) -> None:
    lying(tmp_path, change)
    assert refused(tmp_path).startswith(f"{file_of(tmp_path, 1, 2)} is truncated or corrupt: ")


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer"])
def test_damaged_file(tmp_path: Path, damage: str) -> None:
    write(tmp_path, {"a": torch.ones(400)}, [Shard(0)], [2])
    path = file_of(tmp_path, 1, 2)
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-300], "empty": b"", "pointer": b"version https://git"}[damage])
    said = "is a Git LFS pointer" if damage == "pointer" else "is truncated or corrupt"
    assert refused(tmp_path).startswith(f"{path} {said}")


def test_one_file_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)}, [Shard(0)], [2])
    path = file_of(tmp_path, 0, 2)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == (
        f"{path} holds sharded tensors (DTensor), of which one file is only a part; pass the "
        "directory that holds model_world_size_N_rank_R.pt of all ranks, or save whole tensors "
        "(DTensor.full_tensor)"
    )


def test_unknown_name(tmp_path: Path) -> None:
    write(tmp_path, {"a.weight": torch.ones(4)}, [Shard(0)], [2])
    checkpoint = open_directory(tmp_path, "run")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("a.weigth")
    assert str(caught.value) == "run has no tensor a.weigth; did you mean a.weight?"


def test_address_of_the_file_follows_from_some_storages(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    records = Records([(64, 12), (page, 300), (2 * page, 300), (2 * page + 320, 7)], native=True)
    at = 9 * page
    known = {at + page: 300, at + 2 * page: 300}
    assert mapped_from_some(tmp_path, records, known) == at
    assert mapped_from_some(tmp_path, records, {at + 2 * page + 320: 7}) == at
    assert mapped_from_some(tmp_path, records, {}) is None
    assert mapped_from_some(tmp_path, records, {at + page: 300}) is None  # or the one after it
    for wrong in ({at + page: 301}, {at + page: 300, at + 3 * page: 300}, {at + page + 64: 300}):
        with pytest.raises(CheckpointError, match="and the data stored with it disagree"):
            mapped_from_some(tmp_path, records, wrong)


def test_what_each_rank_has_of_its_own_is_not_taken_from_the_first(tmp_path: Path) -> None:
    for rank in range(2):
        with Group(rank, 2, (2,)) as mesh:
            parts = {
                "norm.weight": place(torch.ones(4), mesh, [Shard(0)]),
                "experts.up_proj": torch.full((2, 3), float(rank)),
                "inv_freq": torch.arange(3.0),
            }
            torch.save(parts, file_of(tmp_path, rank, 2))
    assert refused(tmp_path) == (
        f"experts.up_proj in {tmp_path} is whole on every rank, and another on rank 1 than on "
        "rank 0; parallel experts, each rank with its own? merge the shards with the trainer's "
        "own script"
    )


def test_a_step_of_a_run_pairs_with_files_of_whole_tensors(tmp_path: Path) -> None:
    tensors = model()
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    moved = {name: tensor.clone() for name, tensor in tensors.items()}
    moved["model.norm.weight"][4] += 1
    step = tmp_path / "run" / "global_step_40"
    write(step / "actor", moved, sharded(moved), [2])
    (step / "data.pt").write_bytes(b"a dataloader's state")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("40")
    for tuned in (tmp_path / "run", step, step / "actor"):
        pair = open_pair(tmp_path / "base", tuned)
        assert pair.problems == ()
        assert {t.name: t.updated for t in update_sparsity(pair).per_tensor if t.updated} == {
            "model.norm.weight": 1
        }
