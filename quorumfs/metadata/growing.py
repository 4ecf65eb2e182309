"""How the disk of a set grows, and what the sidecars say at each step.

1. The images of all members are made longer, and synced (`quorumfs.live.grow`). An image may be
   longer than the disk.
2. The sidecars of all members get valid pages for the larger map: bytes behind the map are ignored.
   Added chunks are clean, because all members hold zeros there. A replica that is not current lacks
   them: nobody knows what is behind the end of its image, or how long it is.
3. A record with the larger size is committed. By the rules of any commit it is valid when all
   members hold it, and until then the next mount goes by the old one, or takes over the new one.

So whenever the daemon dies, the next mount finds a set of the one size or of the other, whose
images and maps are long enough for either. A replica that was away is made longer as the first step
of its resync.
"""

from collections.abc import Collection

from quorumfs.metadata.recorder import Recorder
from quorumfs.replica.replica import Replica


async def grow(recorder: Recorder, size: int, lengthened: Collection[Replica]) -> bool:
    """Have on record, and in the ledger, that the disk has *size* bytes, more than before.

    *lengthened*: the replicas whose images durably have as many. False, and nothing done, if a
    member is not among them, or a replica is about to become one. After an `OSError` the disk has
    the size of the record, and if that is the old one, some replicas may hold a record with the
    new one, unless `Membership.recorded`.
    """
    ledger = recorder.ledger
    async with recorder.lock:
        if ledger.joining or not set(ledger.members).issubset(lengthened):
            return False
        if ledger.resyncing is not None:  # its image is made longer when it comes back
            recorder.drop_target(ledger.resyncing, "the disk grew meanwhile")
        lacking = ledger.membership.out_bits
        if ledger.map.size % ledger.map.chunk_size:  # the last chunk grows, too
            ledger.recorded.add(lacking, range(len(ledger.map))[-1:])
        await recorder.write_map_locked(ledger.map.resized(size, lacking))
        for replica in ledger.members:
            recorder.writer.resized(replica, size)
        ledger.records.size = size
        try:
            await recorder.commit_locked(clean=False)
        finally:
            ledger.records.size = ledger.record.size
        ledger.recorded.grow(size, lacking)
        ledger.marks.intents.grow()
        for replica in ledger.replicas:
            replica.resized(size)
        ledger.notify()
    return True
