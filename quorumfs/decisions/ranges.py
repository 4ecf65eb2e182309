"""Sets of byte ranges, and the questions the disk asks of them. Pure: no I/O, no clock."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise


class RangeSet:
    """Disjoint half-open byte ranges ``[start, end)``.

    Kept as one flat sorted list of bounds, start and end in turn: a position with an odd index
    lies inside a range. That makes adding and removing two bisections and one slice.
    """

    __slots__ = ("_bounds",)

    def __init__(self) -> None:
        self._bounds: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._bounds)

    def __len__(self) -> int:
        """The number of separate ranges."""
        return len(self._bounds) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._bounds[::2], self._bounds[1::2], strict=True)

    def add(self, start: int, end: int) -> None:
        """Put ``[start, end)`` in; ranges that touch become one."""
        first = bisect_left(self._bounds, start)
        last = bisect_right(self._bounds, end)
        replacement = [start] * (first % 2 == 0) + [end] * (last % 2 == 0)
        self._bounds[first:last] = replacement

    def remove(self, start: int, end: int) -> None:
        """Take ``[start, end)`` out, of whatever ranges it touches."""
        first = bisect_left(self._bounds, start)
        last = bisect_right(self._bounds, end)
        replacement = [start] * (first % 2 == 1) + [end] * (last % 2 == 1)
        self._bounds[first:last] = replacement

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any byte of ``[start, end)`` is in the set."""
        position = bisect_right(self._bounds, start)
        return position % 2 == 1 or (position < len(self._bounds) and self._bounds[position] < end)

    def union(self, other: "RangeSet") -> "RangeSet":
        """A new set with everything of both."""
        joined = RangeSet()
        for start, end in sorted([*self, *other]):
            if joined._bounds and start <= joined._bounds[-1]:
                joined._bounds[-1] = max(joined._bounds[-1], end)
            else:
                joined._bounds += start, end
        return joined

    def limit(self, ranges: int) -> None:
        """Become the one range around everything, if there are more than *ranges*."""
        if len(self) > ranges:
            self._bounds[:] = self.around()

    def around(self) -> tuple[int, int]:
        """The least range around everything; ``(0, 0)`` if there is nothing."""
        return (self._bounds[0], self._bounds[-1]) if self._bounds else (0, 0)

    def next_inside(self, position: int, default: int) -> int:
        """The first byte at or after *position* that is in the set; *default* if there is none."""
        index = bisect_right(self._bounds, position)
        if index % 2:
            return position
        return self._bounds[index] if index < len(self._bounds) else default

    def next_outside(self, position: int) -> int:
        """The first byte at or after *position* that is not in the set."""
        index = bisect_right(self._bounds, position)
        return self._bounds[index] if index % 2 else position

    def inside(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of ``[start, end)`` that are in the set, in order. It may change meanwhile."""
        for low, high, inside in segments(start, end, [self]):
            if inside:
                yield low, high

    def outside(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """As `inside`: the parts of ``[start, end)`` that are not in the set."""
        for low, high, inside in segments(start, end, [self]):
            if not inside:
                yield low, high

    def bounds_between(self, start: int, end: int) -> list[int]:
        """The places strictly inside ``(start, end)`` where membership changes."""
        first = bisect_right(self._bounds, start)
        return self._bounds[first : bisect_left(self._bounds, end)]


def segments(
    start: int, end: int, sets: Sequence[RangeSet]
) -> Iterator[tuple[int, int, list[int]]]:
    """Cut ``[start, end)`` where a range of any of *sets* begins or ends.

    Yields ``(start, end, inside)`` in order, without gaps: *inside* lists the indexes of the sets
    that the part is in.
    """
    cuts = {start, end}
    for ranges in sets:
        cuts.update(ranges.bounds_between(start, end))
    for low, high in pairwise(sorted(cuts)):
        yield low, high, [i for i, ranges in enumerate(sets) if ranges.overlaps(low, high)]


def least_coverage(size: int, missed: Sequence[RangeSet]) -> int:
    """How many replicas hold the byte of ``[0, size)`` that fewest hold, given what each missed."""
    changes = [(0, 0)]
    for ranges in missed:
        for start, end in ranges:
            changes += (start, -1), (end, 1)
    # Where one range ends and another begins, the end comes first: no byte lies between.
    changes.sort(key=lambda change: (change[0], -change[1]))
    holders = accumulate((change for _, change in changes), initial=len(missed))
    return min(holders)
