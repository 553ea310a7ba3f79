"""Trainer and rollout: the same bits in the dtype that is served, or every tensor by name."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_subnet import (
    CheckpointError,
    PairMismatchError,
    SelectionError,
    assert_synced,
    open_checkpoint,
)

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"


def masters(base, *, seed=0):
    """Float32 weights, none of which is a bfloat16 number."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(each.shape, generator=generator) for name, each in base.items()}


def test_the_same_bits(base, tuned, save):
    result = assert_synced(save(base, "trainer"), save(tuned, "rollout"))
    assert (result.differing, result.unsynced, result.numel) == (0, (), 100)
    assert repr(result) == "Synced(unsynced=0 of 4 tensors, differing=0 of 100, bf16)"


def test_every_tensor_that_differs_is_named_with_where_it_begins(base, tuned, save, fails_with):
    tuned[UP][2, 3:] = 3
    tuned[DOWN].view(torch.int16)[7, 3] += 1
    tuned[NORM][3] = torch.nan
    tuned[EMBED].neg_()
    with fails_with("""
        4 of 4 tensors are not synced: 39 of 100 entries have other bits
          pair       trainer -> rollout   (same bits, bf16, 4/4 tensors, 100 entries)
          first      model.embed_tokens.weight[0, 0] 1 -> -1                   32 / 32  (bf16[8,4])
                     model.layers.0.mlp.down_proj.weight[7, 3] 1 -> 1.0078125   1 / 32  (bf16[8,4])
                     model.layers.0.mlp.up_proj.weight[2, 3] 1 -> 3             5 / 32  (bf16[4,8])
                     model.norm.weight[3] 1 -> nan                               1 / 4  (bf16[4])
          usually    weights of an earlier step: the sync did not happen, or was undone
          to accept  leave the tensors out with exclude=
    """):
        assert_synced(save(base, "trainer"), save(tuned, "rollout"))


def test_all_of_them_are_named_however_many(save):
    trainer = {f"layers.{n}.weight": torch.zeros(2) for n in range(50)}
    rollout = {name: tensor.clone() for name, tensor in trainer.items()}
    for name in list(rollout)[1:]:
        rollout[name][1] = 1
    with pytest.raises(AssertionError) as caught:
        assert_synced(trainer, rollout)
    for name in list(rollout)[1:]:
        assert f" {name}[1] 0 -> 1 " in str(caught.value)
    assert "layers.0.weight" not in str(caught.value)
    assert "usually    an adapter that was not merged" in str(caught.value)


def test_float32_masters_are_compared_as_they_are_served(base, fails_with):
    trainer = masters(base)
    rollout = {name: tensor.bfloat16() for name, tensor in trainer.items()}
    result = assert_synced(trainer, rollout)
    assert result.coverage.dtype == "bf16"
    assert result.coverage.notes == (
        "4 tensors of the trainer cast from f32 to bf16, as the rollout has them",
    )
    rollout[UP][0, 1] *= 2
    before, after = trainer[UP].bfloat16()[0, 1].item(), rollout[UP][0, 1].item()
    both = "dict of tensors -> dict of tensors   (same bits, bf16, 4/4 tensors, 100 entries)"
    with fails_with(f"""
        1 of 4 tensors are not synced: 1 of 100 entries have other bits
          pair       {both}
          note       4 tensors of the trainer cast from f32 to bf16, as the rollout has them
          first      {UP}[0, 1] {before:.9g} -> {after:.9g}  1 / 32  (bf16[4,8])
          usually    an adapter that was not merged, parts that the sync leaves out, or a cast on
                     the way
          to accept  leave the tensors out with exclude=
    """):
        assert_synced(trainer, rollout)


