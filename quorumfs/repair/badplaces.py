"""Places that cannot be read on any replica that holds them."""

import errno
from collections.abc import Sequence

from quorumfs.decisions.voting import BLOCK
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

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
