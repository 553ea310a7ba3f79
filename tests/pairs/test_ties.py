"""Tied embeddings: counted once, whatever is stored; told from heads of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_subnet import Checkpoint, PairMismatchError, open_pair
from pytest_subnet.pairs.ties import class_default, config_flag
from pytest_subnet.scan import SAME_BITS
from pytest_subnet.scan.gathering import gather

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_subnet import ModelPair

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def weights(seed: int, *, head: str | None = None) -> dict[str, torch.Tensor]:
    """An embedding, with a head: a `"copy"` of it, the `"same"` tensor, one of its `"own"`."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(8, 4, generator=generator)
    heads = {"copy": embedding.clone(), "same": embedding, "own": embedding + 1}
    return {EMBED: embedding} | ({HEAD: heads[head]} if head else {})


def names(pair: ModelPair) -> list[str]:
    return [tensor.name for tensor in pair.tensors]


@pytest.mark.parametrize("base", [None, "copy"])
@pytest.mark.parametrize("tuned", [None, "copy"])
def test_a_tied_head_counts_once_whether_or_not_it_is_stored(
    save: Callable[..., Path], base: str | None, tuned: str | None
) -> None:
    pair = open_pair(
        save("base", weights(0, head=base), TIED), save("tuned", weights(1, head=tuned), TIED)
    )
    assert (names(pair), pair.problems) == ([EMBED], ())
    assert pair.tied == ({HEAD: EMBED} if base or tuned else {})


def test_a_head_of_its_own_on_both_sides_counts_by_itself(save: Callable[..., Path]) -> None:
    pair = open_pair(
        save("base", weights(0, head="own"), UNTIED), save("tuned", weights(1, head="own"), UNTIED)
    )
    assert (sorted(names(pair)), pair.tied) == ([HEAD, EMBED], {})


def test_heads_are_not_taken_for_tied_without_a_reason(save: Callable[..., Path]) -> None:
    pair = open_pair(save("base", weights(0, head="copy")), save("tuned", weights(1, head="copy")))
    assert (sorted(names(pair)), pair.tied) == ([HEAD, EMBED], {})


@pytest.mark.parametrize("untied_side", ["base", "tuned"])
def test_an_untied_head_is_compared_with_the_embedding_it_was_tied_to(
    save: Callable[..., Path], untied_side: str
) -> None:
    tied = save("tied", weights(0), TIED)
    untied = save("untied", weights(0, head="own"), UNTIED)
    sides = (untied, tied) if untied_side == "base" else (tied, untied)
    pair = open_pair(*sides)
    assert (names(pair), pair.problems, pair.tied) == ([EMBED, HEAD], (), {})
    head = pair.tensors[1]
    stored = {"base": head.base_name, "tuned": head.tuned_name}
    assert stored.pop(untied_side) == HEAD
    assert list(stored.values()) == [EMBED]
    assert pair.notes == (f"{HEAD}: tied on one side; compared with its embedding there",)
    counted = gather(pair, range(2), SAME_BITS).updated(SAME_BITS)
    assert counted.tolist() == [0, 32]


def test_an_untied_head_without_config_is_not_left_out_because_the_other_side_ties_it() -> None:
    before = {name: tensor.clone() for name, tensor in tied_module(0).state_dict().items()}
    assert gather(open_pair(before, tied_module(1)), [0], SAME_BITS).integers[0, 0] == 32
    with pytest.raises(PairMismatchError, match="with other values"):
        gather(open_pair(weights(0, head="own"), tied_module(1)), [0], SAME_BITS)


def test_a_head_that_config_says_is_missing_is_a_problem(save: Callable[..., Path]) -> None:
    pair = open_pair(
        save("base", weights(0, head="own"), UNTIED), save("tuned", weights(1), UNTIED)
    )
    assert [(p.kind, p.name) for p in pair.problems] == [("only base", HEAD)]


