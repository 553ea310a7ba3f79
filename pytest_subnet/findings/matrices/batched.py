"""Matrices of one shape together: one of them alone would not keep a GPU busy.

What is found out here at once is what each `Spectrum` would find out by itself, by the same
certificates; what is not certain here is left to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.matrices import spectra
from pytest_subnet.findings.matrices.spectra import Spectrum

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_STEPS = 96
"""Of Lanczos: the edge of a spectrum of noise takes some 70 at 4096 rows."""

_LOOPED = 1024
"""Rows from which on a matrix keeps a GPU busy, and batched factorisations are the slower ones."""


def nbytes_of(rows: int, columns: int, itemsize: int) -> int:
    """What a matrix of a batch takes on the device, at most.

    It and its copy in the stack, a block of it in float64, its Gram matrix, two copies of that and
    the workspace of its eigenvalues, and the vectors of Lanczos.
    """
    short, long = sorted((rows, columns))
    wide = short * min(long, spectra.COLUMNS) + 4 * short * short + _STEPS * short
    return 2 * rows * columns * itemsize + 8 * wide


def spectra_of(matrices: Sequence[torch.Tensor], *, all_values: bool = False) -> list[Spectrum]:
    """The spectra of matrices of one shape, with their largest values where these are certain.

    Args:
        matrices: `[m, n]` each, finite, of one dtype and on one device.
        all_values: as in `Spectrum`.
    """
    import torch

    stack = torch.stack(list(matrices))
    if max(stack.shape[1:]) <= spectra.SMALL:
        # A GPU takes them one after the other, and longer than the CPU for each.
        values = torch.linalg.svdvals(stack.double().cpu())
        return [Spectrum.of(values=each) for each in values]
    grams = _grams(stack if stack.shape[1] <= stack.shape[2] else stack.transpose(1, 2))
    del stack
    if all_values:
        return [Spectrum.of(values=each) for each in spectra.singular_values(grams)]
    largest = _largest_eigenvalues(grams)
    return [
        Spectrum.of(gram=gram, largest=found) for gram, found in zip(grams, largest, strict=True)
    ]


def settle(found: Sequence[Spectrum], limits: Sequence[float]) -> None:
    """Find out together what `count_above` of each limit needs to know.

    Args:
        found: spectra of matrices of one shape.
        limits: one for each, not negative.
    """
    import torch

    pending = [
        (spectrum, gram, limit)
        for spectrum, limit in zip(found, limits, strict=True)
        for gram in [spectrum.undecided(limit)]
        if gram is not None
    ]
    if not pending:
        return
    grams = torch.stack([gram for _, gram, _ in pending])
    diagonals = grams.diagonal(dim1=1, dim2=2)
    shifts = grams.new_tensor([limit * limit for _, _, limit in pending])
    shifts += spectra.SLACK * grams.shape[1] * diagonals.amax(dim=1)
    shifted = grams.clone()
    shifted.diagonal(dim1=1, dim2=2).sub_(shifts[:, None])
    are_positive = _factorise(shifted)
    del shifted
    for (spectrum, gram, limit), is_positive in zip(pending, are_positive, strict=True):
        if is_positive:
            spectrum.learn(all_above=limit)
        else:
            spectrum.learn(values=spectra.singular_values(gram))


def _grams(stack: torch.Tensor) -> torch.Tensor:
    """`matrix @ matrix.T` of each, in float64."""
    import torch

    count, rows, columns = stack.shape
    total = torch.zeros(count, rows, rows, dtype=torch.float64, device=stack.device)
    for start in range(0, columns, spectra.COLUMNS):
        block = stack[:, :, start : start + spectra.COLUMNS].double()
        total.baddbmm_(block, block.transpose(1, 2))
    return total


def _largest_eigenvalues(grams: torch.Tensor) -> list[float | None]:
    """Of each, as `Spectrum.largest` has it: None where Lanczos found another or no end."""
    found = _lanczos(grams)
    shifted = grams.neg()
    shifted.diagonal(dim1=1, dim2=2).add_((found * (1 + 2 * spectra.LARGEST))[:, None])
    certain = _factorise(shifted)
    moved = (grams.diagonal(dim1=1, dim2=2).sum(dim=1) > 0).tolist()
    return [
        0.0 if not has_moved else value if is_certain and value > 0 else None
        for value, is_certain, has_moved in zip(found.tolist(), certain, moved, strict=True)
    ]


def _lanczos(grams: torch.Tensor) -> torch.Tensor:
    """A lower bound of the largest eigenvalue of each, with every vector kept orthogonal."""
    import numpy as np
    import torch

    count, size, _ = grams.shape
    steps = min(_STEPS, size)
    scale = grams.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=torch.finfo(grams.dtype).tiny)
    start = torch.from_numpy(np.random.default_rng(0).standard_normal(size)).to(grams.device)
    vector = (start / start.norm()).expand(count, size)
    basis = grams.new_zeros(count, steps, size)
    small = grams.new_zeros(count, steps, steps)
    for step in range(steps):
        basis[:, step] = vector
        image = torch.bmm(grams, vector[:, :, None])[:, :, 0] / scale[:, None]
        small[:, step, step] = (image * vector).sum(dim=1)
        known = basis[:, : step + 1]
        for _ in range(2):
            parts = torch.bmm(known, image[:, :, None])
            image = image - torch.bmm(known.transpose(1, 2), parts)[:, :, 0]
        length = image.norm(dim=1)
        # Nothing is left where the vectors span all that there is: zeros from then on.
        length = torch.where(length > 1e-14, length, 0.0)
        if step + 1 < steps:
            small[:, step, step + 1] = small[:, step + 1, step] = length
        vector = torch.where(length[:, None] > 0, image / length[:, None], 0.0)
    found: torch.Tensor = torch.linalg.eigvalsh(small)[:, -1] * scale
    return found


def _factorise(matrices: torch.Tensor) -> list[bool]:
    """Of which the Cholesky factorisation exists; one that is not finite has none."""
    import torch

    if matrices.shape[1] <= _LOOPED:
        info = torch.linalg.cholesky_ex(matrices).info
    else:  # nothing waits for one before the next is started
        info = torch.stack([torch.linalg.cholesky_ex(each).info for each in matrices])
    return [code == 0 for code in info.tolist()]
