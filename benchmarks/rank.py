"""The rank of one large update, against torch.linalg.matrix_rank on the same matrix.

python benchmarks/rank.py [--shape 4096 14336] [--rounds 1]
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import measure
import torch

from pytest_subnet.findings.matrices.spectra import Spectrum
from pytest_subnet.findings.rank.finding import FLOAT32_EPS

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 1e-5
"""Of an entry, about that of an update."""


def main() -> None:
    """Make two matrices, rank both in both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 14336])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rows, columns = options.shape
    torch.manual_seed(0)
    half = min(rows, columns) // 2
    cases: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
        "full rank": (lambda: torch.randn(rows, columns) * SIZE, "1.50 x"),
        f"rank {half:,}": (
            lambda: torch.randn(rows, half) @ torch.randn(half, columns) * (SIZE / half**0.5),
            "1.00 x",
        ),
        "rank 8": (
            lambda: torch.randn(rows, 8) @ torch.randn(8, columns) * (SIZE / 8**0.5),
            "1.00 x",
        ),
    }
    table = []
    for what, (make, least) in cases.items():
        table += report(what, make(), options.rounds, least)
    measure.show(table)


def report(what: str, matrix: torch.Tensor, rounds: int, least: str) -> list[tuple[str, str, str]]:
    """Rank one matrix in both ways, in turn."""
    counts: dict[str, int] = {}

    def torchs() -> None:
        counts["torch"] = int(torch.linalg.matrix_rank(matrix))

    def ours() -> None:
        spectrum = Spectrum(matrix)
        limit = spectrum.largest() * max(matrix.shape) * FLOAT32_EPS
        counts["ours"] = spectrum.count_above(limit)

    times = [(measure.seconds(torchs), measure.seconds(ours)) for _ in range(rounds)]
    if counts["torch"] != counts["ours"]:
        raise SystemExit(f"{what}: torch counts {counts['torch']:,}, we count {counts['ours']:,}")
    shape = " x ".join(map(str, matrix.shape))
    return [
        (
            f"{what}, {shape}: rank {counts['ours']:,}, matrix_rank ÷ ours",
            f"{measure.spread([theirs / mine for theirs, mine in times])} x",
            least,
        ),
        (
            f"{what}: seconds, matrix_rank and ours",
            f"{measure.spread([theirs for theirs, _ in times])}, "
            f"{measure.spread([mine for _, mine in times])}",
            "-",
        ),
    ]


if __name__ == "__main__":
    main()
