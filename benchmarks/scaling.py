"""What a pair of 671 billion weights in 100,000 tensors costs before a byte of data is read.

    python benchmarks/scaling.py [DIRECTORY]

writes such a pair: the headers are real, the data is a hole in the file, so that 2.7 TB take 45 MB
of disk. The file system must allow files of 8 GB. Opening, aligning, cutting into work units and
adding up what they count are measured as they are. Reading is not: one block of experts is scanned,
which reads zeros that the system makes up; for the rest, see the reading rate of
`benchmarks/scan.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import resource
import tempfile
from pathlib import Path

import measure

from pytest_subnet import open_pair
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.gathering import scan, total
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES
from pytest_subnet.scan.units import cut

LAYERS, DENSE_LAYERS, EXPERTS = 61, 3, 570
HIDDEN, INTERMEDIATE, EXPERT_WIDTH, VOCAB = 7168, 18432, 921, 129_280
SHARDS = 163


def tensors() -> dict[str, tuple[int, ...]]:
    """A DeepSeek-V3 whose experts are narrower and more, so that there are 100,000 matrices."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        found |= {
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{attention}.q_a_proj.weight": (1536, HIDDEN),
            f"{attention}.q_a_layernorm.weight": (1536,),
            f"{attention}.q_b_proj.weight": (24_576, 1536),
            f"{attention}.kv_a_proj_with_mqa.weight": (576, HIDDEN),
            f"{attention}.kv_a_layernorm.weight": (512,),
            f"{attention}.kv_b_proj.weight": (32_768, 512),
            f"{attention}.o_proj.weight": (HIDDEN, 16_384),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
        }
        if layer < DENSE_LAYERS:
            found |= mlp(f"{block}.mlp", INTERMEDIATE)
            continue
        found[f"{block}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        found |= mlp(f"{block}.mlp.shared_experts", 2048)
        for expert in range(EXPERTS):
            found |= mlp(f"{block}.mlp.experts.{expert}", EXPERT_WIDTH)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def mlp(block: str, width: int) -> dict[str, tuple[int, ...]]:
    """The three matrices of one gated layer."""
    return {
        f"{block}.gate_proj.weight": (width, HIDDEN),
        f"{block}.up_proj.weight": (width, HIDDEN),
        f"{block}.down_proj.weight": (HIDDEN, width),
    }


def write_holes(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A checkpoint in bfloat16 whose files have headers and no data."""
    directory.mkdir()
    names = list(shapes)
    per_shard = math.ceil(len(names) / SHARDS)
    weight_map = {}
    for number, first in enumerate(range(0, len(names), per_shard), 1):
        group = names[first : first + per_shard]
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        header, end = {}, 0
        for name in group:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [start, end],
            }
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(directory / file, "wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            shard.truncate(8 + len(raw) + end)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "tie_word_embeddings": False})
    )


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(options.directory or Path(scratch))


def report(root: Path) -> None:
    """Measure everything on the pair in `root`."""
    shapes = tensors()
    sides = root / "base", root / "tuned"
    for side in sides:
        if not side.exists():
            write_holes(side, shapes)
    pair = open_pair(*sides)
    weights = sum(math.prod(shape) for shape in shapes.values())
    opening = [measure.seconds(lambda: open_pair(*sides)) for _ in range(3)]
    rows = range(len(pair.tensors))
    units = cut(pair, rows)
    cutting = [measure.seconds(lambda: cut(pair, rows)) for _ in range(3)]
    tolerances = [each for each in DEFAULT_TOLERANCES if not each.same_bits]
    parts = [Counters(len(unit.segments), tolerances) for unit in units]
    adding = [measure.seconds(lambda: total(pair, units, parts, tolerances)) for _ in range(3)]
    sent = len(pickle.dumps(units))
    block = [row for row in rows if pair.tensors[row].layer == DENSE_LAYERS]
    entries = sum(pair.tensors[row].numel for row in block)
    scanning = [measure.seconds(lambda: scan(pair, block, tolerances)) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    on_disk = sum(path.stat().st_blocks * 512 for side in sides for path in side.iterdir())
    measure.show(
        [
            ("weights", f"{weights / 1e9:.0f} B", "-"),
            ("tensors", f"{len(pair.tensors):,}", "-"),
            ("bytes of the pair", f"{4 * weights / 1e12:.2f} TB", "-"),
            ("bytes on this disk", f"{on_disk / 1e6:.0f} MB", "-"),
            ("open both, align: seconds", measure.spread(opening), "-"),
            ("cut into work units: seconds", measure.spread(cutting), "-"),
            ("work units", f"{len(units):,}", "-"),
            ("bytes of all units, as sent to workers", f"{sent / 1e6:.1f} MB", "-"),
            ("add up what all units counted: seconds", measure.spread(adding), "-"),
            (
                f"scan one block of experts ({4 * entries / 1e9:.0f} GB of zeros): GB/s",
                measure.spread([4 * entries / 1e9 / each for each in scanning], 1),
                "-",
            ),
            ("peak RSS", f"{peak:.0f} MB", "-"),
        ]
    )


if __name__ == "__main__":
    main()
