"""Read patterns: whom to ask for a read, and what their answers mean. Pure decisions.

The names and meanings are those of QEMU's ``read-pattern``. A pattern is asked how many of the
replicas that have not been asked yet to ask now, until it says none; then it judges. A new
pattern is a new class here.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quorumfs.decisions.voting import (
    VOTERS_MIN,
    Outvoted,
    first_difference,
    reconcile,
    undecided,
    vote_data,
    vote_errno,
)


@dataclass(frozen=True, slots=True)
class ReadVerdict:
    """The answer to one read."""

    data: bytes | None
    errno: int = 0
    """Why there is no data; 0 if there is."""
    outvoted: tuple[Outvoted, ...] = ()
    """Who answered with something else, and where (from the start of the request)."""
    difference: int | None = None
    """`Blkverify`: the first byte that differs (from the start of the request)."""


class ReadPattern(Protocol):
    """One way to read from N replicas."""

    def ask_now(self, waiting: int, succeeded: int) -> int:
        """How many of the *waiting* replicas to ask next, all at once; 0 to judge."""

    def needed(self, waiting: int) -> int:
        """How many successes in a round make it enough, if *waiting* are left to ask after it."""

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        """Decide on what was answered for *offset*: pairs of replica and bytes, and errnos.

        Both are in the order in which the replicas were asked.
        """


@dataclass(frozen=True, slots=True)
class Fifo:
    """The first replica, in the order given, that can be read; the last one's errno if none."""

    def ask_now(self, waiting: int, succeeded: int) -> int:
        return 0 if succeeded else min(waiting, 1)

    def needed(self, waiting: int) -> int:
        return 0 if waiting else 1

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        if answers:
            return ReadVerdict(answers[0][1])
        return ReadVerdict(None, errnos[-1] if errnos else errno.EIO)


@dataclass(frozen=True, slots=True)
class Quorum:
    """All replicas at once; the version that most of them hold, if *threshold* of them do."""

    threshold: int

    def ask_now(self, waiting: int, succeeded: int) -> int:
        return waiting

    def needed(self, waiting: int) -> int:
        return self.threshold

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        if len(answers) < self.threshold:
            return ReadVerdict(None, vote_errno(errnos) if errnos else errno.EIO)
        vote = vote_data(answers, offset, self.threshold)
        return ReadVerdict(vote.data, 0 if vote.data is not None else errno.EIO, vote.outvoted)


@dataclass(frozen=True, slots=True)
class Reconcile:
    """Replicas that may differ, the pinned source first: what they are to be made equal to."""

    threshold: int

    def ask_now(self, waiting: int, succeeded: int) -> int:
        if succeeded:
            return 0
        return waiting if waiting >= VOTERS_MIN else min(waiting, 1)

    def needed(self, waiting: int) -> int:
        return 0 if waiting else 1

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        if not answers or undecided(answers, len(errnos), offset):
            return ReadVerdict(None, errnos[-1] if errnos else errno.EIO)
        vote = reconcile(answers, offset, self.threshold)
        return ReadVerdict(vote.data, outvoted=vote.outvoted)


@dataclass(frozen=True, slots=True)
class Blkverify(Quorum):
    """Two replicas that must agree: any difference is an error, and its place is named."""

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        if len(answers) == 2:
            difference = first_difference(answers[0][1], answers[1][1])
            if difference is not None:
                return ReadVerdict(None, errno.EIO, difference=difference)
        return Quorum.judge(self, offset, answers, errnos)
