"""The repairs of a disk: make the replicas equal again, without being asked.

There are six kinds of work, done in this order, under the disk's locks and beside the guest:

* *reopen* members whose file system went away (`quorumfs.repair.rejoin`);
* *settle* divergent chunks, after a crash or a failed change (`quorumfs.repair.settle`);
* *resync* ejected replicas (`quorumfs.repair.rejoin`, `quorumfs.repair.resync`);
* *resolve* what an administrator has decided (`quorumfs.repair.resolving`);
* *verify* images that were adopted as they were (`quorumfs.repair.verify`);
* *scrub*: read all there is, if an administrator asked for it (`quorumfs.repair.scrub`).

Beside them, write-intent marks of idle extents are cleared (R5). Any of this work can stop at any
point, with the process or with a replica, and be done again.
"""

import logging
import time
from contextlib import suppress

import trio

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.model import Found
from quorumfs.decisions.ranges import RangeSet
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.rejoin import RETRY_S, Opener, Rejoin
from quorumfs.repair.resolving import Resolving
from quorumfs.repair.resync import Resync
from quorumfs.repair.rewrite import read_and_rewrite
from quorumfs.repair.scrub import Scrub
from quorumfs.repair.settle import Settling
from quorumfs.repair.verify import Verification
from quorumfs.repair.work import Progress, Work
from quorumfs.replica.replica import Replica
from quorumfs.replica.ticks import next_tick

log = logging.getLogger(__name__)

STOP_S = 1.0
"""How long an unmount waits (seconds) for a repair before giving up the target of a resync, which
still lacks what was not copied."""

AGAIN_S = 0.1
"""How often (seconds) the unmount then gives up the target again, until the repair has ended."""

CLEAR_S = 30.0
"""Seconds without a write (up to twice as many) after which an extent loses its `INTENT`."""

TOUCH_S = 120.0
"""How often (seconds) sidecars are written while marks are kept: a write to a
marked extent writes none, and after a crash no image may be much later than its sidecar
(`quorumfs.decisions.sameimage.touched_after_crash`)."""


