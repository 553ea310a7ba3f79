"""Two predictions of the next token, compared token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

ENTRIES = 2**22
"""Logits of a side that are compared at a time: 16 MB in float32, whatever the vocabulary."""


def compared(
    base: torch.Tensor, tuned: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> NDArray[np.float64]:
    """Compare what two models predict at some places.

    Args:
        base: logits `[places, vocabulary]`, of any floating dtype.
        tuned: likewise, of the same shape; on any device.
        rows: the places that count, `[tokens]`.
        targets: the token that follows each of them.

    Returns:
        `[tokens, 5]`: KL(base || tuned) and KL(tuned || base) in nats, whether both have the same
        first choice, and the log-probability of the target in base and tuned. A row holds NaN
        where a side predicts nothing.
    """
    import torch

    parts = []
    step = max(1, ENTRIES // base.shape[1])
    for start in range(0, len(rows), step):
        place, target = rows[start : start + step], targets[start : start + step]
        one = base[place]
        other = tuned[place.to(tuned.device)].to(base.device)
        found = _together(one, other, target)
        # Of a token that is out of the question for one side alone, float32 forms 0 * Inf.
        odd = (~found.isfinite().all(dim=1)).nonzero()[:, 0]
        found = found.cpu().double()
        if len(odd):
            found[odd.cpu()] = _with_care(*(each[odd].cpu() for each in (one, other, target)))
        parts.append(found)
    joined: NDArray[np.float64] = torch.cat(parts).numpy()
    return joined


def log_probabilities(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> NDArray[np.float64]:
    """The log-probability of the token that follows, at some places; arguments as above."""
    import torch

    parts = []
    step = max(1, ENTRIES // logits.shape[1])
    for start in range(0, len(rows), step):
        logs = torch.log_softmax(logits[rows[start : start + step]], -1, dtype=torch.float32)
        parts.append(_of(logs, targets[start : start + step]).cpu().double())
    joined: NDArray[np.float64] = torch.cat(parts).numpy()
    return joined


def _together(base: torch.Tensor, tuned: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All that is asked of some rows, in float32 and with four pieces of memory.

    With p, q the two distributions and r = log q - log p, KL(p || q) = -sum p r, which is also
    sum p (e^r - 1 - r), since both sum to 1. No term of that is negative, and an error of the
    normalisation, the same in all of r, cancels to first order.
    """
    import torch

    agree = base.argmax(-1) == tuned.argmax(-1)
    logs = torch.log_softmax(base, -1, dtype=torch.float32)
    ratio = torch.log_softmax(tuned, -1, dtype=torch.float32)
    base_log, tuned_log = _of(logs, targets), _of(ratio, targets)
    ratio -= logs
    forward = torch.expm1(ratio)
    backward = forward * ratio
    forward -= ratio
    backward -= forward  # r e^r - e^r + 1: the same sum with p and q exchanged, over p
    chance = logs.exp_()
    sums = [each.mul_(chance).sum(-1) for each in (forward, backward)]
    return torch.stack([*sums, agree.float(), base_log, tuned_log], dim=1)


def _with_care(base: torch.Tensor, tuned: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same for a few rows, in float64; what has no probability takes no part."""
    import torch

    logs = [torch.log_softmax(each, -1, dtype=torch.float64) for each in (base, tuned)]
    sums = [
        torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)
        for p, q in (logs, reversed(logs))
    ]
    agree = base.argmax(-1) == tuned.argmax(-1)
    return torch.stack([*sums, agree.double(), *(_of(each, targets) for each in logs)], dim=1)


def _of(logs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logs.gather(-1, targets[:, None])[:, 0]
