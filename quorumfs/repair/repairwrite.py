"""The write of a repair: to some replicas alone, while what decided on its data is believed."""

from collections.abc import Sequence

from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.ledger.knowledge import holders_of
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


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
