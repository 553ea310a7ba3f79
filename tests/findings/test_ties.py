"""`assert_tied`: what the base ties is still tied."""

import copy
import json

import pytest
import torch

from pytest_subnet import (
    CheckpointError,
    SelectionError,
    assert_same_structure,
    assert_tied,
    open_pair,
    record_update,
)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}
SEPARATE = {"tie_word_embeddings": False}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(8, 4)
        self.lm_head = torch.nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight


def weights(value, head=None):
    tensors = {EMBED: torch.full((8, 4), value)}
    if head is not None:
        tensors[HEAD] = torch.full((8, 4), head)
    return tensors


def standing(base, tuned):
    (tie,) = assert_tied(open_pair(base, tuned)).ties
    return tuple(tie)


def test_one_stored_copy_stays_tied_by_its_config(save):
    base, tuned = save(weights(1.0), "base", TIED), save(weights(2.0), "tuned", TIED)
    assert standing(base, tuned) == (HEAD, EMBED, "one storage", "one storage")


def test_two_stored_copies_are_tied_while_they_hold_the_same_bits(save):
    base, tuned = save(weights(1.0), "base", TIED), save(weights(2.0, 2.0), "tuned", TIED)
    assert standing(base, tuned) == (HEAD, EMBED, "one storage", "same bits")
    assert standing(tuned, base) == (HEAD, EMBED, "same bits", "one storage")


def test_copies_that_came_apart_fail(save, fails_with):
    base, tuned = save(weights(1.0, 1.0), "base", TIED), save(weights(2.0, 2.5), "tuned", TIED)
    pair = open_pair(base, tuned)
    with fails_with("""
        1 tie came apart
          pair       base -> tuned
          tie        lm_head.weight = model.embed_tokens.weight:  base same bits, tuned differs
          usually    sharding or to_empty() split the storage, or a merge trained one name only
          to accept  leave assert_tied out, and say "tie_word_embeddings": false in the
                     config.json of the tuned checkpoint, or loading it ties them again
    """):
        assert_tied(pair)


def test_one_bit_of_one_copy_is_apart(save):
    apart = weights(1.0, 1.0)
    apart[HEAD].view(torch.int32)[7, 3] ^= 1
    pair = open_pair(save(weights(1.0), "base", TIED), save(apart, "tuned", TIED))
    with pytest.raises(AssertionError, match="base one storage, tuned differs"):
        assert_tied(pair)


def test_a_base_whose_config_says_tied_and_whose_copies_differ_fails(save):
    pair = open_pair(save(weights(1.0, 3.0), "base", TIED), save(weights(2.0, 2.0), "tuned", TIED))
    with pytest.raises(AssertionError, match="base differs, tuned same bits"):
        assert_tied(pair)


@pytest.mark.parametrize(
    ("config", "text"),
    [(SEPARATE, "not tied"), (None, "no config says")],
)
def test_a_head_that_is_gone_without_a_tie_fails(save, config, text):
    pair = open_pair(save(weights(1.0, 1.0), "base", TIED), save(weights(2.0), "tuned", config))
    with pytest.raises(AssertionError, match=f"base same bits, tuned {text}"):
        assert_tied(pair)


def test_a_tie_of_which_nothing_is_stored_fails(save):
    other = {"model.norm.weight": torch.ones(4)}
    pair = open_pair(save({**weights(1.0), **other}, "base", TIED), save(other, "tuned", TIED))
    with pytest.raises(AssertionError, match="base one storage, tuned not stored"):
        assert_tied(pair)


def test_a_base_without_ties_leaves_nothing_to_assert(save, recorded):
    pair = open_pair(
        save(weights(1.0, 2.0), "base", SEPARATE), save(weights(2.0, 2.0), "tuned", TIED)
    )
    with pytest.raises(SelectionError) as caught:
        assert_tied(pair)
    assert str(caught.value) == (
        "base ties nothing that can be seen: no shared storage, and its config states "
        '"tie_word_embeddings": false; leave assert_tied out, or correct the config or the weights'
    )
    assert recorded == []