class Repairs:
    """The repairs of one disk with sidecars.

    For a guest's requests this is the `quorumfs.disk.disk.Repairer`.
    """

    def __init__(
        self,
        mirror: Mirror,
        sidecars: Sidecars,
        opener: Opener,
        *,
        present: dict[Replica, Found],
        limit: int | None = None,
        outvoted: bool = False,
        scrub_every_s: float | None = None,
    ) -> None:
        """*present*: what was found of each replica that is open and not current.

        *limit*: bytes a second, at most.
        *outvoted*: a read also rewrites a member that a strict majority outvotes, and so does a
        scrub that begins by itself.
        *scrub_every_s*: how long (seconds) after a scrub the next one begins by itself.
        """
        self._mirror = mirror
        self._sidecars = sidecars
        self._ledger = sidecars.ledger
        self._map = self._ledger.map
        self._work = work = Work(mirror, sidecars, limit)
        self._settling = Settling(work)
        self._verification = Verification(work)
        self._rejoin = Rejoin(sidecars, Resync(work), opener, present)
        self.scrub = Scrub(
            mirror, sidecars, limit=limit, every_s=scrub_every_s, repair_unasked=outvoted
        )
        self.resolving = Resolving(work, self.scrub, self._verification, lambda: self.undecided)
        self._told: set[str] = set()
        """Reasons why repairs stopped that the log has had since a repair last did something."""
        self._stopped = trio.Event()
        self._outvoted = outvoted

    @property
    def progress(self) -> Progress | None:
        """The repair at work; None if there is none."""
        return self._work.progress

    @property
    def limit(self) -> int | None:
        """Bytes a second that a repair may work through at most; None: no limit."""
        return self._work.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        if self.scrub.limit == self.limit:  # else an administrator gave the scrub one of its own
            self.scrub.limit = limit
        self._work.limit = limit

    @property
    def resync_paused(self) -> bool:
        """Whether an administrator paused resyncs."""
        return self._work.resync_paused

    def pause_resync(self, *, paused: bool) -> None:
        """Break off the resync under way and begin none, until this is called again. What was
        copied is kept, and what is written meanwhile is copied later."""
        self._work.resync_paused = paused
        if not paused:
            for replica in self._mirror.replicas:
                self._rejoin.try_at_once(replica)
            self._sidecars.notify()

    @property
    def outvoted(self) -> bool:
        """Whether members that a strict majority outvotes are rewritten without being asked to."""
        return self._outvoted

    @outvoted.setter
    def outvoted(self, outvoted: bool) -> None:
        self._outvoted = self.scrub.repair_unasked = outvoted

    def may_come_back(self, replica: Replica) -> bool:
        """Whether *replica*, which does not do its part, is tried again and again."""
        return self._rejoin.may_come_back(replica)

    def try_at_once(self, replica: Replica) -> None:
        """Have *replica*, which is not current, rejoin now rather than after its back-off."""
        self._rejoin.try_at_once(replica)
        self._sidecars.notify()

    @property
    def being_made(self) -> set[str]:
        """The paths of replicas whose files a thread is making: none of them rejoins meanwhile."""
        return self._rejoin.being_made

    @property
    def changed(self) -> trio.Event:
        """Set when there may be something to repair, then replaced: take it anew for each wait."""
        return self._sidecars.changed

    @property
    def differing(self) -> RangeSet:
        """Chunks of adopted images that differ without a majority."""
        return self._verification.differing

    @property
    def undecided(self) -> RangeSet:
        """Bytes in which replicas differ, and nothing tells which one is right."""
        undecided = self.scrub.inspection.undecided.union(RangeSet())
        for start, end in self.differing:
            undecided.add(*self._map.bounds_of(range(start, end)))
        return undecided

    # The `Repairer` of a guest's requests

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        return await self._settling.settle_and_read(offset, length)

    async def settle_all(self) -> None:
        if self._ledger.agreement.cut_off:
            await self._verification.renew()
        await self._settling.settle_all()

    async def verify(self, offset: int, length: int) -> None:
        await self._verification.verify_range(offset, length)

    async def rewrite(self, offset: int, length: int) -> bytes:
        return await read_and_rewrite(self._mirror, offset, length, outvoted=self.outvoted)

    # Work in the background

    async def run(self) -> None:
        """Repair whatever needs it, until stopped."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._clear_marks)
            while not self._work.stopping:
                worked = await self._try_to_repair()
                self._work.progress = None
                self._mirror.announce_states()
                # Taken after the attempt, so that the attempt itself does not set it.
                changed = self._sidecars.changed
                if not worked and not self._work.stopping:
                    with trio.move_on_at(next_tick(self._pause_s)):
                        await changed.wait()
        self.resolving.close()
        await self.scrub.close()
        self._stopped.set()

    @property
    def _pause_s(self) -> float:
        """How often (seconds) to look whether there is something to repair."""
        unfinished = self._ledger.agreement.divergent
        return RETRY_S[0] if unfinished else self._mirror.rhythm.period_s(RETRY_S[0])

    async def _try_to_repair(self) -> bool:
        """As `_repair`, but log why the repair failed, once for each reason."""
        try:
            worked = await self._repair()
        except OSError as error:
            reason = error.strerror or str(error)
            if reason not in self._told and not self._work.stopping:
                log.warning("a repair stopped, and is tried again: %s", reason)
        except Exception as error:
            reason = repr(error)
            if reason not in self._told:
                log.exception("a repair stopped by an internal error, and is tried again")
        else:
            if worked:
                self._told.clear()
            return worked
        self._told.add(reason)
        return False

    async def stop(self) -> None:
        """Stop repairing, and wait until the repair at work has ended."""
        self._work.stop()
        self.scrub.stop_work()
        self._sidecars.notify()
        patience_s = STOP_S
        while not self._stopped.is_set():
            with trio.move_on_after(patience_s):
                await self._stopped.wait()
                return
            patience_s = AGAIN_S
            for replica in self._mirror.replicas:
                if not replica.standing.is_member or self._ledger.is_target(replica):
                    replica.give_up()

    async def _repair(self) -> bool:
        """Do one repair that is due; whether one was done."""
        sidecars = self._sidecars
        if sidecars.fenced is not None:
            return False
        error: OSError | None = None
        for replica in self._mirror.replicas:
            if await self._rejoin.reopen_member(replica):
                return True
        if self._settling.due():
            try:
                await self._settling.settle()
            except OSError as caught:
                error = caught
            if not self._ledger.agreement.divergent:
                return True
        # Also while chunks are divergent: with more members, a member that refuses writes can be
        # ejected.
        for replica in self._in_order_of_need():
            if self._work.resync_paused:
                break
            if await self._rejoin.rejoin(replica):
                return True
        if self._ledger.agreement.divergent:
            if error is not None:
                raise error
            return False
        if await self.resolving.step():
            return True
        if self._map.count(UNVERIFIED) and await self._verification.verify():
            return True
        return await self.scrub.step()

    def _in_order_of_need(self) -> list[Replica]:
        """The replicas that are not current: the one that lacks the least is the next copy."""

        def lacking_bytes(replica: Replica) -> int:
            return 0 if replica.slot is None else self._map.lacking_bytes(replica.slot)

        out = (one for one in self._mirror.replicas if not one.standing.is_member)
        return sorted(out, key=lacking_bytes)

    async def _clear_marks(self) -> None:
        """Clear write-intent marks of extents that are idle (R5), until stopped. While there are
        any, sidecars are written now and then."""
        touched = trio.current_time(), time.time()
        while True:
            await self._work.sleep(CLEAR_S)
            if self._work.stopping:
                return
            # The host may have slept, or its clock been set.
            now = trio.current_time(), time.time()
            passed = max(abs(late - early) for early, late in zip(touched, now, strict=True))
            if passed >= TOUCH_S and self._map.count(INTENT):
                await self.scrub.save()
                touched = now
            if not self._ledger.may_clear_marks:
                continue
            with suppress(OSError):  # the next time, then
                if self._ledger.unflushable():
                    await self.settle_all()
                if await self._mirror.sync():
                    await self._sidecars.clear_marks(self._mirror.locks.claimed)
