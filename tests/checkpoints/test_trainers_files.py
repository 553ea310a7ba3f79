"""Checkpoints that verl, SkyRL, Megatron and DeepSpeed write themselves.

The programs in `writers/` drive each library's own saving code, in several processes on the CPU.
Where a library is missing its tests are skipped; `tox -e trainers` has all of them.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from pytest_subnet import CheckpointError, open_checkpoint, open_pair, update_sparsity

if TYPE_CHECKING:
    from collections.abc import Callable

    Same = Callable[[torch.Tensor, torch.Tensor], bool]

WRITERS = Path(__file__).with_name("writers")


def written_by(library: str, program: str) -> Any:
    """A fixture: the directory that a program wrote, once for all tests; skips without `library`.

    It is looked for and not imported: that takes long, and warns.
    """

    @pytest.fixture(scope="module")
    def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: tox -e trainers installs it")
        path = tmp_path_factory.mktemp(library)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", WRITERS / program, path],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return path

    return directory


verl_files = written_by("verl", "verl_files.py")
skyrl_files = written_by("skyrl", "skyrl_files.py")
megatron_files = written_by("megatron", "megatron_files.py")
deepspeed_files = written_by("deepspeed", "deepspeed_files.py")


def check_tensors(found: Any, whole: Path, same_bits: Same) -> None:
    """Hold every tensor, and rows of it, to the same in a file of safetensors."""
    checkpoint, tensors = open_checkpoint(found), load_file(whole)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.read(name), tensor), name
        assert same_bits(checkpoint.read(name, slice(1, 4)), tensor[1:4]), name
    pair = open_pair(whole, found)
    assert pair.problems == ()
    assert update_sparsity(pair).updated == 0


def entries_that_differ(one: Path, other: Path) -> int:
    """Counted by torch."""
    first, second = load_file(one), load_file(other)
    return sum(int((first[name] != second[name]).sum()) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2_4", "hsdp_4", "fsdp1_4", "fsdp2_1", "fsdp1_1"])
def test_shards_of_verl(verl_files: Path, same_bits: Same, kind: str) -> None:
    whole = verl_files / f"{kind}.safetensors"
    check_tensors(verl_files / kind, whole, same_bits)
    check_tensors(verl_files / kind / "global_step_1" / "actor", whole, same_bits)
    opened = open_checkpoint(verl_files / kind)
    assert opened.config["model_type"] == "llama"
    base = verl_files / "base" / "model.safetensors"
    moved = update_sparsity(open_pair(base, verl_files / kind)).updated
    assert moved == entries_that_differ(base, whole) > 1000


@pytest.mark.slow
def test_what_verl_exports_beside_its_shards(verl_files: Path, same_bits: Same) -> None:
    actor = verl_files / "exported_4" / "global_step_1" / "actor"
    exported = actor / "huggingface"
    check_tensors(verl_files / "exported_4", verl_files / "exported_4.safetensors", same_bits)
    check_tensors(exported, verl_files / "exported_4.safetensors", same_bits)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(actor)
    assert str(caught.value) == (
        f"{actor} holds two checkpoints: FSDP shards, and huggingface/model.safetensors; pass "
        f"{exported / 'model.safetensors'} for the latter, or move it away for the shards"
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_shards_of_skyrl(skyrl_files: Path, same_bits: Same, world: int) -> None:
    run = skyrl_files / f"run_{world}"
    whole = skyrl_files / f"exported_{world}" / "model.safetensors"
    check_tensors(run, whole, same_bits)
    check_tensors(run / "global_step_1" / "policy", whole, same_bits)
    base = skyrl_files / "base" / "model.safetensors"
    moved = update_sparsity(open_pair(base, run)).updated
    assert moved == entries_that_differ(base, whole) > 1000


def test_plans_of_ranks_as_megatron_keeps_them(tmp_path: Path, same_bits: Same) -> None:
    """They are in the `.metadata` of each of its checkpoints, made of further classes of torch."""
    tensors = {"decoder.weight": torch.arange(12.0).reshape(4, 3), "decoder._extra_state": "bytes"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.save(tensors, checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(tensors, is_coordinator=True)
    metadata.all_local_plans = [planner.create_local_plan()]
    path.write_bytes(pickle.dumps(metadata))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.names()) == ["decoder.weight"]
    assert same_bits(checkpoint.read("decoder.weight"), tensors["decoder.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "tensor", "pipeline"])
def test_torch_dist_of_megatron(megatron_files: Path, same_bits: Same, layout: str) -> None:
    check_tensors(megatron_files / layout, megatron_files / f"{layout}.safetensors", same_bits)
    (note,) = open_checkpoint(megatron_files / layout).notes
    assert re.search(r": 18 tensors left out, no weights: optimizer\.state\.exp_avg", note)


@pytest.mark.slow
def test_pairs_of_megatron_whatever_the_layout(megatron_files: Path) -> None:
    one, tensor, pipeline = (megatron_files / each for each in ("one", "tensor", "pipeline"))
    assert update_sparsity(open_pair(one, tensor)).updated == 0
    moved = entries_that_differ(
        megatron_files / "tensor.safetensors", megatron_files / "pipeline.safetensors"
    )
    assert update_sparsity(open_pair(tensor, pipeline)).updated == moved > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_of_deepspeed_is_converted_by_the_command(
    deepspeed_files: Path, same_bits: Same, stage: int
) -> None:
    run = deepspeed_files / f"zero_{stage}"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(run)
    models = "1 model shard" if stage < 3 else "2 model shards"
    command = f"cd {run} && python zero_to_fp32.py . out --safe_serialization --tag global_step1"
    assert str(caught.value) == (
        f"{run} is a DeepSpeed ZeRO checkpoint, with 2 optimizer shards and {models} in "
        f"global_step1/; run `{command}`, which needs deepspeed, then pass {run / 'out'}: it "
        "holds float32 masters, which are to be compared with as_dtype= the dtype that is served"
    )
    with pytest.raises(CheckpointError, match=re.escape(f"run `{command}`")):
        open_checkpoint(run / "global_step1")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    masters = deepspeed_files / f"masters_{stage}.safetensors"
    check_tensors(run / "out", masters, same_bits)
    pair = open_pair(deepspeed_files / "base", run / "out", as_dtype="bfloat16")
    before = load_file(deepspeed_files / "base" / "model.safetensors")
    after = load_file(masters)
    moved = sum(int((before[name] != after[name].bfloat16()).sum()) for name in before)
    assert update_sparsity(pair).updated == moved > 1000


@pytest.mark.slow
def test_weights_that_zero_3_did_not_gather(deepspeed_files: Path) -> None:
    run = deepspeed_files / "ungathered"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(run)
    assert str(caught.value).startswith(
        f"{run} was saved by ZeRO-3 without gathering: 16 of 21 tensors are empty, among them "
    )