def test_a_base_whose_config_says_nothing_is_told_so(save):
    pair = open_pair(save(weights(1.0, 2.0), "base"), save(weights(2.0, 2.0), "tuned"))
    with pytest.raises(SelectionError) as caught:
        assert_tied(pair)
    assert str(caught.value) == (
        "base ties nothing that can be seen: no shared storage, and no tie_word_embeddings in a "
        "config.json beside it; leave assert_tied out, or add the config"
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_tie_is_found_behind_a_wrappers_prefix_on_either_side(save, prefix):
    def behind(tensors):
        return {prefix + name: tensor for name, tensor in tensors.items()}

    plain, wrapped = save(weights(1.0, 1.0), "p", TIED), save(behind(weights(2.0, 2.0)), "w", TIED)
    assert standing(plain, wrapped) == (HEAD, EMBED, "same bits", "same bits")
    assert standing(wrapped, plain) == (prefix + HEAD, prefix + EMBED, "same bits", "same bits")
    apart = save(behind(weights(2.0, 3.0)), "apart", TIED)
    with pytest.raises(AssertionError, match="base same bits, tuned differs"):
        assert_tied(open_pair(plain, apart))


@pytest.mark.parametrize(("head", "text"), [(2.0, "same bits"), (3.0, "differs")])
def test_a_tie_is_found_under_the_names_of_the_user(save, head, text):
    renamed = {"tok.weight": torch.full((8, 4), 2.0), "output.weight": torch.full((8, 4), head)}
    pair = open_pair(
        save(weights(1.0), "base", TIED),
        save(renamed, "tuned", TIED),
        rename={"tok.weight": EMBED, "output.weight": HEAD},
    )
    if text == "same bits":
        assert assert_tied(pair).ties[0].tuned == text
    else:
        with pytest.raises(AssertionError, match=f"tuned {text}"):
            assert_tied(pair)


def test_a_config_says_nothing_of_a_tie_that_is_not_the_heads(save):
    shared = torch.ones(8, 4)
    base = {"a.weight": shared, "b.weight": shared, "c.weight": torch.ones(2)}
    tuned = save({"a.weight": torch.ones(8, 4), "c.weight": torch.ones(2)}, "tuned", TIED)
    with pytest.raises(
        AssertionError, match=r"b\.weight = a\.weight:  base one storage, tuned not"
    ):
        assert_tied(open_pair(base, tuned))


@pytest.mark.parametrize("pair", ["runs/tuned", None, ("base", "tuned"), {"w": torch.ones(2)}])
@pytest.mark.parametrize("ask", [assert_tied, assert_same_structure])
def test_what_is_no_pair_is_told_how_to_make_one(ask, pair):
    with pytest.raises(TypeError) as caught:
        ask(pair)
    assert str(caught.value) == (
        f"a ModelPair is needed, got {type(pair).__name__}; make one with open_pair(base, tuned), "
        "or take the fixture model_pair"
    )


def test_a_module_that_keeps_its_tie_through_training_holds():
    model = Model()
    with record_update(model) as update:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.lm_head(model.model.embed_tokens(torch.arange(8))).sum().backward()
        optimizer.step()
    assert [tuple(tie)[2:] for tie in assert_tied(update).ties] == [("one storage", "one storage")]


def test_a_module_whose_storage_was_split_holds_until_a_step_moves_one_name():
    base, tuned = Model(), Model()
    tuned.load_state_dict(base.state_dict())
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach().clone())
    assert assert_tied(open_pair(base, tuned)).ties[0].tuned == "same bits"
    tuned.lm_head(tuned.model.embed_tokens(torch.arange(8))).sum().backward()
    torch.optim.SGD([tuned.lm_head.weight], lr=0.1).step()
    with pytest.raises(AssertionError, match="base one storage, tuned differs"):
        assert_tied(open_pair(base, tuned))


def test_ties_under_other_names_are_followed():
    base = Model()
    with torch.no_grad():
        tuned = copy.deepcopy(base)
        tuned.lm_head.weight += 1
    wrapped = torch.nn.Module()
    wrapped.module = tuned
    assert [tie.tuned for tie in assert_tied(open_pair(base, wrapped)).ties] == ["one storage"]


def test_every_shared_storage_is_a_tie_and_each_broken_one_is_listed():
    shared = torch.ones(3)
    base = {"a.weight": shared, "b.weight": shared, "c.weight": shared}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["b.weight"][0] = tuned["c.weight"][1] = 2
    pair = open_pair(base, tuned)
    with pytest.raises(AssertionError) as caught:
        assert_tied(pair)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 ties came apart"
    assert lines[2:4] == [
        "  tie        b.weight = a.weight:  base one storage, tuned differs",
        "             c.weight = a.weight:  base one storage, tuned differs",
    ]


def test_a_checkpoint_that_was_written_since_is_an_error(save):
    base, tuned = save(weights(1.0), "base", TIED), save(weights(2.0), "tuned", TIED)
    pair = open_pair(base, tuned)
    save(weights(3.0, 4.0), "tuned", TIED)
    with pytest.raises(CheckpointError, match="changed after the pair was opened"):
        assert_tied(pair)


def test_the_result_is_plain_and_recorded_also_when_the_assertion_fails(save, recorded):
    pair = open_pair(save(weights(1.0, 1.0), "base", TIED), save(weights(2.0, 2.5), "tuned", TIED))
    with pytest.raises(AssertionError, match=r"\Amerge: 1 tie came apart"):
        assert_tied(pair, message=lambda text: "merge: " + text)
    (result,) = recorded
    assert repr(result) == "Ties(1 tie, 1 broken: base -> tuned)"
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == {
        "finding": "ties",
        "pair": "base -> tuned",
        "ties": 1,
        "broken": 1,
    }
    assert result.table() == "\n".join(
        [
            "Ties(1 tie, 1 broken: base -> tuned)",
            "",
            "tensor          tied to                    base       tuned",
            "--------------  -------------------------  ---------  -------",
            "lm_head.weight  model.embed_tokens.weight  same bits  differs",
        ]
    )
    with pytest.raises(TypeError, match="message='text' is not a function"):
        assert_tied(pair, message="text")
