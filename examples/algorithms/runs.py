"""The runs: seven algorithms of reinforcement learning, their ablations, and supervised tuning.

Every run starts from the same base, trains all of it in float32 with AdamW at a constant rate and
no weight decay, and is stored in bfloat16. The rates are the usual ones of each method.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the table; `steps` are those of the optimiser."""

    algorithm: str
    learning_rate: float
    steps: int = 30
    batch_size: int = 8
    options: dict[str, Any] = field(default_factory=dict)


RUNS: dict[str, Run] = {
    "ppo": Run(algorithm="ppo", learning_rate=1e-6),
    "grpo": Run(algorithm="grpo", learning_rate=1e-6, options={"beta": 0.04}),
    "grpo-without-kl": Run(algorithm="grpo", learning_rate=1e-6, options={"beta": 0.0}),
    # Of gradients, as in the paper: Adam divides by their size, so that little should change.
    "grpo-without-clipping": Run(
        algorithm="grpo", learning_rate=1e-6, options={"beta": 0.04, "max_grad_norm": 0.0}
    ),
    "dpo": Run(algorithm="dpo", learning_rate=5e-7, batch_size=4),
    "orpo": Run(algorithm="orpo", learning_rate=5e-6, batch_size=4),
    "kto": Run(algorithm="kto", learning_rate=5e-7),
    "simpo": Run(algorithm="simpo", learning_rate=5e-7, batch_size=4),
    "prime": Run(algorithm="prime", learning_rate=5e-7),
    "sft-far": Run(algorithm="sft-far", learning_rate=2e-5, steps=60, batch_size=4),
    "sft-near": Run(algorithm="sft-near", learning_rate=2e-5, steps=60, batch_size=4),
    "sft-at-rl-rate": Run(algorithm="sft-far", learning_rate=1e-6, batch_size=4),
}
"""By name; `far` and `near` say how far the text is from what the base writes by itself."""

TWICE = ("ppo", "grpo", "dpo", "orpo", "kto", "simpo", "prime", "sft-far")
"""Trained again with a second seed, to see how much of the update is the same."""

INSIDE = ("dpo", "prime", "grpo")
"""Trained again inside the mask of their own update, with the same seed; the paper does so with the
first two."""