def test_what_is_served_in_float32_is_compared_in_float32(base):
    """Norms and routers stay wide in a bf16 model: a cast of everything would not see them."""
    trainer = masters(base)
    rollout = {
        name: each.clone() if name == NORM else each.half() for name, each in trainer.items()
    }
    rollout[DOWN] = trainer[DOWN].bfloat16()
    result = assert_synced(trainer, rollout)
    assert result.coverage.notes == (
        "1 tensor of the trainer cast from f32 to bf16, as the rollout has them",
        "2 tensors of the trainer cast from f32 to f16, as the rollout has them",
    )
    assert [(each.name, each.dtype) for each in result.per_tensor] == [
        (EMBED, "float16"),
        (UP, "float16"),
        (DOWN, "bfloat16"),
        (NORM, "float32"),
    ]
    rollout[NORM].view(torch.int32)[1] += 1
    with pytest.raises(AssertionError, match=r"^1 of 4 tensors are not synced: 1 of 100"):
        assert_synced(trainer, rollout)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_the_cast_is_that_of_torch(words):
    weights = torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.float32)
    weights = weights.nan_to_num(nan=1.5)
    for dtype in (torch.bfloat16, torch.float16):
        trainer, rollout = {"w": weights}, {"w": weights.to(dtype)}
        assert assert_synced(trainer, rollout).numel == len(words)
        rollout["w"].view(torch.int16)[-1] ^= 1
        with pytest.raises(AssertionError, match="are not synced"):
            assert_synced(trainer, rollout)


def test_a_passage_through_float16_is_found():
    """Small values lose bits below 2^-17 (field case D6)."""
    trainer = {"w": torch.tensor([1.0, 2.0**-20, 2.0**-8 * 1.5, 2.9e-8]).bfloat16()}
    with pytest.raises(AssertionError, match=r"first      w\[3\] "):
        assert_synced(trainer, {"w": trainer["w"].half().bfloat16()})


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module."]
)
def test_wrappers_are_looked_through(base, prefix):
    trainer = {prefix + name: tensor.clone() for name, tensor in base.items()}
    assert len(assert_synced(trainer, base).per_tensor) == 4
    trainer[prefix + UP][0, 0] = 2
    with pytest.raises(AssertionError, match=r"up_proj\.weight\[0, 0\] 2 -> 1"):
        assert_synced(trainer, base)


def test_a_model_that_trains_against_what_it_sent(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=32))
    copy.deepcopy(trainer).bfloat16().save_pretrained("served")
    assert assert_synced(trainer, "served").coverage.dtype == "bf16"
    trainer(torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4).long()).loss.backward()
    torch.optim.AdamW(trainer.parameters(), lr=1e-2).step()
    with pytest.raises(AssertionError, match=r"^21 of 21 tensors are not synced"):
        assert_synced(trainer, "served")
    engine = copy.deepcopy(trainer).bfloat16()
    assert assert_synced(trainer, engine).differing == 0


def test_buffers_and_integers_are_compared_too():
    trainer = {"w": torch.ones(2), "steps": torch.tensor([3]), "scale": torch.ones(2)}
    rollout = {name: tensor.clone() for name, tensor in trainer.items()}
    rollout["steps"] += 1
    with pytest.raises(AssertionError, match=r"first      steps\[0\] 0x0+3 -> 0x0+4  1 / 1"):
        assert_synced(trainer, rollout)
    assert len(assert_synced(trainer, rollout, exclude="steps").per_tensor) == 2


def test_what_is_missing_is_named(base, save):
    rollout = {name: tensor.clone() for name, tensor in base.items() if name != EMBED}
    rollout["lm_head.weight"] = torch.ones(8, 4)
    with pytest.raises(PairMismatchError) as caught:
        assert_synced(save(base, "trainer"), save(rollout, "rollout"), exclude="lm_head*")
    assert str(caught.value) == (
        "tensors do not pair: 1 only base (of 5 tensors)\n"
        "  pair       trainer -> rollout\n"
        "  only base  model.embed_tokens.weight\n"
        '  to mend    say with rename={"name in tuned": "name in base"} where names differ; leave '
        "tensors out with exclude=\n"
        "             (rename=, vocab= and as_dtype= go to open_pair, the model_pair marker,\n"
        "             or the top of a policy; as_dtype= also to open_trajectory)\n"
        "  where      base is the trainer, tuned the rollout"
    )


