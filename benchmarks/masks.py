"""What masks cost: their overlap against boolean tensors, and marking beside counting.

    python benchmarks/masks.py             # 1.1 B entries; needs 7 GB of disk and 3 GB of memory
    python benchmarks/masks.py --small     # 0.3 B entries

The peer is what people write: a boolean tensor for each weight, both masks in memory, and
`(a & b).sum()` tensor by tensor. Ours is given two mask files, counts the same, and all that
`mask_overlap` gives beside it: chance by matrix, by rows and columns, and over the model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import measure
from pairs import LLAMA_1B, LLAMA_300M, build_llama_pair

from pytest_subnet import UpdateMask, open_pair, random_mask_like, update_mask
from pytest_subnet.scan.gathering import scan
from pytest_subnet.scan.masking import mark
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES, SAME_BITS

# Both print the seconds of each round, the memory that the masks take, and what they counted.
PACKED = """
import sys, time
from pytest_subnet import UpdateMask, mask_overlap
def overlap(paths):
    return mask_overlap(*paths, null="matrix").intersection
overlap(sys.argv[2:])
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    found = overlap(sys.argv[2:])
    print(time.perf_counter() - start)
masks = map(UpdateMask.load, sys.argv[2:])
print(sum(words.nbytes for mask in masks for name in mask.names() for words in mask.words(name)))
print(found)
"""
BOOLEAN = """
import sys, time
import torch
from pytest_subnet import UpdateMask
a, b = (
    [torch.from_numpy(mask[name]) for name in mask.names()]
    for mask in map(UpdateMask.load, sys.argv[2:])
)
def overlap():
    return sum(int((x & y).sum()) for x, y in zip(a, b, strict=True))
overlap()
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    found = overlap()
    print(time.perf_counter() - start)
print(sum(each.nbytes for each in (*a, *b)))
print(found)
"""


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(options.directory or Path(scratch), options.rounds, small=options.small)


def report(root: Path, rounds: int, *, small: bool) -> None:
    """Measure everything on the pair in `root`."""
    name, shape = ("0.3b", LLAMA_300M) if small else ("1.1b", LLAMA_1B)
    pair = open_pair(*build_llama_pair(root / name, shape))
    rows = range(len(pair.tensors))

    def count() -> None:
        scan(pair, rows, [each for each in DEFAULT_TOLERANCES if not each.same_bits])

    def count_and_mark() -> None:
        mark(pair, rows, SAME_BITS, lambda row, word, words: None)

    count()  # compiles, or loads what was compiled, and fills the page cache
    count_and_mark()
    marking = measure.ratios(count_and_mark, count, rounds)

    paths = root / "a.safetensors", root / "b.safetensors"
    mask = update_mask(pair)
    mask.save(paths[0])
    random_mask_like(mask, seed=0).save(paths[1])
    entries = UpdateMask.load(paths[0]).numel
    seconds, nbytes, found, peaks = {}, {}, {}, {}
    for way, code in (("packed", PACKED), ("boolean", BOOLEAN)):
        finished = measure.python(code, rounds, *paths)
        *times, size, counted = finished.output.split()
        seconds[way] = sorted(map(float, times))
        nbytes[way], found[way], peaks[way] = int(size), int(counted), finished.peak_mb
    if found["packed"] != found["boolean"]:
        raise SystemExit(f"they do not agree: {found}")
    median = seconds["packed"][len(seconds["packed"]) // 2]
    faster = [each / median for each in seconds["boolean"]]
    measure.show(
        [
            ("entries of each mask", f"{entries:,}", "-"),
            ("overlap from files, seconds", measure.spread(seconds["packed"], 3), "-"),
            ("boolean tensors, seconds", measure.spread(seconds["boolean"], 3), "-"),
            ("overlap against boolean tensors", measure.spread(faster, 1) + " x", "8 x"),
            (
                "bytes of the masks, ours over theirs",
                f"1/{nbytes['boolean'] / nbytes['packed']:.2f}",
                "1/8",
            ),
            (
                "peak RSS, ours and theirs",
                f"{peaks['packed']:.0f} MB, {peaks['boolean']:.0f} MB",
                "1/8",
            ),
            ("marking in the scan over the scan alone", measure.spread(marking), "1.5"),
        ]
    )


if __name__ == "__main__":
    main()
