"""The table: what each checkpoint answers, beside how far its singular values and vectors moved.

Below the checkpoints of the run stands the end of supervised tuning with directions restored, and
for each of these a control: as far back from there in a straight line, whatever the directions.
"""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from answers import outcomes
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

from pytest_subnet import (
    ModelPair,
    ood_forgetting,
    ood_restored,
    open_pair,
    restore_singular_vectors,
    singular_rotation,
    singular_shift,
)

K = 16
MATRICES = "*_proj.weight"
RESTORED = (
    ("16 first directions", {"k_top": 16}),
    ("16 last directions", {"k_tail": 16}),
    ("64 first directions", {"k_top": 64}),
    ("16 first and their values", {"k_top": 16, "values": "base"}),
)
"""Of 64 directions in keys and values, and 128 in all other matrices."""


class Answered(NamedTuple):
    """A checkpoint and what came of each held-out question, by the two rules."""

    name: str
    step: int
    folder: Path
    right_in: dict[str, bool]
    right_out: dict[str, bool]


def report(folder: Path) -> str:
    """Measure every checkpoint under `folder` against the model that learnt both rules."""
    run = [_answered(name, step, path) for name, step, path in checkpoints(folder)]
    start, tuned = run[0], next(each for each in reversed(run) if each.name.startswith("sft"))
    rows = [_row(each, start) for each in run]
    with TemporaryDirectory(dir=folder, prefix=".restored-") as scratch:
        edited = _restore(start, tuned, Path(scratch))
        rows += [_row(each, start) for each in edited]
        verdicts = _verdicts(run, tuned, edited)
    return f"{_table(rows)}\n\n{_table(verdicts)}\n"


def checkpoints(folder: Path) -> list[tuple[str, int, Path]]:
    """Return name, step and folder of each, in the order of training."""
    found = [("learnt", 0, folder / "learnt")]
    for stage in ("sft", "rl"):
        before = found[-1][1]
        steps = sorted(int(path.name.split("-")[1]) for path in (folder / stage).glob("check*-*"))
        found += [
            (f"{stage} {step}", before + step, folder / stage / f"checkpoint-{step}")
            for step in steps
        ]
    return found


def curve(folder: Path) -> list[tuple[int, dict[str, bool]]]:
    """Return what came of the questions out of distribution, by step."""
    return [
        (step, _answered(name, step, path).right_out) for name, step, path in checkpoints(folder)
    ]


def _answered(name: str, step: int, folder: Path) -> Answered:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    both = (outcomes(model, tokenizer, rule) for rule in ("in", "out"))
    return Answered(name, step, folder, *both)


def _restore(start: Answered, tuned: Answered, scratch: Path) -> list[Answered]:
    found = []
    for number, (name, options) in enumerate(RESTORED):
        written = scratch / f"restored-{number}"
        result = restore_singular_vectors(
            start.folder, tuned.folder, output=written, include=MATRICES, **options
        )
        back = {each.name: each.to_tuned for each in result.per_tensor}
        line = _straight(start.folder, tuned.folder, back, scratch / f"straight-{number}")
        found += [
            _answered(name, tuned.step, written),
            _answered(f"{name}: the control", tuned.step, line),
        ]
    return found


def _straight(base: Path, tuned: Path, back: dict[str, float], output: Path) -> Path:
    """Write the tuned model with each matrix moved towards the base by that share of its norm."""
    before, after = (load_file(side / "model.safetensors") for side in (base, tuned))
    for name, share in back.items():
        way = before[name] - after[name]
        after[name] += way * float(share * after[name].norm() / way.norm())
    output.mkdir()
    for path in tuned.glob("*.json"):
        (output / path.name).write_bytes(path.read_bytes())
    save_file(after, output / "model.safetensors", metadata={"format": "pt"})
    return output


def _row(each: Answered, start: Answered) -> dict[str, str]:
    row = {
        "checkpoint": each.name,
        "step": str(each.step),
        "in": f"{sum(each.right_in.values())} of {len(each.right_in)}",
        "out": f"{sum(each.right_out.values())} of {len(each.right_out)}",
    }
    moved = {} if each is start else _moved(open_pair(start.folder, each.folder))
    return {**row, **{name: moved.get(name, "") for name in ("change", "shift", *_ANGLES)}}


_ANGLES = ("angle", "of noise", "ratio")


def _moved(pair: ModelPair) -> dict[str, str]:
    shifts = singular_shift(pair, include=MATRICES)
    rotations = singular_rotation(pair, k=K, include=MATRICES)
    norms = [torch.linalg.matrix_norm(pair.base.read(each.name)) for each in rotations.per_tensor]
    changes = [
        each.change_norm / float(norm)
        for each, norm in zip(rotations.per_tensor, norms, strict=True)
    ]
    return {
        "change": f"{100 * sum(changes) / len(changes):.2f} %",
        "shift": f"{100 * sum(s.shift for s in shifts.per_tensor) / len(changes):.3f} %",
        "angle": f"{rotations.mean_deg:.2f}°",
        "of noise": f"{rotations.null_deg:.2f}°",
        "ratio": f"{rotations.excess:.2f}",
    }


def _verdicts(run: list[Answered], tuned: Answered, edited: list[Answered]) -> list[dict[str, str]]:
    """Whether each difference out of distribution is more than luck, on the same questions."""
    until = [each for each in run if each.step <= tuned.step]
    forgotten = ood_forgetting([(each.step, each.right_out) for each in until])
    peak = next(each for each in until if each.step == forgotten.peak.step)
    rows = [
        {
            "what": f"lost from {peak.name} to {tuned.name}",
            "points": f"{0 - 100 * forgotten.drop:+.1f}",
            "of what was lost": "",
            "95 % interval": "",
            "p": f"{forgotten.p_value:.2g}",
        }
    ]
    rows += [_back(tuned, each, peak) for each in (run[-1], *edited)]
    for restored, straight in list(pairwise(edited))[::2]:
        rows.append(
            {**_back(straight, restored, peak), "what": f"{restored.name}, over the control"}
        )
    return rows


def _back(before: Answered, after: Answered, peak: Answered) -> dict[str, str]:
    counts = [(sum(e.right_out.values()), len(e.right_out)) for e in (peak, before, after)]
    gained = (counts[2][0] - counts[1][0]) / counts[2][1]
    row = {"what": after.name, "points": f"{100 * gained:+.1f}", "of what was lost": ""}
    row |= {"95 % interval": "", "p": f"{_p(before, after):.2g}"}
    if counts[0][0] > counts[1][0] and before.name.startswith("sft"):
        found = ood_restored(*counts)
        ends = ["?" if end is None else f"{100 * end:.0f}" for end in found.interval]
        row["of what was lost"] = f"{100 * found.fraction:.0f} %"
        row["95 % interval"] = f"{' to '.join(ends)} %"
    return row


def _p(one: Answered, other: Answered) -> float:
    """Of McNemar's exact test, on the questions of which only one model has the answer."""
    from scipy.stats import binomtest

    changed = [one.right_out[q] for q in one.right_out if one.right_out[q] != other.right_out[q]]
    return float(binomtest(sum(changed), len(changed)).pvalue) if changed else 1.0


def _table(rows: list[dict[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