def test_names_of_another_engine(base):
    rollout = {name.replace("model.", "engine.body."): each.clone() for name, each in base.items()}
    result = assert_synced(
        base, rollout, rename=lambda name: name.replace("engine.body.", "model.")
    )
    assert len(result.per_tensor) == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_is_quantised_cannot_be_compared(base, dtype):
    rollout = {name: tensor.clone() for name, tensor in base.items()}
    rollout[UP] = rollout[UP].to(dtype)
    with pytest.raises(
        PairMismatchError, match=r"^tensors do not pair: 1 retyped \(of 4 tensors\)"
    ):
        assert_synced(base, rollout)


@pytest.mark.parametrize(
    ("form", "called"),
    [
        ("path", "{path}"),
        ("mapping", "dict of tensors"),
        ("module", "Linear"),
        ("module and its state", "Linear and OrderedDict of tensors"),
    ],
)
def test_one_thing_is_not_two_copies(form, called, base, save):
    path, model = save(base, "trainer"), torch.nn.Linear(2, 2)
    one, other = {
        "path": (path, path),
        "mapping": (base, base),
        "module": (model, model),
        "module and its state": (model, model.state_dict()),
    }[form]
    with pytest.raises(PairMismatchError) as caught:
        assert_synced(one, other)
    assert str(caught.value) == (
        f"trainer and rollout are one thing, {called.format(path=path)}: it is in sync with "
        "itself, whatever the sync does; pass the weights that train (trainer.model) and those "
        "that generate: the engine's module or state_dict, or the path that it loaded"
    )


class Holder:
    """As an engine that keeps its model to itself."""

    def __init__(self, model):
        self.model = model


def test_a_trainer_is_not_its_weights(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads))
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[]))
    with pytest.raises(TypeError) as caught:
        assert_synced(trainer, copy.deepcopy(model))
    assert str(caught.value) == (
        "trainer is Trainer, which has no weights of its own; pass the model that it holds: "
        "trainer.model"
    )
    with pytest.raises(TypeError) as caught:
        assert_synced(trainer.model, Holder(copy.deepcopy(model)))
    assert str(caught.value) == (
        "rollout is Holder, which has no weights of its own; pass the model that it holds: "
        "rollout.model"
    )
    assert not assert_synced(trainer.model, copy.deepcopy(model)).unsynced


@pytest.mark.parametrize("given", [3, None, Holder(None), Holder, torch.ones(2), [torch.ones(2)]])
def test_what_has_no_weights(given, base):
    for role, sides in (("trainer", (given, base)), ("rollout", (base, given))):
        with pytest.raises(TypeError) as caught:
            assert_synced(*sides)
        assert str(caught.value) == (
            f"{role} is {type(given).__name__}, which has no weights of its own; pass a module "
            "(trainer.model), a mapping from names to tensors, or a path, hub id or address of "
            "weights"
        )


def test_what_cannot_be_read(base):
    with pytest.raises(CheckpointError, match=r"^no checkpoint at nowhere"):
        assert_synced(base, "nowhere")
    with pytest.raises(SelectionError, match=r"^include='\*lora\*' matches none of 4 tensors"):
        assert_synced(base, {name: each.clone() for name, each in base.items()}, include="*lora*")
    with pytest.raises(TypeError, match=r"^message='no' is not a function"):
        assert_synced(base, base, message="no")


def test_the_result_says_what_it_is(base, tuned, recorded):
    tuned[UP][0, :2] = 2
    with pytest.raises(AssertionError, match=r"^step 3: 1 of 4"):
        assert_synced(base, tuned, message=lambda text: f"step 3: {text}")
    (result,) = recorded
    assert [each.name for each in result.unsynced] == [UP]
    assert result.to_dict() == {
        "finding": "synced",
        "unsynced": 1,
        "differing": 2,
        **result.coverage.to_dict(),
    }
    assert dict(result.fingerprints) == {
        "trainer": open_checkpoint(base).fingerprint(),
        "rollout": open_checkpoint(tuned).fingerprint(),
    }
    assert result.rows()[1] == {
        "tensor": UP,
        "dtype": "bf16",
        "entries": "32",
        "differing": "2",
        "furthest": "1",
    }
    assert len(result.table().splitlines()) == 9
