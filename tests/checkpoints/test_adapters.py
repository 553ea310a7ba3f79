"""Adapters: what is read is what peft merges, and what does not fit its base is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pytest_subnet import (
    CheckpointError,
    open_checkpoint,
    open_pair,
    update_movement,
    update_rank,
    update_sparsity,
)
from pytest_subnet.checkpoints.adapters import merging
from pytest_subnet.checkpoints.adapters.opening import is_adapter, open_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Same = Callable[[torch.Tensor, torch.Tensor], bool]
    Tensors = dict[str, torch.Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft 0.21 on transformers 5
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # it speaks of ties and of flags
]

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def llama(dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **sizes})).to(dtype)


def gpt2(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=24, **ids)).to(
        dtype
    )


def train(
    root: Path, model: Any, *, moved: float = 0.05, adapter_dtype: Any = None, **lora: Any
) -> None:
    """Write `base` and `adapter` under `root`: every weight that peft would train is moved."""
    model.save_pretrained(root / "base")
    tuned = get_peft_model(model, LoraConfig(**lora))
    for name, weight in tuned.named_parameters():
        if weight.requires_grad:
            with torch.no_grad():
                weight += torch.randn_like(weight) * (moved if "lora_" in name else 0.01)
    if adapter_dtype is not None:
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.to(adapter_dtype)
    tuned.save_pretrained(root / "adapter")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter of rank 2 on its query projections; not to be written to."""
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    train(root, llama(), target_modules=["q_proj"], r=2)
    return root


