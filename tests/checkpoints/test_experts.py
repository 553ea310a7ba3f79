"""Fused experts shown as one matrix an expert: the same bytes, where they lie."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pytest_subnet import CheckpointError, open_checkpoint
from pytest_subnet.checkpoints.experts import ExpertsCheckpoint, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_subnet.checkpoints import Checkpoint

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ORDERS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(7, 4, generator=generator),
        GATE_UP: torch.randn(3, 10, 4, generator=generator).bfloat16(),
        DOWN: torch.randn(3, 4, 5, generator=generator).bfloat16(),
        "norm.weight": torch.ones(4),
    }


def split(fused: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by hand, as a family with a matrix an expert stores it."""
    single = {name: tensor for name, tensor in fused.items() if name not in ORDERS}
    for name, order in ORDERS.items():
        for expert, matrix in enumerate(fused[name]):
            for leaf, part in zip(order, matrix.chunk(len(order)), strict=True):
                single[f"mlp.experts.{expert}.{leaf}.weight"] = part
    return single


def shown(inner: Checkpoint) -> ExpertsCheckpoint:
    parts = {name: list(parts_of(inner.info(name), order)) for name, order in ORDERS.items()}
    return ExpertsCheckpoint(inner, parts)


@pytest.fixture(params=["in memory", "in a file", "not in row order"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    plain = tensors()
    if request.param == "in a file":
        save_file(plain, tmp_path / "model.safetensors")
        return open_checkpoint(str(tmp_path))
    if request.param == "not in row order":
        plain[GATE_UP] = plain[GATE_UP].transpose(0, 2).contiguous().transpose(0, 2)
        assert not plain[GATE_UP].is_contiguous()
    return open_checkpoint(plain)


def test_each_matrix_is_what_it_is_by_hand(
    opened: Checkpoint, same_bits: Callable[[torch.Tensor, torch.Tensor], bool]
) -> None:
    found, expected = shown(opened), split(tensors())
    assert sorted(found.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert found.info(name).shape == tensor.shape
        assert same_bits(found.read(name), tensor)
        assert same_bits(found.read(name, slice(1, 3)), tensor[1:3])
        view = found.view(name)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert view is None or view.tobytes() == raw
        part = bytearray(len(raw) - 3)
        found.read_into(name, 2, memoryview(part)[:-1])
        assert bytes(part[:-1]) == raw[2:-2]
    plain = {name: tensor.contiguous() for name, tensor in expected.items()}
    assert found.fingerprint() == open_checkpoint(plain).fingerprint()


def test_matrices_lie_where_the_fused_tensor_lies(opened: Checkpoint) -> None:
    names = shown(opened).names()
    first = names.index("mlp.experts.0.gate_proj.weight")
    assert names[first : first + 4] == [
        "mlp.experts.0.gate_proj.weight",
        "mlp.experts.0.up_proj.weight",
        "mlp.experts.1.gate_proj.weight",
        "mlp.experts.1.up_proj.weight",
    ]
    order = [name for name in names if "experts" not in name]
    assert order == [name for name in opened.names() if "experts" not in name]


def test_in_a_file_each_is_a_run_of_bytes_and_in_memory_no_copy(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    inner = open_checkpoint(str(tmp_path))
    (whole,) = inner.extents(GATE_UP, 0, inner.info(GATE_UP).nbytes) or ()
    (run,) = shown(inner).extents("mlp.experts.2.up_proj.weight", 6, 10) or ()
    assert run == (whole.path, whole.offset + 2 * 80 + 40 + 6, 10)
    plain = tensors()
    in_memory = shown(open_checkpoint(plain))
    assert in_memory.extents("mlp.experts.2.up_proj.weight", 0, 8) is None
    assert (
        in_memory.read("mlp.experts.2.up_proj.weight").data_ptr()
        == plain[GATE_UP][2, 5:].data_ptr()
    )
    plain[GATE_UP][2, 5, 0] = 77
    assert in_memory.read("mlp.experts.2.up_proj.weight")[0, 0] == 77
    view = in_memory.view("mlp.experts.2.up_proj.weight")
    assert view is not None
    assert view.ctypes.data == plain[GATE_UP][2, 5:].data_ptr()


def test_what_is_known_of_the_checkpoint_stays_known(opened: Checkpoint) -> None:
    found = shown(opened)
    assert (found.label, found.is_live, found.directory) == (
        opened.label,
        opened.is_live,
        opened.directory,
    )
    assert found.identity() == found.identity_when_opened() != opened.identity()
    found.check_unchanged()
    with pytest.raises(CheckpointError, match=r"has no tensor mlp\.experts\.gate_up_proj"):
        found.info(GATE_UP)
    with pytest.raises(CheckpointError, match="has 40 bytes; bytes 40 to 41 were asked for"):
        found.extents("mlp.experts.0.gate_proj.weight", 40, 1)


def test_a_view_of_files_travels_to_other_processes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    found = shown(open_checkpoint(str(tmp_path)))
    assert pickle.loads(pickle.dumps(found)).fingerprint() == found.fingerprint()


def test_fused_tensors_in_one_storage_are_tied_matrix_by_matrix() -> None:
    weight = torch.randn(2, 3, 4)
    inner = open_checkpoint(
        {"a.experts.down_proj": weight, "b.experts.down_proj": weight, "c": weight[0], "d": weight}
    )
    names = ("a.experts.down_proj", "b.experts.down_proj")
    parts = {name: list(parts_of(inner.info(name), ["down_proj"])) for name in names}
    assert ExpertsCheckpoint(inner, parts).ties == {
        f"b.experts.{expert}.down_proj.weight": f"a.experts.{expert}.down_proj.weight"
        for expert in (0, 1)
    }


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_the_parts_of_a_tensor_are_all_of_it_once(
    experts: int, height: int, columns: int, count: int
) -> None:
    fused = torch.arange(experts * height * count * columns).reshape(
        experts, height * count, columns
    )
    inner = open_checkpoint({"x.experts.f": fused})
    parts = list(parts_of(inner.info("x.experts.f"), [f"m{i}" for i in range(count)]))
    found = ExpertsCheckpoint(inner, {"x.experts.f": parts})
    joined = torch.cat([found.read(name) for name in found.names()])
    assert torch.equal(joined, fused.reshape(-1, columns))
