"""What can go wrong before a verdict is possible.

None of these is an `AssertionError`: a bound that does not hold fails a test, a test that cannot
be judged is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class SubnetError(Exception):
    """A measurement could not be made; the text says what was wrong, where, and what to do.

    >>> issubclass(CheckpointError, SubnetError), issubclass(SubnetError, AssertionError)
    (True, False)
    """


class CheckpointError(SubnetError):
    """A checkpoint cannot be read as weights; names the file, the tensor and the remedy.

    >>> open_checkpoint("nowhere")
    Traceback (most recent call last):
    ...
    pytest_subnet.errors.CheckpointError: no checkpoint at nowhere: there is no such path ...
    """


class SelectionError(SubnetError):
    """A selection covers nothing: a pattern matches no tensor, or only tensors of another sort.

    >>> assert_frozen(pair, "*embed_token.weight")
    Traceback (most recent call last):
    ...
    pytest_subnet.errors.SelectionError: include=... did you mean *embed_tokens.weight?
    """


@dataclass(frozen=True, slots=True)
class Problem:
    """One tensor that does not align.

    Attributes:
        kind: `"only base"`, `"only tuned"`, `"reshaped"`, `"retyped"`, `"empty"`, `"ambiguous"`
            or `"quantised"`.
        name: the tensor's name in the base; in the tuned checkpoint if the base has none.
        text: what is wrong and what would allow it.
    """

    kind: str
    name: str
    text: str


class VacuousBoundWarning(UserWarning):
    """An assertion passed, and one of its bounds could not have failed it, whatever was measured.

    `--subnet-strict` makes it an error; so does `-W error::pytest_subnet.VacuousBoundWarning`.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     result = assert_update_sparsity(pair, at_least=0)
    >>> print(caught[0].message)
    assert_update_sparsity: at_least=0 is no bound, nothing is below 0; say what is too little: ...
    """


class PairMismatchError(SubnetError):
    """Base and tuned cannot be compared tensor by tensor.

    Attributes:
        problems: what did not align, as in `ModelPair.problems`.

    >>> grown = open_pair({"w": torch.ones(2, 4)}, {"w": torch.ones(3, 4)})
    >>> update_sparsity(grown)
    Traceback (most recent call last):
    ...
    pytest_subnet.errors.PairMismatchError: tensors do not pair: 1 reshaped (of 1 tensor)...
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        """Keep `problems` beside the text, for callers that want to look."""
        super().__init__(message)
        self.problems = tuple(problems)
