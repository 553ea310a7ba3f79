"""What a run would look like if its update meant nothing: noise as large, stored as it was stored.

Every number that `spectra.py` prints of a run it prints of such a twin too. What both have in
common was made by the size of the update and by bfloat16, not by the training.
"""

from fnmatch import fnmatch

import torch
from torch import Tensor

from pytest_subnet import ModelPair, open_pair

MATRICES = "*_proj.weight"


def noise_like(pair: ModelPair, *, seed: int) -> ModelPair:
    """Return the base beside itself with noise added, of the energy of `pair`'s update.

    Of each projection N(0, s²) is added to every weight, and the sum rounded to the storage dtype;
    s is such that what is left of it then has the norm that the update has.
    """
    generator = torch.Generator().manual_seed(seed)
    twin = {}
    for name in pair.base.names():
        base, tuned = pair.base.read(name), pair.tuned.read(name)
        twin[name] = base
        if fnmatch(name, MATRICES):
            noise = torch.randn(base.shape, generator=generator)
            twin[name] = _rounded(base, noise, energy=_energy(base, tuned))
    return open_pair(pair.base, twin)


def _rounded(base: Tensor, noise: Tensor, *, energy: float) -> Tensor:
    """Add as much of `noise` as it takes, by bisection: the more of it, the more is left."""
    low, high = 0.0, float(base.float().abs().max())
    for _ in range(25):
        middle = (low + high) / 2
        if _energy(base, _add(base, noise, middle)) < energy:
            low = middle
        else:
            high = middle
    return _add(base, noise, high)


def _add(base: Tensor, noise: Tensor, size: float) -> Tensor:
    return (base.float() + size * noise).to(base.dtype)


def _energy(base: Tensor, tuned: Tensor) -> float:
    return float((tuned.double() - base.double()).square().sum())
