"""Measure what turned, what stayed and where it lies, of the demo's three runs and of noise.

    python examples/release/spectra.py .demo

prints the tables and writes them to `.demo/spectra.md`. It wants what `tune.py` builds, and takes
one to two minutes on two cores.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import transformers
from tabulate import tabulate

from pytest_subnet import (
    ModelPair,
    consensus_jaccard,
    displacement_rank,
    open_pair,
    singular_rotation,
    singular_shift,
    task_vector_cosine,
    update_geometry,
    update_mask,
    update_movement,
    update_rank,
)

sys.path.append(str(Path(__file__).parent))

from noise import MATRICES, noise_like
from restored import restored_table

RUNS = ("sft", "dpo", "grpo")
K = 16
CLEAR = 3
"""Standard deviations that tell an angle from those of the null, as the assertion has it."""


def report(demo: Path) -> str:
    """Measure all of it and return the tables as Markdown."""
    runs = {name: open_pair(demo / "base", demo / name) for name in RUNS}
    twins = {name: noise_like(pair, seed=seed) for seed, (name, pair) in enumerate(runs.items())}
    both = {}
    for name in RUNS:
        both[name] = runs[name]
        both[f"{name}, its noise"] = twins[name]
    return "\n\n".join(
        [
            "## Values",
            _table(_values(name, pair) for name, pair in both.items()),
            "## Directions",
            _table(_directions(name, pair) for name, pair in both.items()),
            "## Energy",
            _table(_energies(name, pair) for name, pair in both.items()),
            "## Where it lies",
            _table(_geometry(name, pair) for name, pair in both.items()),
            "## Structure",
            _table(_structure(name, pair) for name, pair in both.items()),
            "## Between runs",
            _table(_between(runs, "") + _between(twins, ", noise")),
            _table([_consensus("the three runs", runs), _consensus("their noise", twins)]),
            "## With directions restored",
            restored_table(demo, k=K),
            "",
        ]
    )


def _values(name: str, pair: ModelPair) -> dict[str, str]:
    shifts = singular_shift(pair, include=MATRICES)
    norms = singular_shift(pair, max_shift=0.01, include=MATRICES)
    moved = update_movement(pair, include=MATRICES).per_tensor
    by_noise = [each.relative_change / math.sqrt(max(each.shape)) for each in moved]
    return {
        "run": name,
        "update / weights": f"{100 * _mean(each.relative_change for each in moved):.3g} %",
        "shift": _short(shifts.mean_shift),
        "null": _short(_mean(by_noise)),
        "largest": _short(shifts.shift),
        "of the top value": _short(_largest(pair, "top")),
        "of each value": _short(_largest(pair, "each")),
        "1 % proven by norms": f"{norms.proven_by_norms} of {len(norms.per_tensor)}",
    }


def _largest(pair: ModelPair, relative_to: str) -> float:
    return singular_shift(pair, relative_to=relative_to, include=MATRICES).shift


def _directions(name: str, pair: ModelPair) -> dict[str, str]:
    dense = singular_rotation(pair, k=K, null="gaussian", include=MATRICES)
    sparse = singular_rotation(pair, k=K, null="support", include=MATRICES)
    clear = sum(each.z is not None and each.z >= CLEAR for each in dense.per_tensor)
    return {
        "run": name,
        "angle": f"{dense.mean_deg:.3g}°",
        "largest": f"{dense.max_deg:.3g}°",
        "gaussian null": f"{dense.null_deg:.3g}°",
        "excess": f"{dense.excess:.2f}",
        "support null": f"{sparse.null_deg:.3g}°",
        "excess ": f"{sparse.excess:.2f}",
        f"z ≥ {CLEAR}": f"{clear} of {len(dense.per_tensor)}",
    }


def _energies(name: str, pair: ModelPair) -> dict[str, str]:
    """What the update spends on the leading directions: along each, and from one to another."""
    found = singular_rotation(pair, k=K, null=None, include=MATRICES)
    values, turns = found.value_energy, found.turn_energy
    return {
        "run": name,
        "moves values": f"{100 * values:.3f} %",
        "null": f"{100 * found.value_energy_null:.3f} %",
        "turns": f"{100 * turns:.2f} %",
        "null ": f"{100 * found.turn_energy_null:.2f} %",
        "turns' share of both": f"{100 * turns / (values + turns):.1f} %",
        " null": f"{100 * (K - 1) / K:.1f} %",
    }


def _geometry(name: str, pair: ModelPair) -> dict[str, str]:
    found = update_geometry(pair, include=MATRICES)
    row = {"run": name, "density": f"{100 * found.updated / found.numel:.1f} %"}
    for what, share in (("principal", found.principal), ("smallest", found.low_magnitude)):
        row |= {
            f"in the {what} 30 %": f"{100 * share.share:.2f} %",
            f"{what}, by exponents": f"{100 * share.by_chance:.2f} %",
            f"{what}, by rounding": f"{100 * share.by_rounding:.2f} %",
            f"{what}, z": "" if share.z is None else f"{share.z:.1f}",
        }
    return row


def _structure(name: str, pair: ModelPair) -> dict[str, str]:
    rank = update_rank(pair, include=MATRICES)
    row = {
        "run": name,
        "rank": f"{100 * rank.ratio:.1f} %",
        "stable rank": f"{rank.stable_rank:.1f}",
        "resolved": f"{100 * rank.resolved_ratio:.1f} %",
    }
    for of in ("update", "tuned"):
        for operator in ("toeplitz", "hankel"):
            found = displacement_rank(pair, of=of, operator=operator, include=MATRICES)
            share = sum(each.rank for each in found.per_tensor) / sum(
                each.max_rank for each in found.per_tensor
            )
            row[f"{operator}, {of}"] = f"{100 * share:.1f} %"
    return row


def _between(runs: dict[str, ModelPair], what: str) -> list[dict[str, str]]:
    rows = []
    for one, other in combinations(runs, 2):
        found = task_vector_cosine(runs[one], runs[other], include=MATRICES)
        rows.append(
            {
                "runs": f"{one} and {other}{what}",
                "cosine": f"{found.cosine:.4f}",
                "by drawn signs": f"± {found.sd:.4f}",
                "of even entries": f"± {found.sd_even:.4f}",
                "z": f"{found.z:.1f}",
            }
        )
    return rows


def _consensus(name: str, runs: dict[str, ModelPair]) -> dict[str, str]:
    masks = [update_mask(pair, include=MATRICES) for pair in runs.values()]
    by_exponent, by_matrix = (
        consensus_jaccard(masks, null=null) for null in ("exponent", "matrix")
    )
    return {
        "masks of": name,
        "in all / in any": f"{100 * by_exponent.jaccard:.2f} %",
        "mean of two": f"{100 * by_exponent.mean_pairwise:.1f} %",
        "by chance, matrix": f"{100 * by_matrix.jaccard_by_chance:.2f} %",
        "lift, matrix": f"{by_matrix.lift:.2f}",
        "by chance, exponent": f"{100 * by_exponent.jaccard_by_chance:.2f} %",
        "lift, exponent": f"{by_exponent.lift:.3f}",
        "z, exponent": f"{by_exponent.z:.1f}",
    }


def _mean(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def _short(number: float) -> str:
    return f"{number:.2g}"


def _table(rows: Iterable[dict[str, str]]) -> str:
    return tabulate(list(rows), headers="keys", tablefmt="github", disable_numparse=True)


def main() -> None:
    """Read the command line, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder that holds base/, sft/, dpo/ and grpo/")
    demo = parser.parse_args().demo
    transformers.logging.disable_progress_bar()
    text = report(demo)
    (demo / "spectra.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
