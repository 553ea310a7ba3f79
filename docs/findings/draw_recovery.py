"""Draws recovery.svg: how far four models trained from one base are the one trained in full.

Run it anywhere: `python docs/findings/draw_recovery.py` trains again and writes the picture.
"""

import copy
from pathlib import Path

import torch
from torch.nn import functional

from pytest_subnet import open_pair, subnetwork_recovery, train_inside, update_mask

PICTURE = Path(__file__).with_name("recovery.svg")
SEED, STEPS, RATE = 0, 40, 5e-6
TOLERANCES = (1e-5, 1e-4)
BLUE, ORANGE = "#3f74b5", "#e0873a"
TOP, BOTTOM, WIDTH = 95, 265, 300  # of a panel


def trained():
    """The run of the page: base, full, and what was trained from the base by how it was."""
    torch.set_num_threads(1)  # or the sums, and with them the picture, depend on the machine
    torch.manual_seed(SEED)
    start = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    data = torch.randn(256, 32), torch.randint(8, (256,))
    base, full = saved(start), train(start, data)
    mask = update_mask(open_pair(base, full))
    return (
        base,
        full,
        {
            "inside the mask": train(start, data, mask=mask),
            "inside it, other order of the data": train(start, data, mask=mask, order=1),
            "in full, other order of the data": train(start, data, order=1),
            "inside it, half the steps": train(start, data, mask=mask, steps=STEPS // 2),
            "not at all": {name: weight.clone() for name, weight in base.items()},
        },
    )


def train(start, data, *, mask=None, order=0, steps=STEPS):
    """Float32 masters, saved in bfloat16, at a learning rate below its resolution."""
    model, draw = copy.deepcopy(start), torch.Generator().manual_seed(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def run():
        for _ in range(steps):
            batch = torch.randint(256, (32,), generator=draw)
            loss = functional.cross_entropy(model(data[0][batch]), data[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return saved(model)

    if mask is None:
        return run()
    with train_inside(model, optimizer, mask):
        return run()


def saved(model):
    """The weights as they are stored."""
    return {name: each.detach().bfloat16() for name, each in model.state_dict().items()}


def measured():
    """What was measured, by tolerance and how sub was trained."""
    base, full, subs = trained()
    mask = update_mask(open_pair(base, full))
    return {
        atol: {
            how: subnetwork_recovery(full, sub, base=base, atol=atol, mask=mask)
            for how, sub in subs.items()
        }
        for atol in (*TOLERANCES, 1e-3)
    }


def rows(results):
    """The lines of the page's table, in percent."""
    return [
        f"| {how} | {atol:.0e} | {100 * each.whole_match:.1f} | {100 * each.match:.1f} "
        f"| {100 * each.base_match:.1f} | "
        f"{'none left' if each.recovered is None else f'**{100 * each.recovered:.1f}**'} |".replace(
            "e-0", "e-"
        )
        for atol, by_how in results.items()
        for how, each in by_how.items()
    ]


def draw(results):
    """The picture, as SVG."""
    title = "Agreement with full training: of all entries, and of those that the base misses"
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 340" role="img" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f"<title>{title}</title>",
        '<rect width="760" height="340" rx="6" fill="#fff"/>',
        text(20, 24, title, 14),
        bar(20, 38, 10, 10, BLUE),
        text(35, 47, "agree, of all entries (the number the paper prints)"),
        bar(340, 38, 10, 10, ORANGE),
        text(355, 47, "agree, of the entries of the mask that the base misses"),
        f'<text transform="translate(16 {(TOP + BOTTOM) / 2:g}) rotate(-90)" '
        'text-anchor="middle">share that agrees with full</text>',
        text(380, 330, "how the model was trained", anchor="middle"),
    ]
    for left, atol in zip((65, 435), TOLERANCES, strict=True):
        lines += panel(left, f"within {atol:.0e}".replace("e-0", "e-"), results[atol])
    return "\n".join([*lines, "</svg>", ""])


def panel(left, title, by_how):
    """One tolerance: two bars for each way of training."""
    lines = [text(left + WIDTH / 2, TOP - 18, title, 12, "middle")]
    for share in (0, 0.5, 1):
        y = BOTTOM - (BOTTOM - TOP) * share
        lines += [
            f'<path d="M{left} {y:g}H{left + WIDTH}" stroke="#ccc"/>',
            text(left - 5, y + 4, f"{share:.0%}", anchor="end"),
        ]
    for number, (how, result) in enumerate(by_how.items()):
        middle = left + WIDTH * (number + 0.5) / len(by_how)
        for x, share, colour in (
            (middle - 25, result.whole_match, BLUE),
            (middle + 1, result.recovered, ORANGE),
        ):
            height = round((BOTTOM - TOP) * share, 1)
            lines += [
                bar(x, BOTTOM - height, 24, height, colour),
                text(x + 12, BOTTOM - height - 4, f"{100 * share:.0f}", anchor="middle"),
            ]
        for line, words in enumerate(in_two(how)):
            lines.append(text(middle, BOTTOM + 16 + 13 * line, words, 10, "middle"))
    return lines


def in_two(how):
    """A label of at most three short lines."""
    first, _, second = how.removesuffix(" of the data").partition(", ")
    return [first, *second.replace("half the", "half the|").split("|")] if second else [first]


def bar(x, y, width, height, colour):
    """A filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height:g}" fill="{colour}"/>'


def text(x, y, words, size=11, anchor="start"):
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


if __name__ == "__main__":
    found = measured()
    PICTURE.write_text(draw(found), encoding="utf-8")
    print("\n".join(rows(found)))
