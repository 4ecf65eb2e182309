"""Many zeros, step by step: other requests wait for a range while zeros are made of it."""

from collections.abc import Iterable, Sequence
from typing import cast

from quorumfs.decisions.voting import BLOCK
from quorumfs.disk.mirror import Mirror
from quorumfs.replica.reach import LEAST
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

STEP_MAX, STEPS = 16 << 30, 8
"""Bytes zeroed at a time, at most: the larger of `STEP_MAX` and an eighth of the disk. Noting this
many chunks takes some milliseconds, in which nothing else runs."""


class Zeroing:
    """Finds in which steps to make zeros of ranges of one disk."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._reached: tuple[int, int, tuple[int, Sequence[Replica]]] = 0, 0, (0, ())
        """A range that can be zeroed at one go, and the requests and receivers it holds for."""

    async def next_step(self, offset: int, end: int) -> int:
        """Where to stop, at most at *end*, when zeros are made from *offset* on.

        A long step is prepared together with the range likely to follow. Raises `OSError` if that
        fails.
        """
        mirror, ledger = self._mirror, self._mirror.ledger
        # A step ends with a block: a sector is zeroed as a whole, or not at all.
        longest = max(STEP_MAX, mirror.size // STEPS // BLOCK * BLOCK)
        stop = min(end, offset + longest)
        if stop - offset <= LEAST:
            return stop
        if not ledger.prepared(offset, stop - offset):  # once for all steps
            await mirror.metadata.prepare(offset, stop - offset, ahead=True)
        return await self._reach_to(offset, stop, min(mirror.size, offset + longest))

    async def _reach_to(self, offset: int, stop: int, longest: int) -> int:
        """How far from *offset* zeros are made at one go, at most to *stop*.

        The replicas are asked as far as *longest*, so that one answer serves several requests of a
        guest that zeroes from one end to the other.
        """
        start, end, asked = self._reached
        state = self._mirror.requests, self._mirror.ledger.receivers
        if asked != state or not start <= offset < stop <= end:
            end = await reach(self._mirror, state[1], offset, longest)
        # The answer holds until a request comes other than the change that now follows.
        self._reached = offset, end, (self._mirror.requests + 1, state[1])
        return min(stop, end)


async def reach(mirror: Mirror, replicas: Iterable[Replica], offset: int, end: int) -> int:
    """How far from *offset*, at most to *end*, all *replicas* can make zeros in milliseconds.

    A replica that gives no answer counts for `LEAST` bytes.
    """
    outcomes = await mirror.ask(replicas, Kind.REACH, mirror.threshold, offset, end - offset)
    least = min(end, offset + LEAST)
    reached = (least if o.error else cast("int", o.operation.value) for o in outcomes)
    return min(reached, default=least)
