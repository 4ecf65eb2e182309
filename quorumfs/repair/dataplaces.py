"""Where replicas have data, for repairs, which pass over holes."""

from typing import cast

from quorumfs.disk import holes
from quorumfs.disk.mirror import Mirror
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
