import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.linalg import polar
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from pytest_subnet import CheckpointError, PairMismatchError, SelectionError, open_pair
from pytest_subnet.training import restored_files, restoring
from pytest_subnet.training.restoring import restore_singular_vectors, restored

Q = "model.layers.0.self_attn.q_proj.weight"
SHAPES = [(12, 9), (9, 12), (10, 10)]


def two(shape: tuple[int, int], noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return base, base + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k_top", [0, 4, 9])
def test_all_directions_restored(shape: tuple[int, int], k_top: int) -> None:
    base, tuned = two(shape)
    left, _, right = svd(base)
    ends = {"k_top": k_top, "k_tail": min(shape) - k_top}
    assert torch.equal(restored(base, tuned, **ends, values="base"), base)
    result = restored(base, tuned, **ends, values="tuned")
    values = torch.linalg.svdvals(tuned)
    torch.testing.assert_close(result, (left * values) @ right.T, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.linalg.svdvals(result), values, rtol=1e-14, atol=1e-14)


def test_none_restored() -> None:
    base, tuned = two((12, 9))
    for values in ("tuned", "base"):
        assert torch.equal(restored(base, tuned, k_top=0, k_tail=0, values=values), tuned)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    k_top=st.integers(0, 9),
    k_tail=st.integers(0, 9),
    noise=st.sampled_from([1e-6, 1e-2, 1.0]),
    seed=st.integers(0, 999),
    values=st.sampled_from(["tuned", "base"]),
)
def test_kept_directions_are_singular_directions_of_the_result(
    shape: tuple[int, int], k_top: int, k_tail: int, noise: float, seed: int, values: str
) -> None:
    k_tail = min(k_tail, min(shape) - k_top)
    base, tuned = two(shape, noise, seed)
    result = restored(base, tuned, k_top=k_top, k_tail=k_tail, values=values)
    left, before, right = svd(base)
    after = torch.linalg.svdvals(tuned)
    kept = [i for i in range(min(shape)) if i < k_top or i >= min(shape) - k_tail]
    chosen = after.clone()
    if values == "base":
        chosen[kept] = before[kept]
    torch.testing.assert_close(
        torch.linalg.svdvals(result), chosen.sort(descending=True).values, rtol=0, atol=1e-12
    )
    for i in kept:
        torch.testing.assert_close(result @ right[:, i], chosen[i] * left[:, i], rtol=0, atol=1e-11)
        torch.testing.assert_close(
            result.T @ left[:, i], chosen[i] * right[:, i], rtol=0, atol=1e-11
        )


def test_the_rest_is_the_nearest_orthonormal_basis() -> None:
    base, tuned = two((12, 9))
    kept = torch.arange(9) < 4
    (fixed, *_), (turned, *_) = svd(base), svd(tuned)
    rest = turned[:, 4:] - fixed[:, :4] @ (fixed[:, :4].T @ turned[:, 4:])
    expected, _ = polar(rest.numpy())
    result = restoring._mixed(fixed, turned, kept).numpy()
    np.testing.assert_array_equal(result[:, :4], fixed[:, :4].numpy())
    np.testing.assert_allclose(result[:, 4:], expected, atol=1e-13)


def test_a_direction_that_was_swapped_away_leaves_one_that_is_free() -> None:
    base, tuned = torch.eye(3).double() * torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3, 3).double()
    tuned[0, 0], tuned[1, 1], tuned[2, 2] = 1.0, 2.0, 3.0  # what was first is last
    result = restored(base, tuned, k_top=1, k_tail=0, values="tuned")
    assert float(result[0, 0].abs()) == pytest.approx(3)
    torch.testing.assert_close(torch.linalg.svdvals(result), torch.tensor([3.0, 2, 1]).double())


