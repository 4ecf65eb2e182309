"""How fast a repair may go, yielding to a guest, and how much is done at a time. Pure: no clock.

The amount at a time follows the speed of the slowest replica.
"""

import math
from dataclasses import dataclass, field

YIELD_TO_GUEST = 1.0
"""Seconds of rest for each second of repair beside a guest."""


@dataclass(slots=True)
class Pacer:
    """Spreads a repair's work over time; times are monotonic, in seconds."""

    limit: int | None = None
    """Bytes a second at most; None: no limit."""
    _free_at: float = 0.0
    """When the limit allows more work."""

    def pay(self, now: float, length: int) -> float:
        """Until when to rest for *length* bytes of work that begins *now*."""
        if self.limit is None:
            return now
        self._free_at = max(self._free_at, now) + length / self.limit
        return self._free_at

    def rest_for_guest(self, began: float, now: float) -> float:
        """Until when to rest after work beside a guest from *began* until *now*."""
        return now + (now - began) * YIELD_TO_GUEST


@dataclass(slots=True)
class Backoff:
    """When to try again: each wait is twice the last one, and begins anew after a long rest.

    Times are monotonic, in seconds.
    """

    first_s: float
    longest_s: float
    due_at: float = 0.0
    """When the next attempt is due."""
    _wait_s: float = 0.0
    """The last wait; 0: there was none lately."""

    def tried(self, began: float, now: float) -> None:
        """Note an attempt from *began* until *now*."""
        rested = began - self.due_at > self.longest_s
        self._wait_s = min(2 * self._wait_s, self.longest_s) if not rested else 0.0
        self._wait_s = self._wait_s or self.first_s
        self.due_at = now + self._wait_s

    def start_anew(self) -> None:
        """Have an attempt be due at once, and the one after it soon."""
        self.due_at = self._wait_s = 0.0


MEMORY_S = 10.0
"""How long ago (seconds) work was done that counts for the present speed by a third."""


@dataclass(slots=True)
class Speed:
    """How fast work is done lately, as an average that decays; times are monotonic, in seconds."""

    _at: float
    """Until when the work is counted; at first, when it begins."""
    _bytes: float = 0.0
    _seconds: float = 0.0
    """In which so many bytes were done, both of which count the less the longer ago they were."""

    def worked(self, now: float, length: int) -> None:
        """Note that *length* bytes are done *now*."""
        self._bytes, self._seconds = self._until(now)
        self._bytes += length
        self._at = max(self._at, now)

    def rate(self, now: float) -> float:
        """Bytes a second; less than there were in the first second, which tells little."""
        done, seconds = self._until(now)
        return done / max(seconds, 1.0)

    def _until(self, now: float) -> tuple[float, float]:
        spent = max(0.0, now - self._at)
        kept = math.exp(-spent / MEMORY_S)
        return self._bytes * kept, self._seconds * kept + MEMORY_S * (1 - kept)


QUICK_MAX = 8
"""A larger portion is tried again after at most this number of quick portions."""


@dataclass(slots=True)
class Portion:
    """How much to do at a time, from *least* to *most*: the amount doubles and halves.

    The amount grows after quick portions and shrinks after a slow one. A portion is slow if it
    takes longer than the least portion by more than `longer_s`. Time that even the least portion
    takes (the latency of a server, a flush that is always slow) is not saved by smaller portions.
    """

    least: int
    most: int
    longer_s: float
    """Seconds."""
    amount: int = field(init=False)
    """How much to do now."""
    _least_s: float = 0.0
    """Seconds that the least portion takes."""
    _since: float = float("-inf")
    """When the amount last changed; portions that began earlier are not counted."""
    _quick: int = 0
    """Quick portions since the amount last changed."""
    _wanted: int = 1
    """Quick portions before the amount grows; doubled, up to `QUICK_MAX`, by a slow portion."""

    def __post_init__(self) -> None:
        self.amount = self.least

    def took(self, amount: int, began: float, ended: float) -> None:
        """Learn from a portion of *amount* that was done from *began* to *ended* (seconds)."""
        if began < self._since:
            return
        seconds = ended - began
        whole = amount >= self.amount
        if amount <= self.least:
            self._least_s = seconds
        elif whole:
            self._least_s = min(self._least_s, seconds)
        longer_s = seconds - self._least_s
        if longer_s > self.longer_s:
            self._wanted = min(2 * self._wanted, QUICK_MAX)
            less = self.amount
            while less > self.least and longer_s > self.longer_s:
                less //= 2
                longer_s /= 2
            self._change(less, ended)
        elif whole and longer_s <= self.longer_s / 2:
            self._quick += 1
            if self._quick >= self._wanted and self.amount < self.most:
                self._change(min(2 * self.amount, self.most), ended)

    def _change(self, amount: int, now: float) -> None:
        self.amount = amount
        self._since = now
        self._quick = 0
