"""Draws rank.svg: a dense update of rank 8, stored in bfloat16, at four sizes.

Run it anywhere: `python docs/findings/draw_rank.py` measures again and writes the picture.
"""

import math
from pathlib import Path

import torch

from pytest_subnet import open_pair, update_rank

PICTURE = Path(__file__).with_name("rank.svg")
TITLE = "Rank and resolved rank of a dense update of rank 8 in a 512 x 512 matrix, at four sizes"
SIDE, RANK = 512, 8
SIZES = (1e-6, 1e-5, 1e-4, 1e-3)


def measured(size, dtype):
    """Base normal of 0.02; an update of rank 8 whose entries have the root mean square `size`."""
    torch.manual_seed(0)
    weight = (torch.randn(SIDE, SIDE) * 0.02).to(dtype)
    update = torch.randn(SIDE, RANK) @ torch.randn(RANK, SIDE) * (size / RANK**0.5)
    tuned = (weight.float() + update).to(dtype)
    return update_rank(open_pair({"w.weight": weight}, {"w.weight": tuned})).per_tensor[0]


def draw():
    """The picture, as SVG."""
    blue, orange = "#3f74b5", "#e0873a"
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 320" font-family="sans-serif" '
        'font-size="11" fill="#333" role="img">',
        f"<title>{TITLE}</title>",
        '<rect width="720" height="320" rx="6" fill="#fff"/>',
        text(20, 24, f"Directions of an update of rank {RANK}, in a {SIDE} x {SIDE} matrix", 14),
        bar(20, 36, 10, 10, blue),
        text(35, 45, "rank, as the paper counts it"),
        bar(220, 36, 10, 10, orange),
        text(235, 45, "resolved: above twice the rounding floor"),
    ]
    for count in (0, 128, 256, 384, SIDE):
        y = 260 - 190 * count / SIDE
        lines += [
            f'<path d="M50 {y:g}H710" stroke="#e4e6e9"/>',
            text(44, y + 4, count, anchor="end"),
        ]
    lines += [text(710, 66, f"full rank: {SIDE}", anchor="end")]
    lines += [text(16, 165, "singular values", anchor="middle", turned=True)]
    for group, size in enumerate(SIZES):
        row = measured(size, torch.bfloat16)
        left = 65 + 165 * group
        for number, (count, colour) in enumerate(((row.rank, blue), (row.resolved_rank, orange))):
            height = round(190 * count / SIDE, 1)
            lines += [
                bar(left + 60 * number, 260 - height, 50, height, colour),
                text(left + 60 * number + 25, 254 - height, f"{count}", anchor="middle"),
            ]
        lines += [
            text(left + 55, 278, f"rms 1e{round(math.log10(size))}", anchor="middle", size=12),
            text(left + 55, 296, f"stable rank {row.stable_rank:.1f}", anchor="middle"),
        ]
    return "\n".join([*lines, '<path d="M50 260H710" stroke="#888"/>', "</svg>", ""])


def bar(x, y, width, height, colour):
    """A filled rectangle."""
    return f'<rect x="{x}" y="{y:g}" width="{width}" height="{height:g}" fill="{colour}"/>'


def text(x, y, words, size=11, anchor="start", turned=False):
    """A line of text, upwards if it is turned."""
    style = f'text-anchor="{anchor}" font-size="{size}"'
    if turned:
        style += f' transform="rotate(-90 {x} {y:g})"'
    return f'<text x="{x}" y="{y:g}" {style}>{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