@pytest.fixture
def root(tmp_path: Path, trained: Path) -> Path:
    """A copy of it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def merged_by_peft(root: Path) -> Tensors:
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    tuned = PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
    return {name: tensor.clone() for name, tensor in tuned.state_dict().items()}


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": PROJECTIONS, "r": 4, "lora_alpha": 7},
    "rslora": {"target_modules": PROJECTIONS, "r": 3, "use_rslora": True},
    "dora": {"target_modules": PROJECTIONS, "r": 3, "use_dora": True},
    "patterns": {
        "target_modules": PROJECTIONS,
        "r": 4,
        "rank_pattern": {"down_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {r"layers\.0\..*": 3, "v_proj": 32},
    },
    "one_layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a_pattern": {"target_modules": r".*\.1\..*_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "embedding_dora": {"target_modules": ["embed_tokens", "q_proj"], "r": 4, "use_dora": True},
    "head_dora": {"target_modules": ["lm_head"], "r": 4, "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


def check_against_peft(root: Path, same_bits: Same) -> None:
    expected = merged_by_peft(root)
    checkpoint = open_adapter(root / "adapter", root / "base")
    changed = 0
    base = open_checkpoint(root / "base")
    for name in checkpoint.names():
        merged = checkpoint.read(name)
        assert same_bits(merged, expected[name]), name
        changed += name not in base.names() or not same_bits(merged, base.read(name))
    assert changed
    left = set(expected) - set(checkpoint.names())
    assert left <= {"lm_head.weight"}
    if left:
        assert same_bits(expected["lm_head.weight"], checkpoint.read(embedding_of(checkpoint)))


def embedding_of(checkpoint: Any) -> str:
    (name,) = (
        each for each in checkpoint.names() if each.endswith(("embed_tokens.weight", "wte.weight"))
    )
    return str(name)


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"embedding"}))
def test_llama_in_bfloat16_is_what_peft_merges(
    tmp_path: Path, same_bits: Same, variant: str
) -> None:
    train(tmp_path, llama(), **VARIANTS[variant])
    check_against_peft(tmp_path, same_bits)


@pytest.mark.parametrize("variant", ["rslora", "dora", "patterns", "embedding", "whole"])
def test_llama_in_float32_is_what_peft_merges(
    tmp_path: Path, same_bits: Same, variant: str
) -> None:
    train(tmp_path, llama(torch.float32), **VARIANTS[variant])
    check_against_peft(tmp_path, same_bits)


GPT2 = {
    "conv1d": {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
    "square": {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    "square_without_the_flag": {"target_modules": ["attn.c_proj", "lm_head"]},
    "dora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    "all_biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    "own_biases": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
    "norms": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]},
}


@pytest.mark.parametrize("variant", GPT2)
def test_gpt2_in_bfloat16_is_what_peft_merges(
    tmp_path: Path, same_bits: Same, variant: str
) -> None:
    train(tmp_path, gpt2(), **GPT2[variant])
    check_against_peft(tmp_path, same_bits)


@pytest.mark.parametrize("variant", ["conv1d", "dora"])
def test_gpt2_in_float32_is_what_peft_merges(tmp_path: Path, same_bits: Same, variant: str) -> None:
    train(tmp_path, gpt2(torch.float32), **GPT2[variant])
    check_against_peft(tmp_path, same_bits)


@pytest.mark.parametrize("variant", ["embedding", "head", "embedding_dora"])
def test_an_adapter_on_a_tied_matrix_moves_both_of_its_names(
    tmp_path: Path, same_bits: Same, variant: str
) -> None:
    train(tmp_path, llama(torch.float32, tie_word_embeddings=True), **VARIANTS[variant])
    check_against_peft(tmp_path, same_bits)
    checkpoint = open_adapter(tmp_path / "adapter", tmp_path / "base")
    assert "lm_head.weight" not in checkpoint.names()  # as in the base, which ties it


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_tied_matrix_trained_whole_is_two_matrices(
    tmp_path: Path, same_bits: Same, saved: list[str]
) -> None:
    model = llama(tie_word_embeddings=True)
    train(tmp_path, model, target_modules=["q_proj"], modules_to_save=saved)
    check_against_peft(tmp_path, same_bits)
    checkpoint = open_adapter(tmp_path / "adapter", tmp_path / "base")
    assert checkpoint.names()[-1] == "lm_head.weight"
    pair = open_pair(tmp_path / "base", checkpoint)
    assert pair.problems == ()
    updated = {row.name for row in update_sparsity(pair).per_tensor if row.updated}
    assert updated == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)} | {
        "lm_head.weight" if name == "lm_head" else "model.embed_tokens.weight" for name in saved
    }
    assert (
        "lm_head.weight, model.embed_tokens.weight: one matrix in the base, two in the merged "
        "model, as the adapter trained one of them whole"
    ) in checkpoint.notes


Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_"


def product(root: Path, module: str = Q, scale: float = 1.0, dtype: Any = torch.float32) -> Any:
    """scale * B @ A of the adapter, by the formula."""
    stored = load_file(root / "adapter" / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{module}.lora_{part}.weight"].to(dtype) for part in "AB")
    return (b @ a) * scale


def test_the_update_of_an_embedding_is_rounded_once(tmp_path: Path, same_bits: Same) -> None:
    train(tmp_path, llama(), target_modules=["embed_tokens"], r=4, lora_alpha=4)
    name = "model.embed_tokens.weight"
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    delta = (stored[f"{key}B"] @ stored[f"{key}A"]).T
    before = open_checkpoint(tmp_path / "base").read(name)
    merged = open_adapter(tmp_path / "adapter", tmp_path / "base")
    assert same_bits(merged.read(name), (before.float() + delta).bfloat16())
    assert not same_bits(merged.read(name), merged_by_peft(tmp_path)[name])
    assert merged.notes[1:] == (
        f"{name}: peft would round the update of an embedding to the base's dtype before it adds "
        "it",
    )


def test_an_adapter_in_bfloat16_is_rounded_once(tmp_path: Path, same_bits: Same) -> None:
    train(tmp_path, llama(), adapter_dtype=torch.bfloat16, target_modules=["q_proj"], r=4)
    before = open_checkpoint(tmp_path / "base").read(f"{Q}.weight")
    merged = open_adapter(tmp_path / "adapter", tmp_path / "base")
    expected = (before.float() + product(tmp_path, scale=2.0)).bfloat16()
    assert same_bits(merged.read(f"{Q}.weight"), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    in_halves = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    theirs = in_halves.merge_and_unload().state_dict()[f"{Q}.weight"]
    assert not same_bits(theirs, expected)
    assert merged.notes[1:] == (
        f"{tmp_path / 'adapter'} holds A and B in bfloat16, to which peft would round their "
        "product before it adds it",
    )


def test_algebraic_is_the_sum_in_float64(tmp_path: Path, same_bits: Same) -> None:
    train(tmp_path, llama(), target_modules=["q_proj"], r=4, modules_to_save=["norm"])
    algebraic = open_adapter(tmp_path / "adapter", tmp_path / "base", reading="algebraic")
    base = open_checkpoint(tmp_path / "base")
    name = f"{Q}.weight"
    exact = base.read(name).double() + product(tmp_path, scale=2.0, dtype=torch.float64)
    assert algebraic.info(name) == (name, (32, 32), "float64", 32 * 32 * 8)
    assert same_bits(algebraic.read(name), exact)
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert same_bits(algebraic.read(untouched), base.read(untouched))


def test_algebraic_dora_is_its_formula(tmp_path: Path) -> None:
    train(tmp_path, llama(), target_modules=["q_proj"], r=4, use_dora=True)
    algebraic = open_adapter(tmp_path / "adapter", tmp_path / "base", reading="algebraic")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    magnitude = stored[f"base_model.model.{Q}.lora_magnitude_vector"].double()
    before = open_checkpoint(tmp_path / "base").read(f"{Q}.weight").double()
    moved = before + product(tmp_path, scale=2.0, dtype=torch.float64)
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(algebraic.read(f"{Q}.weight"), expected, rtol=1e-13, atol=0)


def test_algebraic_updates_are_dense_and_of_low_rank_and_merged_ones_neither(
    tmp_path: Path,
) -> None:
    train(
        tmp_path, llama(hidden_size=64), moved=0.002, target_modules=["q_proj"], r=3, lora_alpha=1
    )
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    algebraic = open_pair(
        base, open_adapter(adapter, base, reading="algebraic"), as_dtype="float64"
    )
    assert update_sparsity(algebraic, include="*q_proj*").sparsity == 0
    ranks = update_rank(algebraic, include="*q_proj*").per_tensor
    assert [(row.rank, row.resolved_rank, row.explained_by_rounding) for row in ranks] == [
        (3, None, False)
    ] * 2
    merged = open_pair(base, open_adapter(adapter, base))
    assert 0.1 < update_sparsity(merged, include="*q_proj*").sparsity < 0.9
    assert all(row.rank > 60 for row in update_rank(merged, include="*q_proj*").per_tensor)
    assert algebraic.notes[0] == (
        f"{adapter} is an adapter on {base}: 2 matrices with an update by LoRA; read as base + "
        "update in float64, unrounded"
    )
    assert merged.notes == (
        f"{adapter} is an adapter on {base}: 2 matrices with an update by LoRA; merged in "
        "float32 and rounded once to bfloat16",
    )


def test_a_pair_counts_what_it_counts_of_the_saved_merge(tmp_path: Path) -> None:
    train(tmp_path, llama(), **VARIANTS["patterns"])
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_file(merged_by_peft(tmp_path), tmp_path / "merged.safetensors")
    expected = update_sparsity(open_pair(base, tmp_path / "merged.safetensors"))
    counted = update_sparsity(open_pair(base, open_adapter(adapter, base)))
    assert [(row.name, row.updated) for row in counted.per_tensor] == [
        (row.name, row.updated) for row in expected.per_tensor
    ]
    assert 0 < counted.updated < counted.numel


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    merged: list[str] = []
    merge = merging.merge

    def count(update: Any, *rest: Any) -> torch.Tensor:
        merged.append(update.target)
        return merge(update, *rest)

    monkeypatch.setattr(merging, "merge", count)
    return merged


def test_a_matrix_is_made_once_however_many_threads_ask_for_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_bits: Same
) -> None:
    train(tmp_path, llama(), target_modules=["down_proj"])
    merged = counting(monkeypatch)
    checkpoint = open_adapter(tmp_path / "adapter", tmp_path / "base")
    assert merged == []  # opening makes nothing
    names = [name for name in checkpoint.names() if "down_proj" in name]
    found = {name: bytearray(checkpoint.info(name).nbytes) for name in names}

    def read(name: str, start: int) -> None:
        checkpoint.read_into(name, start, memoryview(found[name])[start : start + 256])

    threads = [
        threading.Thread(target=read, args=(name, start))
        for name in names
        for start in range(0, len(found[name]), 256)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(merged) == names
    expected = merged_by_peft(tmp_path)
    for name in names:
        tensor = torch.frombuffer(found[name], dtype=torch.bfloat16).reshape(32, 48)
        assert same_bits(tensor, expected[name])


def test_only_the_last_matrices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, llama(), target_modules=PROJECTIONS)
    monkeypatch.setattr("pytest_subnet.checkpoints.adapters.opening._KEPT_BYTES", 0)
    merged = counting(monkeypatch)
    checkpoint = open_adapter(tmp_path / "adapter", tmp_path / "base")
    names = [name for name in checkpoint.names() if name.split(".")[-2] in PROJECTIONS]
    for name in (names[0], names[1], names[0], names[2], names[0], names[1]):
        checkpoint.read(name)
    assert merged == [names[0], names[1], names[2], names[1]]


def test_what_is_stored_is_read_where_it_is_stored(tmp_path: Path) -> None:
    train(tmp_path, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = open_checkpoint(tmp_path / "base")
    checkpoint = open_adapter(tmp_path / "adapter", base)
    untouched = f"{Q.replace('q_proj', 'k_proj')}.weight"
    assert checkpoint.extents(untouched, 4, 8) == base.extents(untouched, 4, 8)
    stored = open_checkpoint(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = stored.extents("base_model.model.lm_head.weight", 4, 8)
    assert checkpoint.extents("lm_head.weight", 4, 8) == whole
    assert checkpoint.extents(f"{Q}.weight", 4, 8) is None
    made = checkpoint.view(f"{Q}.weight")
    assert made is not None
    assert made is checkpoint.view(f"{Q}.weight")
    with pytest.raises(CheckpointError, match=r"has 2,048 bytes; bytes 2,044 to 2,052 were asked"):
        checkpoint.extents(f"{Q}.weight", 2044, 8)
    with pytest.raises(CheckpointError, match=r"has no tensor lm_hat\.weight; did you mean lm_hea"):
        checkpoint.info("lm_hat.weight")


def test_a_whole_tensor_in_another_dtype_is_cast_and_said_to_be(
    tmp_path: Path, same_bits: Same
) -> None:
    train(tmp_path, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    change_tensors(tmp_path, lambda name, tensor: tensor.float() + 1e-4 * ("lm_head" in name))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    checkpoint = open_adapter(tmp_path / "adapter", tmp_path / "base")
    whole = stored["base_model.model.lm_head.weight"]
    assert same_bits(checkpoint.read("lm_head.weight"), whole.bfloat16())
    assert (
        checkpoint.notes[-1] == "lm_head.weight: trained whole in another dtype, cast to the base's"
    )
    check_against_peft(tmp_path, same_bits)
    algebraic = open_adapter(tmp_path / "adapter", tmp_path / "base", reading="algebraic")
    assert same_bits(algebraic.read("lm_head.weight"), whole)


def test_torch_files_are_adapters_too(root: Path, same_bits: Same) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert is_adapter(root / "adapter")
    check_against_peft(root, same_bits)


def test_a_pickled_copy_reads_the_same(root: Path, same_bits: Same) -> None:
    checkpoint = open_adapter(root / "adapter", root / "base")
    merged = checkpoint.read(f"{Q}.weight")
    again = pickle.loads(pickle.dumps(checkpoint))
    assert same_bits(again.read(f"{Q}.weight"), merged)
    assert again.identity() == checkpoint.identity()
    assert again.fingerprint() == checkpoint.fingerprint()


def test_a_module_is_a_base_and_is_read_as_it_is_now(tmp_path: Path, same_bits: Same) -> None:
    model: Any = llama(tie_word_embeddings=True)
    train(tmp_path, copy.deepcopy(model), target_modules=["embed_tokens", "q_proj"], use_dora=True)
    checkpoint = open_adapter(tmp_path / "adapter", model)
    expected = merged_by_peft(tmp_path)
    assert checkpoint.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    for name in ("lm_head.weight", "model.embed_tokens.weight", f"{Q}.weight"):
        assert same_bits(checkpoint.read(name), expected[name])
    assert checkpoint.is_live
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
    assert not same_bits(checkpoint.read(f"{Q}.weight"), expected[f"{Q}.weight"])


@pytest.mark.parametrize("of_its_own", [True, False])
def test_a_scan_merges_into_the_base_as_it_is_now(tmp_path: Path, of_its_own: bool) -> None:
    """Also where torch counts no write: through `.data`, and to a tensor made for inference."""
    train(tmp_path, llama(torch.float32), target_modules=["q_proj"])
    with torch.inference_mode(mode=not of_its_own):
        model: Any = llama(torch.float32)
        pair = open_pair(model, open_adapter(tmp_path / "adapter", model))
        update_sparsity(pair)
        weight = model.model.layers[0].self_attn.q_proj.weight
        (weight.data if of_its_own else weight).mul_(5)
        fresh = open_pair(model, open_adapter(tmp_path / "adapter", model))
        assert update_movement(pair).max_change == update_movement(fresh).max_change < 1


@pytest.mark.parametrize("reading", ["merged", "algebraic"])
def test_a_module_is_not_written_to(root: Path, reading: Any, same_bits: Same) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(root / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    open_adapter(root / "adapter", model, reading=reading).fingerprint()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, before[name])


def test_nothing_random_is_drawn(tmp_path: Path) -> None:
    train(tmp_path, llama(), target_modules=["q_proj", "embed_tokens"])
    before = torch.get_rng_state()
    open_adapter(tmp_path / "adapter", tmp_path / "base").fingerprint()
    assert torch.equal(torch.get_rng_state(), before)


def test_names_without_the_backbone(tmp_path: Path, same_bits: Same) -> None:
    train(tmp_path, gpt2(), target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    expected = merged_by_peft(tmp_path)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, tmp_path / "base" / "model.safetensors")
    checkpoint = open_adapter(tmp_path / "adapter", tmp_path / "base")
    for name in checkpoint.names():
        assert same_bits(checkpoint.read(name), expected[f"transformer.{name}"])
    assert checkpoint.notes[-1] == (
        f"names in {tmp_path / 'adapter'} are read without transformer., as the base writes them"
    )


def test_a_rewritten_adapter_is_another_one(root: Path) -> None:
    checkpoint = open_adapter(root / "adapter", root / "base")
    before = checkpoint.identity()
    assert before == checkpoint.identity_when_opened()
    checkpoint.check_unchanged()
    path = root / "adapter" / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    assert checkpoint.identity() != before
    with pytest.raises(CheckpointError, match=r"adapter_config\.json changed after it was opened"):
        checkpoint.check_unchanged()


def change_config(root: Path, **settings: object) -> None:
    path = root / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def change_tensors(root: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path)


def test_an_untrained_adapter_changes_nothing_and_says_so(root: Path) -> None:
    change_tensors(root, lambda name, tensor: tensor * ("lora_A" in name))
    change_config(root, base_model_name_or_path="org/of-old")
    pair = open_pair(root / "base", open_adapter(root / "adapter", root / "base"))
    assert update_sparsity(pair).updated == 0
    assert pair.notes[1:] == (
        f"every update in {root / 'adapter'} is zero, as before the first step of training: "
        "it changes nothing",
        f"{root / 'adapter'} says that it was trained on org/of-old",
    )


def refusal_of(root: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError) as caught:
            open_adapter(root / "adapter", root / "base")
    text = str(caught.value)
    assert text.isprintable()
    return text.replace(f"{root}/", "")


BAD_ALPHA = f"adapter/adapter_config.json: lora_alpha is 1{'0' * 199}…, not a finite number"
PASS_MERGED = (
    "; that cannot be read here: merge it with peft (merge_and_unload, then save_pretrained) and "
    "pass the merged model"
)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"peft_type": "IA3"},
            "adapter is a PEFT adapter of type IA3, not LORA; merge it into its base "
            "(merge_and_unload, then save_pretrained) and pass the merged model",
        ),
        (
            {"target_parameters": ["experts.up"]},
            "adapter/adapter_config.json sets target_parameters, which adapts parameters that are "
            "no matrices of their own (fused experts)" + PASS_MERGED,
        ),
        (
            {"trainable_token_indices": [3]},
            "adapter/adapter_config.json sets trainable_token_indices, which trains single rows "
            "of an embedding" + PASS_MERGED,
        ),
        (
            {"layer_replication": [[0, 2]]},
            "adapter/adapter_config.json sets layer_replication, which copies layers of the base"
            + PASS_MERGED,
        ),
        (
            {"lora_bias": True},
            "adapter/adapter_config.json sets lora_bias, which adds to the biases too"
            + PASS_MERGED,
        ),
        (
            {"kasa_config": {"beta": 1.0}},
            "adapter/adapter_config.json sets kasa_config, which is another arithmetic than that "
            "of LoRA" + PASS_MERGED,
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "adapter/adapter_config.json sets init_lora_weights to pissa_niter_4, which changed "
            "the base as well when training started; save the adapter with "
            "path_initial_model_for_weight_conversion, or pass the merged model",
        ),
        (
            {"use_something_new": True},
            "adapter/adapter_config.json sets use_something_new, which the installed peft does "
            "not know; install the release of peft that wrote it, or a later one",
        ),
        ({"lora_alpha": 10**400}, BAD_ALPHA),
        ({"r": 0}, "adapter/adapter_config.json: r is 0, not a whole number above 0"),
        (
            {"lora_alpha": "8\x1b"},
            "adapter/adapter_config.json: lora_alpha is 8\\x1b, not a finite number",
        ),
        (
            {"rank_pattern": {"(": 4}},
            "adapter_config.json: rank_pattern or alpha_pattern holds no regular expression: "
            "missing ), unterminated subpattern at position 7",
        ),
        (
            {"target_modules": ["v_proj"]},
            f"adapter holds {KEY}A.weight, but the target_modules of its config leave that module "
            "out; save it again with peft",
        ),
        (
            {"r": 4},
            f"adapter does not fit base: {KEY}A.weight f32[2,32] and {KEY}B.weight f32[32,2] "
            f"against {Q}.weight bf16[32,32]; the rank in its config is 4",
        ),
        (
            {"use_dora": True},
            f"adapter holds {KEY}A.weight without the lora_magnitude_vector of the same module; "
            "it was cut short, save it again",
        ),
    ],
)
def test_settings_that_are_refused(root: Path, settings: dict[str, object], message: str) -> None:
    change_config(root, **settings)
    assert refusal_of(root) == message


def test_without_peft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert refusal_of(root) == (
        "adapter is a PEFT adapter, and peft is not installed; pip install "
        "'pytest-subnet[adapters]'"
    )


def test_settings_of_a_newer_peft_that_are_off_are_no_reason(root: Path) -> None:
    change_config(root, use_something_new=False, another=None)
    assert open_adapter(root / "adapter", root / "base").names()


UNKNOWN = (
    ", which its config does not speak of: no LoRA matrix, no bias that it trains and none of its "
    "modules_to_save; save the adapter again with peft"
)
GATE = "base_model.model.model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{KEY}B.weight": None},
            f"adapter holds {KEY}A.weight without the lora_B of the same "
            "module; it was cut short, save it again",
        ),
        (
            {f"{KEY}A.weight": None},
            f"adapter holds {KEY}B.weight without the lora_A of the same "
            "module; it was cut short, save it again",
        ),
        ({f"{GATE}.weight": (48, 32)}, f"adapter holds {GATE}.weight{UNKNOWN}"),
        ({f"{KEY}E": (2,)}, f"adapter holds {KEY}E{UNKNOWN}"),
        ({"model.norm.weight": (32,)}, f"adapter holds model.norm.weight{UNKNOWN}"),
        ({f"{KEY}magnitude_vector": (32,)}, f"adapter holds {KEY}magnitude_vector{UNKNOWN}"),
        (
            {f"{KEY}A.weight": (2, 30)},
            f"adapter does not fit base: {KEY}A.weight f32[2,30] and {KEY}B.weight f32[32,2] "
            f"against {Q}.weight bf16[32,32]; is this the base it was trained on?",
        ),
        (
            {f"{KEY}A.weight": (2, 32, 1)},
            f"adapter does not fit base: {KEY}A.weight f32[2,32,1] and {KEY}B.weight f32[32,2] "
            f"against {Q}.weight bf16[32,32]; only matrices are handled, no convolutions",
        ),
        (
            {f"{KEY}embedding_A": (2, 32)},
            f"adapter holds {KEY}A.weight, {KEY}B.weight, {KEY}embedding_A: matrices for a linear "
            "layer and for an embedding at once; save it again",
        ),
        (
            {f"{KEY}A": (2, 32)},
            f"adapter holds lora_A of {Q} under two names; which one counts cannot be known, save "
            "it again",
        ),
        (
            {
                f"{KEY.replace('.0.', '.7.')}A.weight": (2, 32),
                f"{KEY.replace('.0.', '.7.')}B.weight": (32, 2),
            },
            f"adapter holds {KEY.replace('.0.', '.7.')}A.weight, but base has no tensor "
            "model.layers.7.self_attn.q_proj.weight; did you mean "
            "model.layers.1.self_attn.q_proj.weight?",
        ),
    ],
)
def test_tensors_that_are_refused(
    root: Path, tensors: dict[str, tuple[int, ...] | None], message: str
) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    stored = load_file(path)
    for name, shape in tensors.items():
        stored.pop(name, None)
        if shape is not None:
            stored[name] = torch.ones(shape)
    save_file(stored, path)
    assert refusal_of(root) == message


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    train(tmp_path, llama(), target_modules=["embed_tokens"], r=2)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    stored["model.embed_tokens.weight"][-1, -1] += 1
    save_file(stored, tmp_path / "base" / "model.safetensors")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert refusal_of(tmp_path) == (
        f"adapter was not trained on base: {key}, its copy of model.embed_tokens.weight, holds "
        "other values; pass the base that it was trained on"
    )


def test_an_adapter_of_a_base_with_another_vocabulary(tmp_path: Path) -> None:
    train(tmp_path, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    llama(vocab_size=41).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    assert refusal_of(tmp_path) == (
        "adapter does not fit base: base_model.model.lm_head.weight bf16[40,32] against "
        "lm_head.weight bf16[41,32]; it has another shape than lm_head.weight there"
    )


def test_copies_of_a_base_that_was_loaded_in_float32(tmp_path: Path) -> None:
    model: Any = llama()
    model.save_pretrained(tmp_path / "served")
    train(tmp_path, model.float(), target_modules=["embed_tokens"])
    assert open_adapter(tmp_path / "adapter", tmp_path / "served").notes[0].endswith("to bfloat16")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_a_quantised_base(root: Path, dtype: torch.dtype) -> None:
    stored = load_file(root / "base" / "model.safetensors")
    stored[f"{Q}.weight"] = stored[f"{Q}.weight"].to(dtype)
    save_file(stored, root / "base" / "model.safetensors")
    assert refusal_of(root).endswith(
        "; the base is quantised: pass it in bfloat16, or the merged model"
    )


def test_a_packed_base(root: Path) -> None:
    stored = load_file(root / "base" / "model.safetensors")
    stored[f"{Q}.qweight"] = stored.pop(f"{Q}.weight").to(torch.int32)
    save_file(stored, root / "base" / "model.safetensors")
    config = root / "base" / "config.json"
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **quantised}))
    assert refusal_of(root) == (
        f"adapter holds {KEY}A.weight, but base has no tensor {Q}.weight; it has {Q}.qweight; is "
        "it quantised? Pass the base in bfloat16"
    )


def test_both_names_of_a_tied_matrix(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    train(tmp_path, model, target_modules=["embed_tokens", "lm_head"], r=2)
    assert refusal_of(tmp_path) == (
        "adapter adapts model.embed_tokens.weight of base twice, under both names of a tied "
        "matrix; merge it with peft and pass the merged model"
    )


def test_one_name_of_a_tied_matrix_adapted_and_the_other_trained_whole(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    train(tmp_path, model, target_modules=["lm_head"], modules_to_save=["embed_tokens"], r=2)
    assert refusal_of(tmp_path) == (
        "adapter adapts model.embed_tokens.weight of base and trains it whole as well; merge it "
        "with peft (merge_and_unload, then save_pretrained) and pass the merged model"
    )


def test_what_is_no_adapter(root: Path) -> None:
    adapter = root / "adapter"
    assert is_adapter(adapter)
    assert is_adapter(str(adapter))
    for other in (root, root / "base", root / "none", "", "org/name", 3, {}, "\0"):
        assert not is_adapter(other)
    (adapter / "optimizer.pt").write_bytes(b"")
    (adapter / "training_args.bin").write_bytes(b"")
    assert is_adapter(adapter)  # as a Trainer leaves it
    (adapter / "model.safetensors").write_bytes(b"")
    assert not is_adapter(adapter)


def test_files_that_are_missing_or_twice(root: Path) -> None:
    path = root / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    assert refusal_of(root) == (
        "adapter holds adapter_model.safetensors and adapter_model.bin; remove the stale one"
    )
    path.unlink()
    path.with_suffix(".bin").unlink()
    assert refusal_of(root) == (
        "adapter holds neither adapter_model.safetensors nor adapter_model.bin; was the save cut "
        "short?"
    )
    (root / "adapter" / "adapter_config.json").unlink()
    assert refusal_of(root) == (
        "adapter is no PEFT adapter: it has no adapter_config.json (it holds README.md); pass the "
        "directory that does, as open_adapter(adapter, base)"
    )


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reading='sum' is not one of 'merged', 'algebraic'"):
        open_adapter(tmp_path, tmp_path, reading="sum")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no adapter at nowhere: there is no such directory"):
        open_adapter("nowhere", tmp_path)


def test_a_pickle_that_wants_code_is_refused(root: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("harm",)

    path = root / "adapter" / "adapter_model.safetensors"
    torch.save({**load_file(path), "harm": Harm()}, path.with_suffix(".bin"))
    path.unlink()
    assert refusal_of(root).startswith("refusing to unpickle adapter/adapter_model.bin")