def test_it_never_leads_further_from_the_tuned_side_than_the_base_is() -> None:
    """The published edit does: its basis is not orthonormal, and 1.5 times as far from both."""
    base, tuned = two((100, 75), 0.05)
    distance = float((tuned - base).norm())
    left, _, right = svd(base)
    turned_left, values, turned_right = svd(tuned)
    kept = torch.arange(75) < 15
    mixed = torch.where(kept, left, turned_left), torch.where(kept, right, turned_right)
    gram = mixed[0].T @ mixed[0]
    assert float(torch.linalg.matrix_norm(gram - torch.eye(75).double(), 2)) > 0.2
    published = (mixed[0] * values) @ mixed[1].T
    result = restored(base, tuned, k_top=15, k_tail=0, values="tuned")
    assert float((result - tuned).norm()) < distance
    assert float((result - base).norm()) < distance
    assert float((published - tuned).norm()) > float((result - tuned).norm())


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def test_transformers_loads_what_was_written(llama_pair: Path, tmp_path: Path) -> None:
    base, tuned = llama_pair / "base", llama_pair / "tuned"
    result = restore_singular_vectors(
        base, tuned, output=tmp_path / "out", k_top=8, k_tail=4, kinds="q_proj"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    state = model.state_dict()
    for name, tensor in after.items():
        if "q_proj" in name:
            expected = restored(
                before[name].double(), tensor.double(), k_top=8, k_tail=4, values="tuned"
            )
            assert torch.equal(state[name], expected.bfloat16())
            assert not torch.equal(state[name], tensor)
        else:
            assert bits(state[name]) == bits(tensor), name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert (tmp_path / "out/config.json").read_bytes() == (tuned / "config.json").read_bytes()
    assert repr(result) == (
        "RestoredVectors(k_top=8, k_tail=4, values of the tuned, 2 matrices, "
        f"in {tmp_path / 'out'})"
    )
    (row, _) = result.per_tensor
    assert (row.name, row.shape, row.dtype, row.kind) == (Q, (64, 64), "bfloat16", "q_proj")
    written, old, new = (each[Q].double() for each in (state, before, after))
    assert row.to_base == pytest.approx(float((written - old).norm() / old.norm()))
    assert row.to_tuned == pytest.approx(float((written - new).norm() / new.norm()))
    assert row.tuned_to_base == pytest.approx(float((new - old).norm() / old.norm()))
    assert result.table().splitlines()[2].split("  ")[0] == "matrix"
    assert json.dumps(result.to_dict())


def test_none_restored_is_a_copy(llama_pair: Path, tmp_path: Path) -> None:
    restore_singular_vectors(llama_pair / "base", llama_pair / "tuned", output=tmp_path / "out")
    copied = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in load_file(llama_pair / "tuned/model.safetensors").items():
        assert bits(copied[name]) == bits(tensor)


def test_shards_with_an_index(
    llama_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = restored_files.write_weights
    monkeypatch.setattr(restoring, "write_weights", lambda *args: real(*args, shard_bytes=60_000))
    out = tmp_path / "out"
    restore_singular_vectors(
        llama_pair / "base", llama_pair / "tuned", output=out, k_top=3, kinds="down_proj"
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    total = sum(
        t.numel() * t.element_size() for shard in shards for t in load_file(out / shard).values()
    )
    assert index["metadata"] == {"total_size": total}
    whole = {name: t for shard in shards for name, t in load_file(out / shard).items()}
    assert len(open_pair(llama_pair / "tuned", out).tensors) == len(whole)
    monkeypatch.undo()
    restore_singular_vectors(
        llama_pair / "base",
        llama_pair / "tuned",
        output=tmp_path / "one",
        k_top=3,
        kinds="down_proj",
    )
    one = load_file(tmp_path / "one/model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in one.items())


def save(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_dtypes_of_the_tuned_side(tmp_path: Path) -> None:
    """Wide dtypes come first in a file, whatever the order of names; odd bytes stay."""
    base, tuned = two((6, 4))
    after = {
        "a": torch.tensor([True, False, True]),
        "half.weight": tuned.half(),
        "i": torch.tensor([5]),
        "w.weight": tuned.float(),
    }
    before = {**after, "half.weight": base.half(), "w.weight": base.bfloat16()}
    result = restore_singular_vectors(
        save(before, tmp_path / "b"), after, output=tmp_path / "o", k_top=2
    )
    assert {each.name: each.dtype for each in result.per_tensor} == {
        "half.weight": "float16",
        "w.weight": "float32",
    }
    assert result.notes == ()
    with safe_open(tmp_path / "o/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.offset_keys()) == ["i", "w.weight", "half.weight", "a"]
        assert file.get_tensor("i").tolist() == [5]
        assert file.get_tensor("a").tolist() == [True, False, True]
        expected = restored(
            base.bfloat16().double(), tuned.float().double(), k_top=2, k_tail=0, values="tuned"
        )
        assert torch.equal(file.get_tensor("w.weight"), expected.float())
        assert file.get_tensor("half.weight").dtype == torch.float16


def test_experts_in_one_tensor_are_edited_one_by_one(tmp_path: Path) -> None:
    pairs = [two((6, 8), seed=seed) for seed in range(3)]
    before, after = (torch.stack(side).float() for side in zip(*pairs, strict=True))
    name = "model.layers.0.mlp.experts.up_proj"
    result = restore_singular_vectors(
        {name: before}, {name: after}, output=tmp_path / "out", k_tail=2, values="base"
    )
    assert [each.name for each in result.per_tensor] == [f"{name}[{i}]" for i in range(3)]
    written = load_file(tmp_path / "out/model.safetensors")[name]
    for i in range(3):
        expected = restored(before[i].double(), after[i].double(), k_top=0, k_tail=2, values="base")
        assert torch.equal(written[i], expected.float())


def test_fused_queries_keys_and_values_are_edited_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    base, tuned = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    restore_singular_vectors(base, tuned, output=tmp_path / "out", k_top=3, include="*c_attn.w*")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    fused = [model.transformer.h[0].attn.c_attn.weight.detach() for model in (base, tuned, loaded)]
    for part in range(3):
        before, after, written = (each[:, 8 * part : 8 * part + 8] for each in fused)
        expected = restored(before.double(), after.double(), k_top=3, k_tail=0, values="tuned")
        assert torch.equal(written, expected.float())
    assert torch.equal(loaded.transformer.wte.weight, tuned.transformer.wte.weight)


def test_a_tied_head_follows_its_embedding(tmp_path: Path) -> None:
    """Stored twice, its second name would hold what the embedding was before the edit."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=16, tie_word_embeddings=True)
    sides = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        folder = tmp_path / f"side{seed}"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        sides.append(folder)
    restore_singular_vectors(*sides, output=tmp_path / "out", k_top=2, include="*embed*")
    written = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in written
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, written["model.embed_tokens.weight"])


def test_a_module_brings_its_config(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
    )
    base, tuned = LlamaForCausalLM(config), LlamaForCausalLM(config)
    restore_singular_vectors(base, tuned, output=tmp_path / "out", k_top=2, kinds="o_proj")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, tuned.lm_head.weight)
    assert not torch.equal(
        loaded.model.layers[0].self_attn.o_proj.weight,
        tuned.model.layers[0].self_attn.o_proj.weight,
    )


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    """As the hub's cache keeps it: links into `blobs`."""
    base, tuned = two((4, 4))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    sides = (
        save({"w": base.float()}, tmp_path / "b"),
        save({"w": tuned.float()}, tmp_path / "snapshots" / "main"),
    )
    beside = sides[1]
    for name in ("config.json", "tokenizer.json", "merges.txt", "tokenizer.model", "chat.jinja"):
        (beside / name).write_text("{}", encoding="utf-8")
    (tmp_path / "blobs" / "1f").write_text("linked", encoding="utf-8")
    (beside / "vocab.txt").symlink_to(tmp_path / "blobs" / "1f")
    for name in ("trainer_state.json", "modeling.py", "optimizer.pt", "adapter_x.json", ".h.json"):
        (beside / name).write_text("{}", encoding="utf-8")
    os.mkfifo(beside / "pipe.json")
    restore_singular_vectors(*sides, output=tmp_path / "o", k_top=1)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "chat.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
    ]
    assert (tmp_path / "o/vocab.txt").read_text() == "linked"
    assert not (tmp_path / "o/vocab.txt").is_symlink()


def test_a_link_out_of_the_checkpoint(tmp_path: Path) -> None:
    base, tuned = small()
    folder = save(tuned, tmp_path / "t")
    (tmp_path / "secret").write_text("mine", encoding="utf-8")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError) as caught:
        restore_singular_vectors(base, folder, output=tmp_path / "out", k_top=1)
    assert str(caught.value) == (
        f"{folder / 'tokenizer.json'} is a link that leads out of the checkpoint; put the file "
        "itself there"
    )
    assert not (tmp_path / "out").exists()


def small(**changes: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base, tuned = two((4, 6))
    before = {"q.weight": base.float(), "norm.weight": torch.ones(4)}
    after = {"q.weight": tuned.float(), "norm.weight": torch.ones(4)}
    return before, {**after, **changes}


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"k_top": -1}, ValueError, "k_top=-1 is below 0"),
        ({"k_tail": True}, TypeError, "k_tail=True is not an integer"),
        ({"k_top": 2.0}, TypeError, "k_top=2.0 is not an integer"),
        (
            {"k_top": 3, "k_tail": 2},
            ValueError,
            "k_top=3 and k_tail=2 are more than the 4 directions of q.weight; give less, or leave "
            "it out with exclude=",
        ),
        ({"values": "\x1b"}, ValueError, "values='\\x1b' is not one of 'tuned', 'base'"),
        (
            {"include": "norm*"},
            SelectionError,
            "none of 1 selected tensor is a weight of two dimensions or a stack of such, and only "
            "these have singular directions",
        ),
    ],
)
def test_bad_arguments(
    options: dict[str, object], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        restore_singular_vectors(*small(), output=tmp_path / "out", **options)
    assert str(caught.value) == text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(value: float, tmp_path: Path) -> None:
    base, tuned = small()
    tuned["q.weight"][1, 1] = value
    with pytest.raises(SelectionError) as caught:
        restore_singular_vectors(base, tuned, output=tmp_path / "out", k_top=1)
    assert str(caught.value) == "q.weight holds NaN or Inf and has no singular directions"
    assert not list(tmp_path.iterdir())


def test_zeros_alone(tmp_path: Path) -> None:
    base, tuned = small()
    base["q.weight"].zero_()
    with pytest.raises(SelectionError, match="holds zeros alone in the base, and has no direct"):
        restore_singular_vectors(base, tuned, output=tmp_path / "out", k_top=1)


def test_what_does_not_align(tmp_path: Path) -> None:
    base, tuned = small(**{"q.weight": torch.ones(4, 5)})
    with pytest.raises(PairMismatchError):
        restore_singular_vectors(base, tuned, output=tmp_path / "out", k_top=1)


def occupied(path: Path) -> None:
    path.mkdir()


def linked(path: Path) -> None:
    path.symlink_to("nowhere")


def filed(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


@pytest.mark.parametrize("make", [occupied, linked, filed])
def test_nothing_is_written_over(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(CheckpointError) as caught:
        restore_singular_vectors(*small(), output=tmp_path / "out", k_top=1)
    assert str(caught.value) == (
        f"{tmp_path / 'out'} is there already, and nothing is written over it; give another path "
        "or remove it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_up_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename would take the place of an empty directory."""
    monkeypatch.setattr(restoring, "copy_beside", lambda *_: (tmp_path / "out").mkdir())
    with pytest.raises(CheckpointError, match="is there already"):
        restore_singular_vectors(*small(), output=tmp_path / "out", k_top=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("output", ["", "/", "a\0b"])
def test_names_that_are_none(output: str) -> None:
    with pytest.raises(CheckpointError, match="names no directory that could be written"):
        restore_singular_vectors(*small(), output=output, k_top=1)


def test_no_directory_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        restore_singular_vectors(*small(), output=tmp_path / "no" / "out", k_top=1)
    assert str(caught.value) == (
        f"cannot write the checkpoint to {tmp_path / 'no' / 'out'}: No such file or directory; "
        "give a path in a directory that is there, can be written to and has room"
    )


def test_an_index_that_leaves_the_directory(tmp_path: Path) -> None:
    base, tuned = small()
    folder = save(tuned, tmp_path / "t")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {name: "../x.safetensors" for name in tuned}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match="points outside its directory"):
        restore_singular_vectors(base, folder, output=tmp_path / "out", k_top=1)


@pytest.mark.parametrize("name", ["__metadata__", "half \ud800 a character"])
def test_names_that_the_format_cannot_hold(name: str, tmp_path: Path) -> None:
    base, tuned = small(**{name: torch.ones(2)})
    with pytest.raises(CheckpointError, match="safetensors has no such name or dtype"):
        restore_singular_vectors(base, tuned, output=tmp_path / "out", k_top=1, include="q.weight")
    assert not list(tmp_path.iterdir())


def test_quantised(tmp_path: Path) -> None:
    base, tuned = small()
    folder = save(tuned, tmp_path / "t")
    config = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        restore_singular_vectors(base, folder, output=tmp_path / "out", k_top=1)
    assert str(caught.value) == (
        f"{folder} is quantised, and what was restored cannot be written as that; give the model "
        "that was quantised"
    )


def test_restored_checkpoints_are_pairs_again(llama_pair: Path, tmp_path: Path) -> None:
    """What was restored of one kind can be restored of another, with another k."""
    base, tuned = llama_pair / "base", llama_pair / "tuned"
    restore_singular_vectors(base, tuned, output=tmp_path / "a", k_top=8, kinds="q_proj")
    restore_singular_vectors(base, tmp_path / "a", output=tmp_path / "b", k_top=64, kinds="o_proj")
    pair = open_pair(tuned, tmp_path / "b")
    assert pair.problems == ()
