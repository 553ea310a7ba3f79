"""A 1.1 B-parameter pair: the scan against reading, the float32 formula and the paper's script.

    python benchmarks/scan.py [DIRECTORY]

builds a sharded bfloat16 pair of 2 x 2.2 GB (and one of 2 x 0.5 GB) in DIRECTORY, once, and prints
ratios measured in one run, with the files in the page cache. The paper's way needs 21 GB of memory;
`--without-paper` leaves it out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
from pathlib import Path

import measure
from pairs import LLAMA_1B, LLAMA_300M, build_llama_pair

from pytest_subnet import open_pair
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan import units
from pytest_subnet.scan.engines import cores
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.reading import in_step, room_for
from pytest_subnet.scan.tolerance import PAPER

READ_BUFFER = 4 * 1024 * 1024

VERDICT = """
import sys
from pytest_subnet import open_pair, update_sparsity
print(update_sparsity(open_pair(*sys.argv[1:])))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""

# What people write: |tuned - base| within atol by isclose in float32, tensor by tensor.
ISCLOSE = """
import sys, time
from pathlib import Path
import torch
from safetensors import safe_open
base, tuned = map(Path, sys.argv[1:])
start = time.perf_counter()
same = total = 0
for shard in sorted(base.glob("*.safetensors")):
    with safe_open(shard, "pt") as left, safe_open(tuned / shard.name, "pt") as right:
        for name in left.keys():
            a, b = left.get_tensor(name).float(), right.get_tensor(name).float()
            same += torch.isclose(b - a, torch.zeros(()), rtol=0, atol=1e-5).sum().item()
            total += a.numel()
print(time.perf_counter() - start, same, total)
"""

# The paper's script as it is described: both models whole, all deltas kept and concatenated.
PAPER_WAY = """
import sys
import torch
from transformers import AutoModelForCausalLM
base, tuned = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.bfloat16) for p in sys.argv[1:])
after = dict(tuned.named_parameters())
deltas = []
for name, parameter in base.named_parameters():
    delta = (after[name] - parameter).detach().flatten()
    print(name, torch.count_nonzero(delta).item())
    deltas.append(delta)
everything = torch.cat(deltas)
print("zero", (everything == 0).sum().item() / everything.numel())
zeros = torch.zeros_like(everything)
print("close", torch.isclose(everything, zeros, atol=1e-5).sum().item() / everything.numel())
"""


def read_everything(pieces: list[units.ScanUnit]) -> None:
    """Read both files with the scan's threads into reused 4 MB buffers, and do nothing else."""
    queue = iter(pieces)

    def work() -> None:
        rooms = [room_for(READ_BUFFER) for _ in range(2)]
        with FileReader() as reader:
            for unit in queue:
                for extents, room in zip((unit.base, unit.tuned), rooms, strict=True):
                    done = 0
                    for path, offset, nbytes in extents or ():
                        into = in_step(room, offset - done, READ_BUFFER)
                        reader.read_into(path, offset, into.data[done : done + nbytes])
                        done += nbytes

    threads = [threading.Thread(target=work) for _ in range(cores())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pieces_of(pair, nbytes: int) -> list[units.ScanUnit]:
    """The pair cut into pieces of another size than the scan's own."""
    own, units.UNIT_BYTES = units.UNIT_BYTES, nbytes
    try:
        return units.cut(pair, range(len(pair.tensors)))
    finally:
        units.UNIT_BYTES = own


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--without-paper", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(options.directory or Path(scratch), options.rounds, options.without_paper)


def report(root: Path, rounds: int, without_paper: bool) -> None:
    """Measure everything on the pairs in `root`."""
    base, tuned = build_llama_pair(root / "1.1b", LLAMA_1B)
    small = build_llama_pair(root / "0.3b", LLAMA_300M)
    pair = open_pair(base, tuned)
    rows = range(len(pair.tensors))
    pieces = pieces_of(pair, READ_BUFFER)
    nbytes = sum(unit.nbytes for unit in pieces)
    scan(pair, rows[:1], [PAPER])  # compiles, or loads what was compiled
    read_everything(pieces)  # fills the page cache

    of_reading = measure.ratios(
        lambda: read_everything(pieces), lambda: scan(pair, rows, [PAPER]), rounds
    )
    rate = nbytes / statistics.median(
        measure.seconds(lambda: scan(pair, rows, [PAPER])) for _ in range(3)
    )
    formula = []
    for _ in range(2):
        took = float(measure.python(ISCLOSE, base, tuned).output.split()[0])
        formula.append(took / measure.seconds(lambda: scan(pair, rows, [PAPER])))
    table = [
        ("scan, rate over that of reading alone", measure.spread(of_reading), "0.60"),
        ("scan, GB/s of both files", f"{rate / 1e9:.1f}", "-"),
        ("scan against isclose in float32", measure.spread(formula, 1) + " x", "20 x"),
    ]
    verdicts = [measure.python(VERDICT, base, tuned) for _ in range(3)]
    if not without_paper:
        paper = measure.python(PAPER_WAY, base, tuned)
        against = [paper.seconds / verdict.seconds for verdict in verdicts]
        table += [
            ("whole command against the paper's script", measure.spread(against, 1) + " x", "18 x"),
            (
                "the paper's script: time, peak RSS",
                f"{paper.seconds:.1f} s, {paper.peak_mb:,.0f} MB",
                "-",
            ),
        ]
    least = min(measure.python(VERDICT, *small).peak_mb for _ in range(2))
    most = max(verdict.peak_mb for verdict in verdicts)
    table += [
        (
            "whole command, import included",
            measure.spread([v.seconds for v in verdicts]) + " s",
            "-",
        ),
        ("peak RSS, 1.1 B pair", f"{most:.0f} MB", "350 MB"),
        ("peak RSS, 0.3 B pair", f"{least:.0f} MB", "flat"),
    ]
    measure.show(table)


if __name__ == "__main__":
    main()
