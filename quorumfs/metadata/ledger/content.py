"""The state of each chunk on each member. Pure: no I/O, no clock.

======= ====================================================== ==========================
state   meaning                                                kept in
======= ====================================================== ==========================
DURABLE a good sync covers the last change                     `Epochs`
CACHED  no good sync covers the last change yet                `Epochs`
RISKED  a sync failed, and no other member holds more: the     memory alone
        data that the member shows is all that is left
LACKING a sync failed, and another member holds more           the member's ``out_of_sync`` bit
======= ====================================================== ==========================

Only epochs tell DURABLE from CACHED, so the table `CONTENT` has a single row for both: HELD.

While a flush waits for other members, a failed sync is *pending*: the member is not believed for
its unsynced chunks. Whether these chunks become RISKED or LACKING depends on the other members, and
is decided when all have answered. The bits of the chunks that would be LACKING may be recorded
before, in case the daemon dies first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.replica.replica import Replica


class Held(Enum):
    """The content of a chunk on a member."""

    HELD = "held"
    RISKED = "risked"
    LACKING = "lacking"


class Event(Enum):
    """An event in the life of a chunk on a member."""

    LOST = "a sync failed, and another replica holds more"
    LOST_BY_THE_LAST = "a sync failed, and no other replica holds more"
    TAKEN = "the replica took what others hold"


CONTENT = {
    (Held.HELD, Event.LOST): Held.LACKING,
    (Held.HELD, Event.LOST_BY_THE_LAST): Held.RISKED,
    (Held.HELD, Event.TAKEN): Held.HELD,
    (Held.RISKED, Event.LOST): Held.LACKING,
    (Held.RISKED, Event.LOST_BY_THE_LAST): Held.RISKED,
    (Held.RISKED, Event.TAKEN): Held.HELD,
    (Held.LACKING, Event.LOST): Held.LACKING,
    # `Content.losers` never says so: a member lacking the chunk is not the last to hold it.
    (Held.LACKING, Event.LOST_BY_THE_LAST): Held.LACKING,
    (Held.LACKING, Event.TAKEN): Held.HELD,
}


class Content:
    """The content of the members of a set."""

    def __init__(self, recorded: Recorded) -> None:
        self.members: Sequence[Replica] = ()
        """The current replicas."""
        self.lossy: set[Replica] = set()
        """The members that lack chunks and can be given them. A member is lossy iff not truncated
        and out of sync in some chunk, apart from chunks pending."""
        self.truncated: set[Replica] = set()
        """Members whose image lost its end. All chunks are LACKING, even if the size grows back."""
        self.gone: set[Replica] = set()
        """The members whose file system was gone when a sync of theirs failed, and that have not
        synced since: what they may have lost is counted, and opening them again adds no loss."""
        self.losses = 0
        """The number of losses by members until now."""
        self._recorded = recorded
        self._map = recorded.map
        self._risked: dict[Replica, RangeSet] = {}
        """By member, the chunks that are RISKED."""
        self._pending: dict[Replica, RangeSet] = {}
        """By member with a failed sync, while the flush waits for others: chunks possibly lost, not
        LACKING before."""

    def __bool__(self) -> bool:
        """Whether any member is lossy, truncated, or has a pending loss."""
        return bool(self.lossy or self.truncated or self._pending)

    # Questions

    def state(self, replica: Replica, chunk: int) -> Held:
        """The state of *chunk* on *replica*, a member, before pending losses are decided."""
        ((_, state),) = self._states(replica, range(chunk, chunk + 1))
        return state

    def _states(self, replica: Replica, chunks: range) -> Iterator[tuple[range, Held]]:
        """Cut *chunks* where the state on *replica* changes."""
        kept = (self.lacked(replica, chunks), self._risked.get(replica, _NOTHING))
        states = (Held.LACKING, Held.RISKED)
        for start, stop, inside in segments(chunks.start, chunks.stop, kept):
            yield range(start, stop), states[inside[0]] if inside else Held.HELD

    def lacked(self, replica: Replica, chunks: range) -> RangeSet:
        """The part of *chunks* LACKING on *replica*, a member."""
        lacking = RangeSet()
        if replica in self.truncated:
            lacking.add(chunks.start, chunks.stop)
        elif replica in self.lossy:
            for run in self._map.runs_in(bit(replica), chunks):
                lacking.add(run.start, run.stop)
            for start, stop in self._pending.get(replica, _NOTHING).inside(
                chunks.start, chunks.stop
            ):
                lacking.remove(start, stop)
        return lacking

    def unbelieved(self, replica: Replica, chunks: range) -> RangeSet:
        """The part of *chunks* LACKING or pending on *replica*, a member."""
        lacking = self.lacked(replica, chunks)
        return lacking.union(self._pending[replica]) if replica in self._pending else lacking

    def risked(self, replica: Replica) -> RangeSet:
        """The chunks RISKED on *replica*."""
        return self._risked.get(replica, _NOTHING)

    @property
    def risking(self) -> bool:
        """Whether any chunk is RISKED on a member."""
        return bool(self._risked)

    @property
    def unsafe(self) -> set[Replica]:
        """The members with LACKING, RISKED or pending chunks; truncation alone does not count."""
        return {*self.lossy, *self._risked, *self._pending}

    @property
    def lacking(self) -> set[Replica]:
        """The members with LACKING chunks."""
        return self.lossy | self.truncated

    def lacks_any(self, chunks: range) -> bool:
        """Whether any of *chunks* is LACKING on a lossy member."""
        return any(self.lacked(replica, chunks) for replica in self.lossy)

    def lost(self, chunks: range) -> RangeSet:
        """The part of *chunks* RISKED on a member, or LACKING on a lossy member."""
        lost = RangeSet()
        for replica in self.lossy:
            lost = lost.union(self.lacked(replica, chunks))
        for places in self._risked.values():
            for start, stop in places.inside(chunks.start, chunks.stop):
                lost.add(start, stop)
        return lost

    # Failed syncs

    def suspend(self, replica: Replica, runs: Iterable[range]) -> None:
        """Note a failed sync of *replica*, a member: the loss of *runs* (unsynced) is pending."""
        self.losses += 1
        pending = self._pending.setdefault(replica, RangeSet())
        for run in runs:
            for start, stop in self.lacked(replica, run).outside(run.start, run.stop):
                pending.add(start, stop)

    def would_lack(self) -> Iterator[tuple[range, list[Replica]]]:
        """The chunks to become LACKING, each with its members, if no further sync fails."""
        pending = dict(self._pending)
        for places in list(pending.values()):
            for start, stop in places:
                for part, lacking, _ in self.losers(pending, range(start, stop)):
                    yield part, lacking

    def losers(
        self, losses: Mapping[Replica, RangeSet], chunks: range
    ) -> Iterator[tuple[range, list[Replica], list[Replica]]]:
        """Cut *chunks* where the outcome of *losses* (chunks by replica) changes.

        Yields with each part the members on which the part becomes LACKING, because other members
        hold more, and the members that are the last to hold the part. Neither list names a member
        on which the part was LACKING before.
        """
        before = {replica: self.lacked(replica, chunks) for replica in self.members}
        known = (before, losses, self._risked)
        cuts = [places for each in known for places in each.values()]
        for start, stop, _ in segments(chunks.start, chunks.stop, cuts):
            lacked, losing, risked = (whose(each, start, stop) for each in known)
            gone = [r for r in self.members if r in losing and r not in lacked]
            left = [r for r in self.members if r not in losing and r not in lacked]
            lacking = gone
            if all(replica in risked for replica in left):  # all left are RISKED, too
                lacking = [replica for replica in gone if left and replica in risked]
            yield range(start, stop), lacking, [one for one in gone if one not in lacking]

    @property
    def pending(self) -> set[Replica]:
        """The members with a pending failed sync."""
        return set(self._pending)

    def lose(self, replicas: Iterable[Replica], chunks: range) -> None:
        """Note the loss of *chunks* on *replicas*, while other members hold more."""
        self._tell(Event.LOST, replicas, chunks)

    def risk(self, replicas: Iterable[Replica], chunks: range) -> None:
        """Note a possible loss of *chunks* on *replicas*, the last members to hold *chunks*."""
        self._tell(Event.LOST_BY_THE_LAST, replicas, chunks)

    def took(self, replicas: Iterable[Replica], chunks: range) -> None:
        """Note *replicas* as holding the same data of *chunks* as other members."""
        self._tell(Event.TAKEN, replicas, chunks)

    def decided(self, replicas: Iterable[Replica]) -> None:
        """End the pending losses of *replicas*: the ``out_of_sync`` bits tell the outcome."""
        for replica in list(replicas):
            if self._pending.pop(replica, None):
                self.recall(replica)

    def truncate(self, replica: Replica) -> None:
        """Note the truncation of the image of *replica*, a member."""
        self.truncated.add(replica)
        self.lossy.discard(replica)
        self.losses += 1
        self._recorded.add(bit(replica), range(len(self._map)))

    def recall(self, replica: Replica) -> None:
        """Count every chunk with the ``out_of_sync`` bit of *replica* as LACKING."""
        if self._map.count(bit(replica)):
            self.lossy.add(replica)

    def forget(self, replica: Replica) -> None:
        """Forget *replica*, a member no more: its out-of-sync bits alone tell the losses."""
        for kept in (self._risked, self._pending):
            kept.pop(replica, None)
        for members in (self.lossy, self.truncated, self.gone):
            members.discard(replica)

    def _tell(self, event: Event, replicas: Iterable[Replica], chunks: range) -> None:
        for replica in replicas:
            if replica in self.truncated:
                continue
            for part, state in list(self._states(replica, chunks)):
                # A bit that was recorded while others were awaited is decided on, too.
                if replica in self._pending or state is not CONTENT[state, event]:
                    self._put(replica, part, CONTENT[state, event])

    def _put(self, replica: Replica, chunks: range, state: Held) -> None:
        lacking, risked = bit(replica), self._risked.setdefault(replica, RangeSet())
        (risked.add if state is Held.RISKED else risked.remove)(chunks.start, chunks.stop)
        if not risked:
            del self._risked[replica]
        if state is not Held.RISKED and replica in self._pending:
            self._pending[replica].remove(chunks.start, chunks.stop)
        if state is Held.LACKING:
            self._recorded.add(lacking, chunks)
            self.lossy.add(replica)
            return
        self._recorded.remove(lacking, chunks)
        if replica in self.lossy and not self._map.any(lacking, range(len(self._map))):
            self.lossy.remove(replica)


def whose(places: Mapping[Replica, RangeSet], start: int, stop: int) -> list[Replica]:
    """The replicas with any of *places* in ``[start, stop)``."""
    return [replica for replica, theirs in places.items() if theirs.overlaps(start, stop)]


def bit(replica: Replica) -> int:
    """The ``out_of_sync`` bit of *replica*, which has a slot."""
    assert replica.slot is not None
    return out_of_sync(replica.slot)


_NOTHING = RangeSet()