def test_a_one_sided_head_without_config_is_unclear(save: Callable[..., Path]) -> None:
    bare, tied = save("bare", weights(0)), save("tied", weights(1, head="copy"), TIED)
    for sides, kind in (((bare, tied), "only tuned"), ((tied, bare), "only base")):
        (problem,) = open_pair(*sides).problems
        assert (problem.kind, problem.name) == (kind, HEAD)
        assert problem.text.endswith("; put the config beside the weights")


def test_a_flag_in_the_text_config_counts() -> None:
    assert config_flag({"text_config": {"tie_word_embeddings": True}}) is True
    assert config_flag({"tie_word_embeddings": False, "text_config": TIED}) is False
    assert config_flag({"tie_word_embeddings": "yes", "text_config": None}) is None


@pytest.mark.parametrize(
    ("model_type", "default"),
    [("gpt2", True), ("gemma", True), ("llama", False), ("gpt_neox", False), ("unheard_of", None)],
)
def test_a_class_knows_its_default(model_type: str, default: bool | None) -> None:
    assert class_default({"model_type": model_type}) is default


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, {"tied": 1, "problems": 0}),
        ({"model_type": "llama"}, {"tied": 0, "problems": 1}),
    ],
)
def test_without_a_flag_the_default_of_the_class_decides(
    save: Callable[..., Path], config: dict[str, object], expected: dict[str, int]
) -> None:
    pair = open_pair(
        save("base", weights(0, head="copy"), config), save("tuned", weights(1), config)
    )
    assert {"tied": len(pair.tied), "problems": len(pair.problems)} == expected


@pytest.mark.parametrize(
    ("base", "tuned", "config", "asked"),
    [
        (None, None, {"model_type": "gpt2"}, False),
        ("own", "own", {"model_type": "gpt2"}, False),
        ("copy", None, {"model_type": "gpt2"} | TIED, False),
        pytest.param("copy", None, {"model_type": "gpt2"}, True, marks=pytest.mark.slow),
    ],
)
def test_transformers_is_asked_only_when_a_one_sided_head_is_unclear(
    save: Callable[..., Path],
    base: str | None,
    tuned: str | None,
    config: dict[str, object],
    asked: bool,
) -> None:
    paths = [
        save(side, weights(0, head=head), config) for side, head in (("b", base), ("t", tuned))
    ]
    script = (
        "import sys; from pytest_subnet import open_pair; open_pair(*sys.argv[1:]);"
        "print('transformers' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True
    )
    imported = done.stdout.split()
    assert imported[0] == str(asked)
    assert asked or imported[1] == "False"


def tied_module(seed: int) -> torch.nn.Module:
    """Its head comes first, so that the embedding is the second name of one storage."""
    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(4, 8, bias=False)
    model.model = torch.nn.Module()
    model.model.embed_tokens = torch.nn.Embedding(8, 4, _weight=weights(seed)[EMBED])
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_modules_show_ties_by_their_storage_whichever_name_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = open_pair(tied_module(0), tied_module(1))
    assert (names(pair), pair.tied) == ([EMBED], {HEAD: EMBED})
    monkeypatch.delattr(Checkpoint, "fingerprint")  # there is no second copy to look at
    assert gather(pair, [0], SAME_BITS).integers[0, 0] == 32


def test_a_bin_file_shows_ties_by_its_storage(tmp_path: Path) -> None:
    paths = [tmp_path / "base.bin", tmp_path / "tuned.bin"]
    for seed, path in enumerate(paths):
        torch.save(weights(seed, head="same"), path)
    pair = open_pair(*paths)
    assert (names(pair), pair.tied) == ([EMBED], {HEAD: EMBED})


