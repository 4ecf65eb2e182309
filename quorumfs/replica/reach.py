"""How far zeros are made at a time on one file, by how long earlier ones took. Pure: no clock.

TiB can be punched at once where there are only holes, or where a file system is quick about data;
elsewhere zeros have to be written. Meanwhile the range, on some file systems the whole file, is
locked. So a caller that wants many zeros asks first how far to go.
"""

from dataclasses import dataclass

LEAST = 1 << 20
"""Bytes zeroed at a time on any file: as many as in the largest write."""

LONG_NS = 4_000_000
"""How long (nanoseconds) a step should take at most: other requests may have to wait for it."""

FLOOR = 4 << 20
"""Bytes below which a limit does not shrink, and to which steps that were not long let it grow: the
fixed cost of an operation, or a busy machine, is no reason for small steps. Even a slow store has
time for this many."""

GROWTH_MAX = 64
"""The factor by which a limit grows at most, because the next bytes may be of another kind."""


@dataclass(slots=True)
class Reach:
    """The limits of the next step (bytes), on one file."""

    length: int = LEAST
    """Bytes with holes."""
    data: int = LEAST
    """Bytes outside holes."""

    def took(self, length: int, data: int, duration_ns: int) -> None:
        """Take note that zeros were made of *length* bytes, *data* of them outside holes."""
        self.length = _adapted(self.length, length, duration_ns)
        self.data = _adapted(self.data, data, duration_ns)


def _adapted(limit: int, used: int, duration_ns: int) -> int:
    """The next limit, after a step of *used* bytes within *limit* took *duration_ns*."""
    if used < LEAST:
        return limit  # too small a step to learn from
    if duration_ns > LONG_NS:
        return min(limit, max(FLOOR, used * LONG_NS // duration_ns))
    if 2 * used < limit:
        return limit  # the limit did not bound the step
    growth = min(GROWTH_MAX, LONG_NS // max(1, duration_ns))
    return max(min(FLOOR, 2 * limit), limit * growth)
