"""Reading by the pattern: one range, from its holders, until an answer is found or time is up."""

import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

import trio

from quorumfs.decisions.patterns import (
    Comparing,
    Fifo,
    Quorum,
    ReadPattern,
    ReadVerdict,
    Reconcile,
    ends_early,
)
from quorumfs.decisions.voting import middle_block
from quorumfs.disk.earlyvote import EarlyVote
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.readorder import Order
from quorumfs.metadata.ledger.knowledge import Outcome, ReadSegment, holders_of
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


class Reading(NamedTuple):
    """Bytes read under a lock, and whether the read showed something to repair."""

    data: bytes
    repairable: bool


async def read_locked(
    mirror: Mirror, offset: int, length: int, pattern: ReadPattern | None = None
) -> Reading:
    """Read a range by *pattern*, by default the read pattern; the caller holds the lock.

    Raises `OSError` with the errno for the guest.
    """
    deadline = trio.current_time() + mirror.search_s
    pattern = pattern or mirror.pattern  # which may change meanwhile
    parts = [
        await _read_part(mirror, segment, pattern, deadline)
        for segment in mirror.ledger.read_segments(offset, length)
    ]
    if len(parts) == 1:
        return parts[0]
    return Reading(b"".join(part.data for part in parts), any(p.repairable for p in parts))


def sole_source(mirror: Mirror, offset: int, length: int) -> Replica | None:
    """The replica whose answer alone decides a read of a range; None also if it is pinned."""
    segment, *others = mirror.ledger.read_segments(offset, length)
    if others or segment.pinned or segment.torn or not segment.holders:
        return None
    alone = isinstance(mirror.pattern, Fifo) or len(segment.holders) == 1
    return _order(mirror, segment, mirror.pattern)[0].first[0] if alone else None


def _order(mirror: Mirror, segment: ReadSegment, pattern: ReadPattern) -> tuple[Order, bool]:
    """How to ask the holders of *segment*, and whether none is known to differ from the others.

    Where some are, the order is the one given: a read must not turn back (P7).
    """
    offset, end = segment.offset, segment.offset + segment.length
    differ = (
        segment.torn
        or segment.pinned
        or mirror.ledger.unverified(offset, segment.length)
        or mirror.read_order.undecided.overlaps(offset, end)
    )
    if differ:
        return Order(segment.holders, []), False
    return mirror.read_order.of(segment.holders, pattern), True


def _judged(pattern: ReadPattern, offset: int, outcomes: Sequence[Outcome]) -> ReadVerdict:
    return pattern.judge(
        offset,
        [(outcome.replica.index, outcome.data) for outcome in outcomes if not outcome.error],
        [outcome.error.errno or errno.EIO for outcome in outcomes if outcome.error],
    )


