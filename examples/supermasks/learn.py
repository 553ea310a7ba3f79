"""Learn a hundred tasks in one small network, by masks alone and with exclusive weights.

    python examples/supermasks/learn.py .demo

learns permuted digits with SupSup (a mask a task, weights never trained) and with ExSSNeT (weights
trained that no earlier mask holds) at three densities, with the same number of steps a task, and
writes `.demo/supermasks/learnt/`: the table, the numbers behind it, and of one density the masks
and a checkpoint after each task.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor, nn

from pytest_subnet import Supermasks

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "release")]

from digits import Task, tasks
from laboratory import build_once
from tune import sha256

DENSITIES = (0.02, 0.05, 0.10)
METHODS = ("SupSup", "ExSSNeT")
KEPT = 0.05  # the density of which masks and checkpoints are kept
WIDTH = 256
BATCH_SIZE = 64
GUESSED_FROM = 128  # digits that a task is guessed from
LOOK_EVERY = 10  # tasks, after which all before are looked at again


class Plan(NamedTuple):
    """How much is learnt: steps of a task, and how many of them train weights in ExSSNeT."""

    tasks: int = 100
    steps: int = 150
    weight_steps: int = 30


SHORT = Plan(tasks=4, steps=50, weight_steps=10)


def network() -> nn.Module:
    """Return the network: no biases, and norms without numbers of their own."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, WIDTH, bias=False),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.ReLU(),
        nn.Linear(WIDTH, 10, bias=False),
    )


def build(out: Path, *, short: bool) -> Path:
    """Learn what is not learnt yet and return the folder that holds what came of it."""
    plan = SHORT if short else Plan()
    here = Path(__file__).parent
    record = {
        "plan": plan._asdict(),
        "code_sha256": {name: sha256(here / name) for name in ("digits.py", "learn.py")},
    }
    return build_once(
        out / "supermasks" / "learnt", record=record, build=partial(_learn_all, plan=plan)
    )


def _learn_all(folder: Path, *, plan: Plan) -> None:
    # The matrices are too small to share: two runs side by side, of one thread each.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = {
            (density, method): pool.submit(
                _learn,
                density,
                plan,
                weights=method == "ExSSNeT",
                kept=folder if (density, method) == (KEPT, "ExSSNeT") else None,
            )
            for density in DENSITIES
            for method in METHODS
        }
        rows = []
        for density in DENSITIES:
            learnt = {method: runs[density, method].result() for method in METHODS}
            rows.append({"density": density, **learnt})
            print(f"density {density}: {plan.tasks} tasks learnt in both ways", flush=True)
    (folder / "numbers.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(rows), encoding="utf-8")


def _learn(density: float, plan: Plan, *, weights: bool, kept: Path | None) -> dict[str, Any]:
    """Learn one task after the other, and look again whether those before compute the same."""
    torch.set_num_threads(1)
    data = tasks(plan.tasks)
    model = network()
    masks = Supermasks(model, density=density, signed=True, keep_scores=False)
    _keep(model, kept, 0)
    first_outputs: dict[str, Tensor] = {}
    forgotten = set()
    for number, task in enumerate(data, 1):
        _learn_one(masks, task, plan, weights=weights)
        _keep(model, kept, number)
        first_outputs[task.name] = _outputs(masks, task)
        if number % LOOK_EVERY == 0 or number == len(data):
            forgotten |= {
                old.name
                for old in data[:number]
                if not torch.equal(_outputs(masks, old), first_outputs[old.name])
            }
    if kept is not None:
        masks.save(kept / "masks")
    guessed = [masks.choose(task.test_inputs[:GUESSED_FROM]).task == task.name for task in data]
    right = [int((first_outputs[task.name].argmax(1) == task.test_labels).sum()) for task in data]
    return {
        "right": right,
        "of": len(data[0].test_labels),
        "forgotten": len(forgotten),
        "guessed": sum(guessed),
        "exclusive": [each.count for each in masks.exclusive.values()],
        "used": masks.used.density,
    }


def _learn_one(masks: Supermasks, task: Task, plan: Plan, *, weights: bool) -> None:
    """Train scores; with `weights` their last steps go to the weights that are the task's own."""
    steps = plan.steps - plan.weight_steps if weights else plan.steps
    with masks.learn_mask(task.name) as scores:
        _train(masks.model, torch.optim.Adam(scores, lr=0.01), task, steps=steps)
    if weights and masks.exclusive[task.name]:
        optimizer = torch.optim.Adam(masks.model.parameters(), lr=0.01)
        with masks.learn_weights(task.name, optimizer):
            _train(masks.model, optimizer, task, steps=plan.weight_steps)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, *, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(task.labels), (BATCH_SIZE,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(task.inputs[rows]), task.labels[rows]).backward()
        optimizer.step()


@torch.no_grad()
def _outputs(masks: Supermasks, task: Task) -> Tensor:
    with masks.apply(task.name) as model:
        return model(task.test_inputs)


def _keep(model: nn.Module, folder: Path | None, number: int) -> None:
    if folder is not None:
        path = folder / "run" / f"checkpoint-{number}"
        path.mkdir(parents=True)
        save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: a row a density."""
    shown = []
    for row in rows:
        alone, both = row["SupSup"], row["ExSSNeT"]
        count = len(alone["right"])
        gained = [
            100 * (after - before) / alone["of"]
            for before, after in zip(alone["right"], both["right"], strict=True)
        ]
        error = statistics.stdev(gained) / count**0.5
        shown.append(
            {
                "density": f"{100 * row['density']:.0f} %",
                "SupSup": _accuracy(alone),
                "ExSSNeT": _accuracy(both),
                "difference": f"{statistics.mean(gained):+.2f} ± {error:.2f}",
                "tasks forgotten": f"{both['forgotten']} of {count}",
                "tasks guessed": f"{alone['guessed']} and {both['guessed']}",
                "nothing to train": f"{sum(not each for each in both['exclusive'])} of {count}",
                "used": f"{100 * both['used']:.1f} %",
                "1 − (1 − ρ)^T": f"{100 * (1 - (1 - row['density']) ** count):.1f} %",
            }
        )
    return tabulate(shown, headers="keys", tablefmt="github", disable_numparse=True) + "\n"


def _accuracy(learnt: dict[str, Any]) -> str:
    return f"{100 * statistics.mean(learnt['right']) / learnt['of']:.2f} %"


def main() -> None:
    """Read the command line, learn and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives supermasks/")
    parser.add_argument("--short", action="store_true", help="four tasks, a third of the steps")
    arguments = parser.parse_args()
    print((build(arguments.out, short=arguments.short) / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
