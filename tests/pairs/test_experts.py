"""Experts fused in memory against a matrix an expert on disk, in either direction."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from transformers import CONFIG_MAPPING, conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    revert_weight_conversion,
)

from pytest_subnet import open_pair, update_mask, update_sparsity
from pytest_subnet.checkpoints.experts import FUSED_FROM, ExpertsCheckpoint, fused_otherwise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

SIZES: dict[str, object] = {
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_local_experts": 3,
    "n_routed_experts": 3,
    "moe_num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}
FAMILIES = (
    *("qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "qwen2_moe", "glm4_moe", "deepseek_v2"),
    *("dots1", "minimax_m2", "hunyuan_v1_moe", "flex_olmo", "afmoe", "jamba", "nemotron_h"),
)
OTHER_NAMES_TOO = ("phimoe", "ernie4_5_moe", "exaone_moe")
"""Families of which a router or its bias has another name on disk, which is a problem still."""


class Saved(NamedTuple):
    model: PreTrainedModel
    path: Path
    fused: Path


@pytest.fixture
def saved(tmp_path: Path, build_model: Callable[..., PreTrainedModel]) -> Callable[[str], Saved]:
    """Build a tiny model of a family and save it as files have it, and as memory does."""

    def save(model_type: str) -> Saved:
        if model_type not in CONFIG_MAPPING:
            pytest.skip("this release of transformers does not have it")
        model = build_model(model_type, **SIZES)
        path, fused = tmp_path / "split", tmp_path / "fused"
        model.save_pretrained(path)
        model.save_pretrained(fused, save_original_format=False)
        return Saved(model, path, fused)

    return save


def is_expert(name: str) -> bool:
    return ".experts." in name and "shared" not in name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_in_memory_against_its_own_files(saved, model_type):
    model, path, fused = saved(model_type)
    for base, tuned in ((model, path), (path, model), (path, fused), (fused, path)):
        pair = open_pair(base, tuned)
        assert pair.problems == ()
        assert {tensor.shape for tensor in pair.tensors if is_expert(tensor.name)}
        assert all(len(tensor.shape) == 2 for tensor in pair.tensors if is_expert(tensor.name))
        found = update_sparsity(pair)
        assert (found.updated, found.numel) == (0, sum(p.numel() for p in model.parameters()))
    pair = open_pair(model, fused)
    assert (pair.problems, pair.notes, update_sparsity(pair).updated) == ((), (), 0)


@pytest.mark.parametrize("model_type", [*FAMILIES, *OTHER_NAMES_TOO])
def test_each_slice_is_what_transformers_would_save(saved, model_type, same_values):
    model, path, _ = saved(model_type)
    pair = open_pair(path, model)
    if not any(is_expert(name) and weight.ndim == 3 for name, weight in model.named_parameters()):
        pytest.skip("this release of transformers does not fuse them")
    assert isinstance(pair.tuned, ExpertsCheckpoint)
    expected = revert_weight_conversion(model, dict(model.state_dict()))
    experts = [tensor for tensor in pair.tensors if is_expert(tensor.name)]
    assert {tensor.name for tensor in experts} == {name for name in expected if is_expert(name)}
    for tensor in experts:
        assert same_values(pair.tuned.read(tensor.tuned_name), expected[tensor.name])
    assert not [problem for problem in pair.problems if is_expert(problem.name)]


@pytest.fixture
def same_values() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    def compare(one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.dtype == other.dtype and torch.equal(one, other)

    return compare


@pytest.mark.parametrize(
    ("model_type", "on_disk"),
    [
        ("qwen3_moe", ("mlp.experts.2.up_proj", "mlp.experts.0.down_proj")),
        ("mixtral", ("block_sparse_moe.experts.2.w3", "block_sparse_moe.experts.0.w2")),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_change_in_one_expert_is_found_in_that_matrix(saved, model_type, on_disk, turned):
    model, path, _ = saved(model_type)
    block = "model.layers.1.mlp.experts"
    with torch.no_grad():
        model.get_parameter(f"{block}.gate_up_proj")[2, -1, 3] += 1  # the last row is of `up`
        model.get_parameter(f"{block}.down_proj")[0, 1, 1:3] += 1
    pair = open_pair(model, path) if turned else open_pair(path, model)
    moved = {row.name: row.updated for row in update_sparsity(pair).per_tensor if row.updated}
    in_files = {
        tensor.tuned_name if turned else tensor.base_name: moved[tensor.name]
        for tensor in pair.tensors
        if tensor.name in moved
    }
    up, down = (f"model.layers.1.{name}.weight" for name in on_disk)
    assert in_files == {up: 1, down: 2}


def test_what_was_done_is_noted_and_names_that_differ_besides_are_renamed(saved):
    model, path, _ = saved("mixtral")
    pair = open_pair(path, model)
    assert pair.notes == (
        "MixtralForCausalLM: 4 tensors of fused experts compared matrix by matrix, as the other "
        "side stores them",
    )
    name = "model.layers.0.mlp.experts.1.w3.weight"
    assert pair.renamed[name] == "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert pair.notes[0] in str(update_sparsity(pair).coverage.notes)


def test_masks_of_both_directions_are_the_same(saved):
    model, path, _ = saved("qwen3_moe")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[1, 2, 3] += 1
    there, back = update_mask(open_pair(path, model)), update_mask(open_pair(model, path))
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert there.count == back.count == 1
    assert there[name].sum() == back[name].sum() == 1
    assert there[name][2, 3]
    assert back[name][2, 3]


def test_wrappers_and_a_rename_of_the_user_still_meet(saved):
    model, path, _ = saved("qwen3_moe")
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    pair = open_pair(path, wrapped)
    assert pair.problems == ()
    assert update_sparsity(pair).updated == 0
    other = {f"policy/{name}": tensor for name, tensor in model.state_dict().items()}
    for base, tuned, rename in (
        (path, other, lambda name: name.removeprefix("policy/")),
        (path, other, {name: name.removeprefix("policy/") for name in other}),
    ):
        pair = open_pair(base, tuned, rename=rename)
        assert pair.problems == ()
        assert update_sparsity(pair).updated == 0
        name = "model.layers.0.mlp.experts.1.up_proj.weight"
        assert pair.renamed[f"policy/{name}"] == name


def small(**changes: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A block of two experts, fused and split; `changes` replace or, where empty, remove."""
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(2, 6, 4, generator=generator)
    down = torch.randn(2, 4, 3, generator=generator)
    fused = {"l.experts.gate_up_proj": gate_up, "l.experts.down_proj": down}
    single = {f"l.experts.{e}.down_proj.weight": down[e].clone() for e in (0, 1)}
    for e in (0, 1):
        single[f"l.experts.{e}.gate_proj.weight"] = gate_up[e, :3].clone()
        single[f"l.experts.{e}.up_proj.weight"] = gate_up[e, 3:].clone()
    for name, tensor in changes.items():
        side = fused if name in ("gate_up_proj", "down_proj") else single
        key = f"l.experts.{name.replace('__', '.')}"
        side.pop(key, None)
        if tensor.numel():
            side[key] = tensor
    return fused, single


