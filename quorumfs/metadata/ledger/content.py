"""What each current replica holds of each chunk. Pure: no I/O, no clock.

======= ====================================================== ==========================
state   meaning                                                kept in
======= ====================================================== ==========================
DURABLE a good sync covers the last change                     `quorumfs.metadata.ledger.epochs`
CACHED  no good sync covers the last change yet                `quorumfs.metadata.ledger.epochs`
RISKED  a sync failed, and no other replica holds more: what   memory alone
        this one shows is all that is left
LACKING a sync failed, and others hold more                    the replica's ``out_of_sync`` bit
======= ====================================================== ==========================

DURABLE and CACHED are told apart by time alone, so the table `CONTENT` has one row for both: HELD.

While a flush waits for other replicas, a failed sync is *pending*: its replica is not believed for
what it has not synced, but which of the states that becomes depends on the other replicas, and is
decided when all have answered. The bits of what would be lacking may be on record by then, should
the daemon die first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.replica.replica import Replica


class Held(Enum):
    """What a current replica has of one chunk."""

    HELD = "held"
    RISKED = "risked"
    LACKING = "lacking"


class Event(Enum):
    """What happens to a chunk of a current replica."""

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
    # Whoever lacked it before is not the last that holds it: `Content.losers` never says so.
    (Held.LACKING, Event.LOST_BY_THE_LAST): Held.LACKING,
    (Held.LACKING, Event.TAKEN): Held.HELD,
}


class Content:
    """What the current replicas of one set hold."""

    def __init__(self, recorded: Recorded) -> None:
        self.members: Sequence[Replica] = ()
        """The current replicas."""
        self.lossy: set[Replica] = set()
        """The members that lack something, and can be given it: exactly those with a
        ``out_of_sync`` bit that are not truncated, but for what is pending."""
        self.truncated: set[Replica] = set()
        """Members whose image lost its end: it may get it back, with zeros. They lack all."""
        self.losses = 0
        """How often a member lost something."""
        self._recorded = recorded
        self._map = recorded.map
        self._risked: dict[Replica, RangeSet] = {}
        """By member, the chunks that are RISKED."""
        self._pending: dict[Replica, RangeSet] = {}
        """By member whose sync failed while the flush waits for others: the chunks that it may have
        lost, without those that it lacked before."""

    def __bool__(self) -> bool:
        """Whether a member is not to be believed everywhere."""
        return bool(self.lossy or self.truncated or self._pending)

    # What is asked

    def state(self, replica: Replica, chunk: int) -> Held:
        """What *replica*, a member, has of *chunk*; what is pending is not decided yet."""
        ((_, state),) = self._states(replica, range(chunk, chunk + 1))
        return state

    def _states(self, replica: Replica, chunks: range) -> Iterator[tuple[range, Held]]:
        """Cut *chunks* where the state of *replica* changes."""
        kept = (self.lacked(replica, chunks), self._risked.get(replica, _NOTHING))
        for start, stop, outside in segments(chunks.start, chunks.stop, kept):
            state = Held.LACKING if 0 not in outside else Held.RISKED
            yield range(start, stop), state if len(outside) < len(kept) else Held.HELD

    def lacked(self, replica: Replica, chunks: range) -> RangeSet:
        """What of *chunks* is LACKING on *replica*, a member."""
        lacking = RangeSet()
        if replica in self.truncated:
            lacking.add(chunks.start, chunks.stop)
        elif replica in self.lossy:
            for run in self._map.runs_in(_bit(replica), chunks):
                lacking.add(run.start, run.stop)
            for start, stop in self._pending.get(replica, _NOTHING).inside(
                chunks.start, chunks.stop
            ):
                lacking.remove(start, stop)
        return lacking

    def unbelieved(self, replica: Replica, chunks: range) -> RangeSet:
        """What of *chunks* is LACKING on *replica*, a member, or pending."""
        lacking = self.lacked(replica, chunks)
        return lacking.union(self._pending[replica]) if replica in self._pending else lacking

    def risked(self, replica: Replica) -> RangeSet:
        """The chunks that are RISKED on *replica*."""
        return self._risked.get(replica, _NOTHING)

    @property
    def risking(self) -> bool:
        """Whether any chunk is RISKED on a member."""
        return bool(self._risked)

    @property
    def unsafe(self) -> set[Replica]:
        """The members that lost something, whatever of it."""
        return {*self.lossy, *self._risked, *self._pending}

    @property
    def lacking(self) -> set[Replica]:
        """The members that lack something."""
        return self.lossy | self.truncated

    def lacks_any(self, chunks: range) -> bool:
        """Whether a member lacks any of *chunks*, and can be given it."""
        return any(self.lacked(replica, chunks) for replica in self.lossy)

    def lost_any(self, chunks: range) -> bool:
        """Whether any of *chunks* is RISKED on a member, or LACKING and can be given to it."""
        risked = self._risked.values()
        return self.lacks_any(chunks) or any(
            places.overlaps(chunks.start, chunks.stop) for places in risked
        )

    def lost_chunks(self) -> RangeSet:
        """The chunks that are RISKED on a member, or LACKING and can be given to it."""
        everything, lost = range(len(self._map)), RangeSet()
        for places in (
            *(self.lacked(replica, everything) for replica in self.lossy),
            *self._risked.values(),
        ):
            lost = lost.union(places)
        return lost

    # What becomes of a failed sync

    def suspend(self, replica: Replica, runs: Iterable[range]) -> None:
        """Note that a sync of *replica*, a member, failed: *runs*, which it has not synced, may be
        lost.
        """
        self.losses += 1
        pending = self._pending.setdefault(replica, RangeSet())
        for run in runs:
            for start, stop in self.lacked(replica, run).outside(run.start, run.stop):
                pending.add(start, stop)

    def would_lack(self) -> Iterator[tuple[range, list[Replica]]]:
        """What is LACKING, and on whom, if no other sync of the flush fails."""
        pending = dict(self._pending)
        for places in list(pending.values()):
            for start, stop in places:
                for part, lacking, _ in self.losers(pending, range(start, stop)):
                    yield part, lacking

    def losers(
        self, losses: Mapping[Replica, RangeSet], chunks: range
    ) -> Iterator[tuple[range, list[Replica], list[Replica]]]:
        """Cut *chunks* where it changes what becomes of those who lost them by *losses* (chunks).

        Yields with each part the replicas that lack it from then on, because others hold more of
        it, and those that are the last that held it. A replica that lacked it before is neither.
        """
        before = {replica: self.lacked(replica, chunks) for replica in self.members}
        known = (before, losses, self._risked)
        cuts = [places for each in known for places in each.values()]
        for start, stop, _ in segments(chunks.start, chunks.stop, cuts):
            lacked, losing, risked = (whose(each, start, stop) for each in known)
            gone = [r for r in self.members if r in losing and r not in lacked]
            left = [r for r in self.members if r not in losing and r not in lacked]
            lacking = gone
            if all(replica in risked for replica in left):  # no better than one that risked some
                lacking = [replica for replica in gone if left and replica in risked]
            yield range(start, stop), lacking, [one for one in gone if one not in lacking]

    @property
    def pending(self) -> set[Replica]:
        """The members whose failed sync is not decided yet."""
        return set(self._pending)

    def lose(self, replicas: Iterable[Replica], chunks: range) -> None:
        """Note that *chunks* are lost by *replicas*, while others hold more."""
        self._tell(Event.LOST, replicas, chunks)

    def risk(self, replicas: Iterable[Replica], chunks: range) -> None:
        """Note that *replicas*, the last that hold *chunks*, may have lost some of them."""
        self._tell(Event.LOST_BY_THE_LAST, replicas, chunks)

    def took(self, replicas: Iterable[Replica], chunks: range) -> None:
        """Note that *replicas* hold what others hold of *chunks*."""
        self._tell(Event.TAKEN, replicas, chunks)

    def decided(self, replicas: Iterable[Replica]) -> None:
        """Note that nothing of *replicas* is pending any more: what is on record holds."""
        for replica in list(replicas):
            if self._pending.pop(replica, None):
                self.recall(replica)

    def truncate(self, replica: Replica) -> None:
        """Note that the image of *replica*, a member, lost its end."""
        self.truncated.add(replica)
        self.lossy.discard(replica)
        self.losses += 1
        self._recorded.add(_bit(replica), range(len(self._map)))

    def recall(self, replica: Replica) -> None:
        """Take for LACKING on *replica* whatever has its ``out_of_sync`` bit."""
        if self._map.count(_bit(replica)):
            self.lossy.add(replica)

    def forget(self, replica: Replica) -> None:
        """Note that *replica* is a member no more: its out-of-sync bits alone say what it lost."""
        for kept in (self._risked, self._pending):
            kept.pop(replica, None)
        for members in (self.lossy, self.truncated):
            members.discard(replica)

    def _tell(self, event: Event, replicas: Iterable[Replica], chunks: range) -> None:
        for replica in replicas:
            if replica in self.truncated:
                continue
            for part, state in list(self._states(replica, chunks)):
                if state is not CONTENT[state, event]:
                    self._put(replica, part, CONTENT[state, event])

    def _put(self, replica: Replica, chunks: range, state: Held) -> None:
        bit, risked = _bit(replica), self._risked.setdefault(replica, RangeSet())
        (risked.add if state is Held.RISKED else risked.remove)(chunks.start, chunks.stop)
        if not risked:
            del self._risked[replica]
        if state is Held.LACKING:
            self._recorded.add(bit, chunks)
            self.lossy.add(replica)
            if replica in self._pending:
                self._pending[replica].remove(chunks.start, chunks.stop)
            return
        self._recorded.remove(bit, chunks)
        if replica in self.lossy and not self._map.any(bit, range(len(self._map))):
            self.lossy.remove(replica)


def whose(places: Mapping[Replica, RangeSet], start: int, stop: int) -> list[Replica]:
    """The replicas of whose *places* some are in ``[start, stop)``."""
    return [replica for replica, theirs in places.items() if theirs.overlaps(start, stop)]


def _bit(replica: Replica) -> int:
    """What says that *replica*, which has a slot, lacks something."""
    assert replica.slot is not None
    return out_of_sync(replica.slot)


_NOTHING = RangeSet()
