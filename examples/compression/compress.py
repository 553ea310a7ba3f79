"""Compress a layer of a small model more than 3.5-fold, retrain briefly, and measure the loss.

    python examples/compression/compress.py .demo

builds the base `.demo/compression/base` if it is not there, replaces the down projection of its
first block by a layer of low displacement rank (Sindhwani, Sainath and Kumar 2015), retrains that
layer for some steps, and writes `.demo/compression/compressed/`: the table, the numbers behind it,
and the matrix that the new layer stands for.
"""

import argparse
import json
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pytest_subnet.training.structured import fit_displacement

sys.path.append(str(Path(__file__).parents[1] / "release"))

from laboratory import Settings, build_base, build_once, encode, read_standard_library
from tune import sha256

BASE = Settings(
    vocab_size=1024, hidden_size=128, intermediate_size=344, layers=2, context=64, steps=250
)
LAYER = "model.layers.0.mlp.down_proj"
RANK = 16
STEPS = 100
LEARNING_RATE = 2e-3
BATCH_SIZE = 8
SCORED = 128  # windows of held-out text that a loss is the mean of


def build(out: Path, *, short: bool) -> Path:
    """Compress what is not compressed yet and return the folder that holds what came of it."""
    folder = out / "compression"
    steps = 2 if short else STEPS
    settings = replace(BASE, steps=2) if short else BASE
    base = build_base(folder, settings=settings)
    record = {
        "settings": asdict(settings),
        "base_sha256": sha256(base / "model.safetensors"),
        "code_sha256": sha256(Path(__file__)),
        "steps": steps,
    }
    return build_once(
        folder / "compressed",
        record=record,
        build=partial(_compress, base=base, steps=steps, context=settings.context),
    )


def _compress(folder: Path, *, base: Path, steps: int, context: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = encode(read_standard_library(), tokenizer=tokenizer)
    held_out = len(tokens) // 10
    learn_from, score_on = tokens[:-held_out], tokens[-held_out:].unfold(0, context, context)
    score = partial(_loss, windows=score_on[:SCORED])

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    dense = model.get_submodule(LAYER)
    structured = fit_displacement(dense.weight, rank=RANK)
    layers = {
        "as it was": deepcopy(dense),
        "low displacement rank": structured,
        "low rank": _low_rank(dense.weight, numbers=_numbers(structured)),
        "left out": _zeros(dense),
    }
    rows = {}
    for name, layer in layers.items():
        model.set_submodule(LAYER, layer)
        before = score(model)
        if name != "left out":
            _retrain(model, layer, learn_from.unfold(0, context, 1), steps=steps)
        rows[name] = {"numbers": _numbers(layer), "loss": before, "retrained": score(model)}

    matrix = {f"{LAYER}.weight": structured.weight.detach().contiguous()}
    save_file(matrix, folder / "layer.safetensors")
    (folder / "numbers.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(_table(rows), encoding="utf-8")


def _numbers(layer: nn.Module) -> int:
    return sum(each.numel() for each in layer.parameters())


def _low_rank(matrix: Tensor, *, numbers: int) -> nn.Module:
    """Return the nearest layer of low rank that has no more numbers: what else one could do."""
    rank = numbers // sum(matrix.shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    layer = nn.Sequential(
        nn.Linear(matrix.shape[1], rank, bias=False), nn.Linear(rank, matrix.shape[0], bias=False)
    )
    with torch.no_grad():
        layer[0].weight.copy_(values[:rank, None].sqrt() * right[:rank])
        layer[1].weight.copy_(left[:, :rank] * values[:rank].sqrt())
    return layer


def _zeros(dense: nn.Module) -> nn.Module:
    empty = deepcopy(dense)
    nn.init.zeros_(empty.weight)
    return empty


@torch.no_grad()
def _loss(model: PreTrainedModel, *, windows: Tensor) -> float:
    """Return the mean loss in nats a token."""
    model.eval()
    losses = [float(model(each, labels=each).loss) for each in windows.split(BATCH_SIZE)]
    return sum(losses) / len(losses)


def _retrain(model: PreTrainedModel, layer: nn.Module, windows: Tensor, *, steps: int) -> None:
    """Train the layer alone: what the rest could learn in its place is not its merit."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(layer.requires_grad_().parameters(), lr=LEARNING_RATE)
    model.train()
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH_SIZE,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _table(rows: dict[str, dict[str, float]]) -> str:
    shown = [
        {
            "layer": name,
            "numbers": f"{row['numbers']:,}" if name != "left out" else "0",
            "loss": f"{row['loss']:.3f}",
            "retrained": f"{row['retrained']:.3f}" if name != "left out" else "",
        }
        for name, row in rows.items()
    ]
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True) + "\n"


def main() -> None:
    """Read the command line, compress and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives compression/")
    parser.add_argument("--short", action="store_true", help="two steps each")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print((build(arguments.out, short=arguments.short) / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