NONE = torch.empty(0)


def test_a_block_that_fits_is_split():
    fused, single = small()
    assert open_pair(fused, single).problems == open_pair(single, fused).problems == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"1__down_proj__weight": NONE},
        {"2__down_proj__weight": torch.ones(4, 3)},
        {"1__up_proj__weight": torch.ones(3, 5)},
        {"1__extra__weight": torch.ones(3, 4)},
        {"1__up_proj__bias": torch.ones(3)},
        {"down_proj": NONE},
        {"gate_up_proj": NONE},
        {"gate_up_proj": torch.ones(2, 4, 6), "down_proj": torch.ones(2, 3, 4)},
        {"gate_up_proj": torch.ones(2, 7, 4)},
        {"gate_up_proj": torch.ones(6, 4)},
        {"gate_up_proj": torch.ones(3, 6, 4)},
        {"gate_up_proj": torch.ones(1, 6, 4)},
    ],
)
def test_a_block_that_does_not_fit_in_every_matrix_is_left_as_it_is(changes):
    fused, single = small(**changes)
    for base, tuned in ((fused, single), (single, fused)):
        pair = open_pair(base, tuned)
        assert pair.tensors == ()
        assert pair.notes == ()
        assert {problem.name for problem in pair.problems} == {*fused, *single}
        texts = [problem.text for problem in pair.problems]
        assert any("one matrix an expert; save the model that is in memory" in t for t in texts)


