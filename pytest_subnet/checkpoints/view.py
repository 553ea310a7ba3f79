"""A checkpoint that shows another one otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from pytest_subnet.checkpoints.base import TensorInfo


class CheckpointView(Checkpoint):
    """The weights of another checkpoint under other names or with other values.

    A subclass says which; what both have in common is that of the checkpoint behind.

    Attributes:
        _infos: every tensor as it is shown, in storage order.
        _reading: what else the values depend on that are shown, beside those behind.
    """

    _infos: Mapping[str, TensorInfo]
    _reading: Hashable = ()

    def __init__(self, inner: Checkpoint) -> None:
        """Show `inner`."""
        self._inner = inner
        self.label = inner.label
        self.config = inner.config
        self.ties = inner.ties
        self.buffers = inner.buffers
        self.shows_buffers = inner.shows_buffers
        self.shows_ties = inner.shows_ties
        self.directory = inner.directory
        self.notes = inner.notes
        self.is_live = inner.is_live

    def names(self) -> Sequence[str]:
        """All tensor names, as they are shown."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype as they are shown."""
        try:
            return self._infos[name]
        except KeyError:
            raise self.unknown(name) from None

    def identity(self) -> Hashable:
        """What the checkpoint behind is right now, and that it is shown otherwise."""
        return type(self).__name__, self._reading, self._inner.identity()

    def identity_when_opened(self) -> Hashable:
        """The same as of when it was opened."""
        return type(self).__name__, self._reading, self._inner.identity_when_opened()

    def check_unchanged(self) -> None:
        """Raise if a file behind was written to."""
        self._inner.check_unchanged()
