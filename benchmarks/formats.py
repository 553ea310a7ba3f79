"""The formats of the field against safetensors: the time of a scan, and what it takes in memory.

    python benchmarks/formats.py [DIRECTORY]

writes one bfloat16 pair of 2 x 2.2 GB in every format in DIRECTORY, once, with the library that
owns each (18 GB in all), and prints ratios measured in one run, with the files in the page cache.
Memory is that of a process of its own which opens the pair, scans it and says the verdict.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import measure
from pairs import LLAMA_1B, build_llama_pair

from pytest_subnet import open_pair
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pytest_subnet import ModelPair

    Tensors = dict[str, torch.Tensor]

ROUNDS = 5
RANKS = 2

VERDICT = """
import sys
from pytest_subnet import open_pair, update_sparsity
print(update_sparsity(open_pair(*sys.argv[1:])).updated)
"""


def write_dcp(tensors: Tensors, directory: Path) -> None:
    """As one process saves a model."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": tensors}, checkpoint_id=directory, no_dist=True)


def write_fsdp(tensors: Tensors, directory: Path) -> None:
    """As verl does: each rank its rows of every tensor."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    directory.mkdir(parents=True)
    for rank in range(RANKS):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
        part = {
            name: DTensor.from_local(
                torch.chunk(tensor, RANKS)[rank].clone(),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
            for name, tensor in tensors.items()
        }
        torch.save(part, directory / f"model_world_size_{RANKS}_rank_{rank}.pt")
        dist.destroy_process_group()


def write_bin(tensors: Tensors, directory: Path) -> None:
    """One file, as transformers did before version 5."""
    import torch

    directory.mkdir(parents=True)
    torch.save(tensors, directory / "pytorch_model.bin")


WRITERS: dict[str, Callable[[Tensors, Path], None]] = {
    "DCP": write_dcp,
    f"FSDP shards, {RANKS} ranks": write_fsdp,
    ".bin": write_bin,
}


def build(root: Path, pair: tuple[Path, Path], kind: str) -> tuple[Path, Path]:
    """Write `pair` in another format, unless it is there."""
    directory = root / kind.partition(",")[0].strip(".").replace(" ", "-").lower()
    base, tuned = directory / "base", directory / "tuned"
    if not (directory / "complete").exists():
        from safetensors.torch import load_file

        for source, target in zip(pair, (base, tuned), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a process group that is not used
                tensors = [load_file(shard) for shard in sorted(source.glob("*.safetensors"))]
                WRITERS[kind](functools.reduce(dict.__or__, tensors), target)
        (directory / "complete").touch()
    return base, tuned


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(options.directory or Path(scratch))


def report(root: Path) -> None:
    """Measure every format on the pair in `root`."""
    safetensors = build_llama_pair(root / "1.1b", LLAMA_1B)
    pairs = {kind: build(root, safetensors, kind) for kind in WRITERS}
    alone = measure.python(VERDICT, *safetensors)  # compiles, and fills the page cache
    other = scanning(open_pair(*safetensors))
    rows = [
        ("safetensors: opening, seconds", opening(safetensors), "-"),
        ("safetensors: peak memory of a verdict, MB", f"{alone.peak_mb:.0f}", "700"),
    ]
    for kind, pair in pairs.items():
        verdict = measure.python(VERDICT, *pair)
        assert verdict.output == alone.output, kind
        one = scanning(open_pair(*pair))
        rows += [
            (
                f"{kind}: scan / safetensors",
                measure.spread(measure.ratios(one, other, ROUNDS)),
                "1.5",
            ),
            (f"{kind}: opening, seconds", opening(pair), "-"),
            (f"{kind}: peak memory of a verdict, MB", f"{verdict.peak_mb:.0f}", "700"),
        ]
    measure.show(rows)


def opening(pair: tuple[Path, Path]) -> str:
    """How long opening and aligning takes."""
    return measure.spread([measure.seconds(lambda: open_pair(*pair)) for _ in range(3)])


def scanning(pair: ModelPair) -> Callable[[], object]:
    """What reads all of an opened pair and counts."""
    tolerances = [each for each in DEFAULT_TOLERANCES if not each.same_bits]
    return lambda: scan(pair, range(len(pair.tensors)), tolerances)


if __name__ == "__main__":
    main()
