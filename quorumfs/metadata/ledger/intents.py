"""Which extents of the disk get write-intent marks, and which extents are in use. Pure.

An extent is marked, durably, before its first write (R1), and the write waits for the mark. To
spare scattered writes on a large disk a wait each, the number of extents marked at a time grows
with the number of recent waits: aligned *spans* of a power of two of extents. Spans shrink again
when marks are cleared, because after a crash every marked extent has to be made equal.

Ahead of a sequential writer, as many extents are marked as the writer has just written: at most
`AHEAD_MAX`, or `AHEAD_REQUESTS` times the length of the request.
"""

from collections.abc import Callable, Iterator

from quorumfs.decisions.dirtymap import INTENT, DirtyMap

SPAN_MAX = 1024
"""Extents in the largest span: 4 GiB of a disk up to 16 TiB."""

AHEAD_MAX = 64
"""Extents marked ahead of a sequential writer: 256 MiB of such a disk."""

AHEAD_REQUESTS = 16
"""Or the length of this number of requests, if larger: a discard takes steps of GiB."""

MISSES_MAX = 256
"""After this number of waits for a mark, the span length doubles. While fewer extents are in use
(1 GiB, in one piece), no span is longer than an extent."""


class Intents:
    """The extents of a disk in use, and the extents to mark in its *known* map."""

    __slots__ = ("_known", "_misses", "_span", "touched")

    def __init__(self, known: DirtyMap) -> None:
        self._known = known
        self.touched = bytearray(len(known.extents(0, known.size)))
        """Per extent: 1 if a write came since `look_anew`, or is about to come."""
        self._span = 1
        self._misses = 0

    def want(
        self, extents: range, may_mark: Callable[[range], bool], *, ahead: bool
    ) -> range | None:
        """The extents to mark for a write to *extents*; None if all of *extents* are marked.

        *may_mark*: whether a span larger than *extents* may be marked. *ahead*: whether writes to
        the following extents are likely.
        """
        if self._known.all(INTENT, self._known.extent_chunks(extents)):
            return None
        aligned = range(self._span_of(extents[0]).start, self._span_of(extents[-1]).stop)
        longer = aligned
        if ahead:
            start = max(0, extents.start - max(AHEAD_MAX, AHEAD_REQUESTS * len(extents)))
            untouched = self.touched.rfind(0, start, extents.start)
            just_before = extents.start - max(start, untouched + 1)
            stop = min(extents.stop + just_before, len(self.touched))
            longer = range(aligned.start, max(aligned.stop, stop))
        span = next((span for span in (longer, aligned) if may_mark(span)), extents)
        self.touch(extents)
        self._misses += 1
        if self._misses >= MISSES_MAX:
            self._misses = 0
            self._span = min(2 * self._span, SPAN_MAX)
        return span

    def touch(self, extents: range) -> None:
        """Note a write to *extents*."""
        self.touched[extents.start : extents.stop] = b"\1" * len(extents)

    def grow(self) -> None:
        """Note that the map has become longer."""
        count = len(self._known.extents(0, self._known.size))
        self.touched += bytes(count - len(self.touched))

    def in_use(self) -> Iterator[range]:
        """The runs of extents with a write since `look_anew`, or about to get a write."""
        start = self.touched.find(1)
        while start >= 0:
            stop = self.touched.find(0, start)
            stop = len(self.touched) if stop < 0 else stop
            yield range(start, stop)
            start = self.touched.find(1, stop)

    def look_anew(self) -> None:
        """Count extents as unused until their next write, and halve the span."""
        self.touched = bytearray(len(self.touched))
        self._span = max(1, self._span // 2)
        self._misses = 0

    def idle(self) -> Iterator[range]:
        """Spans with a mark and no write since `look_anew`, in order; adjacent spans without an
        unmarked extent between are joined.
        """
        marked = self._marked()
        count = len(marked)
        used = -1
        extent = marked.find(1)
        while extent >= 0:
            start = self._span_of(extent).start
            if used < start:
                used = self.touched.find(1, start)
                used = count if used < 0 else used
            unused = self._span_of(used).start if used < count else count
            if start < unused:
                stop = marked.find(0, extent, unused)
                stop = unused if stop < 0 else self._span_of(stop - 1).stop
                yield range(start, stop)
            else:  # skip a run of extents in use at once
                stop = self.touched.find(0, used)
                stop = self._span_of(stop - 1).stop if stop > 0 else count
            extent = marked.find(1, stop)

    def _marked(self) -> bytearray:
        """Per extent: 1 if any chunk of the extent is marked."""
        marked = bytearray(len(self.touched))
        per_extent = self._known.extent // self._known.chunk_size
        for run in self._known.runs(INTENT, longest=len(self._known)):
            first, last = run.start // per_extent, run[-1] // per_extent
            marked[first : last + 1] = b"\1" * (last + 1 - first)
        return marked

    def _span_of(self, extent: int) -> range:
        start = extent // self._span * self._span
        return range(start, min(start + self._span, len(self.touched)))