def test_a_tensor_without_entries_is_not_split():
    fused, single = small(gate_up_proj=NONE)
    fused["l.experts.gate_up_proj"] = torch.empty(2, 0, 4)
    assert open_pair(fused, single).tensors == ()


def test_other_dtypes_are_a_problem_of_each_matrix_and_can_be_cast():
    fused, single = small()
    fused = {name: tensor.bfloat16() for name, tensor in fused.items()}
    pair = open_pair(fused, single)
    assert {problem.kind for problem in pair.problems} == {"retyped"}
    assert {problem.name for problem in pair.problems} == set(single)
    assert update_sparsity(open_pair(fused, single, as_dtype="bfloat16")).updated == 0


def test_quantised_experts_are_not_split():
    fused, single = small()
    fused["l.experts.down_proj_scale_inv"] = torch.ones(2, 1, 1)
    assert open_pair(fused, single).tensors == ()


def test_a_name_that_the_fused_side_has_already_is_not_taken_twice():
    fused, single = small()
    fused["module.l.experts.0.up_proj.weight"] = torch.ones(3, 4)
    assert len(open_pair(fused, single).tensors) <= 1


def expert_converters() -> dict[str, list[WeightConverter]]:
    conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    return {
        model_type: converters
        for model_type, mapping in conversion_mapping._checkpoint_conversion_mapping_cache.items()
        for converters in [
            [
                each
                for each in mapping
                if isinstance(each, WeightConverter)
                and any(isinstance(step, MergeModulelist) for step in each.operations)
            ]
        ]
        if converters
    }


@pytest.mark.skipif(
    "nemotron_h" not in CONFIG_MAPPING, reason="earlier releases fuse other families"
)
def test_every_family_of_transformers_fuses_its_experts_as_we_split_them():
    found = expert_converters()
    assert len(found) > 40
    for model_type, converters in found.items():
        assert not fused_otherwise(model_type), model_type
        for each in converters:
            (target,) = each.target_patterns
            sources = tuple(source.split(".")[-2] for source in each.source_patterns)
            assert sources in FUSED_FROM[target.rpartition(".")[2]], model_type
            dims = [(type(step).__name__, step.dim) for step in each.operations]
            assert dims == [("MergeModulelist", 0), ("Concatenate", 1)][: len(dims)], model_type


def test_a_family_that_transformers_fuses_in_another_way_is_not_split(saved, monkeypatch):
    model, path, _ = saved("qwen3_moe")
    first, second = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_moe")
    turned = WeightConverter(
        source_patterns=list(reversed(first.source_patterns)),
        target_patterns=first.target_patterns,
        operations=first.operations,
    )
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(cache, "qwen3_moe", [turned, second])
    assert fused_otherwise("qwen3_moe")
    assert open_pair(model, path).problems
    assert fused_otherwise("qwen3_vl_moe")  # one tensor on disk too, transposed


def test_files_alone_are_split_without_torch_or_transformers(saved):
    _, path, fused = saved("qwen3_moe")
    script = (
        "import sys\n"
        "from pytest_subnet import open_pair, update_sparsity\n"
        "pair = open_pair(sys.argv[1], sys.argv[2])\n"
        "assert not pair.problems and len(pair.notes) == 1\n"
        "assert update_sparsity(pair).updated == 0\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(fused)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_a_rename_to_the_name_of_a_matrix_leaves_both_tensors_as_they_are():
    fused, single = small()
    base = {f"model.{name}": tensor for name, tensor in single.items()}
    tuned = fused | {"other": torch.ones(3, 4)}
    pair = open_pair(base, tuned, rename={"other": "l.experts.0.up_proj.weight"})
    assert {"l.experts.gate_up_proj", "l.experts.down_proj"} <= {p.name for p in pair.problems}
