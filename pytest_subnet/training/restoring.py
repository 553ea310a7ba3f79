"""What if the directions had stayed: a tuned model with singular vectors of its base."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet import progress
from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.checkpoints.experts import ExpertsCheckpoint
from pytest_subnet.errors import CheckpointError, SelectionError
from pytest_subnet.findings.matrices.fused import WHOLE, parts_of
from pytest_subnet.findings.matrices.updates import read_side
from pytest_subnet.findings.matrices.work import choose_matrices
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.text import safe
from pytest_subnet.training.restored_files import copy_beside, new_directory, write_weights
from pytest_subnet.training.restoring_result import RestoredMatrix, RestoredVectors

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.findings.matrices.fused import Part
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.training.restoring_result import Values


def restore_singular_vectors(
    base: Source,
    tuned: Source,
    *,
    output: str | os.PathLike[str],
    k_top: int = 0,
    k_tail: int = 0,
    values: Values = "tuned",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    device: str | torch.device | None = None,
) -> RestoredVectors:
    """Write the tuned model with leading or trailing singular directions as they were in the base.

    For evaluating what the turn of these directions did. With the decompositions U S Vᵀ of both
    sides of a matrix, W = [U_b,K | U_t,R] S [V_b,K | V_t,R]ᵀ is written, where K are the `k_top`
    first and `k_tail` last directions and R is the rest. U_t,R and V_t,R are first turned out of
    the way of the kept ones: projected beside them, then made orthonormal by the nearest such
    basis. So both bases are orthonormal, the singular values of what is written are those chosen,
    and the kept directions are singular directions of it. What the tuned matrix had between kept
    directions and the rest is not in it: that is what was undone.

    At k_top = k_tail = 0 it is the tuned matrix, to the bit. Where k_top + k_tail = min(m, n), it
    is U_b S_t V_bᵀ with `values="tuned"` and the base with `values="base"`.

    Decomposes both sides of each matrix in full and in float64, one matrix at a time. Tensors that
    are not selected are copied byte for byte, and so are config and tokenizer.

    Args:
        base: whose directions come back; anything `open_checkpoint` takes.
        tuned: what is edited; likewise. Written in its dtype, under its names.
        output: the directory to write, as transformers loads it. It must not be there yet, and is
            there only once it is whole.
        k_top: how many leading directions come back, at least 0; the same of every matrix.
        k_tail: how many trailing ones; together at most min(m, n) of the smallest matrix.
        values: `"tuned"` keeps all singular values of the tuned matrix; `"base"` restores those of
            the restored directions with them.
        include: glob or globs on base names; None takes all matrices.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"down_proj"`, …).
        device: where to compute, as in `open_pair`.

    Returns:
        How far what was written is from both sides, for each matrix.

    Raises:
        SelectionError: a pattern matches nothing, no matrix is selected, or one holds NaN, Inf or,
            in the base, zeros alone.
        PairMismatchError: a selected tensor does not align.
        CheckpointError: a side cannot be read, is quantised or stores its experts otherwise than
            the other; or `output` is there already or cannot be written.
        ValueError: `k_top` or `k_tail` out of range, an unknown `values`.
        TypeError: `k_top` or `k_tail` is no integer.

    Source: the restoration of arXiv 2509.12235, section 4; there the mixed basis is not orthonormal
    and moves the singular values too.

    >>> restore_singular_vectors("base", "tuned", output="restored", k_top=8, kinds="q_proj")
    RestoredVectors(k_top=8, k_tail=0, values of the tuned, 2 matrices, in restored)
    >>> open_pair("restored", "tuned")
    <ModelPair restored -> tuned: 21 tensors>
    """
    _check(k_top, k_tail, values)
    # float64 holds whatever both sides store: a side in float32 and one in bfloat16 do align.
    pair = open_pair(base, tuned, as_dtype="float64", device=device)
    _check_writable(pair)
    chosen = choose_matrices(pair, include, exclude, kinds, what="singular directions")
    _check_k(pair, chosen.matrices, k_top, k_tail)
    edit = _Edit(pair, chosen.matrices, k_top, k_tail, values)
    target = Path(output)
    with pair.lock, new_directory(target) as directory, edit.shown():
        pair.check_unchanged()
        pair.check_second_names()
        write_weights(pair.tuned, edit.names(), directory, edit.of)
        copy_beside(pair.tuned, directory)
        pair.check_unchanged()
    return RestoredVectors(
        output=target,
        pair=pair.label,
        k_top=k_top,
        k_tail=k_tail,
        values=values,
        per_tensor=tuple(edit.done[each] for each in chosen.matrices),
        # The cast is how the matrices were read, not how anything was compared or written.
        notes=tuple(note for note in chosen.notes if not note.endswith(" cast to float64")),
    )


def _check(k_top: object, k_tail: object, values: object) -> None:
    for name, value in (("k_top", k_top), ("k_tail", k_tail)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={safe(repr(value))} is not an integer")
        if value < 0:
            raise ValueError(f"{name}={value} is below 0")
    if values not in ("tuned", "base"):
        raise ValueError(f"values={safe(repr(values))} is not one of 'tuned', 'base'")


def _check_writable(pair: ModelPair) -> None:
    if pair.tuned.config.get("quantization_config"):
        raise CheckpointError(
            f"{safe(pair.tuned.label)} is quantised, and what was restored cannot be written as "
            "that; give the model that was quantised"
        )
    if isinstance(pair.tuned, ExpertsCheckpoint):
        raise CheckpointError(
            f"{safe(pair.tuned.label)} stores its experts otherwise than {safe(pair.base.label)}; "
            "load and save both with the same version of transformers"
        )


def _parts(pair: ModelPair, matrix: Matrix) -> tuple[Part, ...]:
    """What a fused matrix is made of; the whole where nothing says how."""
    if matrix.at is not None:
        return (WHOLE,)
    name = pair.tensors[matrix.row].name
    return parts_of(name, matrix.shape, pair.base.config) or (WHOLE,)


def _check_k(pair: ModelPair, matrices: Iterable[Matrix], k_top: int, k_tail: int) -> None:
    for matrix in matrices:
        tensor = pair.tensors[matrix.row]
        if tensor.tuned_dtype not in ARITHMETIC:
            raise SelectionError(
                f"{safe(tensor.tuned_name)} is stored as {tensor.tuned_dtype}, in which nothing "
                "can be computed; leave it out with exclude="
            )
        for part in _parts(pair, matrix):
            least = min(part.shape(matrix.shape))
            if k_top + k_tail > least:
                raise ValueError(
                    f"k_top={k_top} and k_tail={k_tail} are more than the {least} directions of "
                    f"{safe(matrix.name(tensor))}{f'[{part.name}]' if part.name else ''}; give "
                    "less, or leave it out with exclude="
                )


class _Edit:
    """The selected matrices of a pair, edited as they are asked for."""

    def __init__(
        self,
        pair: ModelPair,
        matrices: Iterable[Matrix],
        k_top: int,
        k_tail: int,
        values: Values,
    ) -> None:
        self._pair = pair
        self._k_top, self._k_tail, self._values = k_top, k_tail, values
        self._by_name: dict[str, list[Matrix]] = {}
        for matrix in matrices:
            name = pair.tensors[matrix.row].tuned_name
            self._by_name.setdefault(name, []).append(matrix)
        self.done: dict[Matrix, RestoredMatrix] = {}
        self._advance: Callable[[int], object] = id

    @contextmanager
    def shown(self) -> Iterator[None]:
        """A bar over the matrices that are decomposed in this block."""
        matrices = [each for matrices in self._by_name.values() for each in matrices]
        total = sum(each.nbytes(self._pair.tensors[each.row]) for each in matrices)
        with progress.bar(total, "restoring") as self._advance:
            yield

    def names(self) -> Iterator[str]:
        """What to write of the tuned checkpoint: all but second names of what is edited.

        They would hold what it was before.
        """
        called = self._pair.tuned_names
        second = {
            called[name]
            for name, counted in self._pair.tied.items()
            if name in called and called.get(counted) in self._by_name
        }
        yield from (name for name in self._pair.tuned.names() if name not in second)

    def of(self, name: str) -> Iterable[memoryview] | None:
        """As `restored_files.Edited`."""
        matrices = self._by_name.get(name)
        return None if matrices is None else map(self._one, matrices)

    def _one(self, matrix: Matrix) -> memoryview:
        import torch

        tensor = self._pair.tensors[matrix.row]
        name = matrix.name(tensor)
        base = _checked(read_side(self._pair, matrix, "base"), name)
        tuned = _checked(read_side(self._pair, matrix, "tuned"), name)
        if not bool(base.any()):
            raise SelectionError(
                f"{safe(name)} of {self._pair.label} holds zeros alone in the base, and has no "
                "directions; leave it out with exclude="
            )
        result = tuned.clone()
        for part in _parts(self._pair, matrix):
            edited = restored(
                part.of(base),
                part.of(tuned),
                k_top=self._k_top,
                k_tail=self._k_tail,
                values=self._values,
            )
            _put(part, edited, result)
        stored = result.to(getattr(torch, tensor.tuned_dtype))
        written = _checked(stored.double(), name)
        self.done[matrix] = RestoredMatrix(
            name=name,
            shape=matrix.shape,
            dtype=tensor.tuned_dtype,
            layer=tensor.layer,
            kind=tensor.kind,
            tuned_to_base=float((tuned - base).norm() / base.norm()),
            to_base=float((written - base).norm() / base.norm()),
            to_tuned=_relative(written - tuned, tuned),
        )
        self._advance(matrix.nbytes(tensor))
        return stored.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _put(part: Part, edited: torch.Tensor, whole: torch.Tensor) -> None:
    """Write a part back into the fused matrix that it was taken from."""
    import torch

    if not part.name:
        whole.copy_(edited)
        return
    index = torch.tensor([number for run in part.runs for number in run], device=whole.device)
    whole.index_copy_(part.axis, index, edited)


def _relative(change: torch.Tensor, to: torch.Tensor) -> float:
    norm = float(to.norm())
    return float(change.norm()) / norm if norm else float(bool(change.any()))


def _checked(matrix: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(matrix.isfinite().all()):
        raise SelectionError(f"{safe(name)} holds NaN or Inf and has no singular directions")
    return matrix


def restored(
    base: torch.Tensor, tuned: torch.Tensor, *, k_top: int, k_tail: int, values: Values
) -> torch.Tensor:
    """One matrix, as `restore_singular_vectors` describes.

    Args:
        base: `[m, n]`, float64, finite.
        tuned: the same.
        k_top: at least 0.
        k_tail: at least 0; together at most min(m, n).
        values: `"tuned"` or `"base"`.

    >>> base, tuned = torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    >>> restored(base.double(), tuned.double(), k_top=2, k_tail=0, values="tuned")
    tensor([[2., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    import torch

    size = min(base.shape)
    if k_top + k_tail == 0 or torch.equal(base, tuned):
        return tuned
    if k_top + k_tail == size and values == "base":
        return base
    left_b, values_b, right_b = torch.linalg.svd(base, full_matrices=False)
    left_t, values_t, right_t = torch.linalg.svd(tuned, full_matrices=False)
    places = torch.arange(size, device=base.device)
    kept = (places < k_top) | (places >= size - k_tail)
    chosen = torch.where(kept, values_b, values_t) if values == "base" else values_t
    left, right = _mixed(left_b, left_t, kept), _mixed(right_b.T, right_t.T, kept)
    return (left * chosen) @ right.T


def _mixed(base: torch.Tensor, tuned: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis: the base's directions where `kept`, nearest to the tuned elsewhere.

    The nearest is the polar factor of what is left of the tuned directions beside the kept ones.
    Where nothing is left of one, because the base's takes its place, QR gives some direction that
    is free.
    """
    import torch

    fixed, rest = base[:, kept], tuned[:, ~kept]
    rest = rest - fixed @ (fixed.T @ rest)
    _, turn = torch.linalg.eigh(rest.T @ rest)
    turn = turn.flip(1)  # most left first: QR takes what nothing is left of last
    free, triangle = torch.linalg.qr(torch.cat([fixed, rest @ turn], dim=1))
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(free.dtype)
    result = base.clone()
    result[:, ~kept] = (free * signs)[:, fixed.shape[1] :] @ turn.T
    return result
