"""The chunks of replicas that are not current. Pure: no I/O, no clock.

The out-of-sync bits of a replica name the chunks that the replica lacks; in all other chunks the
replica equals the members. A resync takes each lacking chunk of its target through three states:

======= ============================ ============================== =========================
state   meaning                      out-of-sync bit of the target  guest writes
======= ============================ ============================== =========================
LACKING the target may hold anything set                            may bypass the target
COPIED  copy under way or done       set: a sync may yet fail       go to the target, too
DURABLE a sync covers the copy       set until recorded             go to the target, too
======= ============================ ============================== =========================

A chunk is COPIED as soon as the copy begins, because guest writes during the copy must reach the
target as well. From any state, a loss or a missed write makes the chunk LACKING (`Target.lacks`).
"""

from collections.abc import Iterable, Iterator
from enum import Enum

from quorumfs.decisions.dirtymap import INTENT, out_of_sync
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.epochs import Epochs
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.replica.replica import Replica


class Chunk(Enum):
    """The state of a chunk on a replica that is not current."""

    LACKING = "lacking"
    COPIED = "copied"
    DURABLE = "durable"
    HELD = "held"
    """Equal to the members, and recorded."""


class Target:
    """A replica that is not current: its lacking chunks, and the progress of a resync."""

    def __init__(self, replica: Replica, recorded: Recorded, epochs: Epochs) -> None:
        assert replica.slot is not None
        self.replica = replica
        self.bit = out_of_sync(replica.slot)
        self.unproven = RangeSet()
        """Lacking chunks to compare before copying: lacking only because the replica may be a
        snapshot slightly older than its record shows (R15)."""
        self.ejected = False
        """The replica was current in this mount: its out-of-sync bits are exact."""
        self.mirroring = False
        """Writes go to the target, too, unless all their chunks are LACKING (see `gets`)."""
        self.joining = False
        """The target lacks nothing, and is being made current."""
        self._recorded = recorded
        self._epochs = epochs
        self._log = RangeSet()
        """Chunks with `INTENT` at the ejection: possible last writes to the replica."""
        self._given = RangeSet()
        """Chunks that are COPIED or DURABLE."""
        self._copied: dict[int, RangeSet] = {}
        """By the epoch in which the copy ended: copied chunks that no sync covers yet."""
        self._durable = RangeSet()
        """Chunks that are DURABLE."""
        self._sources: dict[Replica, RangeSet] = {}
        """By member: the chunks copied to the target while the member was a source. Kept when a
        resync is broken off, as the copied chunks are."""

    # Lacking chunks

    def lacks(self, chunks: range) -> None:
        """Make *chunks*, possibly empty, LACKING: the target must get them again."""
        self._recorded.add(self.bit, chunks)
        if chunks:
            for kept in (self._given, self._durable, *self._copied.values()):
                kept.remove(chunks.start, chunks.stop)

    def lost_by(self, source: Replica, chunks: range) -> None:
        """Make LACKING every chunk of *chunks* copied from *source*, which lost *chunks*.

        The copies may be older than acknowledged writes. Guest writes went to the target directly,
        so chunks with guest writes alone stay: copying these, too, would keep a resync from ever
        ending beside a source that fails each flush.
        """
        if copied := self._sources.get(source):
            for start, stop in copied.inside(chunks.start, chunks.stop):
                self.lacks(range(start, stop))
            copied.remove(chunks.start, chunks.stop)

    def lacks_unsynced(self) -> None:
        """Make all unsynced chunks LACKING after a failure, even if they read as equal (R4)."""
        for run in self._epochs.unsynced(self.replica):
            self.lacks(run)
            self.unproven.remove(run.start, run.stop)

    def eject(self) -> None:
        """Note the ejection of the replica: the present `INTENT` marks cover its last writes."""
        self.ejected = True
        known = self._recorded.map
        for run in known.runs(INTENT, longest=len(known)):
            self._log.add(run.start, run.stop)

    def left_in_order(self) -> None:
        """Note that the replica's sidecar tells its image from any older one."""
        self._log = RangeSet()

    def doubt_log(self) -> None:
        """Make LACKING, and `unproven`, the last writes before the ejection (R15)."""
        lacking, log = RangeSet(), self._log
        for run in self._lacking():
            lacking.add(run.start, run.stop)
        self._log = RangeSet()
        for log_start, log_end in log:
            for start, end in lacking.outside(log_start, log_end):
                self.unproven.add(start, end)
                self.lacks(range(start, end))

    @property
    def lacking_chunks(self) -> int:
        """The number of chunks LACKING, COPIED or DURABLE: all with an out-of-sync bit."""
        return self._recorded.map.count(self.bit)

    def _lacking(self) -> Iterator[range]:
        return self._recorded.map.runs(self.bit, longest=len(self._recorded.map))

    def state(self, chunk: int) -> Chunk:
        """The state of *chunk*."""
        if not self._recorded.map.any(self.bit, range(chunk, chunk + 1)):
            return Chunk.HELD
        if self._durable.overlaps(chunk, chunk + 1):
            return Chunk.DURABLE
        given = self._given.overlaps(chunk, chunk + 1)
        return Chunk.COPIED if given else Chunk.LACKING

    # Progress of a resync

    def begin(self) -> None:
        """Note the start of a resync: every chunk with an out-of-sync bit is LACKING."""
        self.mirroring = False
        self._given, self._durable, self._copied = RangeSet(), RangeSet(), {}

    def gets(self, chunks: range, *, mirrored: bool) -> bool:
        """Whether a change of *chunks* goes to the target, too; if not, *chunks* become LACKING.

        False if all of *chunks* are LACKING: the resync will copy them anyway, and the writer need
        not wait for the target. *mirrored*: as if the target were `mirroring`.
        """
        if (mirrored or self.mirroring) and not self._lacks_all(chunks):
            return True
        self.lacks(chunks)
        return False

    def _lacks_all(self, chunks: range) -> bool:
        if self._given.overlaps(chunks.start, chunks.stop):
            return False
        return self._recorded.map.all(self.bit, chunks)

    def copying(self, sources: Iterable[Replica], chunks: range) -> None:
        """Note the start of a copy of *chunks* from *sources*: LACKING -> COPIED.

        The caller holds the range lock until the copy is done.
        """
        self._given.add(chunks.start, chunks.stop)
        for source in sources:
            self._sources.setdefault(source, RangeSet()).add(chunks.start, chunks.stop)

    def copied(self, chunks: range) -> None:
        """Note the end of a copy of *chunks*.

        Chunks made LACKING during the copy, because the source lost them, stay LACKING.
        """
        copied = self._copied.setdefault(self._epochs.now, RangeSet())
        for start, stop in self._given.inside(chunks.start, chunks.stop):
            copied.add(start, stop)

    @property
    def given(self) -> range:
        """The least range of chunks, perhaps empty, around all that are COPIED or DURABLE."""
        return range(*self._given.around())

    @property
    def unsynced(self) -> bool:
        """Whether any copied chunk is not covered by a sync yet."""
        return bool(self._copied)

    def synced(self, epoch: int) -> int:
        """Note a good sync of *epoch*: COPIED -> DURABLE; returns the number of chunks."""
        count = 0
        for ended in [ended for ended in self._copied if ended <= epoch]:
            for start, stop in self._copied.pop(ended):
                self._durable.add(start, stop)
                count += stop - start
        return count

    @property
    def unrecorded(self) -> bool:
        """Whether any chunk is DURABLE."""
        return bool(self._durable)

    def recorded(self) -> None:
        """Clear the out-of-sync bits of DURABLE chunks: DURABLE -> HELD."""
        for start, end in self._durable:
            self._recorded.remove(self.bit, range(start, end))
            self._given.remove(start, end)
        self._durable = RangeSet()

    @property
    def complete(self) -> bool:
        """Whether all chunks are durable on the target, while some bits are not cleared yet."""
        durable = sum(stop - start for start, stop in self._durable)
        waits = any(self._epochs.unsynced(self.replica))
        return durable >= self.lacking_chunks > 0 and not waits


