"""Draws precision.svg: the density that rounding leaves of updates without structure.

Run it anywhere: `python docs/findings/draw_precision.py` measures again and writes the picture.
"""

import math
from pathlib import Path

import torch

from pytest_subnet import open_pair, update_sparsity

PICTURE = Path(__file__).with_name("precision.svg")
TITLE = "Density that rounding leaves of noise, measured and expected, by the size of the noise"
SIDE = 1024
SIZES = [10 ** (step / 4 - 6) for step in range(13)]


def measured(size, share=1.0):
    """Measured and expected density of normal noise on a share of normal weights of 0.02."""
    torch.manual_seed(0)
    weight = (torch.randn(SIDE, SIDE) * 0.02).bfloat16()
    step = torch.randn(SIDE, SIDE) * size * (torch.rand(SIDE, SIDE) < share)
    tuned = (weight.float() + step).bfloat16()
    result = update_sparsity(open_pair({"w.weight": weight}, {"w.weight": tuned}))
    return result.density, 1 - result.expected_sparsity


def draw():
    """The picture, as SVG."""
    blue, orange = "#3f74b5", "#e0873a"
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 330" font-family="sans-serif" '
        'font-size="11" fill="#333" role="img">',
        f"<title>{TITLE}</title>",
        '<rect width="720" height="330" rx="6" fill="#fff"/>',
        text(20, 24, "Density of dense and of sparse noise after rounding to bfloat16, in %", 14),
        text(20, 45, "line: what rounding alone explains; dots: measured"),
    ]
    lines += [
        '<text x="16" y="170" text-anchor="middle" transform="rotate(-90 16 170)">density, %</text>'
    ]
    for density in (0, 25, 50, 75, 100):
        y = height(density / 100)
        lines += [
            f'<path d="M60 {y:g}H690" stroke="#e4e6e9"/>',
            text(52, y + 4, density, anchor="end"),
        ]
    for share, colour, words in ((1.0, blue, "every weight"), (0.05, orange, "one in twenty")):
        found = [measured(size, share) for size in SIZES]
        points = " ".join(
            f"{across(size):g},{height(expected):g}"
            for size, (_, expected) in zip(SIZES, found, strict=True)
        )
        lines += [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>']
        lines += [
            f'<circle cx="{across(size):g}" cy="{height(density):g}" r="4" fill="{colour}"/>'
            for size, (density, _) in zip(SIZES, found, strict=True)
        ]
        x = 290 if share == 1 else 560
        lines += [text(x, 150 if share == 1 else 245, f"noise on {words}", 12, colour=colour)]
    for power in range(-6, -2):
        lines += [text(across(10**power), 295, f"1e{power}", anchor="middle")]
    lines += [text(375, 316, "standard deviation of the noise, in weight units", anchor="middle")]
    return "\n".join([*lines, '<path d="M60 275H690" stroke="#888"/>', "</svg>", ""])


def across(size):
    """Where a size of noise lies, on a logarithmic axis."""
    return round(75 + 200 * (math.log10(size) + 6), 1)


def height(density):
    """Where a density lies."""
    return round(275 - 210 * density, 1)


def text(x, y, words, size=11, anchor="start", colour="#333"):
    """A line of text."""
    style = f'text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
