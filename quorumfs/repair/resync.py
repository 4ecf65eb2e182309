"""Resync: giving a replica that was ejected what it lacks.

What it lacks is copied from those that hold it, in passes, under locks that keep writers out and
let readers in. What a guest writes meanwhile it lacks from then on, and the guest need not wait for
it; until a pass leaves more than half of what the one before it left. From then on it is given
what is written where it lacks nothing, so it has everything in the end, however fast the guest is.
When it lacks nothing it becomes current. This can stop at any point, with the process or with a
replica, and goes on from there the next time.
"""

import errno
from contextlib import aclosing, suppress

import trio

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.model import Found
from quorumfs.metadata.ledger.target import Target
from quorumfs.repair.copying import Copying
from quorumfs.repair.work import Work
from quorumfs.replica.replica import Replica


class Resync:
    """Brings replicas of one disk up to date, one at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger

    async def resync(self, replica: Replica, found: Found, *, full: bool) -> None:
        """Make *replica* current, which is open, and looked like *found*.

        *full*: it is not known what it lacks. Raises `OSError`; then it keeps what it has.
        """
        assert replica.slot is not None
        sidecars = self._sidecars
        target = await sidecars.joining.start_resync(replica, found, full=full)
        self._mirror.announce_states()
        self._work.begin("resync", replica.path, self._ledger.map.lacking_bytes(replica.slot))
        assert self._work.progress is not None
        self._mirror.events.resync_started(replica.path, self._work.progress.total_bytes)
        copied_before = replica.counters.copied_bytes
        error: str | None = "it was broken off"
        try:
            await self._catch_up(target, Copying(self._work, target, compare=full), full=full)
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
        """Give *target* what it lacks until it lacks nothing."""
        whole = self._work.map
        if full or target.unproven or whole.count(UNVERIFIED):
            # A flush that failed may have dropped pages that a read still shows (R4): they would
            # compare equal.
            await self._sync(target)
            await copying.forget_cached()
        before = 2 * len(whole)
        while lacking := target.lacking_chunks:
            target.mirroring = lacking > before // 2
            before = lacking
            with suppress(OSError):
                # Who lost what it was given last says so before it is copied from: the target would
                # else lack that again, each time if one never syncs.
                await self._mirror.sync()
            await self._copy_all(target, copying)
            try:
                # Who it was copied from may have lost that before: then it lacks it still.
                await self._mirror.sync()
            except OSError:
                if target.lacking_chunks:
                    raise  # not again and again: first another one may have to come back
        target.mirroring = True  # nothing was written since there was nothing lacking
        copying.require_target()
        await self._sync(target)  # the join has the less to sync

    async def _copy_all(self, target: Target, copying: Copying) -> None:
        """Copy what *target* lacks, once.

        What was copied is synced while more is, and held after a sync that began later (R8).
        """
        unreadable = 0

        async def copy_unit(chunks: range) -> None:
            nonlocal unreadable
            # The guest reads from others: only who writes has to wait.
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
                if self._work.stopping:
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
