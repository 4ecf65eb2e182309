"""Which extents of the disk are to be marked as intended, and which are written to. Pure.

An extent is marked, durably, before the first write to it (R1), and that write waits for it. So
that writes all over a large disk do not wait each, the more extents were found without a mark
lately, the more are marked at a time: aligned *spans* of a power of two of extents. Spans shrink
again when marks are cleared: after a crash whatever is marked has to be made equal.

Ahead of who writes one extent after the other as many are marked as were written to just before:
at most `AHEAD_MAX`, or a multiple of what one request of theirs is for.
"""

from collections.abc import Callable, Iterator

from quorumfs.decisions.dirtymap import INTENT, DirtyMap

SPAN_MAX = 1024
"""Extents in the largest span: 4 GiB of a disk up to 16 TiB."""

AHEAD_MAX = 64
"""Extents that are marked ahead of who writes one after the other: 256 MiB of such a disk."""

AHEAD_REQUESTS = 16
"""Or so many requests as long as the one that waits: who discards a disk has it done in GiB."""

MISSES_MAX = 256
"""After so many requests that had to wait for a mark, spans get twice as long. Where all that is in
use has fewer extents than that (1 GiB, in one piece), no span is longer than one extent."""


class Intents:
    """Which extents of a disk are written to, and what is to be marked in its *known* map."""

    __slots__ = ("_known", "_misses", "_span", "touched")

    def __init__(self, known: DirtyMap) -> None:
        self._known = known
        self.touched = bytearray(len(known.extents(0, known.size)))
        """Per extent: 1 when it was written to since `look_anew`, or is about to be."""
        self._span = 1
        self._misses = 0

    def want(
        self, extents: range, may_mark: Callable[[range], bool], *, ahead: bool
    ) -> range | None:
        """The extents to be marked for a write to *extents*; None if these are.

        *may_mark*: whether a span may be marked of which nobody asked for more than *extents*.
        *ahead*: whether those that follow are likely to be wanted next.
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
        """Note that *extents* are written to."""
        self.touched[extents.start : extents.stop] = b"\1" * len(extents)

    def in_use(self) -> Iterator[range]:
        """What was written to since `look_anew`, or is about to be."""
        start = self.touched.find(1)
        while start >= 0:
            stop = self.touched.find(0, start)
            stop = len(self.touched) if stop < 0 else stop
            yield range(start, stop)
            start = self.touched.find(1, stop)

    def look_anew(self) -> None:
        """Begin to look anew for extents that are written to; marks come in shorter spans."""
        self.touched = bytearray(len(self.touched))
        self._span = max(1, self._span // 2)
        self._misses = 0

    def idle(self) -> Iterator[range]:
        """Spans with a mark that nothing was written to since `look_anew`, in order; adjacent ones
        of which all is marked are one.
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
            else:  # what was written to in one piece is passed over in one step
                stop = self.touched.find(0, used)
                stop = self._span_of(stop - 1).stop if stop > 0 else count
            extent = marked.find(1, stop)

    def _marked(self) -> bytearray:
        """Per extent: 1 if any chunk of it is marked."""
        marked = bytearray(len(self.touched))
        per_extent = self._known.extent // self._known.chunk_size
        for run in self._known.runs(INTENT, longest=len(self._known)):
            first, last = run.start // per_extent, run[-1] // per_extent
            marked[first : last + 1] = b"\1" * (last + 1 - first)
        return marked

    def _span_of(self, extent: int) -> range:
        start = extent // self._span * self._span
        return range(start, min(start + self._span, len(self.touched)))
