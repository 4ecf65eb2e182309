"""Writes of the ledger to the sidecars: the one lock, the record, the map.

A member whose sidecar cannot be written is ejected by a record on the remaining members, if enough
remain. So any write here may change the membership.
"""

import errno
from collections.abc import Sequence
from contextlib import suppress

import trio

from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.model import Found
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.scrub import ScrubRecord, encode_scrub
from quorumfs.decisions.sidecar import (
    MAP_OFFSET,
    UNREADABLE_MAX,
    UNREADABLE_OFFSET,
    encode_map,
    encode_unreadable,
    page_numbers,
    pages,
    scrub_offset,
)
from quorumfs.decisions.voting import voted_error
from quorumfs.metadata.claims import Claims
from quorumfs.metadata.ledger.commit import Eject, GiveUp, Write
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.writer import SidecarWriter, identities_of
from quorumfs.replica.replica import Replica


class Recorder:
    """Writes to the sidecars of one set."""

    def __init__(self, ledger: Ledger, claims: Claims, writer: SidecarWriter) -> None:
        self.ledger = ledger
        self.claims = claims
        self.writer = writer
        self.lock = trio.Lock()
        """Held by every writer of sidecars. Methods named ``*_locked`` require the lock."""
        self._unreadable_number = 0
        """The version number of the list of unreadable bytes."""
        self._list_recorded = True
        """All members hold the list of unreadable bytes as it is; false after a failure to write
        it, which leaves a list that nobody knows on the media."""

    def know(self, replica: Replica, found: Found) -> None:
        """Take over the files of *replica*, both *found*."""
        ledger, own = self.ledger, found.sidecar
        assert own is not None
        spare = own.spare_slot
        if own.prepared is not None and own.prepared.key == ledger.record.key:
            # Committed on other members, this record proves the replica took part: keep its slot.
            spare = 1 - spare
        self._unreadable_number = max(self._unreadable_number, own.unreadable_number)
        self.writer.know(replica, found, spare)
        replica.health.last_writes.forget()
        ledger.records.saw([own.record.sequence, own.prepared.sequence if own.prepared else 0])

    async def open(self, *, to_change: bool = False) -> None:
        """Record that the set is in use and, given a quorum, which replicas are ejected.

        *to_change*: record also that this mount may change the disk. A repair changes no disk.
        """
        ledger = self.ledger
        if ledger.in_use and ledger.membership.recorded and not (to_change and ledger.unentered):
            return
        async with self.lock:
            unrecorded = not ledger.membership.recorded and ledger.may_record
            if not ledger.in_use or unrecorded or (to_change and ledger.unentered):
                ledger.records.changing = ledger.records.changing or to_change
                # The map first: the map says which chunks a newly stale replica lacks.
                await self.write_map_locked()
                await self.commit_locked(clean=False)
                ledger.in_use = True
                ledger.arrange()

    # The map

    async def write_map(self) -> None:
        """Make all changes of the map until now durable; concurrent callers share the work."""
        async with self.lock:
            if self.ledger.recorded.behind:
                await self.write_map_locked()

    async def write_map_locked(self, grown: DirtyMap | None = None) -> None:
        """As `write_map`. Raises `OSError` if fewer members than the threshold can be written.

        *grown*: the map as it is, with added chunks or planes, which are written, too.
        """
        assert self.lock.locked()
        ledger = self.ledger
        if grown is None:
            version = ledger.recorded.begin_write()
            pieces = encode_map(ledger.map, ledger.record.set_id, version)
        else:
            last = page_numbers(ledger.map, pages(ledger.map) - 1)
            version = ledger.recorded.begin_write(also=last)
            added = set(page_numbers(grown)).difference(page_numbers(ledger.map))
            pieces = encode_map(grown, ledger.record.set_id, [*version, *added])
        for piece in pieces:
            await self._write_to_all_locked(piece)
        ledger.recorded.written(version)

    async def write_all_to(self, replica: Replica) -> None:
        """Write the whole map and the unreadable ranges to *replica*, not yet a member.

        From here on a fact counts as recorded only if this sidecar holds it too. Raises `OSError`.
        """
        assert self.lock.locked()
        ledger, given = self.ledger, self.ledger.map.copy()
        offset, listed = self._unreadable_piece()
        content = bytes(offset - UNREADABLE_OFFSET) + listed
        content = content.ljust(MAP_OFFSET - UNREADABLE_OFFSET, b"\0")
        (_, first), *further = encode_map(given, ledger.record.set_id, page_numbers(given))
        for piece in ((UNREADABLE_OFFSET, content + first), *further):
            failed = await self.writer.put([replica], piece)
            if failed:
                raise failed[replica]
        ledger.recorded.found(given)

    def require_room_for(self, offset: int, length: int) -> None:
        """Raise `OSError` if the list of unreadable bytes has no room for a range more."""
        wanted = RangeSet()
        wanted.add(offset, offset + length)
        if len(self.ledger.agreement.unreadable.union(wanted)) > UNREADABLE_MAX:
            raise OSError(errno.EIO, "more places cannot be read than are remembered")

    async def require_list(self) -> None:
        """Have the list of unreadable bytes on record as it is. Raises `OSError`."""
        if not self._list_recorded:
            await self.write_unreadable()

    async def write_unreadable(self) -> None:
        """Make the list of unreadable bytes durable. Raises `OSError` on failure."""
        async with self.lock:
            # If this version is torn, the previous version is left.
            self._list_recorded = False
            self._unreadable_number += 1
            await self._write_to_all_locked(self._unreadable_piece())
            self._list_recorded = True

    async def _write_list_again_locked(self) -> None:
        """Write the list of unreadable bytes anew after a failure. A member that cannot hold it is
        not ejected for that, but no replica joins, or is resynced, by the wrong list. Raises
        `OSError` then."""
        self._unreadable_number += 1
        failed = await self.writer.put(self.ledger.members, self._unreadable_piece())
        self._list_recorded = not failed
        if failed and self.ledger.resyncing is not None:
            raise voted_error(failed.values())

    def _unreadable_piece(self) -> tuple[int, bytes]:
        ledger, number = self.ledger, self._unreadable_number
        return encode_unreadable(ledger.agreement.unreadable, ledger.record.set_id, number)

    async def write_scrub(self, record: ScrubRecord) -> dict[Replica, OSError]:
        """Have the members remember what *record* says of scrubs; returns the errors by replica.

        A member that cannot is not ejected for that: nothing of the data depends on it. Raises
        `OSError` if a different mount has the set.
        """
        async with self.lock:
            await self.claims.look(self.ledger.members)
            self.claims.require_ours()
            place = scrub_offset(self.ledger.map)
            piece = encode_scrub(record, self.ledger.record.set_id, place)
            return await self.writer.put(self.ledger.members, piece)

    async def _write_to_all_locked(self, piece: tuple[int, bytes]) -> None:
        """Write *piece* to the sidecar of each member, ejecting members that fail."""
        assert self.lock.locked()
        ledger = self.ledger
        failed = await self.writer.put(ledger.members, piece)
        if not failed:
            return
        gone = [replica for replica in failed if replica in ledger.members]
        if not ledger.enough_without(gone):
            raise voted_error(failed.values())
        if gone:
            self.eject_in_memory(gone, f"its sidecar: {failed[gone[0]].strerror}")
            await self.commit_locked(clean=False)

    async def lose(
        self, replicas: Sequence[Replica], chunks: Sequence[range] | None = None
    ) -> None:
        """As `Chunks.lose`, recording the loss in the map if possible."""
        if not replicas:
            return  # the flush failed for want of members, not of syncs
        self.ledger.chunks.lose(replicas, chunks)
        with suppress(OSError):  # as many sidecars as can
            await self.write_map()

    # The record

    async def commit_locked(self, *, clean: bool, resyncing: Replica | None = None) -> None:
        """Commit a record of the present standings on all members.

        *resyncing*: a replica recorded as resyncing, which gets the record too. Members that fail
        are ejected by a further record. Raises `OSError` if fewer members than the threshold would
        be left, or if *resyncing* failed.
        """
        assert self.lock.locked()
        ledger = self.ledger
        identities = await identities_of(ledger.members) if clean else {}
        await self.claims.look(ledger.membership.receivers)
        self.claims.require_ours()
        if not self._list_recorded:
            await self._write_list_again_locked()
        steps = ledger.records.commit(
            ledger.members,
            clean=clean,
            resyncing=resyncing,
            joining=ledger.resyncing if ledger.joining else None,
            enough_without=ledger.enough_without,
        )
        answer: object = None
        try:
            while True:
                match steps.send(answer):
                    case Write(record, phase, holders):
                        answer = await self.writer.write_slots(holders, record, phase, identities)
                    case Eject(gone, reason):
                        self.eject_in_memory(gone, reason)
                        answer = ledger.members
                    case GiveUp(target, reason):
                        self.drop_target(target, reason)
                        answer = None
        except StopIteration:
            pass
        finally:
            ledger.arrange()

    async def eject(self, failed: Sequence[Replica], chunks: range, reason: str) -> None:
        """Eject *failed*, durably, before a request is acknowledged without them (R3).

        A target among *failed* lacks *chunks*. Raises `OSError` if too few members would be left.
        """
        ledger = self.ledger
        if not failed and (ledger.membership.recorded or not ledger.in_use):
            return
        for replica in failed:
            if ledger.target is not None and ledger.target.replica is replica:
                ledger.target.lacks(chunks)
                if ledger.joining:
                    async with self.lock:
                        pass  # until the join has ended
                self.drop_target(replica, reason)
        async with self.lock:
            gone = [one for one in dict.fromkeys(failed) if one.standing.is_member]
            if not gone and (ledger.membership.recorded or not ledger.in_use):
                return
            if not ledger.enough_without(gone):
                raise OSError(errno.EIO, "too few replicas would be left")
            more_than_marked = not ledger.in_use or ledger.content.truncated.intersection(gone)
            self.eject_in_memory(gone, reason)
            if more_than_marked:
                await self.write_map_locked()
            await self.commit_locked(clean=False)

    def drop_target(self, replica: Replica, reason: str) -> None:
        """Make *replica*, if it is a target not joining, stale again; its chunks are kept."""
        if self.ledger.is_target(replica) and not self.ledger.joining:
            self.break_off(reason)

    def break_off(self, reason: str) -> None:
        """Make the target stale again, even while joining."""
        replica = self.ledger.give_up_target(reason)
        replica.detach(there=not replica.dead)

    def eject_in_memory(self, gone: Sequence[Replica], reason: str) -> None:
        """Make the members *gone* stale, in memory."""
        self.ledger.eject(gone, reason)
        for replica in gone:
            # A rejoin opens the files anew; open files would keep the store busy until then.
            replica.detach(there=not replica.dead)
