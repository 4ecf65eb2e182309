"""Resolving: an administrator says whose data is right where nothing else tells.

That are places that a scrub found undecided, and chunks of adopted images that differ. Everywhere
else the replica to keep is not believed more than any other one.
"""

import errno
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby

import trio

from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.voting import blocks
from quorumfs.metadata.ledger.knowledge import Outcome, holders_of
from quorumfs.repair.repairwrite import repair_write
from quorumfs.repair.scrub import Scrub
from quorumfs.repair.verify import Verification
from quorumfs.repair.work import Work, pieces
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


@dataclass(slots=True)
class Choice:
    """The replica to keep in ``[start, end)`` (bytes), and what came of it."""

    kept: Replica
    start: int
    end: int
    written: int = 0
    """Bytes that other replicas were given."""
    error: OSError | None = None
    """Why it was not carried out to the end."""
    done: trio.Event = field(default_factory=trio.Event)


class Resolving:
    """Carries out choices, one after the other, as one of the repairs of a disk."""

    def __init__(
        self,
        work: Work,
        scrub: Scrub,
        verification: Verification,
        undecided: Callable[[], RangeSet],
    ) -> None:
        """*undecided*: gives the bytes about which there is a choice."""
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger
        self._scrub = scrub
        self._verification = verification
        self._undecided = undecided
        self._choices: deque[Choice] = deque()

    def choose(self, choice: Choice) -> None:
        """Have *choice* carried out; `Choice.done` is set in the end."""
        self._choices.append(choice)
        self._sidecars.notify()

    def close(self) -> None:
        """End all choices that were not carried out."""
        while self._choices:
            self._end(OSError(errno.EINTR, "the set is being unmounted"))

    async def step(self) -> bool:
        """Carry out a choice if there is one; whether there was."""
        if not self._choices:
            return False
        self._work.progress = None  # a resync that failed just now left its own
        choice, undecided = self._choices[0], self._undecided()

        async def decide_unit(chunks: range) -> None:
            start, end = self._work.bounds(chunks)
            async with self._work.locked(chunks) as worked:
                if self._ledger.unsynced(start, end - start):
                    with suppress(OSError):  # let every replica report losses
                        await self._mirror.sync()
                low, high = max(start, choice.start), min(end, choice.end)
                for place in undecided.inside(low, high):
                    for piece in pieces(*place):
                        await self._decide_piece(choice, *piece)
                worked()
            self._verification.compare_again(chunks)

        touched = RangeSet()
        for start, end in undecided.inside(choice.start, choice.end):
            chunks = self._work.map.chunks(start, end - start)
            touched.add(chunks.start, chunks.stop)
        batch = deque(range(start, end) for start, end in touched)
        error = None
        try:
            while batch:
                await self._work.in_parallel(batch, decide_unit)
        except OSError as failed:
            error = failed
        self._end(error)
        await self._scrub.save()
        return True

    def _end(self, error: OSError | None) -> None:
        choice = self._choices.popleft()
        choice.error = error
        choice.done.set()
        self._sidecars.notify()

    async def _decide_piece(self, choice: Choice, offset: int, length: int) -> None:
        """Give all members what the kept one holds. Raises `OSError`."""
        if self._ledger.may_differ(offset, length):
            raise OSError(errno.EBUSY, "the replicas are being made equal there: try again")
        mirror, kept = self._mirror, choice.kept
        asked = await mirror.ask(self._ledger.members, Kind.READ, 1, offset, length)
        believed = kept in holders_of(self._ledger, offset, length)
        right = next((one.data for one in asked if one.replica is kept and not one.error), None)
        if right is None or not believed:
            raise OSError(errno.EIO, f"{kept.path} cannot be read at {offset}, {length} bytes")

        def wrong(block: tuple[int, int]) -> tuple[Replica, ...]:
            return tuple(one.replica for one in asked if _differs(one, right, *block))

        for replicas, group in groupby(blocks(offset, length), wrong):
            run = list(group)
            low, high = run[0][0], run[-1][1]
            await self._rewrite(choice, replicas, offset + low, right[low:high])
        before = self._scrub.undecided_bytes
        self._scrub.inspection.undecided.remove(offset, offset + length)
        self._scrub.decided(before - self._scrub.undecided_bytes)

    async def _rewrite(
        self, choice: Choice, replicas: tuple[Replica, ...], offset: int, data: bytes
    ) -> None:
        if not replicas:
            return
        refused = await repair_write(
            self._mirror, self._sidecars, replicas, offset, data, [choice.kept]
        )
        if refused:
            paths = " and ".join(sorted(replica.path for replica in refused))
            raise OSError(errno.EIO, f"{paths} cannot be written at {offset}, {len(data)} bytes")
        for replica in replicas:
            if replica.standing.is_member:
                self._mirror.events.repaired(replica.path, offset, len(data))
        choice.written += len(data)


def _differs(outcome: Outcome, right: bytes, low: int, high: int) -> bool:
    """Whether a replica could not be read, or holds something else in a block."""
    return outcome.error is not None or outcome.data[low:high] != right[low:high]
