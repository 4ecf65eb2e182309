"""Parallel writes to the sidecars of several replicas: slots, map pages, and syncs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from quorumfs.decisions.model import Found
from quorumfs.decisions.record import Identity, Phase, Record
from quorumfs.decisions.sidecar import SLOT_OFFSETS, encode_further_roles, encode_slot, slot_places
from quorumfs.metadata.ledger.commit import Records
from quorumfs.replica.fanout import carry_out
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import FileStatus, Kind, Operation


class SidecarWriter:
    """Writes to sidecars, never changing the good slot."""

    def __init__(self, records: Records) -> None:
        """As many successes as the threshold of *records* let a write go on without replicas that
        do not answer."""
        self.left_over: dict[Replica, tuple[object, ...] | None] = {}
        """The key of the record that an earlier mount left prepared in the sidecar as found."""
        self.in_use: dict[Replica, Identity] = {}
        """The identity of each image while the set is in use."""
        self._nameless: set[Replica] = set()
        """Replicas whose inode numbers change with each mount of their file system."""
        self._records = records
        self._as_found: dict[Replica, Record] = {}
        """The record of each replica whose good slot may be only in the page cache: a daemon died
        before it synced, or its sync failed, which no later sync tells."""
        self._spare_slot: dict[Replica, int] = {}

    def know(self, replica: Replica, found: Found, spare_slot: int) -> None:
        """Take over the files of *replica*, both *found*."""
        assert found.image is not None
        assert found.in_use is not None
        self.in_use[replica] = found.in_use
        (self._nameless.discard if found.image.inode else self._nameless.add)(replica)
        own = found.sidecar
        assert own is not None
        left = own.prepared
        self._as_found[replica] = left if left and spare_slot != own.spare_slot else own.record
        self._spare_slot[replica] = spare_slot
        self.left_over[replica] = left.key if left else None

    def resized(self, replica: Replica, size: int) -> None:
        """Note that the image of *replica* has *size* bytes now."""
        self.in_use[replica] = replace(self.in_use[replica], size=size)

    async def write_slots(
        self,
        replicas: Sequence[Replica],
        record: Record,
        phase: Phase,
        identities: Mapping[Replica, Identity],
    ) -> dict[Replica, OSError]:
        """Write a slot of each sidecar, durably; returns the errors by replica.

        *identities*: identities of images with no more writes to come.
        """
        if failed := await self._secure_as_found(replicas):
            return failed
        slots, further = {}, {}
        for replica in replicas:
            spare = self._spare_slot[replica]
            number = spare if phase is Phase.PREPARED else 1 - spare
            assert replica.slot is not None
            replica_id = record.roles[replica.slot].replica_id
            identity = self.in_use[replica]
            if replica in identities:
                identity = identities[replica]
                if replica in self._nameless:
                    identity = replace(identity, inode=0, ctime_ns=0)
            content = encode_slot(record, replica_id, identity, phase)
            slots[replica] = SLOT_OFFSETS[number], content
            if (roles := encode_further_roles(record, number)) is not None:
                further[replica] = roles
        failed = {}
        if further:
            failed = await self.put(replicas, further, kinds=(Kind.WRITE,))
        failed |= await self.put([one for one in replicas if one not in failed], slots)
        if phase is Phase.COMMITTED:
            for replica in failed:  # only the prepared slot is sure to be whole
                self._spare_slot[replica] = 1 - self._spare_slot[replica]
        return failed

    async def _secure_as_found(self, replicas: Sequence[Replica]) -> dict[Replica, OSError]:
        """Have the good slots of *replicas*, as they were found, on the medium; returns the errors.

        The spare slot is overwritten after that alone. What the good slot holds is written again:
        where that is torn, the slot says on the medium what it said when it was written first.
        """
        failed: dict[Replica, OSError] = {}
        as_found = [replica for replica in replicas if replica in self._as_found]
        places = {
            replica: slot_places(self._as_found[replica], 1 - self._spare_slot[replica])
            for replica in as_found
        }
        while places:  # one place, or two, of each
            asked = {replica: Operation(Kind.READ, *left.pop()) for replica, left in places.items()}
            await carry_out(asked.items(), self._records.threshold, to_sidecar=True)
            failed |= {replica: read.error for replica, read in asked.items() if read.error}
            held = {
                replica: (read.offset, cast("bytes", read.value))
                for replica, read in asked.items()
                if replica not in failed
            }
            failed |= await self.put(list(held), held)
            places = {one: left for one, left in places.items() if left and one not in failed}
        for replica in as_found:
            if replica not in failed:
                del self._as_found[replica]
        return failed

    async def put(
        self,
        replicas: Sequence[Replica],
        pieces: tuple[int, bytes] | Mapping[Replica, tuple[int, bytes]],
        kinds: Sequence[Kind] = (Kind.WRITE, Kind.SYNC),
    ) -> dict[Replica, OSError]:
        """Write *pieces* (offset in bytes, content), durably; returns the errors by replica.

        *pieces*: a single piece for all replicas, or a piece for each.
        """
        failed: dict[Replica, OSError] = {}
        for kind in kinds:
            asked = []
            for replica in replicas:
                if replica in failed:
                    continue
                operation = Operation(kind)
                if kind is Kind.WRITE:
                    offset, data = pieces if isinstance(pieces, tuple) else pieces[replica]
                    operation = Operation(kind, offset, len(data), data)
                asked.append((replica, operation))
            await carry_out(asked, self._records.threshold, to_sidecar=True)
            for replica, operation in asked:
                if operation.error is not None:
                    failed[replica] = operation.error
        return failed


async def identities_of(replicas: Iterable[Replica]) -> dict[Replica, Identity]:
    """The identities of the images of *replicas*, to which no more writes will come."""
    asked = {replica: Operation(Kind.SEAL) for replica in replicas}
    await carry_out(asked.items())
    return {
        replica: operation.value.identity
        for replica, operation in asked.items()
        if operation.error is None and isinstance(operation.value, FileStatus)
    }
