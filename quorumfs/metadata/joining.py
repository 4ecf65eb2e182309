"""How a replica becomes current again, and what the sidecars say at each step.

An ejected replica becomes the *target* of a resync, gets the chunks it lacks, and *joins*. A member
whose file system went away and came back is *reopened*.
"""

import errno
from collections.abc import Iterable

from quorumfs.decisions.dirtymap import INTENT
from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.record import RoleState
from quorumfs.decisions.returned import OFFLINE
from quorumfs.metadata.ledger.target import Target
from quorumfs.metadata.recorder import Recorder
from quorumfs.replica.fanout import carry_out
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

_UNCERTAIN_MARKS = (RoleState.CURRENT, RoleState.STALE)
"""The states by a replica's own sidecar in which its ``INTENT`` marks may stand for writes that the
members did not take. One that went offline was equal to the members, and synced."""


class Joining:
    """Resync, join and reopening of the replicas of a set."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._ledger = recorder.ledger

    async def start_resync(self, replica: Replica, found: Found, *, full: bool) -> Target:
        """Make *replica*, which is stale and answers, the target of a resync.

        *found*: the open image and sidecar. *full*: the replica may lack any chunk. An `OSError`
        leaves the standing of the replica unchanged.
        """
        ledger, recorder = self._ledger, self._recorder
        own, target = found.sidecar, ledger.targets.of(replica)
        assert own is not None
        assert ledger.target is None
        # Before anything is awaited: what showed this may not show it at the next attempt.
        target.doubt_log()
        if full:
            target.lacks(range(len(ledger.map)))
        elif own.own_state in _UNCERTAIN_MARKS and not target.ejected:
            for run in own.map.resized(ledger.map.size).runs(INTENT, longest=len(ledger.map)):
                target.lacks(run)
        await recorder.open()
        recorder.know(replica, found)
        async with recorder.lock:
            if replica.standing is Standing.OFFLINE:
                raise OSError(errno.EBUSY, OFFLINE)
            await self._lengthen(replica, found)
            await recorder.write_map_locked()
            # From its first copied byte on, the image is a mixture and must not be mounted.
            await recorder.commit_locked(clean=False, resyncing=replica)
        replica.standing = Standing.RESYNCING
        replica.reason = None
        target.begin()
        ledger.targets.resyncing = target
        ledger.arrange()
        return target

    async def _lengthen(self, replica: Replica, found: Found) -> None:
        """Make the image of *replica* as long as the disk, which grew without it.

        Else no record may name the larger size in its sidecar. Raises `OSError`.
        """
        size = self._ledger.map.size
        if found.image is None or found.image.size >= size:
            return
        added = size - found.image.size
        for operation in (Operation(Kind.RESIZE, found.image.size, added), Operation(Kind.SYNC)):
            if (error := await _outcome(replica, operation)) is not None:
                raise error
        self._recorder.writer.resized(replica, size)

    async def sync_target(self, target: Target, changing: Iterable[tuple[int, int]]) -> int:
        """Sync *target*; returns how many copied chunks became durable.

        *changing*: ranges (start, end; bytes) under change. After an `OSError` the replica is stale
        and no longer the target.
        """
        ledger = self._ledger
        epoch = ledger.epochs.begin_sync([target.replica], ledger.chunks_of(changing))
        error = await _outcome(target.replica, Operation(Kind.SYNC))
        if error is not None or ledger.target is not target:
            self._recorder.drop_target(target.replica, "it could not be synced")
            raise error or OSError(errno.EIO, "it failed meanwhile")
        ledger.epochs.cover([target.replica], epoch)
        return target.synced(epoch)

    async def save_progress(self) -> None:
        """Make the progress of a repair durable in the sidecars."""
        ledger, recorder = self._ledger, self._recorder
        if ledger.target is None:
            await recorder.write_map()
            return
        async with recorder.lock:
            # The new sequence number exposes a target that is later rolled back to before this.
            await recorder.commit_locked(clean=False, resyncing=ledger.resyncing)
            if ledger.target is not None:
                ledger.target.recorded()
            await recorder.write_map_locked()

    async def join(self) -> None:
        """Make the target, which now lacks nothing, current.

        After an `OSError` the replica is stale again.
        """
        ledger, recorder = self._ledger, self._recorder
        target = ledger.target
        assert target is not None
        replica = target.replica
        target.joining = True  # flushes now include the target; `Recorder.eject` waits for us
        ledger.arrange()
        try:
            async with recorder.lock:
                # The disk's flush lock is not held. This sync covers the target's writes until now;
                # flushes, which include the target from here on, cover the later writes.
                error = await _outcome(replica, Operation(Kind.SYNC))
                if error is not None:
                    raise error
                await recorder.write_all_to(replica)
                if target.lacking_chunks:
                    raise OSError(errno.EIO, "a write to it or a flush failed meanwhile")
                replica.standing = Standing.CURRENT
                ledger.arrange()
                await recorder.commit_locked(clean=False)
                if replica.standing is not Standing.CURRENT:
                    raise OSError(errno.EIO, "its sidecar could not be written")
                ledger.joined()
        finally:
            target.joining = False
            if ledger.target is target:
                recorder.break_off("it failed before it was current")
            ledger.arrange()
            ledger.notify()

    async def reopen_member(self, replica: Replica, found: Found) -> None:
        """Reopen a member whose file system went away and is back, as *found*.

        If nothing proves that the image is the same, and other members hold all its data, every
        chunk counts as lost until repaired (R15). Raises `OSError` if the image or sidecar changed:
        the replica must then be ejected before it can return.
        """
        ledger, recorder = self._ledger, self._recorder
        own, known = found.sidecar, recorder.writer.in_use[replica]
        if found.in_use is None or own is None or replica.slot is None:
            raise OSError(errno.ENODEV, found.problem or "it is not there")
        ours, left_over = ledger.records.keys, recorder.writer.left_over[replica]
        same = own.record.key in ours and (
            own.prepared is None or own.prepared.key in {*ours, left_over}
        )
        # It may be longer than before, after a growth that failed.
        same = same and found.in_use.size >= known.size
        proven = bool(found.in_use.inode) and found.in_use.inode == known.inode
        proven = proven and not found.exchangeable
        if not proven and found.instance is None:
            same = False
        if not same or own.record.slot_of(own.replica_id) != replica.slot:
            raise OSError(errno.ESTALE, "it is not as it was")
        recorder.know(replica, found)
        recorder.writer.resized(replica, known.size)
        ledger.recorded.found(own.map)
        spared = len(ledger.members) > 1 and not ledger.chunks.sources.held_only_by([replica])
        lost = [range(len(ledger.map))] if spared and not proven else None
        if replica in ledger.content.gone and lost is None:
            # Of two that were gone, the one that is back first has lost no more than the other.
            lost = list(ledger.epochs.unsynced(replica))
        ledger.content.gone.discard(replica)
        await recorder.lose([replica], lost)


async def _outcome(replica: Replica, operation: Operation) -> OSError | None:
    """Have *operation* done on the image of *replica*; returns the error, None on success."""
    await carry_out([(replica, operation)])
    return operation.error
