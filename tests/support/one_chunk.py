"""One chunk of a disk, on two or three replicas, and every history of it, to the end.

Chunks are independent of each other but for syncs, ejections and crashes, and those happen to each
of them by itself: so one chunk, explored until no new state appears, stands for all of them.

The ledger is the real one. `World` does around it what the sidecars, the disk and its repairs do,
each step at once, and knows the truth: what each replica shows, what a power cut leaves of that,
what a reader may see. Whatever happened, all becomes equal when faults stop. Left out are
adoption, parts of chunks, resyncs, and discard.
"""

import errno
import pickle
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, count
from types import SimpleNamespace
from typing import Any, cast

from quorumfs.decisions.dirtymap import CHUNK_MIN, DirtyMap, out_of_sync
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import Identity, Record, RoleState
from quorumfs.decisions.voting import reconcile
from quorumfs.metadata.ledger.commit import Eject, Records
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

CHUNK = range(1)
SIZE = CHUNK_MIN
PLACE = 0, SIZE
"""Offset and length, bytes."""


class BrokenError(Exception):
    """A promise, or an invariant of the ledger."""


@dataclass(eq=False)
class Copy:
    """What one replica holds, as versions of the chunk; what the ledger knows of a replica."""

    slot: int
    shown: int = 0
    durable: int = 0
    """What a power cut leaves."""
    dropped: bool = False
    """It could not be written back, and the next sync says so."""
    ghost: bool = False
    """A sync said so, and it is shown still, as long as memory is not short."""
    standing: Standing = Standing.CURRENT
    reason: str | None = None
    state: Standing = Standing.CURRENT
    hung: bool = False
    path: str = field(init=False)

    def __post_init__(self) -> None:
        self.path = f"/{'abc'[self.slot]}.img"

    @property
    def lossy(self) -> bool:
        """What it shows is not to last."""
        return (self.dropped or self.ghost) and self.shown != self.durable

    def put(self, version: int) -> None:
        """It is written to."""
        self.shown, self.ghost = version, False

    def evict(self) -> None:
        """Memory is short."""
        self.shown, self.ghost = self.durable, False


def failed(kind: Kind) -> Operation:
    """An operation that failed."""
    operation = Operation(kind)
    operation.error = OSError(errno.EIO, "simulated")
    return operation


def _nobody() -> None:
    """Is told of changes."""


class Image:
    """A world as it is now."""

    def __init__(self, world: "World") -> None:
        self._pickled = pickle.dumps(world, pickle.HIGHEST_PROTOCOL)

    def world(self) -> "World":
        """Another one."""
        return cast("World", pickle.loads(self._pickled))


