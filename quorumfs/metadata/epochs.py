"""When each chunk was last changed, and what each replica's syncs have covered since. Pure: no I/O.

Time is counted in *epochs*, as DRBD counts it: a sync ends one. A change belongs to the epoch in
which it ended, and while it is under way, to the present one: a sync covers the changes of all
epochs until its own that had ended when it began. What a replica may have lost when one of its
syncs fails, is what was changed after the last epoch that a good sync of it covered. That is exact:
to round up would be to declare chunks lost that nobody had written.
"""

from collections.abc import Collection, Iterable, Iterator

from quorumfs.replica import Replica

CHUNKS_MAX = 65_536
"""So many chunks are remembered one by one; with more there is a byte for each that the disk has,
which is at most a few MiB."""


class ChunkSet:
    """A set of chunks, cheap to add to."""

    __slots__ = ("_chunks", "_table")

    def __init__(self) -> None:
        self._chunks: set[int] = set()
        self._table = bytearray()
        """1 for each that is in it, once there were too many for a set."""

    def __bool__(self) -> bool:
        return bool(self._chunks or self._table)

    def add(self, chunks: range) -> None:
        """Add *chunks*."""
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


class Epochs:
    """The changes of a disk, by epoch, as far as some replica has not synced them."""

    __slots__ = ("_covered", "_ended", "_syncing", "latest", "now")

    def __init__(self) -> None:
        self.now = 1
        """The number of the present epoch: it only ever grows."""
        self.latest = ChunkSet()
        """What was changed in it, or is being changed; a change is added when it begins and once
        more when it ends."""
        self._ended: list[tuple[int, ChunkSet]] = []
        """Earlier epochs that are not covered everywhere, the oldest first. Those that no sync
        tells apart are one."""
        self._covered: dict[Replica, int] = {}
        """The last epoch that a good sync of a replica covered: later changes wait for a sync."""
        self._syncing: dict[Replica, int] = {}
        """The epoch that the latest sync of a replica is to cover."""

    def follow(self, replicas: Collection[Replica]) -> None:
        """Note the syncs of exactly these from here on. A new one waits for nothing older."""
        added = [replica for replica in replicas if replica not in self._covered]
        epoch = self._end(()) if added else 0
        self._covered = {replica: self._covered.get(replica, epoch) for replica in replicas}
        self._syncing = {replica: self._syncing.get(replica, epoch) for replica in replicas}
        self._tidy()

    def begin_sync(self, replicas: Iterable[Replica], changing: Iterable[range]) -> int:
        """Note that *replicas* begin to sync amid changes of *changing*; returns its epoch."""
        epoch = self._end(changing)
        for replica in replicas:
            self._syncing[replica] = epoch
        if len(self._ended) > 1:
            self._tidy()
        return epoch

    def cover(self, replicas: Iterable[Replica], epoch: int) -> None:
        """Note that nothing of *epoch*, or earlier, waits for a sync of *replicas* any more."""
        for replica in replicas:
            self._covered[replica] = max(self._covered[replica], epoch)
        self._tidy()

    def covered(self, replica: Replica) -> int:
        """The last epoch of which nothing waits for a sync of *replica*."""
        return self._covered[replica]

    def unsynced(self, replica: Replica) -> Iterator[range]:
        """What *replica* may have lost if a sync of it fails; a chunk may come more than once.

        Nothing of one that is not followed: what it lacks is known.
        """
        if replica in self._covered:
            for chunks in self._after(self._covered[replica]):
                yield from chunks.runs()

    def waits(self, replica: Replica, chunks: range) -> bool:
        """Whether any of *chunks* was changed since what *replica* has synced."""
        return any(later.overlaps(chunks) for later in self._after(self._covered[replica]))

    def _after(self, epoch: int) -> Iterator[ChunkSet]:
        for number, chunks in self._ended:
            if number > epoch:
                yield chunks
        yield self.latest

    def _end(self, changing: Iterable[range]) -> int:
        """End the present epoch amid changes of *changing*; returns its number."""
        epoch, self.now = self.now, self.now + 1
        if self.latest:
            self._ended.append((epoch, self.latest))
            self.latest = ChunkSet()
        for chunks in changing:
            self.latest.add(chunks)
        return epoch

    def _tidy(self) -> None:
        """Drop the epochs that all have covered, and join those that no sync tells apart."""
        ended = self._ended
        oldest = min(self._covered.values(), default=self.now)
        if not ended or ended[-1][0] <= oldest:
            ended.clear()  # nearly always: all were synced together
            return
        bounds = {*self._covered.values(), *self._syncing.values()}
        self._ended = []
        for epoch, chunks in ended:
            if epoch <= oldest:
                continue
            if self._ended:
                before, joined = self._ended[-1]
                if not any(before <= bound < epoch for bound in bounds):
                    for run in chunks.runs():
                        joined.add(run)
                    self._ended[-1] = epoch, joined
                    continue
            self._ended.append((epoch, chunks))
