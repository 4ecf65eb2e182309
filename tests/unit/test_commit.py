"""The commit of a record, with every failure at every step, and death at each.

`Records.commit` says what to write; here it is written to sidecars of real bytes. Each holder takes
it, fails, or fails after it took it; or the daemon dies, and of what it was writing each sidecar
has all, nothing, or half. Then every subset of the replicas is assembled, as mounts may find them.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import cast

import pytest
from support.sidecars import decode, encode

from quorumfs.decisions import record as record_module
from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import CHUNK_MIN, INTENT, DirtyMap
from quorumfs.decisions.model import Found, Plan, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import Identity, Phase, RoleState, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sidecar import (
    CHUNKS_PER_PAGE,
    MAP_OFFSET,
    PAGE,
    SLOT_OFFSETS,
    encode_pages,
    encode_slot,
    pages,
)
from quorumfs.metadata.ledger.commit import Eject, GiveUp, Order, Records, Write
from quorumfs.replica.replica import Replica

SIZE = CHUNK_MIN
LARGER = (CHUNKS_PER_PAGE + 1) * CHUNK_MIN
"""With a second page of the map."""
FAILED = OSError(5, "simulated")


class DiedError(Exception):
    """The daemon is no more."""


class CancelledError(DiedError):
    """Or it is the commit alone that is no more: what was being written is there, or is not."""


@dataclass(eq=False)
class Holder:
    """What `Records` knows of a replica, and the bytes of its sidecar."""

    slot: int
    content: bytearray
    spare_slot: int = 1
    size: int = SIZE
    """Bytes of its image."""
    path: str = field(init=False)

    def __post_init__(self) -> None:
        self.path = f"/{'abc'[self.slot]}.img"

    @property
    def image(self) -> Identity:
        return Identity(self.slot + 1, self.size, 1, 1)

    @property
    def found(self) -> Found:
        return Found(self.path, self.image, decode(bytes(self.content)))

    def put(self, write: Write, *, half: bool = False) -> None:
        """As `SidecarWriter.write_slots` does."""
        number = self.spare_slot if write.phase is Phase.PREPARED else 1 - self.spare_slot
        own = write.record.roles[self.slot].replica_id
        clean = write.record.clean
        identity = self.image if clean else Identity(self.image.inode, self.size)
        slot = encode_slot(write.record, own, identity, write.phase)
        start = SLOT_OFFSETS[number]
        length = PAGE // 8 if half else PAGE  # a sector
        self.content[start : start + length] = slot[:length]


class Choices:
    """One way through a history; `again` tells whether there is another one, and takes it."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int]] = []
        self._at = 0

    def one_of(self, count: int) -> int:
        """A number below *count*."""
        if self._at == len(self._taken):
            self._taken.append((0, count))
        choice, known = self._taken[self._at]
        assert known == count
        self._at += 1
        return choice

    def again(self) -> bool:
        while self._taken:
            choice, count = self._taken.pop()
            if choice + 1 < count:
                self._taken.append((choice + 1, count))
                self._at = 0
                return True
        return False


class Set:
    """Replicas of one set, and the commits of one mount."""

    def __init__(self, count: int, threshold: int, numbers: Iterator[int]) -> None:
        paths = [f"/{name}.img" for name in "abc"[:count]]
        record = new_record(
            paths, SIZE, threshold, random_bytes=lambda size: next(numbers).to_bytes(size)
        )
        disk_map = DirtyMap(SIZE, CHUNK_MIN)
        self.threshold = threshold
        self.all = []
        for slot, role in enumerate(record.roles):
            image = Identity(slot + 1, SIZE, 1, 1)
            content = encode(Sidecar(role.replica_id, record, disk_map, image))
            self.all.append(Holder(slot, bytearray(content)))
        self.mount()

    def mount(self) -> None:
        self.records = Records(self.assembled(self.all), threshold=self.threshold, identity=7)
        self.records.changing = True

    def assembled(self, there: Sequence[Holder]) -> Plan:
        """Raises `AssemblyRefusedError`."""
        gone = [Found(one.path, None, problem="gone") for one in self.all if one not in there]
        return assemble([*(one.found for one in there), *gone])

    def commit(
        self,
        members: Sequence[Holder],
        write: Callable[[Write], dict[Holder, OSError]],
        *,
        clean: bool = False,
        resyncing: Holder | None = None,
        joining: Holder | None = None,
    ) -> list[Holder]:
        """Do what `Records.commit` says; returns the members at the end. Raises `OSError`."""
        self.members = left = list(members)

        def enough_without(gone: Sequence[Replica]) -> bool:
            return len(left) - len(gone) >= max(self.threshold, self.records.quorum)

        steps = self.records.commit(
            cast("list[Replica]", left),
            clean=clean,
            resyncing=cast("Replica | None", resyncing),
            joining=cast("Replica | None", joining),
            enough_without=enough_without,
        )
        answer: object = None
        try:
            while True:
                match steps.send(answer):
                    case Write() as effect:
                        failed = write(effect)
                        for one in failed if effect.phase is Phase.COMMITTED else ():
                            one.spare_slot = 1 - one.spare_slot
                        answer = failed
                    case Eject() as effect:
                        gone = set(cast("Sequence[Holder]", effect.gone))
                        assert gone <= set(left)
                        answer = self.members = left = [one for one in left if one not in gone]
                    case GiveUp() as effect:
                        assert cast("Holder", effect.target) is resyncing
                        answer = None
        except StopIteration:
            return left


