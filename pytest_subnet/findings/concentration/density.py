"""How large a mask is: over all that it covers, and in each tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.findings.common.bounds import check_message, check_range, warn_of_vacuous
from pytest_subnet.findings.common.result import reworded
from pytest_subnet.findings.concentration.groups import fingerprints_of, selected
from pytest_subnet.findings.concentration.texts import density_outside, size_outside
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.findings.common.result import Message
    from pytest_subnet.masks.update_mask import UpdateMask
    from pytest_subnet.pairs.selection import Patterns

Per: TypeAlias = Literal["matrix", "all"]


class TensorDensity(NamedTuple):
    """How much of one tensor is in a mask.

    Attributes:
        name: of the tensor.
        shape: of it.
        dtype: of the weights that the mask was made from.
        numel: its entries.
        inside: those in the mask.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    inside: int

    @property
    def density(self) -> float:
        """Share of its entries that are in the mask."""
        return self.inside / self.numel


@dataclass(frozen=True, slots=True, repr=False)
class MaskDensity:
    """How large a mask is.

    Attributes:
        mask: what the mask was made from.
        count: its entries in the tensors selected.
        numel: the entries of these tensors: the denominator.
        tensors_total: how many tensors the mask covers.
        per_tensor: the tensors selected, as `TensorDensity`.
        fingerprints: of base and tuned checkpoint, as far as the mask knows them.
    """

    mask: str
    count: int
    numel: int
    tensors_total: int
    per_tensor: tuple[TensorDensity, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def density(self) -> float:
        """Share of the entries that are in the mask."""
        return self.count / self.numel

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "entries": f"{each.numel:,}",
                "in mask": f"{each.inside:,}",
                "density": percent(each.density),
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["entries", "in mask", "density"]
        return f"{facts(repr(self), self.facts())}\n\n{table(self.rows(), right=numbers)}"

    def facts(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        tensors = f"{len(self.per_tensor):,}/{plural(self.tensors_total, 'tensor')}"
        return [
            (
                "mask",
                f"{self.mask}: {self.count:,} / {plural(self.numel, 'entry')}   "
                f"(density {percent(self.density)}, {tensors})",
            )
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "mask_density",
            "mask": self.mask,
            "density": self.density,
            "count": self.count,
            "numel": self.numel,
            "tensors": len(self.per_tensor),
            "tensors_total": self.tensors_total,
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return f"MaskDensity(density={self.density:.6g}, {self.count:,} of {self.numel:,})"


def assert_subnetwork_size(
    mask: UpdateMask,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    message: Message | None = None,
) -> MaskDensity:
    """Fail unless a mask's share of all entries that it covers lies within the bounds.

    size = entries in the mask / entries of the tensors that it covers and that are selected. What
    it does not cover is not in the denominator: of a mask over matrices, embeddings are not.

    Valid usages:
        assert_subnetwork_size(mask, at_most=0.01)                       # of what it covers
        assert_subnetwork_size(mask, at_most=0.01, exclude="*norm*")     # norms out of both
        assert_subnetwork_size(mask, at_least=0.001, at_most=0.01)

    Args:
        mask: any mask.
        at_most: fraction in [0, 1].
        at_least: likewise; one of the two is required.
        include: glob or globs on names; None takes all.
        exclude: glob or globs on names to leave out.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        The size, in all and per tensor.

    Raises:
        AssertionError: a bound does not hold.
        SelectionError: the mask is empty in what is selected, or a pattern matches nothing.
        TypeError: `mask` is no mask, or a bound no number.
        ValueError: no bound, one outside [0, 1], or `at_least` above `at_most`.

    Source: arXiv 2504.15471, table 2 (there over the weights of attention and MLP).

    >>> mask = UpdateMask.of({"h.0.mlp.w": [True, True, True, False], "h.0.attn.w": [False] * 6})
    >>> assert_subnetwork_size(mask, at_most=0.5)
    MaskDensity(density=0.3, 3 of 10)
    """
    __tracebackhide__ = True
    check_range(at_least, at_most)
    check_message(message)
    result = _measured(mask, include, exclude)
    text = None
    if at_most is not None and result.density > at_most:
        text = size_outside(result, at_most, above=True, what="subnetwork size")
    elif at_least is not None and result.density < at_least:
        text = size_outside(result, at_least, above=False, what="subnetwork size")
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_subnetwork_size", at_least=at_least, at_most=at_most)
    return result


def assert_mask_density(
    mask: UpdateMask,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    per: Per = "matrix",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    message: Message | None = None,
) -> MaskDensity:
    """Fail unless a mask takes the share of each tensor, or of all of them, that the bounds say.

    Masks that keep a share of each matrix round it, one way or another: in each tensor one entry
    more or less than a bound is let pass, with `per="all"` as many as there are tensors.

    Valid usages:
        assert_mask_density(mask, at_least=0.1, at_most=0.1)             # a tenth of each matrix
        assert_mask_density(mask, at_most=0.1, per="all")                # a tenth of all
        assert_mask_density(mask, at_most=0.1, include="*_proj.weight")

    Args:
        mask: any mask.
        at_least: fraction in [0, 1].
        at_most: likewise; one of the two is required.
        per: `"matrix"`: in every tensor selected. `"all"`: over all of them.
        include: glob or globs on names; None takes all.
        exclude: glob or globs on names to leave out.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        The density, in all and per tensor.

    Raises:
        AssertionError: a bound does not hold.
        SelectionError: the mask is empty in what is selected, or a pattern matches nothing.
        TypeError: `mask` is no mask, or a bound no number.
        ValueError: no bound, one outside [0, 1], `at_least` above `at_most`, or an unknown `per`.

    Source: the published supermasks keep n - int((1 - k) * n) of n entries for a density k, which
    is all ten of ten for k = 0.9.

    >>> mask = UpdateMask.of({"a": [True] * 10, "b": [True] * 9 + [False]})
    >>> assert_mask_density(mask, at_least=0.9, at_most=0.9)
    MaskDensity(density=0.95, 19 of 20)
    """
    __tracebackhide__ = True
    check_range(at_least, at_most)
    check_message(message)
    if per not in ("matrix", "all"):
        raise ValueError(f"per={safe(repr(per))} is none of matrix, all")
    result = _measured(mask, include, exclude)
    text = None
    if per == "matrix":
        below = [each for each in result.per_tensor if _is_below(each.inside, each.numel, at_least)]
        above = [each for each in result.per_tensor if _is_above(each.inside, each.numel, at_most)]
        if below or above:
            below.sort(key=lambda each: each.density)
            above.sort(key=lambda each: -each.density)
            text = density_outside(result, below, above, _spelt(at_least, at_most))
    else:
        slack = len(result.per_tensor)
        if at_most is not None and _is_above(result.count, result.numel, at_most, slack):
            text = size_outside(result, at_most, above=True, what="mask density")
        elif at_least is not None and _is_below(result.count, result.numel, at_least, slack):
            text = size_outside(result, at_least, above=False, what="mask density")
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_mask_density", at_least=at_least, at_most=at_most)
    return result


def _is_below(count: int, numel: int, bound: float | None, slack: int = 1) -> bool:
    return bound is not None and count + slack < bound * numel


def _is_above(count: int, numel: int, bound: float | None, slack: int = 1) -> bool:
    return bound is not None and count - slack > bound * numel


def _spelt(at_least: float | None, at_most: float | None) -> str:
    if at_least is None or at_most is None:
        return (
            f"{percent(at_least or 0.0)} or more"
            if at_most is None
            else f"{percent(at_most)} or less"
        )
    return f"{percent(at_least)} to {percent(at_most)}"


def _measured(mask: UpdateMask, include: Patterns | None, exclude: Patterns | None) -> MaskDensity:
    mask, tensors = selected(mask, include, exclude)
    result = MaskDensity(
        mask=mask.origin.what,
        count=sum(each.entries for each in tensors),
        numel=sum(each.numel for each in tensors),
        tensors_total=len(mask.tensors),
        per_tensor=tuple(
            TensorDensity(each.name, each.shape, each.dtype, each.numel, each.entries)
            for each in tensors
        ),
        fingerprints=fingerprints_of(mask),
    )
    record(result)
    return result