class World:
    """A set in use, and what is true of it."""

    def __init__(self, replicas: int, threshold: int, writes: int) -> None:
        """*writes*: how often it is written to, at most."""
        numbers = count(1)
        self.copies = [Copy(slot) for slot in range(replicas)]
        self.threshold = threshold
        self.writes_left = writes
        self.allowed = frozenset({0})
        """What a read may give."""
        self.kept = frozenset({0})
        """What it may give after a power cut."""
        self.owed = False
        """Something is lost that no replica can make good, and no flush has failed since."""
        self.version = 0
        self.on_record = bytes(1)
        """The map in the sidecars."""
        record = new_record(
            [one.path for one in self.copies],
            SIZE,
            threshold,
            random_bytes=lambda size: next(numbers).to_bytes(size),
        )
        self.ledger = self.loaded(record)

    def loaded(self, record: Record) -> Ledger:
        """What the next mount knows."""
        known = DirtyMap(SIZE, CHUNK_MIN, [bytearray(self.on_record)])
        members, found = [], []
        for one, role in zip(self.copies, record.roles, strict=True):
            state = Standing.CURRENT if role.state is RoleState.CURRENT else Standing.STALE
            members.append(Member(one.path, one.slot, state))
            own = cast("Any", SimpleNamespace(record=record, map=known.copy(), unreadable=()))
            found.append(Found(one.path, Identity(one.slot + 1, SIZE, 1, 1), own))
        plan = Plan("simulated", record, self.threshold, known, tuple(members))
        return Ledger(
            cast("Sequence[Replica]", self.copies),
            plan,
            found,
            Records(plan, threshold=self.threshold, identity=record.sequence + 1),
            read_only=False,
            notify=_nobody,
        )

    def copy(self) -> "World":
        """Another one that is as it is."""
        return Image(self).world()

    @property
    def members(self) -> list[Copy]:
        return [one for one in self.copies if one.standing is Standing.CURRENT]

    def truth_of(self, replica: Replica) -> Copy:
        """What a replica really holds."""
        return cast("Copy", replica)

    # What the sidecars do

    def record_map(self) -> None:
        version = self.ledger.recorded.begin_write()
        self.on_record = bytes(self.ledger.map.planes[0])
        self.ledger.recorded.written(version)

    def commit(self, *, clean: bool = False) -> None:
        ledger = self.ledger
        steps = ledger.records.commit(
            ledger.members,
            clean=clean,
            resyncing=None,
            joining=None,
            enough_without=ledger.enough_without,
        )
        with suppress(StopIteration):
            effect = next(steps)
            while True:
                assert not isinstance(effect, Eject)
                effect = steps.send({})
        ledger.arrange()

    def open(self, *, to_change: bool = False) -> None:
        ledger = self.ledger
        unrecorded = not ledger.membership.recorded and len(self.members) >= ledger.records.quorum
        if not ledger.in_use or unrecorded or (to_change and ledger.unentered):
            ledger.records.changing = ledger.records.changing or to_change
            self.record_map()
            self.commit()
            ledger.in_use = True
            ledger.arrange()

    def prepare(self, *, repair: bool = False) -> None:
        ledger = self.ledger
        while not ledger.prepared(*PLACE, repair=repair):
            self.open(to_change=not repair)
            if not ledger.membership.recorded:
                raise OSError(errno.EIO, "too few replicas are current")
            ledger.marks.want(*PLACE, ahead=False)
            self.record_map()

    def eject(self, gone: Sequence[Replica]) -> None:
        ledger = self.ledger
        gone = [replica for replica in dict.fromkeys(gone) if replica.standing is Standing.CURRENT]
        if not gone and (ledger.membership.recorded or not ledger.in_use):
            return
        if not ledger.enough_without(gone):
            raise OSError(errno.EIO, "too few replicas would be left")
        ledger.eject(gone, "simulated")
        self.record_map()
        self.commit()

    # What the disk and its repairs do

    def sync(self) -> None:
        """Raises `OSError` if too few could."""
        ledger = self.ledger
        content = ledger.content
        holding = [r for r in ledger.members if not content.unbelieved(r, CHUNK)]
        sound = [replica for replica in holding if not content.risked(replica)]
        all_lose = all(self.truth_of(replica).dropped for replica in sound or holding)
        ledger.begin_flush(())
        outcomes: list[Outcome] = []
        noted = False
        for replica in ledger.flush_receivers:
            one = self.truth_of(replica)
            operation = failed(Kind.SYNC) if one.dropped else Operation(Kind.SYNC)
            one.ghost = one.ghost or one.dropped
            one.durable, one.dropped = one.durable if one.ghost else one.shown, False
            ledger.sync_ended(replica, operation)
            outcomes.append(Outcome(replica, operation))
            if operation.error and len(outcomes) < len(ledger.flush_receivers) and not noted:
                ledger.chunks.note_pending()  # others are awaited
                self.record_map()
                noted = True
        try:
            self.eject(ledger.unfit(outcomes))
        except OSError:
            if lossy := [outcome.replica for outcome in outcomes if outcome.error]:
                ledger.chunks.lose(lossy)
                self.record_map()
                if all_lose and len(holding) > 1:
                    self.allowed |= self.kept  # who of them lost more nobody can know
                    self.owed = True
            raise
        finally:
            ledger.chunks.end_flush()

    def settle(self, takers: Sequence[Copy]) -> None:
        """*takers* can be written to."""
        ledger = self.ledger
        if not ledger.agreement.divergent:
            return
        self.open()
        with suppress(OSError):
            self.sync()
        if not ledger.agreement.divergent:
            return
        ((_, sources),) = ledger.chunks.sources.of(CHUNK)
        answers = [(r.slot or 0, bytes([self.truth_of(r).shown])) for r in sources]
        ledger.chunks.sources.pin_source(sources[0], ledger.map.chunks(*PLACE))
        data = reconcile(answers, 0).data
        assert data is not None
        self.prepare(repair=True)
        asked = [
            replica
            for replica in ledger.members
            if self.truth_of(replica).shown != data[0]
            or not ledger.chunks.durable_on(replica, CHUNK)
        ]
        refused = [replica for replica in asked if self.truth_of(replica) not in takers]
        with ledger.giving(asked, *PLACE):
            for replica in asked:
                if replica not in refused:
                    self.truth_of(replica).put(data[0])
        if len(ledger.members) - len(refused) >= self.threshold:
            for replica in refused:
                with suppress(OSError):
                    self.eject([replica])
        refused = [replica for replica in refused if replica.standing is Standing.CURRENT]
        if refused:
            ledger.chunks.equalized_in_part(refused, CHUNK)
        else:
            ledger.equalized(CHUNK)
            self.prepare(repair=True)

    def make_durable(self, takers: Sequence[Copy]) -> None:
        """Raises `OSError` if that cannot be."""
        if self.ledger.unflushable():
            self.settle(takers)
            if self.ledger.unflushable():
                raise OSError(errno.EIO, "it may differ")
        self.sync()

    def flush(self, takers: Sequence[Copy]) -> None:
        """Raises `OSError` if it fails."""
        try:
            self.make_durable(takers)
        except OSError:
            self.ledger.tell_loss()
            raise
        if self.ledger.tell_loss():
            raise OSError(errno.EIO, "lost on all")

    # What may happen, and what of it is right

    @property
    def possible(self) -> frozenset[int]:
        """What a read may give, if a sync told of all losses before."""
        if any(one.shown in self.allowed and not one.lossy for one in self.members):
            return self.allowed
        return self.allowed | self.kept  # it is lost on all

    def write(self, took: Sequence[Copy], silently: Sequence[Copy], takers: Sequence[Copy]) -> str:
        """Those who *took* it say so; others fail, though some took it *silently*."""
        ledger = self.ledger
        before = self.possible
        self.version += 1
        self.writes_left -= 1
        if ledger.lossy(*PLACE):
            self.settle(takers)
            if ledger.lossy(*PLACE):
                self.allowed |= before
                return "refused"
        self.prepare()
        outcomes = []
        for replica in ledger.begin(*PLACE):
            one = self.truth_of(replica)
            if one in took or one in silently:
                one.put(self.version)
            outcomes.append(
                Outcome(replica, Operation(Kind.WRITE) if one in took else failed(Kind.WRITE))
            )
        ledger.note_written(CHUNK)
        try:
            if sum(outcome.error is None for outcome in outcomes) < self.threshold:
                raise OSError(errno.EIO, "too few took it")
            self.eject([outcome.replica for outcome in outcomes if outcome.error])
        except OSError:
            ledger.chunks.diverge(CHUNK)
            self.allowed |= before | {self.version}
            self.kept |= {self.version}
            return "failed"
        self.allowed, self.kept = frozenset({self.version}), self.kept | {self.version}
        return "acknowledged"

    def read(self, takers: Sequence[Copy]) -> Iterator[tuple[str, "World"]]:
        """Each answer that it may get."""
        ledger, possible = self.ledger, self.possible
        if ledger.may_differ(*PLACE):
            self.settle(takers)
        if ledger.may_differ(*PLACE):
            yield "EIO", self
            return
        for replica in {one for segment in ledger.read_segments(*PLACE) for one in segment.holders}:
            shown = self.truth_of(replica).shown
            if shown not in possible | self.allowed:
                raise BrokenError(f"a read gives {shown}, of {set(possible | self.allowed)}")
            after = self.copy()
            after.owed = after.owed or shown not in after.allowed
            after.allowed = frozenset({shown})
            yield str(shown), after

    def crash(self, *, power: bool) -> None:
        """Kill the daemon, or cut the power; then mount."""
        self.allowed, self.owed = self.kept if power else self.possible, False
        record = self.ledger.record
        for one in self.copies:
            if power:
                one.shown, one.dropped, one.ghost = one.durable, False, False
        self.ledger = self.loaded(record)

    def unmount(self) -> None:
        """Close it in order, and mount it again; it has been flushed."""
        ledger = self.ledger
        if ledger.membership.recorded and (ledger.in_use or not ledger.record.clean):
            self.commit(clean=True)
            ledger.in_use = False
            ledger.arrange()
            ledger.marks.clear_all()
        self.record_map()
        self.ledger = self.loaded(ledger.record)

    def forget_marks(self, takers: Sequence[Copy]) -> None:
        """It has not been written to for long."""
        ledger = self.ledger
        self.make_durable(takers)
        if ledger.in_use and ledger.membership.recorded:
            ledger.marks.intents.look_anew()
            self.commit()
            if ledger.all_current():
                ledger.marks.clear([CHUNK], ())
            self.record_map()

    def calm(self) -> None:
        """Faults stop. Raises `BrokenError` if repairs and flushes do not come to an end then."""
        for _ in range(3):
            self.settle(self.members)
            with suppress(OSError):
                self.flush(self.members)
        try:
            self.flush(self.members)
        except OSError:
            raise BrokenError("flushes fail for ever") from None
        if not self.ledger.uniform_members:
            raise BrokenError("replicas differ for ever")

    # What must hold at any time

    def check(self) -> None:
        """Raise `BrokenError` where an invariant of the ledger does not hold."""
        if not any(one.shown in self.allowed for one in self.members):
            self.owed, self.allowed = True, self.allowed | self.kept
        ledger, content = self.ledger, self.ledger.content
        lost = [bool(content.unbelieved(replica, CHUNK)) for replica in ledger.members]
        bits = [ledger.map.any(out_of_sync(replica.slot or 0), CHUNK) for replica in ledger.members]
        waits = any(ledger.epochs.waits(replica, CHUNK) for replica in ledger.members)
        unequal = bool(ledger.agreement.divergent or content.risking) or any(lost)
        marked = ledger.recorded.holds(CHUNK, 0)
        rules = {
            "R1: what is unequal, or not synced, is marked durably": marked or not unequal,
            "R5: what is not synced is marked durably": marked or not waits,
            "what a current replica lost is its bit": lost == bits,
            "somebody is believed": not all(lost),
            "what was lost may differ": bool(ledger.agreement.divergent) or not any(lost),
            "who is current is on record": not ledger.in_use or ledger.membership.recorded,
        }
        for rule, holds in rules.items():
            if not holds:
                raise BrokenError(rule)

    @property
    def key(self) -> tuple[object, ...]:
        """All that tells it from another one."""
        ledger, pin = self.ledger, self.ledger.chunks.sources._pin
        return (
            self.allowed,
            self.kept,
            self.owed,
            self.version,
            self.on_record,
            bytes(ledger.map.planes[0]),
            ledger.in_use,
            ledger.record.clean,
            ledger.chunks.writeback_errors_surfaced,
            ledger.membership.ready,
            ledger.chunks._untold_loss,
            ledger.agreement.state(0),
            pin and pin.slot,
            *(
                (one.shown, one.durable, one.dropped, one.ghost, one.standing, *self._known_of(one))
                for one in self.copies
            ),
        )

    def _known_of(self, one: Copy) -> tuple[object, ...]:
        replica, ledger = cast("Replica", one), self.ledger
        if replica not in ledger.members:
            return ()
        return (
            ledger.epochs.waits(replica, CHUNK),
            bool(ledger.content.unbelieved(replica, CHUNK)),
            ledger.content.state(replica, 0),
        )


