"""``rewrite-corrupted``: give replicas back what a read has shown them to lack.

A replica gets the winning data where it was strictly outvoted, where it could not be read (a
write makes a disk remap a bad sector), and where it is on record as having missed a write. The
decision is made on data read anew under the exclusive lock, so no guest's write can come between
reading and rewriting. A tie rewrites nothing.
"""

import errno

import trio

from quorumfs.disk import Disk
from quorumfs.patterns import Quorum
from quorumfs.replica import Replica, State
from quorumfs.storage import Kind
from quorumfs.voting import middle_block


async def read_and_rewrite(disk: Disk, offset: int, length: int) -> bytes:
    """Read a range from all replicas, rewrite what is wrong on some, and return the data.

    Raises `OSError` when the range cannot be read; never because a rewrite failed.
    """
    deadline = trio.current_time() + disk.search_s
    async with disk.locks.held(offset, offset + length, exclusive=True):
        parts = [
            await _rewrite_part(disk, *choice, deadline) for choice in disk.choices(offset, length)
        ]
    disk.announce_states()
    return b"".join(parts)


async def _rewrite_part(
    disk: Disk, offset: int, length: int, holders: list[Replica], deadline: float
) -> bytes:
    outcomes = await disk.ask(holders, Kind.READ, disk.threshold, offset, length)
    verdict = Quorum(disk.threshold).judge(
        offset,
        [(outcome.replica.index, outcome.data) for outcome in outcomes if not outcome.error],
        [outcome.error.errno or errno.EIO for outcome in outcomes if outcome.error],
    )
    if verdict.data is None:
        middle = middle_block(offset, length)
        unreadable = any(outcome.error for outcome in outcomes)
        if unreadable and middle and trio.current_time() < deadline:
            rest = offset + length - middle
            left = await _rewrite_part(disk, offset, middle - offset, holders, deadline)
            return left + await _rewrite_part(disk, middle, rest, holders, deadline)
        return (await disk.read_locked(offset, length)).data

    wrong = [
        (disk.replicas[loss.voter], loss.start, loss.end)
        for loss in verdict.outvoted
        if loss.strict
    ]
    if all(loss.strict for loss in verdict.outvoted):
        read = [outcome.replica for outcome in outcomes if not outcome.error]
        wrong += [(replica, 0, length) for replica in disk.replicas if replica not in read]
    for replica, start, end in wrong:
        if replica.state is not State.MISSING:
            await _rewrite(disk, replica, offset + start, verdict.data[start:end])
    return verdict.data


async def _rewrite(disk: Disk, replica: Replica, offset: int, data: bytes) -> None:
    (outcome,) = await disk.ask([replica], Kind.WRITE, 0, offset, len(data), data)
    if outcome.error:
        disk.events.bad(Kind.WRITE, replica.path, offset, len(data), outcome.error)
    else:
        replica.hold(offset, offset + len(data))
        disk.events.repaired(replica.path, offset, len(data))
