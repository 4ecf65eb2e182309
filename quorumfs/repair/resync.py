"""Resync: giving the *target*, a replica that was ejected, the chunks that the target lacks.

Chunks are copied from their holders, in passes, under locks that keep writers out and let readers
in. At first guest writes pass by the target, which then lacks the chunks written. Once a pass
leaves more than half of what the pass before left, guest writes to chunks already copied go to the
target, too, so that a resync ends however fast the guest writes. A target that lacks nothing
becomes current. A resync can stop at any point, and goes on from there the next time.
"""

import errno
from contextlib import aclosing, suppress

import trio

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.model import Found, RepairKind
from quorumfs.metadata.ledger.target import Target
from quorumfs.repair.copying import Copying
from quorumfs.repair.dataplaces import seek
from quorumfs.repair.work import Work
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


class Resync:
    """Brings replicas of one disk up to date, one at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger

    async def resync(self, replica: Replica, found: Found, *, full: bool) -> None:
        """Make *replica*, which is open and was found as *found*, current.

        *full*: the lacking chunks are unknown. Raises `OSError`; copied chunks are kept then.
        """
        assert replica.slot is not None
        sidecars = self._sidecars
        target = await sidecars.joining.start_resync(replica, found, full=full)
        self._mirror.announce_states()
        self._work.begin(
            RepairKind.RESYNC, replica.path, self._ledger.map.lacking_bytes(replica.slot)
        )
        assert self._work.progress is not None
        self._mirror.events.resync_started(replica.path, self._work.progress.total_bytes)
        copied_before = replica.counters.copied_bytes
        error: str | None = "it was broken off"
        try:
            # What is a hole from end to end is different wherever anybody has data.
            compare = (
                full and await seek(self._mirror, replica, Kind.SEEK_DATA, 0) < self._mirror.size
            )
            await self._catch_up(target, Copying(self._work, target, compare=compare), full=full)
            await sidecars.joining.join()
            error = None
        except Exception as caught:
            error = (isinstance(caught, OSError) and caught.strerror) or str(caught)
            sidecars.recorder.drop_target(replica, error)
            raise
        finally:
            copied = replica.counters.copied_bytes - copied_before
            self._mirror.events.resync_finished(replica.path, copied, error)

    async def _catch_up(self, target: Target, copying: Copying, *, full: bool) -> None:
        """Copy, pass by pass, until *target* lacks nothing."""
        whole = self._work.map
        if full or target.unproven or whole.count(UNVERIFIED):
            # A failed sync may have dropped pages that a read still shows (R4). Such pages would
            # compare equal.
            await self._sync(target)
            await copying.forget_cached()
        before = 2 * len(whole)
        while lacking := target.lacking_chunks:
            target.mirroring = lacking > before // 2
            before = lacking
            with suppress(OSError):
                # A source reports its losses before it is copied from. Else the target would lack
                # those chunks again, in each pass if a source never syncs.
                await self._mirror.sync()
            await self._copy_all(target, copying)
            try:
                # A source may have lost a chunk before the copy; the target then still lacks it.
                await self._mirror.sync()
            except OSError:
                if target.lacking_chunks:
                    raise  # not again at once: another replica may have to come back first
        target.mirroring = True  # no write has begun since the target lacked nothing
        copying.require_target()
        await self._sync(target)  # the join has the less to sync

    async def _copy_all(self, target: Target, copying: Copying) -> None:
        """Copy each chunk that *target* lacks, once.

        Copied chunks are synced beside further copies, and are held after a sync that began later
        than the copy ended (R8).
        """
        unreadable = 0

        async def copy_unit(chunks: range) -> None:
            nonlocal unreadable
            # A guest reads from the members, so only its writes have to wait.
            async with self._work.locked(chunks, exclusive=False) as worked:
                unreadable += await copying.copy(chunks)
                worked()

        async def keep_some() -> None:
            await self._sync_copied(target, copying)
            if self._work.save_due:
                await self._save(target)

        async def keep_all() -> None:
            await self._sync_copied(target, copying)
            await self._save(target)

        lacking = self._work.map.runs(target.bit, longest=len(self._work.map))
        found = self._work.batches(lacking, copying.pass_over, copying.make_hole)
        async with aclosing(found) as batches:
            try:
                async for batch in batches:
                    most = self._work.unsynced.amount
                    await self._work.in_parallel(
                        batch, copy_unit, large=True, most=most, beside=keep_some
                    )
            finally:
                if self._work.interruption:
                    await keep_all()
        await keep_all()
        if unreadable:
            raise OSError(errno.EIO, f"{unreadable} chunks can be read on no current replica")

    async def _sync_copied(self, target: Target, copying: Copying) -> None:
        if target.unsynced:
            copying.require_target()
            began = trio.current_time()
            size = await self._sync(target) * self._work.map.chunk_size
            self._work.unsynced.took(size, began, trio.current_time())

    async def _sync(self, target: Target) -> int:
        return await self._sidecars.joining.sync_target(target, self._mirror.locks.changing())

    async def _save(self, target: Target) -> None:
        if target.unrecorded:
            await self._work.save()
