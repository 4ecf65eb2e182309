"""How far zeros are made at a time on one file, by how long that took. Pure: no clock.

A hole may be punched into TiB at once where there is nothing but holes, or where a file system is
quick about data; elsewhere zeros have to be written. Meanwhile nobody else can use that range, and
on some file systems the whole file. So whoever wants many zeros asks first how far to go.
"""

from dataclasses import dataclass

LEAST = 1 << 20
"""Bytes that are zeroed at a time anywhere: as many as the largest write has."""

LONG_NS = 4_000_000
"""How long (nanoseconds) it is to take at most: others may have to wait for it."""

FLOOR = 4 << 20
"""Bytes to which it does not fall back from more, and which it comes to wherever it was not long:
what an operation costs in any case, and a busy machine, are no reason to go in small steps. A slow
store has time for so many."""

GROWTH_MAX = 64
"""How many times as far as the last time to go at most: what lies there may be of another kind."""


@dataclass(slots=True)
class Reach:
    """How far to go the next time (bytes), on one file."""

    length: int = LEAST
    """With all the holes in it."""
    data: int = LEAST
    """So much that is not in a hole."""

    def took(self, length: int, data: int, duration_ns: int) -> None:
        """Take note that zeros were made of *length* bytes, *data* of them not in a hole."""
        self.length = _adapted(self.length, length, duration_ns)
        self.data = _adapted(self.data, data, duration_ns)


def _adapted(limit: int, used: int, duration_ns: int) -> int:
    """The limit to keep to, after one of *limit*, of which *used* was used, took so long."""
    if used < LEAST:
        return limit  # nothing can be told from it
    if duration_ns > LONG_NS:
        return min(limit, max(FLOOR, used * LONG_NS // duration_ns))
    if 2 * used < limit:
        return limit  # it was not what kept it from going farther
    growth = min(GROWTH_MAX, LONG_NS // max(1, duration_ns))
    return max(min(FLOOR, 2 * limit), limit * growth)
