"""The last writes to an image, by which it proves later that it is no older copy. Pure.

Some stores give the same file another number at each mount, or another file the same number, as
those on FUSE do: there nothing but the content tells an image from an older copy of it (R15). A
copy taken at one moment holds either the last write, and all that had ended before it began, or
lacks it. So an image that holds the last writes, as many as can be under way at once, holds all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from quorumfs.replica.storage import CHANGES, Kind, Operation

BLOCK = 4096

REMEMBERED = 128
"""Writes: more than a guest has under way at once through FUSE (64), and resync beside it."""


class LastWrite(NamedTuple):
    """The begin of what was written at one place, at most a block of it."""

    offset: int
    length: int
    digest: int

    def is_held(self, content: bytes) -> bool:
        """Whether *content*, read there, is what was written."""
        return xxhash.xxh3_64_intdigest(content) == self.digest


class LastWrites:
    """The last writes to one image that succeeded, and that nothing was written over."""

    def __init__(self) -> None:
        self._by_block: dict[int, LastWrite] = {}
        """By number of the block that they begin in, the last one last."""

    def __iter__(self) -> Iterator[LastWrite]:
        return iter(list(self._by_block.values()))

    def forget(self) -> None:
        """Begin anew: another file may be the image from now on."""
        self._by_block.clear()

    def note(self, operation: Operation) -> None:
        """Note *operation*, which has its outcome."""
        if operation.kind not in CHANGES:
            return
        if operation.kind is not Kind.WRITE:
            # What it left behind is not known here, and what was before proves too little.
            self.forget()
            return
        first, last = operation.offset // BLOCK, (operation.offset + operation.length - 1) // BLOCK
        for block in range(first, last + 1):
            self._by_block.pop(block, None)
        if operation.error is not None or not operation.length:
            return
        kept = memoryview(operation.data)[: (first + 1) * BLOCK - operation.offset]
        if len(self._by_block) == REMEMBERED:
            del self._by_block[next(iter(self._by_block))]
        digest = xxhash.xxh3_64_intdigest(kept)
        self._by_block[first] = LastWrite(operation.offset, len(kept), digest)
