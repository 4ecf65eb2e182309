"""Repair on reading: rewrite a replica where a read has shown it to be wrong.

A replica gets the winning data where it could not be read (a write makes a disk remap a bad
sector), where it is on record as having missed a write, and with ``rewrite-corrupted`` also where
it was strictly outvoted. The decision is made on data read anew under the exclusive lock, so no
guest's write can come between reading and rewriting. A tie rewrites nothing. In adopted images not
yet found equal only a majority of all replicas, readable or not, rewrites anything (P4).
"""

import errno
from collections.abc import Sequence
from contextlib import suppress

import trio

from quorumfs.decisions.patterns import Quorum
from quorumfs.decisions.voting import majority, middle_block
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.reading import read_locked
from quorumfs.metadata.ledger.knowledge import ReadSegment, holders_of
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


async def read_and_rewrite(mirror: Mirror, offset: int, length: int, *, outvoted: bool) -> bytes:
    """Read a range from all its holders, rewrite the wrong replicas, and return the data.

    *outvoted*: also rewrite a replica that a strict majority outvotes.
    Raises `OSError` if the range cannot be read or may differ; never because a rewrite failed.
    """
    deadline = trio.current_time() + mirror.search_s
    async with mirror.locks.held(offset, offset + length, exclusive=True):
        if mirror.ledger.unsynced(offset, length):
            with suppress(OSError):  # first let every replica report losses
                await mirror.sync()
        parts = [
            await _rewrite_part(mirror, segment, deadline, outvoted=outvoted)
            for segment in mirror.ledger.read_segments(offset, length)
        ]
    mirror.announce_states()
    return b"".join(parts)


class Rewriting:
    """The `quorumfs.disk.disk.Repairer` with ``metadata=none``: only missed writes are known."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        return await self.rewrite(offset, length)

    async def settle_all(self) -> None:
        """There is nothing to settle."""

    async def verify(self, offset: int, length: int) -> None:
        """There is nothing to compare."""

    async def rewrite(self, offset: int, length: int) -> bytes:
        return await read_and_rewrite(self._mirror, offset, length, outvoted=True)


async def _rewrite_part(
    mirror: Mirror, segment: ReadSegment, deadline: float, *, outvoted: bool
) -> bytes:
    offset, length, holders, pinned, lacking, torn = segment
    if pinned or torn:  # a write has failed here meanwhile, and may have left replicas different
        raise OSError(errno.EIO, "the replicas may differ")
    asked = await mirror.ask(holders, Kind.READ, mirror.threshold, offset, length)
    still = holders_of(mirror.ledger, offset, length)  # a holder may have lost the range meanwhile
    outcomes = [outcome for outcome in asked if outcome.replica in still]
    verdict = Quorum(mirror.threshold).judge(
        offset,
        [(outcome.replica.index, outcome.data) for outcome in outcomes if not outcome.error],
        [outcome.error.errno or errno.EIO for outcome in outcomes if outcome.error],
    )
    unreadable = [outcome.replica for outcome in outcomes if outcome.error]
    unverified = mirror.ledger.unverified(offset, length)
    # With one of two replicas unreadable there is no majority, however small the part.
    divisible = verdict.data is None or (unverified and len(outcomes) > 2)
    middle = middle_block(offset, length)
    if unreadable and divisible and middle and trio.current_time() < deadline:
        left = segment._replace(length=middle - offset)
        right = segment._replace(offset=middle, length=offset + length - middle)
        return b"".join(
            [
                await _rewrite_part(mirror, half, deadline, outvoted=outvoted)
                for half in (left, right)
            ]
        )
    if verdict.data is None:
        return (await read_locked(mirror, offset, length)).data

    answers = [outcome for outcome in outcomes if not outcome.error]
    voters = [outcome.replica for outcome in answers]

    def decided(start: int, end: int, data: bytes) -> bool:
        """Whether no other content can be right from *start* to *end*."""
        ballots = [answer.data[start:end] for answer in answers]
        return not unverified or majority(ballots, len(asked), mirror.threshold) == data

    if outvoted:
        for loss in verdict.outvoted:
            data = verdict.data[loss.start : loss.end]
            if loss.strict and decided(loss.start, loss.end, data):
                loser = mirror.replicas[loss.voter]
                await _rewrite(mirror, loser, offset + loss.start, data, voters)
    if all(loss.strict for loss in verdict.outvoted) and decided(0, length, verdict.data):
        for replica in unreadable:
            await _rewrite(mirror, replica, offset, verdict.data, voters, read_back=True)
        for replica in lacking:
            await _rewrite(mirror, replica, offset, verdict.data, voters)
    return verdict.data


async def _rewrite(
    mirror: Mirror,
    replica: Replica,
    offset: int,
    data: bytes,
    voters: Sequence[Replica],
    *,
    read_back: bool = False,
) -> None:
    if not replica.state.answers:
        return
    metadata, length = mirror.metadata, len(data)
    if not mirror.ledger.prepared(offset, length, repair=True):
        try:
            await metadata.prepare(offset, length, repair=True)
        except OSError:
            return  # the intent cannot be recorded now; the next read tries again
    if replica not in mirror.ledger.receivers:
        return  # ejected meanwhile: its sidecar may not say that its image is in use
    if not set(voters).issubset(holders_of(mirror.ledger, offset, length)):
        return  # a voter lost the range meanwhile
    with mirror.ledger.giving([replica], offset, length):
        (outcome,) = await mirror.ask([replica], Kind.WRITE, 0, offset, length, data)
    if outcome.error is None and read_back:
        (outcome,) = await mirror.ask([replica], Kind.READ, 0, offset, length)
        if outcome.error is None and outcome.data != data:
            outcome.operation.error = OSError(errno.EIO, "it does not hold what was written to it")
    if outcome.error:
        mirror.events.bad(outcome.operation.kind, replica.path, offset, length, outcome.error)
    else:
        replica.counters.copied_bytes += length
        mirror.events.repaired(replica.path, offset, length)
    await metadata.repaired(replica, offset, length, well=outcome.error is None)
