"""What replicas hold that are not current, chunk by chunk. Pure: no I/O, no clock.

Its out-of-sync bits say what it lacks; the rest it holds as the current replicas do. A
resync takes each chunk that it lacks through three states:

======= ============================ ============================== ===================
state   meaning                      its out-of-sync bit            changes of a guest
======= ============================ ============================== ===================
LACKING it holds anything            set                            may pass it by
COPIED  it was given all of it       set: a sync may yet lose it    go to it, too
DURABLE a sync covers what it got    set, until that is on record   go to it, too
======= ============================ ============================== ===================

A chunk is COPIED from the moment on in which the copy begins: what a guest writes meanwhile it must
get as well. Whatever may have been lost, or was not given, is LACKING again, in whatever state it
was: `Target.lacks`.
"""

from collections.abc import Iterable, Iterator
from enum import Enum

from quorumfs.decisions.dirtymap import INTENT, out_of_sync
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.epochs import Epochs
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.replica.replica import Replica


class Chunk(Enum):
    """What a replica that is not current has of one chunk."""

    LACKING = "lacking"
    COPIED = "copied"
    DURABLE = "durable"
    HELD = "held"
    """The same as the current replicas, and on record."""


class Target:
    """A replica that is not current: what it lacks, and what a resync has given to it."""

    def __init__(self, replica: Replica, recorded: Recorded, epochs: Epochs) -> None:
        assert replica.slot is not None
        self.replica = replica
        self.bit = out_of_sync(replica.slot)
        self.unproven = RangeSet()
        """Chunks that it lacks only because it may come from a snapshot that is a little older
        than its record shows (R15): they are compared before they are copied."""
        self.ejected = False
        """It was current in this mount: its bits are exact."""
        self.mirroring = False
        """It gets what is written where it lacks nothing; else it lacks that from then on."""
        self.joining = False
        """It lacks nothing, and is being made current."""
        self._recorded = recorded
        self._epochs = epochs
        self._log = RangeSet()
        """Chunks with `INTENT` when it was ejected: what it took there last."""
        self._given = RangeSet()
        """Chunks that are COPIED or DURABLE."""
        self._copied: dict[int, RangeSet] = {}
        """By the epoch in which that ended: chunks that were copied, and no sync covers it yet."""
        self._durable = RangeSet()
        """Chunks that are DURABLE."""
        self._sources: dict[Replica, RangeSet] = {}
        """By replica: the chunks that this one was given while that one was believed to hold
        them. They outlast a resync that is broken off: so does what it was given."""

    # What it lacks

    def lacks(self, chunks: range) -> None:
        """Have it be given *chunks*, which may be none, again."""
        self._recorded.add(self.bit, chunks)
        if chunks:
            for kept in (self._given, self._durable, *self._copied.values()):
                kept.remove(chunks.start, chunks.stop)

    def lost_by(self, source: Replica, chunks: range) -> None:
        """Note that *source*, which is believed, lost *chunks*: what was copied from it may be
        older than what was acknowledged.

        What a guest wrote went to both of them: to have that copied again would keep a resync from
        ever ending beside a source that fails each flush.
        """
        if copied := self._sources.get(source):
            for start, stop in copied.inside(chunks.start, chunks.stop):
                self.lacks(range(start, stop))
            copied.remove(chunks.start, chunks.stop)

    def lacks_unsynced(self) -> None:
        """Have it lack all that it has not synced, equal as it may read: it failed (R4)."""
        for run in self._epochs.unsynced(self.replica):
            self.lacks(run)
            self.unproven.remove(run.start, run.stop)

    def eject(self) -> None:
        """Note that it is current no more: it took what was written until now."""
        self.ejected = True
        known = self._recorded.map
        for run in known.runs(INTENT, longest=len(known)):
            self._log.add(run.start, run.stop)

    def doubt_log(self) -> None:
        """Have it lack what it may only seem to have taken last (R15)."""
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
        """How many chunks it lacks, or has not on record that it holds."""
        return self._recorded.map.count(self.bit)

    def _lacking(self) -> Iterator[range]:
        return self._recorded.map.runs(self.bit, longest=len(self._recorded.map))

    def state(self, chunk: int) -> Chunk:
        """What it has of *chunk*."""
        if not self._recorded.map.any(self.bit, range(chunk, chunk + 1)):
            return Chunk.HELD
        if self._durable.overlaps(chunk, chunk + 1):
            return Chunk.DURABLE
        given = self._given.overlaps(chunk, chunk + 1)
        return Chunk.COPIED if given else Chunk.LACKING

    # What a resync gives to it

    def begin(self) -> None:
        """Note that a resync of it begins: it was given nothing yet."""
        self.mirroring = False
        self._given, self._durable, self._copied = RangeSet(), RangeSet(), {}

    def gets(self, chunks: range, *, mirrored: bool) -> bool:
        """Whether a change of *chunks* that begins now goes to it, too; else it lacks them.

        Not where it lacks all of them: they will be copied in any case, and who changes them need
        not wait for that. *mirrored*: as if it were `mirroring`.
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
        """Note that it is about to be given what *sources* hold of *chunks*: LACKING -> COPIED.

        The caller has locked them, until that is done.
        """
        self._given.add(chunks.start, chunks.stop)
        for source in sources:
            self._sources.setdefault(source, RangeSet()).add(chunks.start, chunks.stop)

    def copied(self, chunks: range) -> None:
        """Note that it was given all of *chunks*.

        What it lacks again meanwhile, because its source lost it, it still lacks.
        """
        copied = self._copied.setdefault(self._epochs.now, RangeSet())
        for start, stop in self._given.inside(chunks.start, chunks.stop):
            copied.add(start, stop)

    @property
    def unsynced(self) -> bool:
        """Whether it was given anything that no sync covers yet."""
        return bool(self._copied)

    def synced(self, epoch: int) -> int:
        """Note that a sync covers *epoch*: COPIED -> DURABLE; returns of how many chunks."""
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
        """Note that it is on record as it is now: DURABLE -> HELD."""
        for start, end in self._durable:
            self._recorded.remove(self.bit, range(start, end))
            self._given.remove(start, end)
        self._durable = RangeSet()

    @property
    def complete(self) -> bool:
        """Whether it holds all durably, though that is not on record yet."""
        durable = sum(stop - start for start, stop in self._durable)
        waits = any(self._epochs.unsynced(self.replica))
        return durable >= self.lacking_chunks > 0 and not waits


class Targets:
    """The replicas of one set that are not current, of which one at a time is resynced."""

    def __init__(self, recorded: Recorded, epochs: Epochs) -> None:
        self.resyncing: Target | None = None
        """The replica that is being resynced."""
        self._recorded = recorded
        self._epochs = epochs
        self._targets: dict[Replica, Target] = {}

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets.values())

    def of(self, replica: Replica) -> Target:
        """What *replica* holds, which is not current, or is no more."""
        if replica not in self._targets:
            self._targets[replica] = Target(replica, self._recorded, self._epochs)
        return self._targets[replica]

    def lacks(self, chunks: range) -> None:
        """Have the replica that is being resynced, if there is one, be given *chunks* again."""
        if self.resyncing is not None:
            self.resyncing.lacks(chunks)

    def lost_by(self, source: Replica, chunks: range) -> None:
        """Have all be given again what was copied to them from *source*, which lost *chunks*."""
        for target in self:
            target.lost_by(source, chunks)

    def joined(self) -> None:
        """Note that the replica that was being resynced is current."""
        assert self.resyncing is not None
        del self._targets[self.resyncing.replica]
        self.resyncing = None
