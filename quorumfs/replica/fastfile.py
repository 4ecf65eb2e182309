"""A file as the fast path sees it, and when it may be used there. Pure: no clock."""

from typing import NamedTuple

REST_S = (0.1, 10.0)
"""The first and the longest rest (seconds) of a file that did not answer at once."""

FORGIVEN_AFTER = 10
"""A file that answered at once for this many times its last rest begins with the first anew."""


class FastFile(NamedTuple):
    """A file whose system calls a thread of the fast path may make."""

    fd: int
    memory: bool
    """The file is in memory: no read of it waits for a device."""
    reads: bool
    """A read of what is not in the page cache can be told not to wait."""
    regions: int = 0
    """The address of a `quorumfs.replica.lastregions.LastRegions` to note writes in; 0: nobody asks
    for them."""


class Rest:
    """When a file is left to the replica's own threads, after a request was stuck in it.

    Meanwhile slow answers of the file hold up no request for another one. Times are trio's clock,
    in seconds.
    """

    __slots__ = ("_length", "_until")

    def __init__(self) -> None:
        self._until = 0.0
        self._length = 0.0

    def begin(self, now: float) -> None:
        """Note that a request was stuck in the file."""
        first, longest = REST_S
        calm = now - self._until >= FORGIVEN_AFTER * self._length
        self._length = first if calm else min(2 * self._length, longest)
        self._until = now + self._length

    def over(self, now: float) -> bool:
        """Whether the file may be used again."""
        return now >= self._until
