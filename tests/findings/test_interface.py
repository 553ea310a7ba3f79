"""`same_interface`, `assert_same_interface`: what lies beside the weights is that of the base."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pytest_subnet import (
    CheckpointError,
    SelectionError,
    assert_same_interface,
    open_adapter,
    open_pair,
    same_interface,
)
from pytest_subnet.findings.interface.texts import ABSENT, same, spell_two

from ..checkpoints.servers import FileServer, running

TEMPLATE = "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n"


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def tiny_model(**further):
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=290,
        **further,
    )
    return LlamaForCausalLM(config).bfloat16()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A model and its tokenizer, written by the libraries that own the formats."""
    directory = tmp_path_factory.mktemp("released")
    with torch.random.fork_rng():
        tiny_model().save_pretrained(directory)
    train_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def sides(released, tmp_path, monkeypatch):
    """The same release twice, as `base` and `tuned` in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "tuned"):
        shutil.copytree(released, name)
    return Path("base"), Path("tuned")


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def opened(sides):
    return open_pair(*sides)


def places(result):
    return [each.place for each in result.differences]


def test_a_copy_is_the_same(sides):
    result = assert_same_interface(opened(sides))
    assert result.compared == (
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        "chat_template",
    )
    assert result.differences == result.allowed == result.notes == ()
    assert repr(result) == f"SameInterface(0 differences, {result.keys} keys in 5 files)"
    assert result.left_out == (
        "config.json:dtype",
        "config.json:transformers_version",
        "generation_config.json:_from_model_config",
        "generation_config.json:transformers_version",
        "tokenizer_config.json:backend",
    )


def set_rope(sides):
    edit(sides[1] / "config.json", lambda c: c["rope_parameters"].update(rope_theta=500000.0))


def set_temperature(sides):
    config = GenerationConfig.from_pretrained(sides[1])
    config.update(do_sample=True, temperature=0.6)
    config.save_pretrained(sides[1])


def add_a_token(sides):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sides[1])
    tokenizer.add_tokens([AddedToken("<think>", special=True)])
    tokenizer.save_pretrained(sides[1])


def change_the_normalizer(sides):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sides[1])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save_pretrained(sides[1])


def change_the_template(sides):
    (sides[1] / "chat_template.jinja").write_text(TEMPLATE.replace("role", "name"))


def drop_the_template(sides):
    (sides[1] / "chat_template.jinja").unlink()


def set_another_eos(sides):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sides[1])
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(sides[1])


def swap_two_tokens(sides):
    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    edit(sides[1] / "tokenizer.json", swap)


def drop_a_merge(sides):
    edit(sides[1] / "tokenizer.json", lambda content: content["model"]["merges"].pop(3))


def add_a_file(sides):
    (sides[1] / "added_tokens.json").write_text('{"<think>": 290}')


def change_a_model_file(sides):
    (sides[0] / "tokenizer.model").write_bytes(b"one")
    (sides[1] / "tokenizer.model").write_bytes(b"two")


FAULTS = {
    set_rope: ["config.json: rope_theta 10000.0 → 500000.0"],
    set_temperature: [
        "generation_config.json: do_sample (not there) → true",
        "generation_config.json: temperature (not there) → 0.6",
    ],
    add_a_token: [
        "tokenizer.json: added_tokens.290.id (not there) → 290",
        'tokenizer.json: added_tokens.290.content (not there) → "<think>"',
        "tokenizer.json: added_tokens.290.single_word (not there) → false",
        "tokenizer.json: added_tokens.290.lstrip (not there) → false",
        "tokenizer.json: added_tokens.290.rstrip (not there) → false",
        "tokenizer.json: added_tokens.290.normalized (not there) → false",
        "tokenizer.json: added_tokens.290.special (not there) → true",
    ],
    change_the_normalizer: ['tokenizer.json: normalizer.type "NFC" → "NFKC"'],
    change_the_template: [
        'chat_template: default line 2: "{{ m.role }}: {{ m.content }}" → '
        '"{{ m.name }}: {{ m.content }}"'
    ],
    drop_the_template: ["chat_template: (there) → (not there)"],
    set_another_eos: ['tokenizer_config.json: eos_token "<eos>" → "<pad>"'],
    swap_two_tokens: [
        'tokenizer.json: model.vocab 290 entries, "a" 66 → 290 entries, 67 (2 differ)'
    ],
    drop_a_merge: [
        'tokenizer.json: model.merges 32 entries, number 4 ["b", "r"] → 31 entries, number 4 '
        '["c", "k"]'
    ],
    add_a_file: ["added_tokens.json: (not there) → (there)"],
    change_a_model_file: [
        'tokenizer.model: "0a1c6d4cf41eb499911faba7321fe1a0, 3 bytes" → '
        '"35d5c8cc887e4da96c0560bdcb29998b, 3 bytes"',
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found_and_shown(sides, fault):
    fault(sides)
    with pytest.raises(AssertionError) as caught:
        assert_same_interface(opened(sides))
    lines = str(caught.value).splitlines()
    shown = [line[13:] for line in lines if " → " in line]
    assert shown == FAULTS[fault]


def test_the_whole_message(sides, fails_with):
    set_rope(sides)
    change_the_template(sides)
    edit(sides[1] / "config.json", lambda content: content.update(use_cache=False))
    with fails_with(
        """
        2 differences beside the weights, in config.json, chat_template
          pair       base -> tuned
          differs    config.json: rope_theta 10000.0 → 500000.0
                     chat_template: default line 2: "{{ m.role }}: {{ m.content }}" → "{{ m.name }}: {{ m.content }}"
          allowed    config.json:use_cache
          usually    saved by another version of transformers, a tokenizer that was changed for
                     training, or a config that was edited for it and not set back
          to accept  allow=["config.json:use_cache", "config.json:rope_theta", "chat_template:default"], if the release means it
        """  # noqa: E501
    ):
        assert_same_interface(opened(sides), allow="use_cache")


@pytest.mark.parametrize("count", [3, 40])
def test_what_the_message_offers_to_allow_can_be_pasted(sides, count):
    more = {f'a "key" with\x1b {number}.x': number for number in range(count)}
    edit(sides[1] / "config.json", lambda content: content.update(more))
    with pytest.raises(AssertionError) as caught:
        assert_same_interface(opened(sides))

    offered = str(caught.value).splitlines()[-1].partition("allow=")[2]
    pasted = ast.literal_eval(offered.removesuffix(", if the release means it"))

    assert isinstance(pasted, list)
    assert assert_same_interface(opened(sides), allow=pasted).differences == ()


def test_message_rewords(sides):
    set_rope(sides)
    with pytest.raises(AssertionError, match=r"^ours: 1 difference beside"):
        assert_same_interface(opened(sides), message=lambda text: f"ours: {text}")


@pytest.mark.parametrize(
    "allow",
    [
        "config.json:rope_theta",
        "rope_theta",
        "config.json",
        "config.json:*",
        "*rope*",
        ["use_cache", "rope*"],
    ],
)
def test_what_is_allowed_may_differ(sides, allow):
    set_rope(sides)
    result = assert_same_interface(opened(sides), allow=allow)
    assert [each.place for each in result.allowed] == ["config.json:rope_theta"]
    assert repr(result).startswith("SameInterface(0 differences, 1 allowed, ")


@pytest.mark.parametrize("allow", ["chat_template", "chat_template:default", "chat*"])
@pytest.mark.parametrize("fault", [change_the_template, drop_the_template])
def test_the_template_may_be_allowed_to_differ(sides, fault, allow):
    fault(sides)
    if (fault, allow) == (drop_the_template, "chat_template:default"):
        return  # there is no template to compare with
    assert len(assert_same_interface(opened(sides), allow=allow).allowed) == 1


def test_an_allowed_key_need_not_differ_but_must_be_there(sides):
    assert assert_same_interface(opened(sides), allow="rope_theta").allowed == ()
    with pytest.raises(SelectionError) as caught:
        assert_same_interface(opened(sides), allow=["rope_theta", "rope_thta"])
    assert str(caught.value) == (
        f"allow='rope_thta' matches none of {same_interface(opened(sides)).keys} keys compared; "
        "did you mean rope_theta?"
    )
    with pytest.raises(TypeError, match="allow takes strings, not int"):
        assert_same_interface(opened(sides), allow=[1])


def test_versions_of_transformers_spell_one_thing_in_several_ways(sides):
    base, _ = sides

    def as_before(content):
        content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
        content["torch_dtype"] = content.pop("dtype")
        content.update(rope_scaling=None, transformers_version="4.40.0", _name_or_path="x")

    edit(base / "config.json", as_before)

    def strings(content):
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    edit(base / "tokenizer.json", strings)
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    edit(
        base / "tokenizer_config.json",
        lambda content: content.update(
            eos_token={"__type": "AddedToken", "content": "<eos>", **flags},
            chat_template=(base / "chat_template.jinja").read_text(),
        ),
    )
    (base / "chat_template.jinja").unlink()
    result = assert_same_interface(opened(sides))
    assert "config.json:torch_dtype" in result.left_out
    assert "config.json:dtype" in result.left_out


def test_a_scaled_rope_is_spelled_in_two_ways_too(sides):
    base, tuned = sides
    scaling = {"rope_type": "llama3", "factor": 8.0}
    edit(tuned / "config.json", lambda c: c["rope_parameters"].update(scaling))
    assert places(same_interface(opened(sides))) == [
        "config.json:rope_scaling.rope_type",
        "config.json:rope_scaling.factor",
    ]

    def as_before(content):
        content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
        content["rope_scaling"] = scaling

    edit(base / "config.json", as_before)
    assert_same_interface(opened(sides))


def test_line_ends_that_jinja_does_not_see_are_no_difference(sides):
    (sides[1] / "chat_template.jinja").write_bytes(
        TEMPLATE.rstrip("\n").replace("\n", "\r\n").encode()
    )
    assert_same_interface(opened(sides))


def test_bytes_that_are_no_utf8_are_told_apart(sides):
    for side, raw in zip(sides, (b"{{ '\xfe' }}", b"{{ '\xff' }}"), strict=True):
        (side / "chat_template.jinja").write_bytes(raw)

    assert places(same_interface(opened(sides))) == ["chat_template:default"]


def test_named_templates_are_compared_one_by_one(sides):
    for side in sides:
        more = side / "additional_chat_templates"
        more.mkdir()
        (more / "tool_use.jinja").write_text(f"use {side}")
    assert places(same_interface(opened(sides))) == ["chat_template:tool_use"]


def test_vocabularies_in_files_of_their_own(sides):
    base, tuned = sides
    for side, last in ((base, "c d"), (tuned, "d c")):
        (side / "vocab.json").write_text(json.dumps({f"t{n}": n for n in range(30)}))
        (side / "merges.txt").write_text(f"#version: 0.2 {side}\na b\n{last}\n")
        (side / "vocab.txt").write_text("one\ntwo\n")
    edit(tuned / "vocab.json", lambda content: content.update(t7=99))
    shown = [each[:] for each in same_interface(opened(sides)).differences]
    assert shown == [
        ("vocab.json", "", '30 entries, "t7" 7', "30 entries, 99 (1 differ)"),
        ("merges.txt", "", '["a b", "c d"]', '["a b", "d c"]'),
    ]


def test_weights_that_lie_alone_are_nothing_to_compare(pair_of, base, tuned):
    with pytest.raises(SelectionError) as caught:
        same_interface(pair_of(base, tuned))
    assert str(caught.value) == (
        "nothing lies beside the weights of base -> tuned: no config, tokenizer or chat template, "
        "so there is nothing to compare; copy them there, or leave assert_same_interface out"
    )


def test_a_checkpoint_without_its_tokenizer_differs_in_every_file(sides):
    for path in sides[1].iterdir():
        if path.name.startswith(("tokenizer", "chat")):
            path.unlink()
    result = same_interface(opened(sides))
    assert [(each.place, each.base, each.tuned) for each in result.differences] == [
        ("tokenizer.json", "(there)", "(not there)"),
        ("tokenizer_config.json", "(there)", "(not there)"),
        ("chat_template", "(there)", "(not there)"),
    ]


def test_of_models_in_memory_the_config_is_compared():
    result = assert_same_interface(open_pair(tiny_model(), tiny_model()))
    assert result.compared == ("config.json",)
    assert result.notes == (
        "generation config, tokenizer and chat template are not compared: LlamaForCausalLM is not "
        "in a directory of this machine",
    )
    other = open_pair(tiny_model(), tiny_model(rms_norm_eps=1e-5))
    (difference,) = same_interface(other).differences
    assert difference == ("config.json", "rms_norm_eps", "1e-06", "1e-05")


def test_a_model_in_memory_and_a_directory_are_compared_where_both_speak(sides):
    result = assert_same_interface(open_pair(sides[0], tiny_model()))
    assert result.notes[-1] == (
        "a model in memory states its defaults too: of config.json, the keys both sides state"
    )
    (difference,) = same_interface(open_pair(sides[0], tiny_model(use_cache=False))).differences
    assert difference.place == "config.json:use_cache"


def test_of_a_remote_checkpoint_the_config_is_compared_key_by_key(sides):
    base, tuned = sides
    edit(tuned / "config.json", lambda content: content.update(tie_word_embeddings=True))
    edit(tuned / "config.json", lambda content: content.pop("use_cache"))
    files = {f"/run/{path.name}": path.read_bytes() for path in tuned.iterdir()}
    with running(FileServer(files)) as server:
        result = same_interface(open_pair(base, f"{server.address}/run/"))
        asked = {each.path.rpartition("/")[2] for each in server.asked}
    assert [each[:] for each in result.differences] == [
        ("config.json", "tie_word_embeddings", "false", "true"),
        ("config.json", "use_cache", "true", "(not there)"),
    ]
    assert result.notes == (
        "generation config, tokenizer and chat template are not compared: "
        f"{server.address}/run/ is not in a directory of this machine",
    )
    assert "tokenizer.json" not in asked


def test_tensors_in_memory_have_nothing_to_compare(sides):
    tensors = {"w": torch.ones(2)}
    with pytest.raises(SelectionError) as caught:
        same_interface(open_pair(tensors, {"w": torch.zeros(2)}))
    assert str(caught.value) == (
        "dict of tensors -> dict of tensors: nothing to compare beside the weights: one side is "
        "not in a directory of this machine, and there are not two configs; pass directories, or "
        "models with a config"
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_an_adapter_has_what_it_does_not_bring_from_its_base(sides, tmp_path):
    from peft import LoraConfig, get_peft_model

    base, _ = sides
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2))
    model.save_pretrained("adapter")
    pair = open_pair(base, open_adapter("adapter", base))
    result = assert_same_interface(pair)
    assert result.compared == ("config.json",)
    assert result.notes == (
        "the tuned checkpoint is an adapter: what does not lie beside it is the base's",
    )
    (tmp_path / "adapter" / "chat_template.jinja").write_text("hello")
    pair = open_pair(base, open_adapter("adapter", base))
    assert places(same_interface(pair)) == ["chat_template:default"]


def test_a_file_that_is_no_json_is_an_error(sides):
    (sides[1] / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        same_interface(opened(sides))


def test_a_directory_in_a_files_place_is_an_error(sides):
    (sides[1] / "chat_template.jinja").unlink()
    (sides[1] / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError) as caught:
        same_interface(opened(sides))
    path = Path.cwd() / "tuned" / "chat_template.jinja"
    assert str(caught.value) == f"{path} is a directory, not a file; put the file there"


@pytest.mark.parametrize("depth", [100, 600, 900, 100_000])
def test_nesting_without_end_is_a_difference_or_an_error(sides, depth):
    text = '{"a": ' * depth + "1" + "}" * depth
    (sides[1] / "generation_config.json").write_text(text)
    (sides[0] / "generation_config.json").write_text(text.replace("1", "2"))
    with pytest.raises((AssertionError, CheckpointError)):
        assert_same_interface(opened(sides))


def test_hostile_names_are_escaped_and_hide_nothing(sides):
    base, tuned = sides
    evil = "\x1b[31m\n::error::<script>"
    edit(tuned / "config.json", lambda content: content.update({evil: evil * 100}))
    with pytest.raises(AssertionError) as caught:
        assert_same_interface(opened(sides))
    assert str(caught.value).replace("\n", "").isprintable()
    assert max(map(len, str(caught.value).splitlines())) < 200
    assert same_interface(opened(sides)).table().replace("\n", "").isprintable()
    edit(base / "config.json", lambda content: content.update({"a": {"b": 1}, "a.b": 1}))
    edit(
        tuned / "config.json",
        lambda content: content.pop(evil) and content.update({"a": {"b": 2}, "a.b": 1}),
    )
    assert places(same_interface(opened(sides))) == ["config.json:a.b"]


def test_tokens_in_a_config_are_not_shown(sides):
    for side, token in zip(sides, ("hf_" + "a" * 30, "hf_" + "b" * 30), strict=True):
        edit(
            side / "config.json", lambda content, token=token: content.update(hub=[token], t=token)
        )
    shown = [each[1:] for each in same_interface(opened(sides)).differences]
    assert shown == [("hub", '["hf_…"]', '["hf_…"]'), ("t", '"hf_…"', '"hf_…"')]


def test_both_are_recorded_as_plain_json(sides, recorded):
    set_rope(sides)
    pair = opened(sides)
    result = same_interface(pair)
    with pytest.raises(AssertionError):
        assert_same_interface(pair)
    assert recorded == [result, result]
    plain = result.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["finding"], plain["differences"]) == ("same_interface", 1)
    assert plain["differing"] == ["config.json:rope_theta"]
    assert result.rows() == [
        {
            "file": "config.json",
            "key": "rope_theta",
            "base": "10000.0",
            "tuned": "500000.0",
            "allowed": "",
        }
    ]


def test_misuse_is_named(sides):
    with pytest.raises(TypeError, match="a ModelPair is needed, got str"):
        same_interface("base")
    with pytest.raises(TypeError, match="is not a function from the default text"):
        assert_same_interface(opened(sides), message="no")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(VALUES, VALUES)
def test_two_values_are_the_same_exactly_when_json_says_so(one, other):
    def spelled(value):
        if isinstance(value, dict):
            return {key: spelled(part) for key, part in sorted(value.items())}
        if isinstance(value, list):
            return [spelled(part) for part in value]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) + 0.0 if is_number else value

    assert same(one, one)
    assert same(one, other) == (json.dumps(spelled(one)) == json.dumps(spelled(other)))


@given(st.text(), st.text())
def test_texts_that_differ_are_shown_shortly_and_printably(one, other):
    shown = " ".join(spell_two(one, other))
    assert shown.isprintable()
    assert len(shown) < 700


def test_what_is_absent_is_not_null_and_true_is_not_one():
    assert not same(True, 1)
    assert not same([1.0], [True])
    assert not same(None, ABSENT)
    assert spell_two(None, ABSENT) == ("null", "(not there)")
