"""Linear layers of low displacement rank (Sindhwani, Sainath and Kumar 2015)."""

from __future__ import annotations

import math

import torch

from pytest_subnet.findings.displacement.operators import resolve_operator

_ROUNDS = 50
"""Steps of L-BFGS after the truncated displacement; more change the fourth digit of the error."""


class ToeplitzLikeLinear(torch.nn.Module):
    """A linear layer whose matrix has displacement rank at most `rank`: 2 n `rank` numbers, not n².

    The matrix is the upper left corner of Σ Z₁(gᵢ) Z₋₁(hᵢ), with n the longer side: products of
    a circulant and a skew-circulant matrix, multiplied by FFT in O(n log n). Square layers of rank
    2 hold all Toeplitz matrices and their inverses; of rank 4 all products of two.

    Args:
        in_features: length of what goes in.
        out_features: length of what comes out.
        rank: how many products are added up; at least 1.
        bias: whether a vector is added.

    Attributes:
        left: `[rank, n]`, first columns of the circulant factors.
        right: `[rank, n]`, first columns of the skew-circulant factors.
        bias: `[out_features]`, or None.

    Source: Sindhwani, Sainath and Kumar 2015, section 3.

    >>> layer = ToeplitzLikeLinear(64, 64, rank=2)
    >>> layer(torch.ones(3, 64)).shape, sum(each.numel() for each in layer.parameters())
    (torch.Size([3, 64]), 320)
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, rank: int, bias: bool = True
    ) -> None:
        """Draw the factors so that outputs are as large as those of `torch.nn.Linear`."""
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("rank", rank),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not an integer of at least 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        size = max(in_features, out_features)
        # An entry is a sum of n · rank products; a Linear's has variance 1 / (3 in_features).
        spread = (3 * in_features * size * rank) ** -0.25
        self.left = torch.nn.Parameter(spread * torch.randn(rank, size))
        self.right = torch.nn.Parameter(spread * torch.randn(rank, size))
        limit = 1 / math.sqrt(in_features)
        self.bias = (
            torch.nn.Parameter(torch.empty(out_features).uniform_(-limit, limit)) if bias else None
        )

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, `[out_features, in_features]`, computed anew; differentiable."""
        identity = torch.eye(self.in_features, dtype=self.left.dtype, device=self.left.device)
        return self._times(identity).T

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply the last dimension of `inputs`, of `in_features`, by the matrix."""
        outputs = self._times(inputs)
        return outputs if self.bias is None else outputs + self.bias

    def _times(self, inputs: torch.Tensor) -> torch.Tensor:
        # Half precision has no FFT on most devices, and float32 none of its digits to lose.
        wide = torch.promote_types(
            torch.promote_types(self.left.dtype, inputs.dtype), torch.float32
        )
        left, right, vectors = (each.to(wide) for each in (self.left, self.right, inputs))
        size = left.shape[1]
        vectors = torch.nn.functional.pad(vectors, (0, size - vectors.shape[-1]))
        total = _multiply(left, _multiply_skew(right, vectors[..., None, :])).sum(dim=-2)
        return total[..., : self.out_features].to(
            torch.promote_types(self.left.dtype, inputs.dtype)
        )

    def extra_repr(self) -> str:
        """As `torch.nn.Linear` shows itself, with the rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def _multiply(columns: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The circulant matrices with these first columns times `vectors`."""
    transformed = torch.fft.rfft(columns) * torch.fft.rfft(vectors)
    product: torch.Tensor = torch.fft.irfft(transformed, n=columns.shape[-1])
    return product


def _multiply_skew(columns: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """The skew-circulant matrices with these first columns times `vectors`.

    Half a turn along the vector makes a skew shift a cyclic one.
    """
    size = columns.shape[-1]
    angles = torch.arange(size, dtype=columns.dtype, device=columns.device) * (math.pi / size)
    turns = torch.polar(torch.ones_like(angles), angles)
    transformed = torch.fft.fft(turns * columns) * torch.fft.fft(turns * vectors)
    product: torch.Tensor = (torch.fft.ifft(transformed) * turns.conj()).real
    return product


def fit_displacement(matrix: torch.Tensor, rank: int) -> ToeplitzLikeLinear:
    """Find a layer of low displacement rank whose matrix is near a given one.

    Starts from the leading singular triples of the displacement, which give the matrix itself where
    its displacement rank is no higher, and improves on them in the Frobenius norm.

    Args:
        matrix: `[out_features, in_features]`, a real float; 16-bit ones are fitted in float32.
        rank: of the layer, at least 1 and less than the longer side.

    Returns:
        A layer without bias, in the dtype and on the device of `matrix`.

    Raises:
        ValueError: no matrix of finite real floats, or a rank out of range.

    Source: the inversion formula of the displacement by Z₁ and Z₋₁ (Pan 2001, example 4.4.4;
    Sindhwani, Sainath and Kumar 2015, proposition 1).

    >>> ramp = torch.arange(8.0)
    >>> toeplitz = ramp[:, None] - ramp[None, :]
    >>> bool(torch.allclose(fit_displacement(toeplitz, rank=2).weight, toeplitz, atol=1e-4))
    True
    """
    if not isinstance(matrix, torch.Tensor) or matrix.ndim != 2 or not matrix.is_floating_point():
        raise ValueError("a matrix of two dimensions and real floats is needed")
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrix holds NaN or Inf, and nothing is near it")
    size = max(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < size:
        raise ValueError(f"rank={rank!r} is not an integer from 1 to {size - 1}")
    wide = torch.promote_types(matrix.dtype, torch.float32)
    target = matrix.detach().to(wide)
    with torch.random.fork_rng(devices=[]):  # what a new layer draws is not kept
        layer = ToeplitzLikeLinear(matrix.shape[1], matrix.shape[0], rank=rank, bias=False)
    layer.to(dtype=wide, device=matrix.device)
    _start(layer, target)
    _improve(layer, target)
    return layer.to(matrix.dtype)


@torch.no_grad()
def _start(layer: ToeplitzLikeLinear, target: torch.Tensor) -> None:
    """∇ = G Hᵀ gives M = ½ Σ Z_1(g_j) Z_-1(J h_j), with J the reversal."""
    size, rank = layer.left.shape[1], layer.rank
    square = target.new_zeros(size, size)
    square[: target.shape[0], : target.shape[1]] = target
    moved = resolve_operator("toeplitz").displacement(square)
    left, values, right = torch.linalg.svd(moved, full_matrices=False)
    weights = (values[:rank] / 2).sqrt()
    layer.left.copy_((left[:, :rank] * weights).T)
    layer.right.copy_(right[:rank].flip(1) * weights[:, None])


def _improve(layer: ToeplitzLikeLinear, target: torch.Tensor) -> None:
    norm = float(target.norm())
    if norm == 0:
        return
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=_ROUNDS, line_search_fn="strong_wolfe"
    )

    def error() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = ((layer.weight - target) / norm).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(error)  # type: ignore[no-untyped-call]
    optimizer.zero_grad()
