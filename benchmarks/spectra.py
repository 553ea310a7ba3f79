"""Spectral findings against plain torch on the same matrices, and what they hold in memory.

python benchmarks/spectra.py [--shape 1024 3584] [--size 1024] [--rounds 3]
python benchmarks/spectra.py --full                      # 4096 x 14336 and 4096 x 4096, one round
python benchmarks/spectra.py --pair DIR [--include GLOB] # with the peak memory over DIR/base, tuned
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import measure
import torch
from safetensors.torch import save_file

from pytest_subnet import open_pair
from pytest_subnet.findings.displacement.finding import displacement, displacement_rank
from pytest_subnet.findings.matrices import base_cache
from pytest_subnet.findings.matrices.subspaces import principal_angles_deg
from pytest_subnet.findings.rotation.finding import singular_rotation
from pytest_subnet.findings.spectrum.finding import singular_shift

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_subnet import ModelPair

K = 64

FULL = (4096, 14336), 4096

NEAR = 0.01
"""Degrees between our angles and those of the full decompositions, where there is a gap."""

MEASURE = """
import sys
from pytest_subnet import open_pair
from pytest_subnet.findings.displacement.finding import displacement_rank
from pytest_subnet.findings.rotation.finding import singular_rotation
from pytest_subnet.findings.spectrum.finding import singular_shift
what, base, tuned, *include = sys.argv[1:]
pair, include = open_pair(base, tuned), include or None
{
    "shift": lambda: singular_shift(pair, include=include),
    "rotation": lambda: singular_rotation(pair, k=64, null=None, include=include),
    "rotation and its null": lambda: singular_rotation(pair, k=64, include=include),
    "displacement": lambda: displacement_rank(pair, include=include),
    "displacement of the update": lambda: displacement_rank(pair, of="update", include=include),
}[what]()
"""
FINDINGS = (
    "shift",
    "rotation",
    "rotation and its null",
    "displacement",
    "displacement of the update",
)


class Sides(NamedTuple):
    """A matrix before and after, in memory for torch and in files for us."""

    base: torch.Tensor
    tuned: torch.Tensor
    files: Path

    def pair(self) -> ModelPair:
        """A pair of which nothing is known."""
        base_cache._kept.clear()
        return open_pair(self.files / "base", self.files / "tuned")


def main() -> None:
    """Make matrices, measure them in both ways, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs=2, type=int, default=[1024, 3584])
    parser.add_argument("--size", type=int, default=1024, help="of the structured matrix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="the shapes of the claims; minutes")
    parser.add_argument("--pair", type=Path, help="holds base and tuned: peak memory over these")
    parser.add_argument("--include", help="which matrices of that pair")
    options = parser.parse_args()
    shape, size, rounds = tuple(options.shape), options.size, options.rounds
    if options.full:
        (shape, size), rounds = FULL, 1
    with tempfile.TemporaryDirectory() as directory:
        warm_up(Path(directory))
        sides = made(Path(directory), shape)
        rows = [*stability(sides, rounds), *rotation(sides, rounds)]
    rows += structure(size, rounds)
    if options.pair:
        rows += memory(options.pair, options.include)
    measure.show(rows)


def made(root: Path, shape: tuple[int, ...]) -> Sides:
    """Noise with K directions that stand out, the least of them by a few per cent, nudged."""
    torch.manual_seed(0)
    base = torch.randn(shape)
    edge = shape[0] ** 0.5 + shape[1] ** 0.5
    left, right = (torch.linalg.qr(torch.randn(size, min(K, size))).Q for size in shape)
    base += (left * torch.linspace(3, 0.6, left.shape[1]) * edge) @ right.T
    base = base.bfloat16()
    tuned = (base.float() + 0.005 * torch.randn(shape) * (torch.rand(shape) < 0.3)).bfloat16()
    for side, matrix in {"base": base, "tuned": tuned}.items():
        (root / side).mkdir(exist_ok=True)
        save_file({"layers.0.mlp.up_proj.weight": matrix}, root / side / "model.safetensors")
    return Sides(base.float(), tuned.float(), root)


def warm_up(root: Path) -> None:
    """Compile and import what the first call would."""
    sides = made(root, (96, 128))
    for _ in range(2):
        singular_shift(sides.pair())
        singular_rotation(sides.pair(), k=K, null=None)
    displacement_rank(sides.base)


def row(
    what: str, peer: Callable[[], object], ours: Callable[[], object], rounds: int, least: str
) -> list[tuple[str, str, str]]:
    """The ratio of both, measured in turn, and the seconds."""
    times = [(measure.seconds(peer), measure.seconds(ours)) for _ in range(rounds)]
    return [
        (what, f"{measure.spread([theirs / mine for theirs, mine in times])} x", least),
        (
            f"{what}: seconds",
            f"{measure.spread([theirs for theirs, _ in times])}, "
            f"{measure.spread([mine for _, mine in times], 3)}",
            "-",
        ),
    ]


def stability(sides: Sides, rounds: int) -> list[tuple[str, str, str]]:
    """With the bound of the norms, and without."""
    found = []

    def torchs() -> None:
        before, after = torch.linalg.svdvals(sides.base), torch.linalg.svdvals(sides.tuned)
        found.append(float((after - before).norm() / before.norm()))

    def certified() -> None:
        assert singular_shift(sides.pair(), max_shift=0.5).proven_by_norms == 1

    def computed() -> None:
        found.append(singular_shift(sides.pair()).shift)

    shape = " x ".join(map(str, sides.base.shape))
    rows = row(f"{shape}: svdvals of both ÷ shift by norms", torchs, certified, rounds, "100 x")
    rows += row(f"{shape}: svdvals of both ÷ shift by values", torchs, computed, rounds, "1.00 x")
    apart = max(found) / min(found) - 1
    return [*rows, ("both shifts differ by", f"{apart:.1e} of themselves", "-")]


def rotation(sides: Sides, rounds: int) -> list[tuple[str, str, str]]:
    """K directions, and how far our angles are from those of the full decompositions."""
    found = {}

    def torchs() -> None:
        found["torch"] = [
            torch.linalg.svd(each, full_matrices=False) for each in (sides.base, sides.tuned)
        ]

    def ours() -> None:
        (found["ours"],) = singular_rotation(sides.pair(), k=K, null=None).per_tensor

    shape = " x ".join(map(str, sides.base.shape))
    rows = row(f"{shape}: two full svd ÷ rotation, k={K}", torchs, ours, rounds, "15 x")
    (left, _, right), (left_after, _, right_after) = found["torch"]
    angles = [
        principal_angles_deg(*(torch.linalg.qr(each.double()).Q for each in both))
        for both in ((left[:, :K], left_after[:, :K]), (right[:K].T, right_after[:K].T))
    ]
    mine = found["ours"]
    apart = max(
        float((torch.tensor(one, dtype=torch.float64) - other).abs().max())
        for one, other in zip((mine.left_deg, mine.right_deg), angles, strict=True)
    )
    bound = NEAR if mine.gap >= 0.01 else max(mine.error_deg, NEAR)
    return [
        *rows,
        (f"angles differ by, gap at k {mine.gap:.1%}", f"{apart:.1e}°", f"{bound:.2g}° at most"),
    ]


def structure(size: int, rounds: int) -> list[tuple[str, str, str]]:
    """A product of two Toeplitz matrices: displacement of rank 4."""
    torch.manual_seed(0)
    index = torch.arange(size)[:, None] - torch.arange(size)[None, :] + size - 1
    one, other = (torch.randn(2 * size - 1)[index] for _ in range(2))
    matrix = one @ other
    moved = displacement(matrix)
    found = {}

    def torchs() -> None:
        found["values"] = torch.linalg.svdvals(moved)

    def ours() -> None:
        (found["ours"],) = displacement_rank(matrix).per_tensor

    rows = row(f"{size} x {size}: svdvals of the displacement ÷ rank", torchs, ours, rounds, "20 x")
    theirs, mine = int((found["values"] > found["ours"].tolerance).sum()), found["ours"].rank
    return [*rows, ("rank by us, by svdvals", f"{mine}, {theirs}", "the same")]


def memory(root: Path, include: str | None) -> list[tuple[str, str, str]]:
    """The peak of a fresh process, for each finding."""
    pair = open_pair(root / "base", root / "tuned")
    short = max(min(each.shape) for each in pair.tensors if len(each.shape) == 2)
    least = f"{700 + 5 * short * short * 8 / 1e6:,.0f} MB at most"
    sides = (root / "base", root / "tuned", *([include] if include else []))
    rows = []
    for what in FINDINGS:
        done = measure.python(MEASURE, what, *sides)
        rows.append((f"peak memory, {what}", f"{done.peak_mb:,.0f} MB", least))
        rows.append((f"{what}: seconds", f"{done.seconds:.1f}", "-"))
    return rows


if __name__ == "__main__":
    main()