def subsets(copies: Sequence[Copy]) -> list[tuple[Copy, ...]]:
    """Each selection of *copies*."""
    return [some for size in range(len(copies) + 1) for some in combinations(copies, size)]


def following(world: World) -> Iterator[tuple[str, World]]:
    """Each event that may happen next, and what it leads to."""

    def chosen(after: World, some: Sequence[Copy]) -> list[Copy]:
        return [after.copies[one.slot] for one in some]

    image, members = Image(world), world.members
    doubtful = not world.ledger.uniform_members
    for took in subsets(members) if world.writes_left else ():
        for silently in subsets([one for one in members if one not in took]):
            for takers in subsets(members) if world.ledger.lossy(*PLACE) else (members,):
                after = image.world()
                with suppress(OSError):
                    how = after.write(*(chosen(after, some) for some in (took, silently, takers)))
                    yield f"write {after.version} {how}, {slots(took)} took it", after
    for one in members:
        if one.ghost:
            after = image.world()
            after.copies[one.slot].evict()
            yield f"evicted on {one.slot}", after
        elif one.shown != one.durable and not one.dropped:
            after = image.world()
            after.copies[one.slot].durable = one.shown
            yield f"written back on {one.slot}", after
            after = image.world()
            after.copies[one.slot].dropped = True
            yield f"dropped on {one.slot}", after
    for takers in subsets(members) if doubtful else (members,):
        after = image.world()
        for value, later in after.read(chosen(after, takers)):
            yield f"read: {value}, {slots(takers)} can be written to", later
        after = image.world()
        possible = world.possible
        try:
            after.flush(chosen(after, takers))
            if after.owed:
                raise BrokenError("a flush succeeds over a loss")
            after.kept = after.allowed
            yield f"flush, {slots(takers)} can be written to", after
            later = after.copy()
            later.unmount()
            yield "flush, unmount", later
        except OSError:
            after.allowed, after.owed = after.allowed | possible, False
            yield f"flush fails, {slots(takers)} can be written to", after
        after = image.world()
        with suppress(OSError):
            after.forget_marks(chosen(after, takers))
        yield f"marks are forgotten, {slots(takers)} can be written to", after
    for power in (False, True):
        after = image.world()
        after.crash(power=power)
        yield ("power cut" if power else "kill"), after


