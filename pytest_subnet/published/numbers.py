"""Published numbers other than sparsities of updates: ranks, overlaps, scores, dynamics."""

from __future__ import annotations

from pytest_subnet.published.rows import (
    DISTILLATION,
    PATH_NOT_TAKEN,
    PULSE,
    RL_SUBNETWORKS,
    PublishedNumber,
    PublishedOverlap,
)
from pytest_subnet.scan.tolerance import PAPER, SAME_BITS, Tolerance

_BF16 = "bfloat16"
_RELATIVE = Tolerance(rtol=1e-3)


def _fraction(percent: float) -> float:
    return round(percent / 100, 6)


# setting; in percent: observed, by chance, sparsity, each of the first run and of the second
_TABLE_4 = (
    ("seed 42 and seed 123", 60.5, 60.6, 36.7, 36.7, 63.3, 63.3),
    ("Tulu's data and PRIME's data", 26.7, 67.1, 14.6, 36.7, 63.3, 85.4),
    ("DPO and PRIME from Eurus-2-7B-SFT", 59.1, 33.2, 23.0, 12.9, 87.1, 77.0),
)

OVERLAPS: tuple[PublishedOverlap, ...] = tuple(
    PublishedOverlap(RL_SUBNETWORKS, "Table 4", setting, *map(_fraction, values))
    for setting, *values in _TABLE_4
)
"""2505.11711, Table 4; which tolerance its masks use is not said."""

_RANK = "mean of rank / min(m, n) over matrices; bfloat16 rounding alone gives as much"
# setting, percent
_TABLE_2 = (
    ("DPO, Tulu 8B", 99.8),
    ("PRIME, Eurus 7B", 99.5),
    ("KTO, Llama-3 8B", 99.2),
    ("GRPO, DeepSeek Math 7B", 99.4),
)

# benchmark, percent of the full run and of the run inside its subnetwork
_TABLE_3 = (
    ("DPO, LSAT-AR", 21.3, 24.8),
    ("DPO, LSAT-LR", 53.1, 54.7),
    ("DPO, LogiQA-en", 43.5, 45.5),
    ("DPO, GPQA", 32.8, 32.8),
    ("DPO, MMLU-Pro Math", 50.8, 51.6),
    ("DPO, mean", 40.3, 41.9),
    ("PRIME, MATH500 L1", 93.0, 93.0),
    ("PRIME, MATH500 L2", 85.6, 85.6),
    ("PRIME, MATH500 L3", 82.9, 83.8),
    ("PRIME, MATH500 L4", 71.1, 74.2),
    ("PRIME, MATH500 L5", 40.3, 45.5),
    ("PRIME, MATH500 all", 69.8, 72.2),
)
_NO_ERROR = "printed without an error bar"
_INSIDE = "over all entries; those outside the mask agree by construction"
_DYNAMICS = (
    "80% of the entries end unchanged here, 77.0% (1e-5) or 75.3% (1e-8) in the released model"
)
_OUTSIDE = (
    "the text says about 8.5% of the entries ever updated, which 8 of 28 are not: it is of all"
)
_FIGURE = "read off a figure"
_SECOND_HAND = "second-hand"
_SFT_PAIRS = (
    f"{_FIGURE}; Llama-3.1-8B and 70B to Tulu-3-SFT, Qwen2.5-Math-7B to Eurus-2-7B-SFT, not told "
    "apart"
)

# table, quantity, setting, value, upper, note
_RL_SUBNETWORKS = (
    ("section 4", "agreement within 1e-5", "DPO, full and subnetwork", 0.940, None, _INSIDE),
    ("section 4", "agreement within 1e-5", "PRIME, full and subnetwork", 0.905, None, _INSIDE),
    ("section 4", "agreement within 1e-4", "DPO, full and subnetwork", 1.0, None, _INSIDE),
    ("section 4", "agreement within 1e-4", "PRIME, full and subnetwork", 1.0, None, _INSIDE),
    ("Figure 2", "never", "PRIME, 21 checkpoints", 0.72, None, f"{_DYNAMICS}; the text says 70%"),
    ("Figure 2", "cancelled", "PRIME, 21 checkpoints", 0.08, None, _OUTSIDE),
    ("Figure 2", "final", "PRIME, 21 checkpoints", 0.20, None, _DYNAMICS),
    ("section 6", "step sparsity", "PRIME, 21 checkpoints", 0.93, None, "mean over neighbours"),
)