def well(write: Write) -> dict[Holder, OSError]:
    for holder in cast("Sequence[Holder]", write.holders):
        holder.put(write)
    return {}


def in_any_way(choices: Choices, *, halves: bool) -> Callable[[Write], dict[Holder, OSError]]:
    """Have *choices* decide how each write ends."""

    def write(write: Write) -> dict[Holder, OSError]:
        holders = cast("Sequence[Holder]", write.holders)
        if holders and choices.one_of(2):
            torn = False
            for holder in holders:
                how = choices.one_of(3 if halves else 2)
                torn = torn or how == 2
                if how:
                    holder.put(write, half=how == 2)
            raise DiedError if torn else CancelledError
        failed = {}
        for holder in holders:
            how = choices.one_of(3)
            if how != 1:
                holder.put(write)
            if how:
                failed[holder] = FAILED
        return failed

    return write


def subsets(holders: Sequence[Holder]) -> Iterator[tuple[Holder, ...]]:
    for count in range(1, len(holders) + 1):
        yield from combinations(holders, count)


def current(plan: Plan) -> set[int | None]:
    return {member.slot for member in plan.members if member.state is Standing.CURRENT}


def make_longer(the_set: Set) -> None:
    """What comes before a commit with the larger size: images, and pages of the map."""
    for one in the_set.all:
        one.size = LARGER
        found = decode(bytes(one.content))
        grown = found.map.resized(LARGER)
        one.content[MAP_OFFSET:] = encode_pages(grown, found.record.set_id, 0, pages(grown) - 1)
    the_set.records.size = LARGER


KINDS = ["open", "close", "leave behind", "resync", "join", "grow"]
# Of two that are both needed none can be ejected.
CASES = [(2, 2, "open"), (2, 2, "close"), (2, 2, "grow")]
CASES += [(2, 1, kind) for kind in KINDS]
CASES += [(3, *rest) for rest in product((1, 2), KINDS) if "close" not in rest]