class Targets:
    """The replicas of a set that are not current; one at a time is resynced."""

    def __init__(self, recorded: Recorded, epochs: Epochs) -> None:
        self.resyncing: Target | None = None
        """The target of the resync; None without a resync."""
        self._recorded = recorded
        self._epochs = epochs
        self._targets: dict[Replica, Target] = {}

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets.values())

    def of(self, replica: Replica) -> Target:
        """The `Target` of *replica*, which is not current."""
        if replica not in self._targets:
            self._targets[replica] = Target(replica, self._recorded, self._epochs)
        return self._targets[replica]

    def forget(self, replica: Replica) -> None:
        """Note that *replica*, which is not the target, has left the set."""
        self._targets.pop(replica, None)

    def lacks(self, chunks: range) -> None:
        """Make *chunks* LACKING on the target of the resync, if there is a target."""
        if self.resyncing is not None:
            self.resyncing.lacks(chunks)

    def lost_by(self, source: Replica, chunks: range) -> None:
        """As `Target.lost_by`, on all replicas that are not current."""
        for target in self:
            target.lost_by(source, chunks)

    def joined(self) -> None:
        """Note the target as current: the resync is over."""
        assert self.resyncing is not None
        del self._targets[self.resyncing.replica]
        self.resyncing = None
