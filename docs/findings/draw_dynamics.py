"""Draws dynamics.svg: a policy-gradient run beside a random walk with steps of the same size.

Run it anywhere: `python docs/findings/draw_dynamics.py` trains again and writes the picture.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional

from pytest_subnet import open_trajectory, update_dynamics

PICTURE = Path(__file__).with_name("dynamics.svg")
TITLE = (
    "The parts of an update, checkpoint by checkpoint, of a small policy-gradient run and of a "
    "random walk"
)
CHECKPOINTS, STEPS, RATE = 20, 20, 2e-6  # steps of the optimiser between two checkpoints
INPUTS, HIDDEN, ACTIONS, BATCH = 64, 256, 8, 256


def policy_run():
    """Train a small network by its own samples: weights at the checkpoints, rewards."""
    torch.set_num_threads(1)  # or the sums, and with them the picture, depend on the machine
    torch.manual_seed(0)
    hidden = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh()
    model = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, HIDDEN), torch.nn.Tanh(), *hidden, torch.nn.Linear(HIDDEN, ACTIONS)
    )
    teacher = torch.randn(INPUTS, ACTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):  # supervised, until it is right somewhat more often than not
        seen = torch.randn(BATCH, INPUTS)
        step(optimizer, functional.cross_entropy(model(seen), (seen @ teacher).argmax(1)))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    run, rewards = [weights_of(model)], []
    for number in range(CHECKPOINTS * STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - number / (CHECKPOINTS * STEPS))
        seen = torch.randn(BATCH, INPUTS)
        chosen = torch.distributions.Categorical(logits=model(seen))
        actions = chosen.sample()
        reward = (actions == (seen @ teacher).argmax(1)).float()
        step(optimizer, -(chosen.log_prob(actions) * (reward - reward.mean())).mean())
        rewards.append(float(reward.mean()))
        if (number + 1) % STEPS == 0:
            run.append(weights_of(model))
    return run, (sum(rewards[:STEPS]) / STEPS, sum(rewards[-STEPS:]) / STEPS)


def step(optimizer, loss):
    """One step of the optimiser."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def weights_of(model):
    """A copy of the weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def walk_like(run):
    """The same start, and between two checkpoints noise as large as what training did there."""
    generator = torch.Generator().manual_seed(1)
    walk = run[:1]
    for before, after in pairwise(run):
        walk.append(
            {
                name: weight
                + (after[name] - before[name]).square().mean().sqrt()
                * torch.randn(weight.shape, generator=generator)
                for name, weight in walk[-1].items()
            }
        )
    return walk


def measured(run):
    """As if saved in bfloat16."""
    saved = [{name: weight.bfloat16() for name, weight in state.items()} for state in run]
    return update_dynamics(open_trajectory(saved), include="*weight")


def panel(left, title, result):
    """Shares of the weights at each checkpoint: final, updated but not in the end, and neither."""
    xs = [left + 40 + 13.5 * step for step in range(CHECKPOINTS + 1)]
    ever = [0.0, *(each.ever_share for each in result.steps)]
    inside = [0.0, *(each.ever_share * (1 - each.outside_share) for each in result.steps)]
    sparsity = [1.0, *(each.sparsity for each in result.steps)]
    steps = [each.step_sparsity for each in result.steps]
    lines = [
        text(left + 40, 30, title, size=13),
        area(xs, ever, "#f0c9a0"),
        area(xs, inside, "#e0873a"),
    ]
    lines += [line(xs, sparsity, "#1f4e8c"), line(xs[1:], steps, "#1f4e8c", "5 4")]
    for share in (0, 0.5, 1):
        lines.append(text(left + 34, height(share) + 4, f"{share:.0%}", "end"))
    for number in (0, CHECKPOINTS // 2, CHECKPOINTS):
        lines.append(text(xs[number], 269, number, "middle"))
    lines.append(text((xs[0] + xs[-1]) / 2, 283, "checkpoint", "middle"))
    lines.append(f'<g transform="rotate(-90)">{text(-150, left, "share of weights", "middle")}</g>')
    shares = result.never_share, result.cancelled_share, result.final_share
    words = "never {:.1%}, cancelled {:.1%}, final {:.1%}".format(*shares)
    return [*lines, text(left + 40, 305, words), text(left + 40, 321, levels(result))]


def levels(result):
    """Where it levels off."""
    level = result.levels_off()
    return "does not level off" if level is None else f"levels off at checkpoint {level.number}"


def height(share):
    """Where a share lies."""
    return round(255 - 210 * share, 1)


def area(xs, shares, colour):
    """What lies under a curve."""
    points = " ".join(f"{x:g},{height(y):g}" for x, y in zip(xs, shares, strict=True))
    return f'<polygon points="{xs[0]:g},255 {points} {xs[-1]:g},255" fill="{colour}"/>'


def line(xs, shares, colour, dashes=""):
    """A curve."""
    points = " ".join(f"{x:g},{height(y):g}" for x, y in zip(xs, shares, strict=True))
    style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
    return f'<polyline points="{points}" {style}/>'


def text(x, y, words, anchor="start", size=11):
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def draw():
    """The picture, as SVG."""
    run, (before, after) = policy_run()
    trained, walked = measured(run), measured(walk_like(run))
    title = f"trained by its own samples (reward {before:.2f} to {after:.2f})"
    keys = (
        (40, '<rect x="40" y="341" width="10" height="10" fill="#e0873a"/>', "updated for good"),
        (200, '<rect x="200" y="341" width="10" height="10" fill="#f0c9a0"/>', "updated, put back"),
        (330, line((326, 340), (-0.43, -0.43), "#1f4e8c"), "sparsity against the start"),
        (510, line((506, 520), (-0.43, -0.43), "#1f4e8c", "5 4"), "against the checkpoint before"),
    )
    legend = [part for x, mark, words in keys for part in (mark, text(x + 15, 350, words))]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-15 0 735 365" role="img" '
            'font-family="sans-serif" fill="#333">',
            f"<title>{TITLE}</title>",
            '<rect x="-15" width="735" height="365" rx="6" fill="#fff"/>',
            *panel(0, title, trained),
            *panel(360, "a random walk with steps of the same size", walked),
            *legend,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
