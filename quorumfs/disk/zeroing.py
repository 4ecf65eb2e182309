"""Many zeros, step by step: others have to wait for a range while zeros are made of it."""

from collections.abc import Iterable, Sequence
from typing import cast

from quorumfs.disk.mirror import Mirror
from quorumfs.replica.reach import LEAST
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

STEP_MAX, STEPS = 16 << 30, 8
"""Bytes zeroed at a time: so many, or an eighth of the disk. To note that of each of its chunks
takes some milliseconds, in which nothing else is done."""


class Zeroing:
    """Finds in which steps to make zeros of ranges of one disk."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._reached: tuple[int, int, tuple[int, Sequence[Replica]]] = 0, 0, (0, ())
        """Where zeros can be made at one go, and the requests and receivers until then."""

    async def next_step(self, offset: int, end: int) -> int:
        """Where to stop, at most at *end*, when zeros are made from *offset* on.

        A long step is prepared, and with it what is likely to follow. Raises `OSError` if that
        cannot be.
        """
        mirror, ledger = self._mirror, self._mirror.ledger
        longest = max(STEP_MAX, mirror.size // STEPS)
        stop = min(end, offset + longest)
        if stop - offset <= LEAST:
            return stop
        if not ledger.prepared(offset, stop - offset):  # once for all steps
            await mirror.metadata.prepare(offset, stop - offset, ahead=True)
        return await self._reach_to(offset, stop, min(mirror.size, offset + longest))

    async def _reach_to(self, offset: int, stop: int, longest: int) -> int:
        """How far from *offset* zeros are made at one go, at most to *stop*.

        Who asks for zeros from one end to the other in many requests has it found out, as far as
        *longest*, for several of them at once.
        """
        start, end, asked = self._reached
        state = self._mirror.requests, self._mirror.ledger.receivers
        if asked != state or not start <= offset < stop <= end:
            end = await reach(self._mirror, state[1], offset, longest)
        # It holds until anything else is asked for than what now follows.
        self._reached = offset, end, (self._mirror.requests + 1, state[1])
        return min(stop, end)


async def reach(mirror: Mirror, replicas: Iterable[Replica], offset: int, end: int) -> int:
    """How far from *offset*, at most to *end*, zeros can be made on all *replicas* within some
    milliseconds. One that does not say counts for as much as the largest write.
    """
    outcomes = await mirror.ask(replicas, Kind.REACH, mirror.threshold, offset, end - offset)
    least = min(end, offset + LEAST)
    reached = (least if o.error else cast("int", o.operation.value) for o in outcomes)
    return min(reached, default=least)