def test_other_shared_tensors_count_once_too() -> None:
    def model(seed: int) -> dict[str, torch.Tensor]:
        shared = torch.full((3,), float(seed))
        return {"a.weight": shared, "b.weight": shared, "c.weight": torch.zeros(3)}

    pair = open_pair(model(0), {f"module.{name}": tensor for name, tensor in model(1).items()})
    assert (names(pair), pair.tied) == (["a.weight", "c.weight"], {"b.weight": "a.weight"})
    torn = model(1) | {"b.weight": torch.ones(3)}
    assert names(open_pair(model(0), torn)) == ["a.weight", "b.weight", "c.weight"]


def test_the_head_of_a_renamed_checkpoint_is_found() -> None:
    tuned = {"tok.weight": torch.ones(8, 4), "output.weight": torch.ones(8, 4)}
    pair = open_pair(tied_module(0), tuned, rename={"tok.weight": EMBED, "output.weight": HEAD})
    assert (names(pair), pair.tied, pair.problems) == ([EMBED], {HEAD: EMBED}, ())


def test_a_head_of_another_shape_is_no_tie(save: Callable[..., Path]) -> None:
    odd = {EMBED: torch.zeros(8, 4), HEAD: torch.zeros(9, 4)}
    pair = open_pair(save("base", odd, TIED), save("tuned", weights(1, head="copy"), TIED))
    assert [(p.kind, p.name) for p in pair.problems] == [("reshaped", HEAD)]


def test_a_second_copy_with_other_values_is_refused_when_something_is_counted(
    save: Callable[..., Path],
) -> None:
    pair = open_pair(
        save("base", weights(0, head="copy"), TIED), save("tuned", weights(1, head="own"), TIED)
    )
    with pytest.raises(PairMismatchError, match=r"tuned stores lm_head\.weight with other values"):
        gather(pair, [0], SAME_BITS)
    with pytest.raises(PairMismatchError, match='"tie_word_embeddings": false'):
        gather(pair, [0], SAME_BITS)


def test_a_second_copy_with_the_same_values_is_looked_at_once(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = open_pair(
        save("base", weights(0, head="copy"), TIED), save("tuned", weights(1, head="copy"), TIED)
    )
    asked = []
    fingerprint = type(pair.base).fingerprint
    monkeypatch.setattr(
        type(pair.base),
        "fingerprint",
        lambda self, name=None: asked.append(name) or fingerprint(self, name),
    )
    for tolerance in (SAME_BITS, SAME_BITS):
        gather(pair, [0], tolerance)
    assert sorted(asked) == [HEAD, HEAD, EMBED, EMBED]


def test_two_embeddings_leave_the_head_to_itself(save: Callable[..., Path]) -> None:
    def encoder_decoder(seed: int) -> dict[str, torch.Tensor]:
        return weights(seed, head="own") | {"shared.weight": torch.zeros(8, 4)}

    pair = open_pair(
        save("base", encoder_decoder(0), TIED), save("tuned", encoder_decoder(1), TIED)
    )
    assert sorted(names(pair)) == [HEAD, EMBED, "shared.weight"]


def test_a_further_embedding_inside_a_block_does_not_hide_the_tie(
    save: Callable[..., Path],
) -> None:
    def multi_token(seed: int, head: str | None) -> dict[str, torch.Tensor]:
        extra = {"model.layers.61.embed_tokens.weight": torch.full((8, 4), float(seed))}
        return weights(seed, head=head) | extra

    pair = open_pair(
        save("base", multi_token(0, "copy"), TIED), save("tuned", multi_token(1, None), TIED)
    )
    assert (pair.tied, pair.problems) == ({HEAD: EMBED}, ())


def test_without_transformers_the_default_of_a_class_is_unknown_and_nothing_breaks(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert class_default({"model_type": "gpt2"}) is None
    pair = open_pair(
        save("base", weights(0, head="copy"), {"model_type": "gpt2"}),
        save("tuned", weights(1), {"model_type": "gpt2"}),
    )
    (problem,) = pair.problems
    assert (problem.kind, problem.name) == ("only base", HEAD)
    assert "no tie_word_embeddings in a config.json" in problem.text
