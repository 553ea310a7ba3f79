"""The tables that come out of the runs, as Markdown."""

from pathlib import Path

from runs import INSIDE, RUNS, TWICE
from tabulate import tabulate

from pytest_subnet import (
    mask_overlap,
    open_pair,
    subnetwork_recovery,
    update_rank,
    update_sparsity,
)


def report(base: Path, folder: Path) -> str:
    """Measure every run under `folder` against `base`."""
    return "\n\n".join(
        [
            "## What moved",
            _table([_moved(base, folder, name) for name in RUNS]),
            "## The same run with a second seed",
            _table([_overlap(base, folder, name) for name in TWICE]),
            "## Trained inside the mask of its own update",
            _table([_inside(base, folder, name) for name in INSIDE]),
            "",
        ]
    )


def _moved(base: Path, folder: Path, name: str) -> dict[str, str]:
    run, pair = RUNS[name], open_pair(base, folder / name)
    matrices = update_sparsity(pair, exclude="*norm*")
    exact, paper = update_sparsity(pair), update_sparsity(pair, atol=1e-5)
    rank = update_rank(pair)
    return {
        "run": name,
        "rate": f"{run.learning_rate:.0e}",
        "steps × batch": f"{run.steps} × {run.batch_size}",
        "sparsity": _percent(exact.sparsity),
        "within 1e-5": _percent(paper.sparsity),
        "rounding alone": _percent(exact.expected_sparsity),
        "spread": _percent(matrices.spread),
        "rank": _percent(rank.ratio),
        "stable rank": f"{rank.stable_rank:.1f}",
        "resolved rank": _percent(rank.resolved_ratio),
    }


def _overlap(base: Path, folder: Path, name: str) -> dict[str, str]:
    first = open_pair(base, folder / name)
    second = open_pair(base, folder / f"{name}-second-seed")
    found = mask_overlap(first, second, null="exponent")
    return {
        "run": name,
        "o1": _percent(found.one_sided_a),
        "o2": _percent(found.one_sided_b),
        "jaccard": _percent(found.jaccard),
        **{f"lift, {null}": f"{lift:.2f}" for null, lift in found.lifts.items()},
        "z, exponent": f"{found.z:.0f}",
        "kappa, exponent": f"{found.kappa:.3f}",
    }


def _inside(base: Path, folder: Path, name: str) -> dict[str, str]:
    full, inside, other = (
        folder / each for each in (name, f"{name}-inside", f"{name}-second-seed")
    )
    exact = subnetwork_recovery(full, inside, base=base, atol=0)
    near = subnetwork_recovery(full, inside, base=base, atol=1e-5)
    control = subnetwork_recovery(full, other, base=base, atol=0)
    return {
        "run": name,
        "entries in the mask": f"{exact.inside:,}",
        "same value inside": _percent(exact.match),
        "another seed, in full": _percent(control.match),
        "all entries, within 1e-5": _percent(near.whole_match),
        "the base, within 1e-5": _percent(near.base_whole_match),
    }


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _table(rows: list[dict[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