@pytest.mark.parametrize(("count", "threshold", "kind"), CASES)
def test_every_way_that_a_commit_may_end(
    count: int, threshold: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices, seen = Choices(), set[object]()
    ways = 0
    while not ways or choices.again():
        ways += 1
        numbers = itertools.count(1)  # the same in all ways: many end alike
        monkeypatch.setattr(record_module, "random_identity", lambda numbers=numbers: next(numbers))
        one_way(choices, Set(count, threshold, numbers), kind, seen, halves=count == 2)
    assert ways > 10


def one_way(choices: Choices, the_set: Set, kind: str, seen: set[object], *, halves: bool) -> None:
    *others, last = the_set.all
    the_set.commit(the_set.all, well)
    if kind in ("resync", "join"):
        the_set.commit(others, well)
        the_set.commit(others, well, resyncing=last)
    left: list[Holder] | None = None
    refused = False
    if kind == "grow":
        make_longer(the_set)
    try:
        left = the_set.commit(
            others if kind in ("leave behind", "resync") else the_set.all,
            in_any_way(choices, halves=halves),
            clean=kind == "close",
            resyncing=last if kind == "resync" else None,
            joining=last if kind == "join" else None,
        )
    except CancelledError:
        the_set.records.size = the_set.records.record.size
        goes_on_in_doubt(the_set)
    except DiedError:
        pass
    except OSError:
        refused = True
    the_set.records.size = the_set.records.record.size
    end = refused, left and len(left), *(bytes(one.content) for one in the_set.all)
    if end in seen:
        return
    seen.add(end)
    for there in subsets(the_set.all):
        try:
            plan = the_set.assembled(there)
        except AssemblyRefusedError:
            assert len(there) < len(the_set.all), "all are there, and a human is needed"
            continue
        assert plan.record.size in ((SIZE, LARGER) if kind == "grow" else (SIZE,))
        assert not plan.map.count(INTENT), "nothing was written, and all pages can be read"
        if left is not None:  # what depends on it has been acknowledged
            assert current(plan) <= {one.slot for one in left}
            assert kind != "grow" or plan.record.size == LARGER
        if kind == "resync":
            assert last.slot not in current(plan)
    if left is not None:
        assert the_set.records.names_only(cast("list[Replica]", left))
        assert current(the_set.assembled(the_set.all)) == {one.slot for one in left}
    if refused:
        members = [one for one in the_set.members if kind != "join" or one is not last]
        if the_set.records.names_only(cast("list[Replica]", members)):
            # Only the one that was resyncing could not take it.
            assert {decode(bytes(one.content)).record.key for one in members} == {
                the_set.records.record.key
            }
        if len(members) >= the_set.threshold:
            goes_on(the_set, members)
    # Whatever is left of it, the next mount goes on from there.
    the_set.mount()
    for one in the_set.all:
        one.spare_slot = decode(bytes(one.content)).spare_slot
    slots = current(the_set.assembled(the_set.all))
    members = [one for one in the_set.all if one.slot in slots]
    if len(members) >= the_set.threshold:
        goes_on(the_set, members)


def goes_on_in_doubt(the_set: Set) -> None:
    """The same mount knows that replicas may hold a part of what was cancelled."""
    members = the_set.members
    assert not the_set.records.names_only(cast("list[Replica]", members))
    held, records = [bytes(one.content) for one in the_set.all], copy.deepcopy(the_set.records)
    if len(members) >= the_set.threshold:
        goes_on(the_set, members)
    the_set.records = records
    for one, content in zip(the_set.all, held, strict=True):
        one.content[:] = content


def goes_on(the_set: Set, members: Sequence[Holder]) -> None:
    """The next commit leaves nobody in doubt, whatever a replica has of earlier ones."""
    the_set.commit(members, well)
    assert the_set.records.names_only(cast("list[Replica]", members))
    for there in subsets(the_set.all):
        with suppress(AssemblyRefusedError):
            assert current(the_set.assembled(there)) <= {one.slot for one in members}
    assert current(the_set.assembled(the_set.all)) == {one.slot for one in members}


STATES = (RoleState.CURRENT, RoleState.STALE, RoleState.OFFLINE)
REMOVED = Order(RoleState.REMOVED, at=1)


def test_no_record_has_fewer_replicas_than_it_needs_for_a_write() -> None:
    """Such a record is believed by nobody: the set could not be used any more."""
    removed = kept = 0
    numbers = itertools.count(1)
    for states in product(STATES, repeat=3):
        members = [slot for slot, state in enumerate(states) if state is RoleState.CURRENT]
        holders = cast("list[Replica]", [Holder(slot, bytearray()) for slot in members])
        out = [slot for slot in range(3) if slot not in members]
        for before, now, then, quorum in product((1, 2, 3), (1, 2, 3), (None, 1, 2, 3), (1, 2, 3)):
            record = new_record(
                ["/a.img", "/b.img", "/c.img"],
                SIZE,
                before,
                random_bytes=lambda size: next(numbers).to_bytes(size),
            )
            for slot, state in enumerate(states):
                record = record.with_role(slot, state=state)
            plan = Plan("any", record, now, record.new_map(), (), quorum=quorum)
            for gone in itertools.chain.from_iterable(combinations(out, n) for n in range(3)):
                records = Records(plan, threshold=now, identity=1)
                records.next_threshold = then
                records.orders = dict.fromkeys(gone, REMOVED)
                composed = records.composed(holders, clean=False, resyncing=None)
                assert composed.threshold <= len(composed.slots)
                removed += len(composed.slots) == 3 - len(gone)
                kept += len(composed.slots) > 3 - len(gone)
    assert removed > kept > 0
