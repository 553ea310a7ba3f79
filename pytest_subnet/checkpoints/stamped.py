"""A checkpoint in files of this machine: the same as long as their stamps are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint
from pytest_subnet.checkpoints.files import check_stamp, stamp

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from pytest_subnet.checkpoints.base import TensorInfo
    from pytest_subnet.checkpoints.files import FileStamp


class StampedCheckpoint(Checkpoint):
    """What formats on disk have in common: what they say of tensors, and what their files are.

    Attributes:
        _infos: every tensor, in storage order.
        _stamps: of every file, taken before it was read.
        _digests: a hash of every header that is not the whole of its file.
    """

    _infos: Mapping[str, TensorInfo]
    _stamps: tuple[FileStamp, ...]
    _digests: tuple[str, ...] = ()

    def names(self) -> Sequence[str]:
        """All tensor names, in storage order."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """What the files say of `name`."""
        try:
            return self._infos[name]
        except KeyError:
            raise self.unknown(name) from None

    def identity(self) -> Hashable:
        """The stamps of all files as they are now, and what their headers were."""
        return tuple(stamp(known.path) for known in self._stamps), self._digests

    def identity_when_opened(self) -> Hashable:
        """The same with the stamps that were taken before each file was read."""
        return self._stamps, self._digests

    def check_unchanged(self) -> None:
        """Raise if any of the files was written to since."""
        for known in self._stamps:
            check_stamp(known)
