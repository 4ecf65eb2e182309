"""Requests of repairs to single replicas: where data lies, and writes."""

import errno
from collections.abc import Sequence
from typing import cast

from quorumfs.decisions.voting import BLOCK
from quorumfs.disk import holes
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.ledger.known import holders_of
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


async def seek(mirror: Mirror, replica: Replica, kind: Kind, offset: int) -> int:
    """Where the next data or hole of *replica* is; without an answer everything is data."""
    (outcome,) = await mirror.ask([replica], kind, 0, offset)
    if outcome.error is None:
        return cast("int", outcome.operation.value)
    return offset if kind is Kind.SEEK_DATA else mirror.size


async def next_data(mirror: Mirror, sidecars: Sidecars, offset: int) -> int:
    """Where some member next has data; *offset* itself if a member does not answer."""
    found = await holes.next_data(mirror, offset)
    silent = any(not replica.state.answers for replica in sidecars.ledger.members)
    return offset if silent else found


_MEDIUM = frozenset({errno.EIO, errno.EBADMSG, errno.ENODATA, errno.EILSEQ})
"""Errors of a read at a bad place of a medium; any other error is one of the whole replica."""

PROBES = 8
"""Other places to read before a replica counts as one that cannot be read at all."""


async def cannot_be_read(
    mirror: Mirror, sidecars: Sidecars, replicas: Sequence[Replica], offset: int, length: int
) -> bool:
    """Note a block as unreadable if all *replicas*, its holders, fail there; whether it is noted.

    Not if a replica can be read nowhere else (that may pass), nor if a new read of the block does
    not fail as a bad medium does.
    """
    for replica in replicas:
        if not await is_bad_place(mirror, replica, offset, length):
            return False
    # Meanwhile a holder may have been ejected, or another replica may have become a holder.
    chunks = sidecars.ledger.map.chunks(offset, length)
    holders = {r for _, holding in sidecars.ledger.chunks.sources.of(chunks) for r in holding}
    if not holders or not holders.issubset(replicas):
        return False
    await sidecars.note_unreadable(offset, length)
    mirror.events.unreadable(offset, length)
    return True


async def is_bad_place(mirror: Mirror, replica: Replica, offset: int, length: int) -> bool:
    """Whether a new read of a range fails as a bad medium does, while *replica* can be read."""
    if not await _reads_elsewhere(mirror, replica, offset):
        return False
    (outcome,) = await mirror.ask([replica], Kind.READ, 0, offset, length)
    return outcome.error is not None and outcome.error.errno in _MEDIUM


async def _reads_elsewhere(mirror: Mirror, replica: Replica, offset: int) -> bool:
    for number in range(PROBES):
        place = mirror.size * number // PROBES // BLOCK * BLOCK
        if place != offset:
            size = min(BLOCK, mirror.size - place)
            (probe,) = await mirror.ask([replica], Kind.READ, 0, place, size)
            if probe.error is None:
                return True
    return False


async def repair_write(
    mirror: Mirror,
    sidecars: Sidecars,
    replicas: Sequence[Replica],
    offset: int,
    data: bytes,
    sources: Sequence[Replica],
) -> set[Replica]:
    """Write *data* to current *replicas*; returns the replicas that failed and stay current.

    Nothing is written, and all *replicas* are returned, if any of *sources*, whose answers decided
    on *data*, is not believed any more. The target of a resync gets *data* as well, unless it lacks
    all of these chunks. The caller holds the lock.
    """
    if not sidecars.ledger.prepared(offset, len(data), repair=True):
        await sidecars.prepare(offset, len(data), repair=True)
    if not set(sources).issubset(holders_of(sidecars.ledger, offset, len(data))):
        return set(replicas)
    # The sidecar of a replica that was ejected just now may not say that its image is in use.
    current = [replica for replica in replicas if replica.standing.is_member]
    targets = sidecars.ledger.target_for_repair(offset, len(data))
    given = [*current, *targets]
    with sidecars.ledger.giving(given, offset, len(data)):
        gathered = await mirror.ask(given, Kind.WRITE, 0, offset, len(data), data)
    outcomes, to_targets = gathered[: len(current)], gathered[len(current) :]
    failed = sum(outcome.error is not None for outcome in outcomes)
    # As with a guest's write (R2): where too few succeed no replica is blamed; all may be full.
    enough = len(sidecars.ledger.members) - failed >= mirror.threshold
    for replica, operation in outcomes:
        well = operation.error is None
        if well:
            replica.counters.copied_bytes += len(data)
        if well or enough:
            await sidecars.repair_written(replica, offset, len(data), well=well)
    for replica, operation in to_targets:
        if operation.error is not None:
            sidecars.ledger.targets.lacks(sidecars.ledger.map.chunks(offset, len(data)))
            sidecars.recorder.drop_target(replica, "a write to it failed")
    refused = {outcome.replica for outcome in outcomes if outcome.error is not None}
    return {replica for replica in refused if replica.standing.is_member}
