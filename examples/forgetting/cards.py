"""Sums of three cards under two rules: what a picture counts is said in each question.

In distribution J, Q and K all count 10; out of it they count 11, 12 and 13 (arXiv 2509.12235).
Every question has a picture, so that no answer is the same by both rules.
"""

import random
from itertools import product
from typing import NamedTuple

CARDS = (*map(str, range(1, 11)), "J", "Q", "K")
RULES = {"in": {"J": 10, "Q": 10, "K": 10}, "out": {"J": 11, "Q": 12, "K": 13}}
TRIALS = 234  # of each rule, held out: as many as the paper has episodes


class Question(NamedTuple):
    """A prompt and the only answer that is right."""

    prompt: str
    answer: str


def questions(rule: str, *, held_out: bool) -> list[Question]:
    """Return the questions of a rule; the same hands of cards are held out of both."""
    hands = [hand for hand in product(CARDS, repeat=3) if set(hand) & {"J", "Q", "K"}]
    random.Random(0).shuffle(hands)
    chosen = hands[:TRIALS] if held_out else hands[TRIALS:]
    return [_question(hand, RULES[rule]) for hand in chosen]


def _question(hand: tuple[str, ...], counts: dict[str, int]) -> Question:
    total = sum(counts[card] if card in counts else int(card) for card in hand)
    return Question(f"K={counts['K']}: {'+'.join(hand)}=", str(total))
