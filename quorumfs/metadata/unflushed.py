"""What was written and not yet synced: what who fails a sync may have lost. Pure: no I/O."""

from collections.abc import Iterator

CHUNKS_MAX = 65_536
"""So many chunks are remembered one by one; with more there is a byte for each that the disk has,
which is at most a few MiB."""


class Unflushed:
    """A set of chunks, exact however many: what nobody wrote must not be said to be lost."""

    __slots__ = ("_chunks", "_table")

    def __init__(self) -> None:
        self._chunks: set[int] = set()
        self._table = bytearray()
        """1 for each that is in it, once there were too many for a set."""

    def __bool__(self) -> bool:
        return bool(self._chunks or self._table)

    def add(self, chunks: range) -> None:
        """Note a write of *chunks*."""
        if self._table:
            if len(self._table) < chunks.stop:
                self._table.extend(bytes(chunks.stop - len(self._table)))
            self._table[chunks.start : chunks.stop] = b"\1" * len(chunks)
        elif len(self._chunks) + len(chunks) <= CHUNKS_MAX:
            self._chunks.update(chunks)
        else:
            self._table = bytearray(max(self._chunks, default=0) + 1)
            for chunk in self._chunks:
                self._table[chunk] = 1
            self._chunks.clear()
            self.add(chunks)

    def overlaps(self, chunks: range) -> bool:
        """Whether any of *chunks* is in it."""
        if self._table:
            return self._table.find(1, chunks.start, chunks.stop) >= 0
        return not self._chunks.isdisjoint(chunks)

    def take(self) -> "Unflushed":
        """Everything noted until now; from here on it is empty."""
        taken = Unflushed()
        taken._chunks, taken._table = self._chunks, self._table
        self._chunks, self._table = set(), bytearray()
        return taken

    def put_back(self, taken: "Unflushed") -> None:
        """Note again what a sync that failed was to cover."""
        for run in taken.runs():
            self.add(run)

    def runs(self) -> Iterator[range]:
        """What is in it, in order, adjacent chunks together."""
        chunks = sorted(self._chunks)
        first = 0  # of those that are adjacent
        for position, chunk in enumerate(chunks, 1):
            if position == len(chunks) or chunks[position] != chunk + 1:
                yield range(chunks[first], chunk + 1)
                first = position
        start = self._table.find(1)
        while start >= 0:
            stop = self._table.find(0, start)
            stop = len(self._table) if stop < 0 else stop
            yield range(start, stop)
            start = self._table.find(1, stop)
