"""Draws overlap.svg: updates without any structure beside Table 4 of arXiv 2505.11711.

Run it anywhere: `python docs/findings/draw_overlap.py` measures again and writes the picture.
"""

from pathlib import Path

import numpy as np
import torch

from pytest_subnet import mask_overlap, open_pair
from pytest_subnet.published import OVERLAPS

PICTURE = Path(__file__).with_name("overlap.svg")
TITLE = (
    "One-sided overlap of two runs: by chance, as published, and of random updates "
    "stored in bfloat16"
)
SIDE = 1024

NAMES = ("two seeds", "two data sets", "seed, data and algorithm")

# Of normal noise, in weight units: they leave the densities of each row of Table 4.
SCALES = ((3.72e-5, 3.72e-5), (3.72e-5, 1.535e-5), (1.40e-5, 2.265e-5))


def measured(scales):
    """One-sided overlaps in percent, and lift by exponent, of two unrelated updates."""
    base = {"w": stored(0.02 * noise(0))}
    runs = [
        open_pair(base, {"w": stored(base["w"].float() + scale * noise(seed))})
        for seed, scale in enumerate(scales, start=1)
    ]
    result = mask_overlap(*runs, atol=1e-5)
    return (100 * result.one_sided_a, 100 * result.one_sided_b), result.lift


def noise(seed):
    """Normal numbers, float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((SIDE, SIDE), np.float32))


def stored(weights):
    """As a checkpoint keeps them."""
    return weights.bfloat16()


def draw():
    """The picture, as SVG."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 330" font-family="sans-serif" '
        'font-size="11" fill="#333" role="img">',
        f"<title>{TITLE}</title>",
        '<rect width="720" height="330" rx="6" fill="#fff"/>',
        text(20, 24, "One-sided overlap of two updates, in %", size=14),
    ]
    sorts = ("random sets (the paper)", "published", "random updates, stored in bfloat16")
    colours = ("#c4c8ce", "#3f74b5", "#e0873a")
    for number, (sort, colour) in enumerate(zip(sorts, colours, strict=True)):
        left = (20, 180, 265)[number]
        lines += [bar(left, 36, 10, 10, colour), text(left + 15, 45, sort)]
    lines += [
        '<text x="12" y="160" text-anchor="middle" transform="rotate(-90 12 160)">overlap, %</text>'
    ]
    for y in range(0, 101, 25):
        lines += [
            f'<path d="M38 {260 - 2 * y}H712" stroke="#e4e6e9"/>',
            text(32, 264 - 2 * y, f"{y}", anchor="end"),
        ]
    for group, (name, row, scales) in enumerate(zip(NAMES, OVERLAPS, SCALES, strict=True)):
        left = 40 + 228 * group
        found, lift = measured(scales)
        chance = 100 * row.random_a, 100 * row.random_b
        published = 100 * row.one_sided_a, 100 * row.one_sided_b
        for side in range(2):
            values = chance[side], published[side], found[side]
            for number, (value, colour) in enumerate(zip(values, colours, strict=True)):
                x, height = left + 105 * side + 31 * number, round(2 * value, 1)
                lines += [
                    bar(x, 260 - height, 28, height, colour),
                    text(x + 14, 255 - height, f"{value:.1f}", anchor="middle"),
                ]
            lines += [text(left + 105 * side + 45, 275, f"o{side + 1}", anchor="middle")]
        lines += [
            text(left + 97, 295, name, anchor="middle", size=12),
            text(left + 97, 314, f'lift by "exponent": {lift:.2f}', "middle", colour=colours[2]),
        ]
    return "\n".join([*lines, '<path d="M38 260H712" stroke="#888"/>', "</svg>", ""])


def bar(x, y, width, height, colour):
    """A filled rectangle."""
    return f'<rect x="{x}" y="{y:g}" width="{width}" height="{height}" fill="{colour}"/>'


def text(x, y, words, anchor="start", size=11, colour="#333"):
    """A line of text."""
    style = f'text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f'<text x="{x}" y="{y:g}" {style}>{words.replace(chr(34), "&quot;")}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
