"""Where the replicas of a disk, taken together, have data and where holes."""

from typing import cast

from quorumfs.disk.mirror import Mirror
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

ROUNDS_MAX = 64
"""How often to look for a hole that all replicas share before giving up."""


async def next_data(mirror: Mirror, offset: int) -> int:
    """The first byte at or after *offset* that some replica has data for; else the size.

    A replica that fails, or knows no holes, counts as data everywhere, and so do the writes that a
    replica missed.
    """
    places = [
        min(place, mirror.ledger.missed(replica).next_inside(offset, default=place))
        for replica, place in await _seek(mirror, Kind.SEEK_DATA, offset, if_unknown=offset)
    ]
    return min(places, default=offset)


async def next_hole(mirror: Mirror, offset: int) -> int:
    """The first byte at or after *offset* that is a hole on all replicas; else the size.

    Where holes of different replicas alternate for long, the search ends early, at a byte that is
    data. That bounds the time, and a caller that goes on from there meets that data.
    """
    for _ in range(ROUNDS_MAX):
        places = [
            mirror.ledger.missed(replica).next_outside(place)
            for replica, place in await _seek(mirror, Kind.SEEK_HOLE, offset, mirror.size)
        ]
        offset = max(places, default=mirror.size)
        if offset >= mirror.size or await next_data(mirror, offset) > offset:
            break
    return offset


async def _seek(
    mirror: Mirror, kind: Kind, offset: int, if_unknown: int
) -> list[tuple[Replica, int]]:
    """The answer of each replica, except of missing replicas."""
    mirror.metadata.require_ours()
    outcomes = await mirror.ask(mirror.ledger.readers, kind, mirror.threshold, offset)
    return [
        (
            outcome.replica,
            if_unknown if outcome.error else cast("int", outcome.operation.value),
        )
        for outcome in outcomes
        if outcome.replica.state.answers
    ]
