"""What the ledger knows, written to the sidecars: the one lock, the record, the map.

Whoever cannot be written to is ejected, by a record that the others get, as long as they are
enough. So each of these writes may change who is current.
"""

import errno
from collections.abc import Sequence
from contextlib import suppress

import trio

from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.sidecar import (
    MAP_OFFSET,
    PAGE,
    UNREADABLE_MAX,
    UNREADABLE_OFFSET,
    encode_pages,
    encode_unreadable,
    page_runs,
    pages,
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
        """Whoever writes to the sidecars holds it. What ends in ``_locked`` asserts that."""
        self._unreadable_number = 0
        """How often the list of what cannot be read was written."""

    def know(self, replica: Replica, found: Found) -> None:
        """Take over what was *found* of a replica's files, both of them."""
        ledger, own = self.ledger, found.sidecar
        assert own is not None
        spare = own.spare_slot
        if own.prepared is not None and own.prepared.key == ledger.record.key:
            # Committed elsewhere, it is what shows that this one was there: the older one may go.
            spare = 1 - spare
        self._unreadable_number = max(self._unreadable_number, own.unreadable_number)
        self.writer.know(replica, found, spare)
        ledger.records.saw([own.record.sequence, own.prepared.sequence if own.prepared else 0])

    async def open(self, *, to_change: bool = False) -> None:
        """Have the record say that the set is in use, and, given a quorum, who is ejected.

        *to_change*: and that this mount may change the disk. To make replicas equal is no change.
        """
        ledger = self.ledger
        if ledger.in_use and ledger.membership.recorded and not (to_change and ledger.unentered):
            return
        async with self.lock:
            unrecorded = not ledger.membership.recorded and ledger.may_record
            if not ledger.in_use or unrecorded or (to_change and ledger.unentered):
                ledger.records.changing = ledger.records.changing or to_change
                # The map first: who is now said to be stale lacks what it says.
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

    async def write_map_locked(self) -> None:
        """As `write_map`. Raises `OSError` if fewer than the threshold can take it."""
        assert self.lock.locked()
        ledger = self.ledger
        version = ledger.recorded.begin_write()
        pieces = [
            (
                MAP_OFFSET + first * PAGE,
                encode_pages(ledger.map, ledger.record.set_id, first, last),
            )
            for first, last in page_runs(version)
        ]
        for piece in pieces:
            await self._write_to_all_locked(piece)
        ledger.recorded.written(version)

    async def write_all_to(self, replica: Replica) -> None:
        """Give *replica*, which is no member, the whole map and all that belongs to it.

        From here on a fact is recorded only if this sidecar has it, too. Raises `OSError`.
        """
        assert self.lock.locked()
        ledger, given = self.ledger, self.ledger.map.copy()
        offset, listed = self._unreadable_piece()
        content = bytes(offset - UNREADABLE_OFFSET) + listed
        content = content.ljust(MAP_OFFSET - UNREADABLE_OFFSET, b"\0")
        content += encode_pages(ledger.map, ledger.record.set_id, 0, pages(ledger.map) - 1)
        failed = await self.writer.put([replica], (UNREADABLE_OFFSET, content))
        if failed:
            raise failed[replica]
        ledger.recorded.found(given)

    async def write_unreadable(self) -> None:
        """Make the list of what cannot be read durable. Raises `OSError` if that cannot be."""
        async with self.lock:
            if len(self.ledger.agreement.unreadable) > UNREADABLE_MAX:
                raise OSError(errno.EIO, "more places cannot be read than are remembered")
            # One that is torn leaves the one before.
            self._unreadable_number += 1
            await self._write_to_all_locked(self._unreadable_piece())

    def _unreadable_piece(self) -> tuple[int, bytes]:
        ledger, number = self.ledger, self._unreadable_number
        return encode_unreadable(ledger.agreement.unreadable, ledger.record.set_id, number)

    async def _write_to_all_locked(self, piece: tuple[int, bytes]) -> None:
        """Write a piece of each member's sidecar; whoever cannot take it is ejected."""
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

    async def lose(self, replicas: Sequence[Replica], chunks: Sequence[range] = ()) -> None:
        """As `Chunks.lose`, and on record, if that can be."""
        if not replicas:
            return  # there were too few from the beginning
        self.ledger.chunks.lose(replicas, chunks)
        with suppress(OSError):  # whoever can, remembers
            await self.write_map()

    # The record

    async def commit_locked(self, *, clean: bool, resyncing: Replica | None = None) -> None:
        """Make a record of the roles as they are now valid on all that are current in it.

        *resyncing*: a replica that it says this of, and that gets it too. Those that fail are
        ejected, by another record. Raises `OSError` when fewer than the threshold would be left, or
        when the replica that is resyncing failed.
        """
        assert self.lock.locked()
        ledger = self.ledger
        identities = await identities_of(ledger.members) if clean else {}
        await self.claims.look(ledger.membership.receivers)
        self.claims.require_ours()
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
        """Leave *failed* behind, durably, before anything is acknowledged without them (R3).

        A target among them lacks *chunks*. Raises `OSError` if too few would be left.
        """
        ledger = self.ledger
        if not failed and (ledger.membership.recorded or not ledger.in_use):
            return
        for replica in failed:
            if ledger.target is not None and ledger.target.replica is replica:
                ledger.target.lacks(chunks)
                if ledger.joining:
                    async with self.lock:
                        pass  # until it is known what has become of it
                self.drop_target(replica, reason)
        async with self.lock:
            gone = [one for one in dict.fromkeys(failed) if one.standing is Standing.CURRENT]
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
        """Make *replica* stale again, if it is the target: it keeps what it has."""
        if self.ledger.is_target(replica) and not self.ledger.joining:
            self.break_off(reason)

    def break_off(self, reason: str) -> None:
        """Make the target stale again, also while it joins."""
        replica = self.ledger.give_up_target(reason)
        replica.detach(there=not replica.dead)

    def eject_in_memory(self, gone: Sequence[Replica], reason: str) -> None:
        """Make current replicas stale, in memory."""
        self.ledger.eject(gone, reason)
        for replica in gone:
            # They are opened anew to bring it back, and meanwhile keep its store busy.
            replica.detach(there=not replica.dead)