def slots(copies: Sequence[Copy]) -> list[int]:
    """Their slots."""
    return [one.slot for one in copies]


@dataclass(frozen=True, slots=True)
class Explored:
    """What was explored."""

    states: int
    transitions: int


def explore(world: World, *, limit: int = 200_000) -> Explored:
    """Every history from *world* on, until no new state appears.

    Raises `BrokenError` with the shortest one that breaks a promise, or an invariant.
    """
    seen: dict[object, None] = {world.key: None}
    ahead: deque[tuple[World, tuple[str, ...]]] = deque([(world, ())])
    transitions = 0
    while ahead:
        now, history = ahead.popleft()
        events = following(now)
        name = ""
        try:
            for name, after in events:
                transitions += 1
                after.check()
                if after.key not in seen:
                    seen[after.key] = None
                    ahead.append((after, (*history, name)))
                    after.copy().calm()
        except BrokenError as error:
            path = "; ".join([*history, f"after {name}"])
            raise BrokenError(f"{error}: {path}") from None
        assert len(seen) < limit
    return Explored(len(seen), transitions)


SIZES = ((2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (3, 2, 1))
"""Replicas, threshold, writes."""


def main() -> None:
    """Explore all sizes, or those in the arguments: ``REPLICAS,THRESHOLD,WRITES``."""
    for size in [tuple(map(int, text.split(","))) for text in sys.argv[1:]] or SIZES:
        replicas, threshold, writes = size
        began = time.monotonic()
        found = explore(World(replicas, threshold, writes))
        print(
            f"{replicas} replicas, threshold {threshold}, writes: {writes}: {found.states} states, "
            f"{found.transitions} transitions, {time.monotonic() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
