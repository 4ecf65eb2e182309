"""Read patterns: how many replicas to ask for a read, and what answers mean. Pure decisions.

Names and meanings follow QEMU's ``read-pattern``. A pattern says, round by round, how many of the
replicas left to ask now; after 0 the pattern judges the answers. A new pattern is a new class here.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

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
    """The replicas that answered otherwise, and where (from the start of the request)."""
    difference: int | None = None
    """`Blkverify`: the first byte that differs (from the start of the request)."""


class ReadPattern(Protocol):
    """One way to read from N replicas."""

    def ask_now(self, waiting: int, succeeded: int) -> int:
        """How many of the *waiting* replicas to ask next, all at once; 0 to judge."""

    def needed(self, waiting: int) -> int:
        """How many successes make a round enough, if *waiting* replicas are left to ask after."""

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        """Decide on the answers for *offset*: pairs of replica and bytes, and errnos.

        Both are in the order in which the replicas were asked.
        """


@dataclass(frozen=True, slots=True)
class Fifo:
    """The first replica, in the order given, that can be read; the last errno if none can."""

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
class Fastest(Fifo):
    """As `Fifo`, in the order of how soon replicas have answered reads lately."""


@dataclass(frozen=True, slots=True)
class Quorum:
    """All replicas at once; the version that most replicas hold, if at least *threshold* do."""

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
    """Replicas that may differ, the pinned source first; the data to make them equal to."""

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
        vote = reconcile(answers, offset)
        return ReadVerdict(vote.data, outvoted=vote.outvoted)


@dataclass(frozen=True, slots=True)
class Comparing(Quorum):
    """As `Quorum`, and waits for the answers of all, also when they cannot change the decision."""


def ends_early(pattern: ReadPattern) -> TypeGuard[Quorum]:
    """Whether a vote by *pattern* is over when it is decided."""
    return isinstance(pattern, Quorum) and not isinstance(pattern, Comparing)


@dataclass(frozen=True, slots=True)
class Blkverify(Comparing):
    """Two replicas that must agree: any difference is an error, with its place."""

    def judge(
        self, offset: int, answers: Sequence[tuple[int, bytes]], errnos: Sequence[int]
    ) -> ReadVerdict:
        if len(answers) == 2:
            difference = first_difference(answers[0][1], answers[1][1])
            if difference is not None:
                return ReadVerdict(None, errno.EIO, difference=difference)
        return Quorum.judge(self, offset, answers, errnos)
