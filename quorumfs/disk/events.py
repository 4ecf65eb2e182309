"""Events: what happened to the replicas, for the log.

``QUORUM_REPORT_BAD`` and ``QUORUM_FAILURE`` are QEMU's, with QEMU's meaning of their members
(sectors of 512 bytes); the rest are new. A disk in trouble makes thousands of events a second, so
each kind is limited per replica to one a second. The last event held back is still told, with the
number of events left out before it, so that no corruption is silent.
"""

import logging
import math
import os
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import trio

from quorumfs.decisions.claim import Claim
from quorumfs.decisions.scrub import Counts
from quorumfs.decisions.slowness import Slow
from quorumfs.replica.storage import Kind

log = logging.getLogger(__name__)

SECTOR = 512
PERIOD_S = 1.0
"""The time (seconds) in which at most one event of a kind and replica is told: QEMU's limit."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event; JSON shows *members* beside name and time."""

    name: str
    members: dict[str, Any]
    text: str
    """The event in words."""
    level: int = logging.WARNING
    dropped: int = 0
    """Events of this kind and replica left out since the last one told."""


@dataclass(slots=True)
class _Kept:
    """A limiter's memory of one kind of event."""

    told_at: float
    waiting: Event | None = None
    dropped: int = 0


@dataclass(slots=True)
class RateLimiter:
    """Lets one event a period and key pass: the first at once, then the last when time is up.

    Pure: the caller brings the clock, in seconds.
    """

    period_s: float = PERIOD_S
    _kept: dict[Hashable, _Kept] = field(default_factory=dict)

    def offer(self, key: Hashable, event: Event, now: float) -> Event | None:
        """Return *event* if the event may be told now; else keep the event for `due`."""
        kept = self._kept.get(key)
        if kept is None:
            self._kept[key] = _Kept(now)
            return event
        if kept.waiting is not None:
            kept.dropped += 1
        kept.waiting = event
        return self._release(kept, now)

    def due(self, now: float) -> list[Event]:
        """The held-back events that may be told now; all if *now* is infinite."""
        released = (self._release(kept, now) for kept in self._kept.values())
        return [event for event in released if event is not None]

    def _release(self, kept: _Kept, now: float) -> Event | None:
        if kept.waiting is None or now - kept.told_at < self.period_s:
            return None
        waiting = kept.waiting
        event = Event(waiting.name, waiting.members, waiting.text, waiting.level, kept.dropped)
        kept.told_at, kept.waiting, kept.dropped = now, None, 0
        return event


