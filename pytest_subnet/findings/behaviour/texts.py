"""What failed assertions on behaviour say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import WORST, limit_above, number_against
from pytest_subnet.text import column, facts, percent, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.findings.behaviour.finding import BehaviourShift
    from pytest_subnet.findings.behaviour.policy import NearPolicy
    from pytest_subnet.findings.behaviour.prompts import Prompt


def not_a_number(role: str, label: str, prompt: Prompt, position: int, noun: str = "prompt") -> str:
    """A model predicts nothing at a place.

    Args:
        role: which model it is.
        label: how it is called, escaped.
        prompt: where.
        position: after which of its tokens, from 0.
        noun: what a prompt is called.
    """
    text = f' ("{prompt.text}")' if prompt.text else ""
    return (
        f"{role} ({label}) predicts NaN after position {position} of {noun} {prompt.number}{text}; "
        "look for NaN in its weights with assert_finite, or take a dtype with more range"
    )


def behaves_the_same(result: BehaviourShift) -> str:
    """Nothing differs, so that closeness says nothing."""
    return facts(
        "nothing differs: base and tuned predict the same to the last bit",
        [
            *result.measured(),
            ("usually", "the base was saved again, an adapter was not merged, no optimiser step"),
            ("", "was made, or each was smaller than half a step of the storage dtype"),
            ("to accept", "allow_identical=True"),
        ],
    )


def too_different(result: BehaviourShift, bound: float) -> str:
    """The divergence is above `max_kl`."""
    value, allowed = number_against(result.kl, bound)
    furthest = sorted(result.per_prompt, key=lambda each: -each.kl)
    accept = limit_above(result.kl)
    return facts(
        f"KL(base || tuned) of {value} nats a token is above the allowed {allowed}",
        [
            *result.measured(),
            (
                "behaviour",
                f"reverse KL {result.reverse_kl:.3g}, same first choice for "
                f"{percent(result.top1_agreement)}, log-prob of the text "
                f"{result.logprob_shift:+.3g}",
            ),
            *_worst(
                "prompt", [(each.number, each.tokens, each.kl, each.text) for each in furthest]
            ),
            ("usually", "too high a learning rate or too many steps, no KL term, or prompts that"),
            ("", "the tuning was about, where it was meant to change"),
            *([("to accept", f"max_kl={accept}")] if accept is not None else []),
        ],
    )


def off_policy(result: NearPolicy, bound: float) -> str:
    """The data is less likely than `max_nll` allows."""
    value, allowed = number_against(result.nll, bound)
    furthest = sorted(result.per_sample, key=lambda each: -each.nll)
    accept = limit_above(result.nll)
    return facts(
        f"negative log-likelihood of {value} nats a token is above the allowed {allowed}",
        [
            *result.measured(),
            (
                "of chance",
                f"{result.chance_nll:.3g} nats: every token of the vocabulary alike",
            ),
            *_worst(
                "sample", [(each.number, each.tokens, each.nll, each.text) for each in furthest]
            ),
            ("usually", "data that another model or people wrote, or another chat template than"),
            ("", "the base was trained with; updates on such data are dense"),
            *([("to accept", f"max_nll={accept}")] if accept is not None else []),
        ],
    )


def _worst(noun: str, rows: Sequence[tuple[int, int, float, str]]) -> list[tuple[str, str]]:
    """The rows of a message for the first few of some prompts: number, tokens, nats, text."""
    lines = [
        f"{noun} {number}  {nats:.3g} nats over {plural(tokens, 'token')}"
        + (f'  "{text}"' if text else "")
        for number, tokens, nats, text in rows[:WORST]
    ]
    if len(rows) > WORST:
        lines.append(f"… {len(rows) - WORST:,} more")
    return column("worst", lines)
