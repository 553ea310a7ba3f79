"""The tables: sufficient, necessary, where it lies, what it overlaps with, what it turns."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bigrams import Text, correlation, negative_loss
from search import load, with_random_blocks
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel

from pytest_subnet import (
    UpdateMask,
    magnitude_mask,
    mask_concentration,
    mask_overlap,
    random_mask_like,
    subnetwork_necessity,
)

CONTROLS = 19


def report(folder: Path) -> str:
    """Measure what was found under `folder`, and return the tables in Markdown."""
    model, text = load(folder)
    masks = read_masks(folder)
    tables = [
        _models(model, text, masks),
        _necessity(model, text, masks),
        _concentration(masks["bigram"]),
        _overlaps(model, masks),
        _rotation(model, text, masks["bigram"]),
    ]
    searches = [(folder / "found" / f"{name}.txt").read_text("utf-8") for name in masks]
    return "\n\n".join(tables) + "\n\n```\n" + "\n".join(searches) + "```\n"


def read_masks(folder: Path) -> dict[str, UpdateMask]:
    """Return the masks found, by name."""
    return {
        name: UpdateMask.load(folder / "found" / f"{name}.safetensors")
        for name in ("bigram", "pruning", "random")
    }


def under(model: PreTrainedModel, mask: UpdateMask) -> PreTrainedModel:
    """Return a copy of the model with zeros outside the mask, in the tensors that it covers."""
    masked = deepcopy(model)
    with torch.no_grad():
        for name in mask.names():
            masked.get_parameter(name).mul_(torch.from_numpy(mask[name]))
    return masked


def empty(mask: UpdateMask) -> UpdateMask:
    """Return the mask of no entry of the same tensors: what embeddings do by themselves."""
    return mask - mask


def _models(model: PreTrainedModel, text: Text, masks: dict[str, UpdateMask]) -> str:
    drawn = with_random_blocks(model)
    bigram = masks["bigram"]
    chance = [
        correlation(under(model, random_mask_like(bigram, seed=seed)), text)
        for seed in range(CONTROLS)
    ]
    rows = {
        "the whole model": (model, 1.0),
        "its bigram subnetwork": (under(model, bigram), bigram.density),
        "no entry of its blocks": (under(model, empty(bigram)), 0.0),
        "its pruning subnetwork": (under(model, masks["pruning"]), masks["pruning"].density),
        "random blocks, whole": (drawn, 1.0),
        "a bigram subnetwork of random blocks": (
            under(drawn, masks["random"]),
            masks["random"].density,
        ),
    }
    table = [
        {
            "model": name,
            "entries kept": f"{100 * density:.2f} %",
            "r": f"{correlation(each, text):.3f}",
            "loss": f"{-negative_loss(each, text):.3f}",
        }
        for name, (each, density) in rows.items()
    ]
    table.insert(
        2,
        {
            "model": f"{CONTROLS} random masks of that size, best",
            "entries kept": f"{100 * bigram.density:.2f} %",
            "r": f"{max(chance):.3f}",
            "loss": "",
        },
    )
    return _table(table)


def _necessity(model: PreTrainedModel, text: Text, masks: dict[str, UpdateMask]) -> str:
    rows = []
    for name in ("bigram", "pruning"):
        found = subnetwork_necessity(
            (deepcopy(model), model),
            masks[name],
            partial(negative_loss, text=text),
            fill="zero",
            controls=CONTROLS,
        )
        rows.append(
            {
                "entries set to zero": f"{name} subnetwork",
                "of the blocks": f"{100 * found.density:.2f} %",
                "loss rises by": f"{found.drop:.3f}",
                "random masks, mean": f"{found.full - (found.random_mean or 0):.3f}",
                "most": f"{found.full - min(found.random):.3f}",
                "p": f"{found.p_value:.2f}",
            }
        )
    return _table(rows)


def _concentration(mask: UpdateMask) -> str:
    rows = [
        {"where": name, "share": f"{100 * each.share:.1f} %", "lift": f"{each.lift:.2f}"}
        for by in ("module", "kind")
        for each in mask_concentration(mask, by).groups
        for name in [each.name]
    ]
    return _table(rows)


def magnitudes(model: PreTrainedModel, mask: UpdateMask) -> UpdateMask:
    """Return the largest weights of the same tensors, in the density of the whole mask."""
    return magnitude_mask(
        {name: model.get_parameter(name).detach() for name in mask.names()}, mask.density
    )


def _overlaps(model: PreTrainedModel, masks: dict[str, UpdateMask]) -> str:
    bigram = masks["bigram"]
    others = {
        "pruning subnetwork": masks["pruning"],
        "largest weights": magnitudes(model, bigram),
        "subnetwork of random blocks": masks["random"],
        "random mask": random_mask_like(bigram, seed=0),
    }
    rows = []
    for name, other in others.items():
        found = mask_overlap(bigram, other, null="matrix")
        rows.append(
            {
                "bigram subnetwork and": name,
                "in both": f"{found.intersection:,}",
                "by chance": f"{found.expected:,.0f}",
                "lift": f"{found.lift:.2f}",
                "of the bigram one": f"{100 * found.one_sided_a:.1f} %",
                "kappa": f"{found.kappa:.2f}",
                "z": f"{found.z:.1f}",
            }
        )
    return _table(rows)


def _rotation(model: PreTrainedModel, text: Text, mask: UpdateMask) -> str:
    sides = {
        "whole": model,
        "subnetwork": under(model, mask),
        "random mask": under(model, random_mask_like(mask, seed=0)),
    }
    found = {name: alignments(each, text) for name, each in sides.items()}
    rows = []
    for layer in range(model.config.num_hidden_layers + 1):
        row: dict[str, Any] = {"after": f"block {layer - 1}" if layer else "the embedding"}
        for name, each in found.items():
            current, following = each[layer]
            row[f"{name}: current"] = f"{current:.3f}"
            row[f"{name}: next"] = f"{following:.3f}"
        rows.append(row)
    return _table(rows)


class Alignment(NamedTuple):
    """Mean cosines of activations.

    Attributes:
        current: with the embedding of the token that they stand at.
        following: with the unembedding of the next token.
    """

    current: float
    following: float


@torch.no_grad()
def alignments(model: PreTrainedModel, text: Text) -> list[Alignment]:
    """Say how activations lie to the current token's embedding and to the next one's unembedding.

    Returns:
        After the embedding and after each block the mean cosines, all three less their means: what
        activations have in common says nothing of a token.
    """
    states = model(text.score_on, output_hidden_states=True).hidden_states
    embedding, unembedding = model.get_input_embeddings(), model.get_output_embeddings()
    current = _centred(embedding.weight)[text.score_on[:, :-1]]
    following = _centred(unembedding.weight)[text.score_on[:, 1:]]
    return [
        Alignment(_cosine(each[:, :-1], current), _cosine(each[:, :-1], following))
        for each in states
    ]


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=0)


def _cosine(states: Tensor, directions: Tensor) -> float:
    flat = _centred(states.flatten(0, 1))
    return float(torch.cosine_similarity(flat, directions.flatten(0, 1), dim=-1).mean())


def _table(rows: list[dict[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