class EventLog:
    """Makes events and passes them, limited, to *tell*; *reference* names the disk."""

    def __init__(self, reference: str, tell: Callable[[Event], None]) -> None:
        self._reference = reference
        self._tell = tell
        self._limiter = RateLimiter()

    def tick(self, now: float) -> None:
        """Tell the held-back events that are due at *now* (trio's clock, seconds)."""
        for event in self._limiter.due(now):
            self._tell(event)

    def close(self) -> None:
        """Tell every event that is still held back."""
        self.tick(math.inf)

    def bad(
        self, kind: Kind, replica: str, offset: int, length: int, error: OSError | None = None
    ) -> None:
        """*replica* failed an operation on these bytes, or held other data than the winner's."""
        sectors = _sectors(offset, length)
        # QEMU knows three types; zeros and discards count as writes.
        type_ = kind.value if kind in (Kind.READ, Kind.SYNC) else Kind.WRITE.value
        members: dict[str, Any] = {"type": type_, "node-name": replica, **sectors}
        reason = "it holds other data than the winner of the vote"
        if error is not None:
            members["error"] = os.strerror(error.errno or 0)
            reason = error.strerror or str(error)
        where = f"{kind.value} of {replica}"
        if length:
            where += f" at {offset}, {length} bytes"
        self._offer(
            ("bad", kind, replica, error is None),
            Event("QUORUM_REPORT_BAD", members, f"{where}: {reason}"),
        )

    def failure(self, offset: int, length: int) -> None:
        """The disk as a whole could not do a request on these bytes."""
        members = {"reference": self._reference, **_sectors(offset, length)}
        text = f"no quorum of replicas at {offset}, {length} bytes: the request failed"
        self._offer(("failure",), Event("QUORUM_FAILURE", members, text, logging.ERROR))

    def difference(self, offset: int) -> None:
        """``blkverify``: the replicas differ at *offset*."""
        members = {"reference": self._reference, "offset": offset}
        text = f"blkverify: the replicas differ at offset {offset}"
        self._offer(("difference",), Event("BLKVERIFY_DIFFERENCE", members, text, logging.ERROR))

    def state_changed(self, replica: str, old: Enum, new: Enum) -> None:
        """The state of *replica* changed."""
        members = {"replica": replica, "old": old.value, "new": new.value}
        text = f"{replica} is {new.value}, was {old.value}"
        self._tell(Event("REPLICA_STATE_CHANGED", members, text))

    def slow(self, replica: str, operation: str, slow: Slow) -> None:
        """Operations of a sort take *replica* much longer than the fastest other one."""
        times = round(slow.times)
        median_us = round(slow.median_s * 1e6)
        members = {"replica": replica, "operation": operation, "p50_us": median_us, "times": times}
        text = (
            f"{replica} is slow: half of its {operation}s take {slow.median_s * 1000:.3g} ms and "
            f"more, {times} times as long as those of the fastest other replica"
        )
        self._tell(Event("REPLICA_SLOW", members, text))

    def fenced(self, by: Claim) -> None:
        """Another mount has taken over the set, and this mount is over."""
        members = {"reference": self._reference, "host": by.host, "pid": by.pid, "since": by.since}
        text = f"fenced: the set was taken over by {by}; nothing is read or written here any more"
        self._tell(Event("FENCED", members, text, logging.ERROR))

    def differs(self, offset: int, length: int) -> None:
        """Adopted images differ, and no strict majority decides."""
        members = {"reference": self._reference, "offset": offset, "length": length}
        text = f"the replicas differ at {offset}, {length} bytes, and none has a majority"
        self._offer(("differs",), Event("MISMATCH_FOUND", members, text, logging.ERROR))

    def mismatch(self, offset: int, length: int, replica: str | None) -> None:
        """A scrub found a difference: *replica* is outvoted; None: none has a majority."""
        blame = "undecided" if replica is None else "majority"
        members = {
            "reference": self._reference,
            "offset": offset,
            "length": length,
            "replica": replica,
            "blame": blame,
        }
        text = f"the replicas differ at {offset}, {length} bytes, and none has a majority"
        level = logging.ERROR
        if replica is not None:
            text = f"{replica} differs from the majority at {offset}, {length} bytes"
            level = logging.WARNING
        self._offer(("mismatch", replica), Event("MISMATCH_FOUND", members, text, level))

    def scrub_started(self, length: int, *, repair: bool) -> None:
        """A scrub of a disk of *length* bytes began."""
        members = {"reference": self._reference, "bytes": length, "repair": repair}
        text = f"scrub started: {length} bytes" + (", to repair what is certain" if repair else "")
        self._tell(Event("SCRUB_STARTED", members, text, logging.INFO))

    def scrub_finished(self, counts: Counts, seconds: int, *, stopped: bool) -> None:
        """A scrub ended after *seconds* of work, at the end of the disk unless it was *stopped*."""
        members = {"reference": self._reference, **asdict(counts)}
        members |= {"seconds": seconds, "stopped": stopped}
        text = (
            f"scrub {'stopped' if stopped else 'finished'} after {seconds} s: blocks with a "
            f"mismatch {counts.mismatches}, unreadable {counts.unreadable}, repaired "
            f"{counts.repaired}, undecided {counts.undecided}, left as they were "
            f"{counts.unrepaired}"
        )
        level = logging.WARNING if counts.unrepaired else logging.INFO
        self._tell(Event("SCRUB_FINISHED", members, text, level))

    def unreadable(self, offset: int, length: int) -> None:
        """These bytes can be read on none of their holders."""
        members = {"reference": self._reference, **_sectors(offset, length)}
        text = (
            f"{length} bytes at {offset} can be read on no replica: reads there fail until "
            "the place is written anew"
        )
        self._tell(Event("DATA_UNREADABLE", members, text, logging.ERROR))

    def resync_started(self, replica: str, length: int) -> None:
        """A resync of *replica* began, of at most *length* bytes."""
        members = {"replica": replica, "bytes": length}
        text = f"resync of {replica} started: up to {length} bytes"
        self._tell(Event("RESYNC_STARTED", members, text, logging.INFO))

    def resync_finished(self, replica: str, copied: int, error: str | None) -> None:
        """The resync of *replica* ended after *copied* bytes, well if there is no *error*."""
        members = {"replica": replica, "bytes": copied, "error": error}
        text = f"resync of {replica} finished: {copied} bytes copied"
        if error:
            text = f"resync of {replica} stopped: {error}"
        self._tell(Event("RESYNC_FINISHED", members, text, logging.INFO))

    def repaired(self, replica: str, offset: int, length: int) -> None:
        """*replica* was given the winning data for these bytes."""
        members = {"replica": replica, "offset": offset, "length": length}
        text = f"{replica} rewritten at {offset}, {length} bytes"
        self._offer(("repaired", replica), Event("MISMATCH_REPAIRED", members, text))

    def errors_cleared(self, replica: str, errors: int) -> None:
        """The administrator had the *errors* of *replica* forgotten."""
        members = {"replica": replica, "errors": errors}
        text = f"{errors} errors of {replica} were cleared by the administrator"
        self._tell(Event("ERRORS_CLEARED", members, text, logging.INFO))

    def _offer(self, key: Hashable, event: Event) -> None:
        told = self._limiter.offer(key, event, trio.current_time())
        if told is not None:
            self._tell(told)


def _sectors(offset: int, length: int) -> dict[str, int]:
    """The 512-byte sectors that hold these bytes, in QEMU's words."""
    first = offset // SECTOR
    return {"sector-num": first, "sectors-count": -(-(offset + length) // SECTOR) - first}
