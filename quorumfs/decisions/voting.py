"""How replicas' answers become one answer. Pure decisions: answers in, verdict out.

The model is QEMU's ``block/quorum.c``: answers are grouped into versions and the largest group
wins if it reaches the threshold. Two decisions differ on purpose. The first-listed version wins
a tie (in QEMU, the last), and a tie is never grounds for a repair. And when not all answers
are equal the vote is held again per block, so that bad blocks at different places on different
replicas still leave every block with a majority.
"""

import errno
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import xxhash

BLOCK = 4096
"""Bytes compared at a time when whole answers disagree: the page, and the sector of most disks."""

VOTERS_MIN = 3
"""Answers that `reconcile` needs for a vote: of two that differ, neither is a majority."""

Version = TypeVar("Version", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Plurality(Generic[Version]):
    """The version that most voters share."""

    version: Version
    count: int
    strict: bool
    """No other version has as many votes."""


def plurality(ballots: Iterable[Version]) -> Plurality[Version]:
    """Count *ballots* (at least one); the version that was cast first wins a tie."""
    counts: dict[Version, int] = {}
    for ballot in ballots:
        counts[ballot] = counts.get(ballot, 0) + 1
    version, count = max(counts.items(), key=lambda item: item[1])  # max keeps the first of equals
    return Plurality(version, count, strict=list(counts.values()).count(count) == 1)


def unassailable(count: int, voters: int, threshold: int) -> bool:
    """Whether a version with *count* of the ballots wins, whatever the rest of *voters* cast."""
    return count >= threshold and 2 * count > voters


@dataclass(frozen=True, slots=True)
class Outvoted:
    """Bytes ``[start, end)`` (from the start of the request) in which *voter* lost."""

    voter: int
    start: int
    end: int
    strict: bool
    """The winners are a strict plurality: their data may replace the voter's."""


@dataclass(frozen=True, slots=True)
class DataVerdict:
    """The decision of a vote over equally long answers."""

    data: bytes | None
    """The winning bytes; None if some block had no version at the threshold."""
    outvoted: tuple[Outvoted, ...] = ()


def vote_data(answers: Sequence[tuple[int, bytes]], offset: int, threshold: int) -> DataVerdict:
    """Vote on *answers*, pairs of a voter's number and its bytes, in the order of the list.

    *offset* is where on the disk the answers begin, in bytes: blocks are those of the disk, not
    of the request. Fewer answers than *threshold* decide nothing.
    """
    if len(answers) < threshold:
        return DataVerdict(None)
    first = answers[0][1]
    if all(data == first for _, data in answers[1:]):
        return DataVerdict(first)

    winning: list[bytes] = []
    losses: list[Outvoted] = []
    decided = True
    for start, end in blocks(offset, len(first)):
        ballots = [xxhash.xxh3_128_digest(memoryview(data)[start:end]) for _, data in answers]
        winner = plurality(ballots)
        decided = decided and winner.count >= threshold
        winning.append(answers[ballots.index(winner.version)][1][start:end])
        losses += [
            Outvoted(voter, start, end, winner.strict)
            for (voter, _), ballot in zip(answers, ballots, strict=True)
            if ballot != winner.version
        ]
    return DataVerdict(b"".join(winning) if decided else None, tuple(_joined(losses)))


def reconcile(answers: Sequence[tuple[int, bytes]], offset: int) -> DataVerdict:
    """The data to make replicas equal to; as `vote_data`, but always decided.

    Each block is the version of a strict majority of `VOTERS_MIN` or more answers, whatever the
    threshold (P9); else the block of the first answer, which is the same after every mount if the
    order of the answers is (P7).
    """
    first = answers[0][1]
    if len(answers) < VOTERS_MIN or all(data == first for _, data in answers[1:]):
        return DataVerdict(first)
    decided: list[bytes] = []
    losses: list[Outvoted] = []
    for start, end in blocks(offset, len(first)):
        ballots = [data[start:end] for _, data in answers]
        winner = majority(ballots, len(ballots), 1)
        decided.append(ballots[0] if winner is None else winner)
        losses += [
            Outvoted(voter, start, end, strict=True)
            for (voter, _), ballot in zip(answers, ballots, strict=True)
            if winner is not None and ballot != winner
        ]
    return DataVerdict(b"".join(decided), tuple(_joined(losses)))


def undecided(answers: Sequence[tuple[int, bytes]], failed: int, offset: int) -> bool:
    """Whether the range is to be divided before `reconcile`: *failed* replicas could not be read.

    One bad sector spoils the whole answer of a replica, and so perhaps a majority elsewhere in it.
    """
    contents = {data for _, data in answers}
    voters = len(answers) + failed
    divisible = middle_block(offset, len(answers[0][1])) is not None
    return failed > 0 and voters >= VOTERS_MIN and len(contents) > 1 and divisible


def majority(ballots: Sequence[bytes], voters: int, threshold: int) -> bytes | None:
    """The version that more than half of all *voters*, and at least *threshold*, cast as ballot.

    None if there is no such version. A voter without a ballot may hold anything, and counts.
    """
    if not ballots:
        return None
    winner = plurality(ballots)
    return winner.version if winner.count >= threshold and 2 * winner.count > voters else None


def vote_errno(errnos: Iterable[int]) -> int:
    """The errno that most failed replicas gave; a tie goes to the first-listed replica."""
    return plurality(errnos).version


def voted_error(errors: Iterable[OSError | None]) -> OSError:
    """The error for the guest when replicas failed with *errors*; EIO if none did."""
    voted = vote_errno([(error and error.errno) or errno.EIO for error in errors] or [errno.EIO])
    return OSError(voted, os.strerror(voted))


def first_difference(one: bytes, other: bytes) -> int | None:
    """The first byte at which two equally long answers differ, or None if they are equal."""
    for start, end in blocks(0, len(one)):
        if one[start:end] != other[start:end]:
            return next(i for i in range(start, end) if one[i] != other[i])
    return None


def blocks(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The disk's blocks that ``[offset, offset + length)`` touches, clipped, from its start."""
    start = 0
    while start < length:
        end = min(length, start + BLOCK - (offset + start) % BLOCK)
        yield start, end
        start = end


def middle_block(offset: int, length: int) -> int | None:
    """A block bound near the middle of a request, to divide it at; None within one block."""
    middle = max((offset + length // 2) // BLOCK, offset // BLOCK + 1) * BLOCK
    return middle if middle < offset + length else None


def _joined(losses: Iterable[Outvoted]) -> list[Outvoted]:
    """Adjacent losses of the same voter, of the same strictness, as one."""
    joined: list[Outvoted] = []
    for loss in sorted(losses, key=lambda loss: (loss.voter, loss.start)):
        last = joined[-1] if joined else None
        if last and (last.voter, last.end, last.strict) == (loss.voter, loss.start, loss.strict):
            joined[-1] = Outvoted(last.voter, last.start, loss.end, last.strict)
        else:
            joined.append(loss)
    return joined
