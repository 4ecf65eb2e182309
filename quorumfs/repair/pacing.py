"""How fast a repair may go: at once on an idle disk, yielding to a guest; and how much of it is
done at a time, which follows the speed of the slowest replica. Pure: no clock.
"""

from dataclasses import dataclass, field

YIELD_TO_GUEST = 1.0
"""With a guest at work, a repair rests as long as it worked."""


@dataclass(slots=True)
class Pacer:
    """Spreads a repair's work over time; times are monotonic, in seconds."""

    limit: int | None = None
    """Bytes a second at most; None: no limit."""
    _free_at: float = 0.0
    """When the work done so far is paid for."""

    def pay(self, now: float, length: int) -> float:
        """Until when to rest for *length* bytes that are worked on from *now* on."""
        if self.limit is None:
            return now
        self._free_at = max(self._free_at, now) + length / self.limit
        return self._free_at

    def rest_for_guest(self, began: float, now: float) -> float:
        """Until when to rest after work beside a guest from *began* until *now*."""
        return now + (now - began) * YIELD_TO_GUEST


QUICK_MAX = 8
"""After so many quick portions at the latest a larger one is tried again."""


@dataclass(slots=True)
class Portion:
    """How much to do at a time, from *least* to *most*, by powers of two: what takes little time.

    It is found by trying: more after what was quick, less after what was slow. A portion is slow
    if it takes longer than the least one by more than `longer_s`: what even that one takes (the
    latency of a server, a flush that is slow whatever there is to flush) smaller ones do not save.
    """

    least: int
    most: int
    longer_s: float
    """Seconds."""
    amount: int = field(init=False)
    """How much to do now."""
    _least_s: float = 0.0
    """What the least portion takes."""
    _since: float = float("-inf")
    """When the amount last changed: what began before tells nothing of it."""
    _quick: int = 0
    """Quick portions since then."""
    _wanted: int = 1
    """So many of them are a reason for more: the more often that was too much, the more."""

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