async def _ask(
    mirror: Mirror,
    pattern: ReadPattern,
    waiting: Sequence[Replica],
    outcomes: list[Outcome],
    offset: int,
    length: int,
    *,
    others: int = 0,
    agreed: bool = False,
) -> tuple[list[Outcome], bool]:
    """Ask the *waiting* replicas, wave by wave, after those with *outcomes*.

    *others*: how many others there are to ask if these give no answer. *agreed*: none is known to
    differ, so that a read need not wait for all answers. Returns all outcomes, and whether any of
    these replicas lost the range meanwhile.
    """
    lost, early = False, agreed and ends_early(pattern)
    while True:
        # A replica that lost the range while others were asked, or was ejected, is no holder now.
        still = holders_of(mirror.ledger, offset, length)
        lost = lost or not set(waiting).issubset(still)
        waiting = [replica for replica in waiting if replica in still]
        kept = [o for o in outcomes if o.error is not None or o.replica in still]
        lost = lost or len(kept) < len(outcomes)
        outcomes = kept
        succeeded = sum(outcome.error is None for outcome in outcomes)
        if not (count := pattern.ask_now(len(waiting), succeeded)):
            return outcomes, lost
        wave, waiting = waiting[:count], waiting[count:]
        needed = 0 if others else pattern.needed(len(waiting)) - succeeded
        if isinstance(pattern, Fifo) and waiting and agreed and mirror.read_order.hedges:
            last = 0 if others else pattern.needed(len(waiting) - 1)
            asked = await mirror.read_order.race(
                wave[0], waiting[0], (needed, last), offset, length
            )
            await mirror.note_truncated(asked)
            tried = {outcome.replica for outcome in asked}
            waiting = [replica for replica in waiting if replica not in tried]
        elif early and ends_early(pattern):
            early = False  # if this is not decided, the rest is asked, too, and waited for
            late, threshold, voters = mirror.late_answers, pattern.threshold, len(wave) + others
            vote = EarlyVote(needed, threshold, voters, late)
            first = late.asked(wave, voters, threshold)
            for replica in first:
                vote.ask(replica, offset, length)
            decided = await vote.decided()
            asked = vote.outcomes
            waiting = [] if decided else [one for one in wave if one not in first]
            await mirror.note_truncated(asked)
        else:
            asked = await mirror.ask(wave, Kind.READ, needed, offset, length)
        outcomes += asked


async def _read_part(
    mirror: Mirror, segment: ReadSegment, pattern: ReadPattern, deadline: float
) -> Reading:
    """Read a range from the holders of all of it; divide the range until *deadline*."""
    offset, length, holders, pinned, lacking, torn = segment
    if torn:
        pattern = Quorum(max(1, len(holders)))
    elif pinned:
        pattern = Reconcile(mirror.threshold)
    order, agreed = _order(mirror, segment, pattern)
    others = len(order.reserve)
    outcomes, lost = await _ask(
        mirror, pattern, order.first, [], offset, length, others=others, agreed=agreed
    )
    verdict = _judged(pattern, offset, outcomes)
    if others and (verdict.data is None or verdict.outvoted):
        outcomes, more = await _ask(mirror, pattern, order.reserve, outcomes, offset, length)
        verdict = _judged(pattern, offset, outcomes)
        lost = lost or more

    failed = [outcome for outcome in outcomes if outcome.error is not None]
    mirror.report(failed)
    mirror.report_outvoted(verdict.outvoted, offset)
    if verdict.difference is not None:
        mirror.events.difference(offset + verdict.difference)
    if verdict.data is not None:
        wrong = {outcome.replica for outcome in failed}
        wrong.update(mirror.replicas[loss.voter] for loss in verdict.outvoted if loss.strict)
        wrong.update(lacking)
        if pinned:
            # Settling makes the replicas equal later; this read only has to give the right data.
            answers = [outcome for outcome in outcomes if not outcome.error]
            held = [one.replica for one in answers if one.data == verdict.data]
            differed = [one.replica for one in answers if one.data != verdict.data]
            mirror.ledger.note_shown(held, differed, offset, length)
            return Reading(verdict.data, repairable=False)
        repairable = any(replica.state.answers for replica in wrong)
        return Reading(verdict.data, repairable)

    if lost and not failed:  # other holders are to be asked now
        return await read_locked(mirror, offset, length, pattern)
    middle = middle_block(offset, length)
    if failed and middle and trio.current_time() < deadline:
        # One unreadable sector fails a whole request. Where replicas are bad at different
        # places, each half may still have enough good ones.
        first = segment._replace(length=middle - offset)
        second = segment._replace(offset=middle, length=offset + length - middle)
        left = await _read_part(mirror, first, pattern, deadline)
        right = await _read_part(mirror, second, pattern, deadline)
        return Reading(left.data + right.data, left.repairable or right.repairable)
    if type(pattern) is not Comparing:  # for which no guest waits
        mirror.events.failure(offset, length)
    raise OSError(verdict.errno, os.strerror(verdict.errno))