_JACCARD = "mean over pairs of five RL runs, block 13"
# matrix, observed, of independent masks with the same densities
_JACCARDS = (
    ("Q", 0.580, 0.430),
    ("K", 0.580, 0.413),
    ("V", 0.597, 0.467),
    ("O", 0.552, 0.373),
    ("down", 0.585, 0.453),
    ("up", 0.578, 0.443),
    ("gate", 0.575, 0.437),
)

# quantity, setting, value, note
_DISTILLATION = (
    ("principal angle in degrees", "SFT", 10.0, "more than"),
    ("principal angle in degrees", "OPD", 1.0, "about"),
    ("principal angle in degrees", "RLVR", 0.5, "less than"),
    ("singular shift", "SFT", 1e-3, "its order of magnitude"),
    ("singular shift", "OPD", 1e-4, "its order of magnitude"),
    ("singular shift", "RLVR", 1e-5, "its order of magnitude"),
    ("density", "SFT", 0.9273, "with a sparsity of 8.1% elsewhere in the paper"),
    ("density", "OPD", 0.4628, "with a sparsity of 51.6% elsewhere in the paper"),
    ("density", "RLVR", 0.2776, "with a sparsity of 77.2% elsewhere in the paper"),
    ("low-magnitude overlap", "SFT", 0.3188, "of the smallest 30%"),
    ("low-magnitude overlap", "OPD", 0.5359, "of the smallest 30%"),
    ("low-magnitude overlap", "RLVR", 0.7348, "of the smallest 30%"),
)

_STEP = "step sparsity"
_ALL_PAIRS = "over all its pairs"
_SPREAD = f"mean of 400 steps, standard deviation 0.2 to 0.4 points; {_SECOND_HAND}"
_MORE = f"more than; {_SECOND_HAND}"
# source, table, quantity, setting, value, upper, note, tolerance; all on bfloat16
_UNDER_A_TOLERANCE: tuple[tuple[str, str, str, str, float, float | None, str, Tolerance], ...] = (
    (RL_SUBNETWORKS, "Figure 1", "sparsity", "SFT", 0.06, 0.15, _SFT_PAIRS, PAPER),
    (PATH_NOT_TAKEN, "text", "sparsity", "RL", 0.36, 0.92, _ALL_PAIRS, _RELATIVE),
    (PATH_NOT_TAKEN, "text", "sparsity", "SFT", 0.006, 0.188, _ALL_PAIRS, _RELATIVE),
    (PULSE, "text", _STEP, "one optimiser step", 0.99, None, _SPREAD, SAME_BITS),
    (PULSE, "text", _STEP, "worst of 400 steps", 0.98, None, _MORE, SAME_BITS),
    (PULSE, "text", _STEP, "up to 8 steps apart", 0.98, None, _MORE, SAME_BITS),
)

NUMBERS: tuple[PublishedNumber, ...] = (
    *(
        PublishedNumber(RL_SUBNETWORKS, "Table 2", "rank", setting, _fraction(value), note=_RANK)
        for setting, value in _TABLE_2
    ),
    *(
        PublishedNumber(
            RL_SUBNETWORKS, "Table 3", quantity, setting, _fraction(value), note=_NO_ERROR
        )
        for setting, full, inside in _TABLE_3
        for quantity, value in (("full score", full), ("subnetwork score", inside))
    ),
    *(PublishedNumber(RL_SUBNETWORKS, *row, None, _BF16) for row in _RL_SUBNETWORKS),
    *(
        PublishedNumber(
            PATH_NOT_TAKEN, "text", quantity, setting, value, None, _JACCARD, _RELATIVE, _BF16
        )
        for setting, observed, independent in _JACCARDS
        for quantity, value in (("jaccard", observed), ("independent jaccard", independent))
    ),
    *(
        PublishedNumber(DISTILLATION, "tables", quantity, setting, value, note=note)
        for quantity, setting, value, note in _DISTILLATION
    ),
    *(PublishedNumber(*row, _BF16) for row in _UNDER_A_TOLERANCE),
)
"""Every published number that is no sparsity of a released or trained pair."""
