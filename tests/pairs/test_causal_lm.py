"""Both models of a pair, whole, loaded by transformers."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_subnet import CheckpointError, SubnetError, open_pair
from pytest_subnet.pairs import causal_lm
from pytest_subnet.pairs.causal_lm import free_bytes, load_causal_lm_pair, room_for


@pytest.fixture
def pair(llama_pair, tmp_path, monkeypatch):
    """A copy of the tiny pair that a test may damage."""
    shutil.copytree(llama_pair, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return open_pair("base", "tuned")


def give_tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "simple": 1, "better": 2}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    wrapped.save_pretrained(directory)


def change_config(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def test_both_models_are_loaded_in_eval_mode_in_their_own_dtype(pair):
    base, tuned, tokenizer = load_causal_lm_pair(pair, "cpu")

    for model, file in ((base, "base"), (tuned, "tuned")):
        weights = load_file(f"{file}/model.safetensors")
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 256)
    assert tokenizer is None


@pytest.mark.parametrize("directories", [["base"], ["tuned"], ["base", "tuned"]])
def test_the_tokenizer_is_that_of_the_tuned_model_or_else_of_the_base(pair, tmp_path, directories):
    for directory in directories:
        give_tokenizer(tmp_path / directory)

    tokenizer = load_causal_lm_pair(pair, "cpu").tokenizer

    assert tokenizer("simple better unheard").input_ids == [1, 2, 0]
    assert tokenizer.name_or_path.endswith(directories[-1])


def test_the_need_is_told_with_what_is_free(pair, monkeypatch):
    monkeypatch.setattr(causal_lm, "free_bytes", lambda device: 3_000_000)

    assert room_for(pair, "cpu") == "230 kB + 230 kB needed on cpu, 3 MB free"


def test_where_the_system_does_not_say_what_is_free_loading_goes_ahead(pair, monkeypatch):
    monkeypatch.setattr(causal_lm, "free_bytes", lambda device: None)

    assert room_for(pair, "cpu").endswith("needed on cpu; how much is free is not known here")


def test_two_models_that_do_not_fit_are_refused_even_if_each_does(pair, monkeypatch):
    monkeypatch.setattr(causal_lm, "free_bytes", lambda device: 300_000)

    with pytest.raises(SubnetError) as caught:
        room_for(pair, "cuda:0")

    assert str(caught.value) == (
        "both models do not fit: 230 kB + 230 kB needed on cuda:0, 300 kB free; take a larger "
        "device with --subnet-device, or free memory"
    )


def test_a_device_is_asked_for_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:1": (5, 9)}.__getitem__)

    assert free_bytes("cuda:1") == 5


def test_the_system_is_asked_for_its_free_memory(tmp_path, monkeypatch):
    memory = tmp_path / "meminfo"
    monkeypatch.setattr(causal_lm, "Path", lambda _: memory)

    assert free_bytes("cpu") is None
    memory.write_text("MemTotal: 9 kB\nMemAvailable:  7 kB\n")
    assert free_bytes("cpu") == 7 * 1024
    memory.write_text("MemTotal: 9 kB\n")
    assert free_bytes("cpu") is None


def memory(*models):
    """Bytes of all tensors of some models, each piece of memory once."""
    tensors = [each for model in models for each in model.state_dict().values()]
    return sum({each.data_ptr(): each.nbytes for each in tensors}.values())


def test_what_is_bit_identical_is_shared_when_asked(pair):
    tokens = torch.tensor([[1, 2, 3]])
    apart = load_causal_lm_pair(pair, "cpu")
    together = load_causal_lm_pair(pair, "cpu", share_identical=True)

    base, tuned = (dict(model.named_parameters()) for model in together[:2])
    shared = {name for name in base if base[name].data_ptr() == tuned[name].data_ptr()}
    assert shared == {name for name in base if torch.equal(base[name], tuned[name])}
    assert shared == {name for name in base if not name.endswith("_proj.weight")}
    saved = sum(base[name].nbytes for name in shared)
    assert memory(*apart[:2]) - memory(*together[:2]) == saved
    for one, other in zip(apart[:2], together[:2], strict=True):
        assert not other.training
        assert torch.equal(one(tokens).logits, other(tokens).logits)


def test_nothing_is_shared_unless_asked(pair):
    base, tuned, _ = load_causal_lm_pair(pair, "cpu")

    assert memory(base, tuned) == memory(base) + memory(tuned)
    assert all(each.requires_grad for each in tuned.parameters())


def test_what_is_shared_cannot_be_trained(pair):
    base, tuned, _ = load_causal_lm_pair(pair, "cpu", share_identical=True)

    assert not any(each.requires_grad for each in (*base.parameters(), *tuned.parameters()))


def test_ties_hold_and_buffers_are_shared_too():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Linear(2, 2, bias=False)
            self.head = torch.nn.Linear(2, 2, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(3))
            torch.nn.init.ones_(self.embed.weight)

    base, tuned = Tied(), Tied()

    assert causal_lm.share(base, tuned) == 16 + 12
    assert tuned.head.weight is tuned.embed.weight
    assert tuned.embed.weight.data_ptr() == base.embed.weight.data_ptr()
    assert tuned.scale.data_ptr() == base.scale.data_ptr()


def test_zeros_of_another_sign_other_shapes_and_dtypes_are_not_shared():
    base, tuned = (torch.nn.ParameterDict() for _ in range(2))
    pairs = {
        "sign": (torch.zeros(2), -torch.zeros(2)),
        "shape": (torch.ones(2, 3), torch.ones(3, 2)),
        "dtype": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        "nan": (torch.full((2,), torch.nan), torch.full((2,), torch.nan)),
        "order": (torch.eye(3)[:2].t(), torch.eye(3)[:2].t().contiguous()),
    }
    for name, (one, other) in pairs.items():
        base[name] = torch.nn.Parameter(one, requires_grad=False)
        tuned[name] = torch.nn.Parameter(other, requires_grad=False)
    tuned["new"] = torch.nn.Parameter(torch.ones(1))

    causal_lm.share(base, tuned)

    shared = {name for name in pairs if base[name].data_ptr() == tuned[name].data_ptr()}
    assert shared == {"nan", "order"}
    assert torch.equal(tuned["order"], pairs["order"][1])
    assert tuned["new"].item() == 1


def test_for_shared_models_the_base_must_fit(pair, monkeypatch):
    monkeypatch.setattr(causal_lm, "free_bytes", lambda device: 300_000)
    assert room_for(pair, "cpu", share_identical=True) == (
        "230 kB + up to 230 kB needed on cpu, 300 kB free"
    )

    monkeypatch.setattr(causal_lm, "free_bytes", lambda device: 200_000)
    with pytest.raises(SubnetError) as caught:
        room_for(pair, "cpu", share_identical=True)

    assert str(caught.value) == (
        "the base does not fit: 230 kB + up to 230 kB needed on cpu, 200 kB free; take a larger "
        "device with --subnet-device, or free memory"
    )


def test_weights_that_are_missing_are_not_made_up(pair, tmp_path):
    path = tmp_path / "tuned" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})

    with pytest.raises(CheckpointError) as caught:
        load_causal_lm_pair(pair, "cpu")

    assert str(caught.value) == (
        "tuned lacks model.layers.1.mlp.up_proj.weight, which transformers would fill with random "
        "numbers; save the whole model again"
    )


def test_weights_without_a_config_are_no_model(pair, tmp_path):
    (tmp_path / "base" / "config.json").unlink()

    with pytest.raises(CheckpointError, match=r"^base has no config.json beside its weights; "):
        load_causal_lm_pair(pair, "cpu")


def test_weights_in_memory_are_no_model():
    pair = open_pair({"w": torch.ones(2)}, {"w": torch.zeros(2)})

    with pytest.raises(CheckpointError, match=r"needs a directory written by save_pretrained$"):
        load_causal_lm_pair(pair, "cpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "nobody-knows"}, "nobody-knows"),
        ({"hidden_size": 32}, "*"),
        ({"num_attention_heads": "four"}, "*"),
    ],
)
def test_what_transformers_cannot_load_is_one_line_in_our_words(pair, tmp_path, changes, said):
    change_config(tmp_path / "tuned" / "config.json", **changes)

    with pytest.raises(CheckpointError) as caught:
        load_causal_lm_pair(pair, "cpu")

    text = str(caught.value)
    assert text.startswith("transformers cannot load tuned as a causal language model: ")
    assert said in text or said == "*"
    assert "\n" not in text


def test_code_that_comes_with_a_checkpoint_is_not_run(pair, tmp_path):
    change_config(
        tmp_path / "base" / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (tmp_path / "base" / "own.py").write_text("open('ran', 'w')\n")

    with pytest.raises(CheckpointError, match="transformers cannot load base"):
        load_causal_lm_pair(pair, "cpu")

    assert not (tmp_path / "ran").exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(pair, tmp_path):
    (tmp_path / "tuned" / "own.py").write_text("open('ran', 'w')\n")
    (tmp_path / "tuned" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    )

    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer of tuned"):
        load_causal_lm_pair(pair, "cpu")

    assert not (tmp_path / "ran").exists()


def test_a_damaged_tokenizer_is_one_line_in_our_words(pair, tmp_path):
    give_tokenizer(tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_text("{")

    with pytest.raises(CheckpointError, match=r"cannot load the tokenizer of tuned: [^\n]+$"):
        load_causal_lm_pair(pair, "cpu")


def test_without_transformers_it_says_what_to_install(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(CheckpointError) as caught:
        load_causal_lm_pair(pair, "cpu")

    assert str(caught.value) == (
        "transformers cannot load base as a causal language model: transformers is not installed; "
        "pip install transformers"
    )
