"""How long a store takes for one kind of request.

`Latency`: lately, as percentiles of a decaying histogram. Its buckets are four to each power of two
of nanoseconds, so that a percentile is right to a fifth, and to note a latency costs no memory.
Counts are halved from time to time: what a store did minutes ago tells little about what it does
now.

`Durations`: since the mount, as a histogram for monitoring, of few buckets that never change.

Pure: the caller has the clock.
"""

from array import array
from bisect import bisect_left
from typing import NamedTuple

HALF_LIFE_S = 60.0
"""Seconds until an earlier latency counts half as much as a new one."""

_STEPS = 4  # buckets to a power of two
_LONGEST = 42 * _STEPS  # 2^42 ns are 73 minutes; no request is waited for so long


class Percentiles(NamedTuple):
    """Of one kind of request, in seconds."""

    p50: float
    p99: float
    longest: float
    """Of the last one to two half-lives."""


class Latency:
    """The latencies of one kind of request to one store."""

    __slots__ = ("_counts", "_halved_at", "_longest", "_longest_before", "count")

    def __init__(self) -> None:
        self.count = 0.0
        """Requests noted, with the weight that they have now."""
        self._counts = [0.0] * (_LONGEST + 1)
        self._longest = self._longest_before = 0.0
        self._halved_at = 0.0

    def note(self, seconds: float, now: float) -> None:
        """Note that a request took *seconds*; *now* by any clock that goes on (seconds)."""
        if now - self._halved_at >= HALF_LIFE_S:
            self._halve(now)
        self._counts[_bucket(seconds)] += 1
        self.count += 1
        self._longest = max(self._longest, seconds)

    def percentile(self, fraction: float) -> float:
        """What *fraction* of the requests took at most (seconds); 0 if there were none."""
        left = fraction * self.count
        for bucket, count in enumerate(self._counts):
            left -= count
            if count and left <= 0:
                return _upper_s(bucket)
        return 0.0

    def percentiles(self) -> Percentiles | None:
        """All that is shown of it; None if there were no requests lately."""
        if self.count < 1:
            return None
        longest = max(self._longest, self._longest_before)
        p50, p99 = (min(self.percentile(fraction), longest) for fraction in (0.5, 0.99))
        return Percentiles(p50, p99, longest)

    def _halve(self, now: float) -> None:
        times = min(64, int((now - self._halved_at) / HALF_LIFE_S))
        self._halved_at = now
        self._counts = [count / 2**times for count in self._counts]
        self.count = sum(self._counts)
        self._longest_before = self._longest if times == 1 else 0.0
        self._longest = 0.0


BOUNDS_NS = tuple(
    digit * 10**exponent for exponent in range(4, 11) for digit in (1, 3)
)  # 10 µs to 30 s
"""The longest duration in each bucket of `Durations` but the last, which has no end (nanoseconds).

Others have stored what was counted by these: they never change.
"""


class Durations:
    """The histogram of how long the requests of one kind took that one store was asked for.

    The fast path counts in the same memory: ``struct gate_durations`` in gate.h.
    """

    __slots__ = ("_words", "address")

    def __init__(self) -> None:
        self._words = array("Q", bytes(8 * (len(BOUNDS_NS) + 5)))
        """The counts, `total_ns`, and three words of the fast path."""
        self.address = self._words.buffer_info()[0]
        """Of that memory."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Requests by bucket: those above the bound before, and not above its own."""
        return tuple(self._words[: len(BOUNDS_NS) + 1])

    @property
    def total_ns(self) -> int:
        """Of all requests together (nanoseconds)."""
        return self._words[len(BOUNDS_NS) + 1]

    def note(self, seconds: float) -> None:
        """Note that a request took *seconds*."""
        nanoseconds = int(seconds * 1e9)
        self._words[bisect_left(BOUNDS_NS, nanoseconds)] += 1
        self._words[len(BOUNDS_NS) + 1] += nanoseconds


def _bucket(seconds: float) -> int:
    nanoseconds = int(seconds * 1e9)
    power = nanoseconds.bit_length()
    if power <= 2:
        return 0
    return min(_STEPS * power + (nanoseconds >> power - 3) - _STEPS, _LONGEST)


def _upper_s(bucket: int) -> float:
    """The longest latency of *bucket*, in seconds."""
    power, step = divmod(bucket, _STEPS)
    return (_STEPS + step + 1) * 2.0 ** (power - 3) * 1e-9 if power > 2 else 4e-9
