"""Writing to the sidecars of several replicas at once: slots, pages of maps, and when to sync."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quorumfs.decisions.model import Found
from quorumfs.decisions.record import Identity, Phase, Record
from quorumfs.decisions.sidecar import SLOT_OFFSETS, encode_slot
from quorumfs.replica.replica import FanOut, Replica
from quorumfs.replica.storage import FileStatus, Kind, Operation


class SidecarWriter:
    """Writes to sidecars, and knows which slot of each must not be lost."""

    def __init__(self, threshold: int) -> None:
        """*threshold* successes let a write go on without replicas that do not answer."""
        self.in_use: dict[Replica, Identity] = {}
        """By which the images are known while they are in use."""
        self._nameless: set[Replica] = set()
        """Those whose inode numbers do not outlast a mount of their file system."""
        self._threshold = threshold
        self._as_found: set[Replica] = set()
        """Those whose sidecars are as a daemon left them that may have died before its sync."""
        self._spare_slot: dict[Replica, int] = {}

    def know(self, replica: Replica, found: Found, spare_slot: int) -> None:
        """Take over what was *found* of a replica's files, both of them."""
        assert found.image is not None
        assert found.in_use is not None
        self.in_use[replica] = found.in_use
        (self._nameless.discard if found.image.inode else self._nameless.add)(replica)
        self._as_found.add(replica)
        self._spare_slot[replica] = spare_slot

    async def write_slots(
        self,
        replicas: Sequence[Replica],
        record: Record,
        phase: Phase,
        identities: Mapping[Replica, Identity],
    ) -> dict[Replica, OSError]:
        """Write one slot of each, durably; returns who failed.

        *identities*: of images that nothing is written to any more.
        """
        # The good slot must be on the medium before the other one is written to.
        as_found = [replica for replica in replicas if replica in self._as_found]
        if as_found:
            failed = await self.put(as_found, {}, kinds=(Kind.SYNC,))
            self._as_found.difference_update(
                replica for replica in as_found if replica not in failed
            )
            if failed:
                return failed
        slots = {}
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
        failed = await self.put(replicas, slots)
        if phase is Phase.COMMITTED:
            for replica in failed:  # only what it prepared is sure to be whole
                self._spare_slot[replica] = 1 - self._spare_slot[replica]
        return failed

    async def put(
        self,
        replicas: Sequence[Replica],
        pieces: tuple[int, bytes] | Mapping[Replica, tuple[int, bytes]],
        kinds: Sequence[Kind] = (Kind.WRITE, Kind.SYNC),
    ) -> dict[Replica, OSError]:
        """Write a piece (offset in bytes, content) of each sidecar, durably; returns who failed.

        Either the same piece for all, or each its own.
        """
        failed: dict[Replica, OSError] = {}
        for kind in kinds:
            fan_out = FanOut(self._threshold)
            asked = []
            for replica in replicas:
                if replica in failed:
                    continue
                operation = Operation(kind)
                if kind is Kind.WRITE:
                    offset, data = pieces if isinstance(pieces, tuple) else pieces[replica]
                    operation = Operation(kind, offset, len(data), data)
                asked.append((replica, operation))
                fan_out.submit(replica, operation, to_sidecar=True)
            await fan_out.complete()
            for replica, operation in asked:
                if operation.error is not None:
                    failed[replica] = operation.error
        return failed


async def identities_of(replicas: Iterable[Replica]) -> dict[Replica, Identity]:
    """What the images look like now that nothing is written to them any more."""
    fan_out = FanOut(0)
    asked = {replica: Operation(Kind.SEAL) for replica in replicas}
    for replica, operation in asked.items():
        fan_out.submit(replica, operation)
    await fan_out.complete()
    return {
        replica: operation.value.identity
        for replica, operation in asked.items()
        if operation.error is None and isinstance(operation.value, FileStatus)
    }
