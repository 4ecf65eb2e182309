"""What C may serve after `Publisher.publish` is what the long way would do the same, at once.

Whatever is known of a set: for a request that C admits, the disk itself has to be done without
waiting for anything, to ask the same replicas, and to leave the same behind as `gate_note` and
`fold` do. A request that C refuses needs a reason.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native import gate_library

from quorumfs.decisions.dirtymap import (
    CHUNK_MIN,
    EXTENT,
    INTENT,
    REPLICAS_MAX,
    UNVERIFIED,
    DirtyMap,
    out_of_sync,
)
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.patterns import Fifo, Quorum, ReadPattern
from quorumfs.decisions.record import RoleState
from quorumfs.decisions.sidecar import CHUNKS_PER_PAGE
from quorumfs.decisions.voting import BLOCK
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.rangelock import RangeClaim
from quorumfs.fastpath.native import RANGES, REPLICAS, Gate, Request, RequestKind
from quorumfs.fastpath.path import fold
from quorumfs.fastpath.publish import Publisher
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.metadata.volatile import Volatile
from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Done, Kind, Operation, Storage, Value

SIZE = CHUNKS_PER_PAGE * CHUNK_MIN + EXTENT + 5 * 512
"""Two pages of the map."""
CHUNKS = len(DirtyMap(SIZE, CHUNK_MIN))
MOUNT = 7
"""The identity of the mount."""
LENGTH_MAX = 1 << 20


@dataclass
class Prompt:
    """A file that answers each operation before `submit` returns."""

    fast_file: FastFile | None
    asked: list[Kind] = field(default_factory=list)

    def resized(self, _: int) -> None:
        """It has any size."""

    def submit(self, operation: Operation, done: Done) -> None:
        self.asked.append(operation.kind)
        value: Value = bytes(operation.length) if operation.kind is Kind.READ else 0
        done(operation, value, None)

    def copying(self, _source: Storage, _offset: int, _length: int) -> Operation | None:
        return None


class Repairs:
    """A repairer that nothing may need."""

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        raise AssertionError("the long way repairs")

    async def settle_all(self) -> None:
        raise AssertionError("the long way repairs")

    async def verify(self, offset: int, length: int) -> None:
        raise AssertionError("the long way compares")

    async def rewrite(self, offset: int, length: int) -> bytes:
        raise AssertionError("the long way rewrites")


@dataclass(frozen=True)
class Known:
    """What is to be known of a set, apart from its map."""

    states: list[Standing]
    """Of the replicas; one that is `RESYNCING` is the target."""
    files: list[str]
    """Of each replica: *fast*, *slow*, *waits* (a read always does), *rests* or *gone*."""
    threshold: int
    fifo: bool
    ejected_on_record: bool
    """Whoever is not current is on record as such."""
    in_use: bool
    entered: bool
    mirroring: bool
    joining: bool
    claims: list[tuple[int, int, bool]]
    behind: tuple[int, ...] = ()
    """Replicas that have not answered yet to votes that are over."""
    mostly: frozenset[int] = frozenset()
    """Replicas that are write-mostly."""
    undecided: bool = False
    """Some replicas are known to differ, and nothing tells which is right."""
    removed: int = 0
    """Replicas that the set had before these: so these are in later planes of the map."""


@dataclass(frozen=True)
class Asked:
    """A request of the guest."""

    reads: bool
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


Step = Callable[[Ledger], None]
"""Something that happens to a ledger."""


def make_replicas(known: Known) -> list[Replica]:
    replicas = []
    for slot, file in enumerate(known.files):
        fast = FastFile(slot, memory=False, reads=file != "waits") if file != "slow" else None
        storage = Prompt(fast) if file != "gone" else None
        replicas.append(Replica(slot, f"r{slot}", storage, 1.0))
        if file == "rests":
            replicas[-1]._rest.begin(trio.current_time())
    return replicas


def make_mirror(known: Known, metadata: Sidecars | Volatile, replicas: list[Replica]) -> Mirror:
    pattern: ReadPattern = Fifo() if known.fifo else Quorum(known.threshold)
    mirror = Mirror(
        SIZE,
        metadata,
        pattern=pattern,
        search_s=1.0,
        events=EventLog("disk", lambda _: None),
    )
    mirror.locks.claims += [RangeClaim(*claim) for claim in known.claims]
    for index in known.behind:
        mirror.late_answers.begin(replicas[index % len(replicas)])
    mirror.read_order.write_mostly = frozenset(f"r{index}" for index in known.mostly)
    if known.undecided:
        mirror.read_order.undecided.add(0, SIZE)
    return mirror


def with_sidecars(known: Known, steps: list[Step]) -> tuple[Mirror, Ledger]:
    replicas = make_replicas(known)
    paths = [replica.path for replica in replicas]
    all_paths = ["/gone.img"] * known.removed + paths
    record = new_record(all_paths, SIZE, known.threshold, random_bytes=lambda size: b"\1" * size)
    for slot in range(known.removed):
        record = record.with_role(slot, state=RoleState.REMOVED)
    if known.ejected_on_record:
        for slot, state in enumerate(known.states, known.removed):
            if state is not Standing.CURRENT:
                record = record.with_role(slot, state=RoleState.STALE)
    record = record.entered(MOUNT, changed=known.entered)
    members = tuple(
        Member(path, slot, Standing.CURRENT if state is Standing.CURRENT else Standing.STALE)
        for slot, (path, state) in enumerate(zip(paths, known.states, strict=True), known.removed)
    )
    plan = Plan("any", record, known.threshold, record.new_map(), members)
    found = [Found(path, None) for path in paths]
    metadata = Sidecars(replicas, plan, found, threshold=known.threshold, identity=MOUNT)
    ledger = metadata.ledger
    for replica, state in zip(replicas, known.states, strict=True):
        replica.standing = state
        if state is Standing.RESYNCING:
            target = ledger.targets.resyncing = ledger.targets.of(replica)
            target.begin()
            target.mirroring, target.joining = known.mirroring, known.joining
    ledger.in_use = known.in_use
    ledger.arrange()
    for step in steps:
        step(ledger)
    return make_mirror(known, metadata, replicas), ledger


# What happens


def add(bits: int, chunks: range, ledger: Ledger) -> None:
    ledger.recorded.add(bits, chunks)


def remove(bits: int, chunks: range, ledger: Ledger) -> None:
    ledger.recorded.remove(bits, chunks)


def record(ledger: Ledger) -> None:
    ledger.recorded.written(ledger.recorded.begin_write())


def begin_to_record(ledger: Ledger) -> None:
    ledger.recorded.begin_write()


def change(chunks: range, ledger: Ledger) -> None:
    ledger.note_written(chunks)


def flush(ledger: Ledger) -> None:
    ledger.begin_flush(())
    ledger.chunks.end_flush()


def begin_flush(ledger: Ledger) -> None:
    ledger.begin_flush(())


def cannot_be_read(chunks: range, ledger: Ledger) -> None:
    ledger.agreement.unreadable.add(*ledger.map.bounds_of(chunks))


def tear(chunks: range, ledger: Ledger) -> None:
    ledger.agreement.tear(*ledger.map.bounds_of(chunks))


def diverge(chunks: range, ledger: Ledger) -> None:
    ledger.chunks.diverge(chunks)


def lose(chunks: range, ledger: Ledger) -> None:
    ledger.content.lose(ledger.members[:1], chunks)


def truncate(ledger: Ledger) -> None:
    for member in ledger.members[:1]:
        ledger.content.truncate(member)


def fail_to_sync(ledger: Ledger) -> None:
    for member in ledger.members[:1]:
        ledger.chunks.suspend(member)


def fence(ledger: Ledger) -> None:
    ledger.fence()


def copy(chunks: range, ledger: Ledger) -> None:
    if ledger.target:
        ledger.target.copying(ledger.members, chunks)


def end_copy(chunks: range, ledger: Ledger) -> None:
    copy(chunks, ledger)
    if ledger.target:
        ledger.target.copied(chunks)


def sync_target(ledger: Ledger) -> None:
    if ledger.target and ledger.target.replica in ledger.membership.receivers:  # else: fenced
        replica = ledger.target.replica
        epoch = ledger.epochs.begin_sync([replica], ())
        ledger.epochs.cover([replica], epoch)
        ledger.target.synced(epoch)


def record_progress(ledger: Ledger) -> None:
    if ledger.target:
        ledger.target.recorded()
    record(ledger)


def lack_all(ledger: Ledger) -> None:
    """Whoever gets no write lacks each chunk already."""
    ledger.recorded.add(ledger.membership.out_bits, range(CHUNKS))
    record(ledger)


def target_lacks_all(ledger: Ledger) -> None:
    if ledger.target:
        ledger.target.lacks(range(CHUNKS))


MARKED: list[Step] = [partial(add, INTENT, range(CHUNKS)), record]


@st.composite
def knowns(draw: st.DrawFn) -> Known:
    mostly = st.sampled_from([True] * 16 + [False])
    states = draw(st.lists(st.sampled_from([Standing.CURRENT] * 4 + [Standing.STALE]), max_size=3))
    target = draw(st.sampled_from([[]] * 3 + [[Standing.RESYNCING]]))
    states = [Standing.CURRENT, *states, *target]
    files = [
        "fast" if draw(mostly) else draw(st.sampled_from(["slow", "waits", "rests", "gone"]))
        for _ in states
    ]
    enough = draw(mostly)
    threshold = draw(st.integers(1, states.count(Standing.CURRENT))) if enough else len(states)
    starts = st.integers(0, SIZE - 1) | st.integers(0, EXTENT)
    many = [(SIZE - 1, 1, True)] * (RANGES + 1)
    some = st.lists(st.tuples(starts, st.integers(1, EXTENT), st.booleans()), max_size=2)
    claims = draw(st.sampled_from([some] * 12 + [st.just(many)]).flatmap(lambda which: which))
    return Known(
        states,
        files,
        threshold,
        fifo=draw(st.booleans()),
        ejected_on_record=draw(mostly),
        in_use=draw(mostly),
        entered=draw(mostly),
        mirroring=draw(st.booleans()),
        joining=not draw(mostly),
        claims=[(start, min(start + length, SIZE), how) for start, length, how in claims],
        behind=draw(st.sampled_from([(), (), (), (0,), (1,), (2,), (0, 1)])),
        mostly=draw(st.sampled_from([frozenset[int]()] * 4 + [frozenset({0}), frozenset({1, 2})])),
        undecided=not draw(mostly),
        removed=draw(st.sampled_from([0, 0, 4, 6, 13, REPLICAS_MAX - 5])),
    )


@st.composite
def steps(draw: st.DrawFn, slots: range) -> list[Step]:
    start = draw(st.integers(0, CHUNKS - 1))
    run = range(start, draw(st.integers(start + 1, CHUNKS)))
    near = range(start % 8, start % 8 + 1)
    chunks = draw(st.sampled_from([run, near, range(CHUNKS)]))
    bits = draw(st.sampled_from([INTENT, INTENT, UNVERIFIED, *map(out_of_sync, slots)]))
    often: list[Step] = [
        record,
        begin_to_record,
        partial(change, run),
        flush,
        begin_flush,
        partial(remove, bits, chunks),
        partial(add, bits, chunks),
    ]
    resync: list[Step] = [
        partial(copy, chunks),
        partial(end_copy, chunks),
        sync_target,
        record_progress,
    ]
    seldom: list[Step] = [
        partial(cannot_be_read, near),
        partial(tear, chunks),
        partial(diverge, chunks),
        partial(lose, near),
        truncate,
        fail_to_sync,
        fence,
    ]
    step = draw(st.sampled_from(often * 4 + resync * 3 + seldom))
    return [step, record] if draw(st.booleans()) else [step]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    """Often at the bounds of chunks and extents."""
    page = CHUNKS_PER_PAGE * CHUNK_MIN
    near = st.sampled_from([0, CHUNK_MIN, EXTENT, page, SIZE - 512])
    offset = draw(st.integers(0, SIZE - 1) | near.flatmap(lambda at: st.integers(at - 2, at + 2)))
    offset = min(max(0, offset), SIZE - 1)
    length = draw(st.integers(1, LENGTH_MAX) | st.sampled_from([1, 512, CHUNK_MIN, LENGTH_MAX]))
    return Asked(draw(st.booleans()), offset, min(length, SIZE - offset))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Known, list[Step], list[Asked]]:
    known = draw(knowns())
    slots = range(known.removed, known.removed + len(known.states))
    happened = draw(st.lists(steps(slots), max_size=3))
    marked = draw(
        st.sampled_from(
            [[*MARKED, lack_all], [*MARKED, target_lacks_all, lack_all]] * 3
            + [MARKED, MARKED[:1], []]
        )
    )
    joined = [*marked, *(step for few in happened for step in few)]
    return known, joined, draw(st.lists(requests(), min_size=1, max_size=4))


# What is compared


def left(mirror: Mirror, ledger: Ledger) -> object:
    """All that a request which is done may leave behind."""
    epochs, target, agreement = ledger.epochs, ledger.target, ledger.agreement
    receivers = ledger.membership.receivers
    return (
        [bytes(plane) for plane in ledger.map.planes],
        dict(ledger.recorded.behind),
        bytes(ledger.marks.intents.touched),
        (epochs.now, list(epochs.latest.runs())),
        [(epochs.covered(one), sorted(map(repr, epochs.unsynced(one)))) for one in receivers],
        target and ([target.state(chunk) for chunk in range(8)], target.unsynced),
        [list(kept) for kept in (agreement.divergent, agreement.torn, agreement.unreadable)],
        [list(ledger.content.risked(one)) for one in ledger.members],
        ([one.index for one in ledger.content.lacking], ledger.content.losses),
        (mirror.requests, [one.counters for one in mirror.replicas]),
        [[sum(by.counts) for by in one.health.durations.values()] for one in mirror.replicas],
        [one.standing for one in mirror.replicas],
    )


def at_once(doing: Coroutine[Any, Any, object]) -> object:
    """The result of what must not wait for anything."""
    try:
        doing.send(None)
    except StopIteration as end:
        return end.value
    doing.close()
    raise AssertionError("the long way waits")


def admits(gate: Gate, request: Asked, data: bytes) -> bool:
    library = gate_library()
    kind = RequestKind.READ if request.reads else RequestKind.WRITE
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
    seen = Request(kind, request.length, 1, 5, request.offset, address)
    admitted = bool(library.gate_admits(gate, seen))
    if admitted:
        library.gate_note(gate, seen, (ctypes.c_uint64 * REPLICAS)())
    return admitted


def check_admitted(gate: Gate, mirror: Mirror, request: Asked, data: bytes) -> None:
    """Have the long way do the same with a copy: *mirror*."""
    files = {one.index: one.image for one in mirror.replicas if isinstance(one.image, Prompt)}
    for file in files.values():
        file.asked.clear()
    disk = Disk(mirror, Repairs())
    if request.reads:
        assert at_once(disk.read(request.offset, request.length)) == bytes(request.length)
        places, kind = gate.reader[: gate.readers], Kind.READ
    else:
        assert at_once(disk.write(request.offset, data)) == request.length
        places, kind = gate.writer[: gate.writers], Kind.WRITE
    asked = {index: file.asked for index, file in files.items() if file.asked}
    assert asked == {place.slot: [kind] for place in places}
    assert all(place.fd == place.slot for place in places)


def reason_to_refuse(mirror: Mirror, ledger: Ledger, request: Asked) -> bool:
    """Whether a request may be refused: else the fast path would be slow for nothing."""
    wanted = RangeClaim(request.offset, request.end, not request.reads)
    free = not any(claim.conflicts(wanted) for claim in mirror.locks.claims)
    if not free or len(mirror.locks.claims) > RANGES:
        return True
    if request.reads:
        members = list(ledger.members)
        mostly = mirror.read_order.write_mostly
        first = [one for one in members if one.path not in mostly]
        reserve = [one for one in members if one.path in mostly]
        if isinstance(mirror.pattern, Quorum):
            threshold = mirror.pattern.threshold
            first = [*first, *reserve[: max(0, threshold - len(first))]] or reserve
            asked = mirror.late_answers.asked(first, len(members), threshold)
            all_asked = asked == members
        else:
            asked = (first or reserve)[:1]
            all_asked = asked == members[:1]
        files = [one.fast_file for one in asked]
        too_few = isinstance(mirror.pattern, Quorum) and len(members) < mirror.pattern.threshold
        differ = bool(ledger.agreement or ledger.content)
        may_differ = mirror.read_order.undecided or ledger.unverified(0, SIZE)
        differ |= not all_asked and bool(may_differ)
        return not members or too_few or differ or any(not (file and file.reads) for file in files)
    chunks = ledger.map.chunks(request.offset, request.length)
    page = CHUNKS_PER_PAGE
    pages = range(chunks.start // page * page, min(-(-chunks.stop // page) * page, CHUNKS))
    return (
        any(one.fast_file is None for one in ledger.receivers)
        or not ledger.prepared(request.offset, request.length)
        or ledger.unverified(request.offset, request.length)
        or ledger.map.any(ledger.membership.member_bits, chunks)
        or not ledger.map.has(ledger.membership.out_bits, chunks)  # which a write would set
        or ledger.unreadable.overlaps(request.offset, request.end)
        or len(ledger.members) < ledger.threshold
        # These keep out more than they have to, because they are rare, or soon over.
        or bool(ledger.agreement.torn or ledger.content)
        or at_the_target(ledger, chunks)
        or not marked_is_recorded(ledger, pages)
    )


def at_the_target(ledger: Ledger, chunks: range) -> bool:
    """Whether a change of *chunks* may have to be decided on for the target of a resync."""
    target = ledger.target
    if target is None:
        return False
    if target.joining:
        return True
    if target.mirroring:
        return ledger.map.any(target.bit, chunks)
    around = max(chunks.start, target.given.start) < min(chunks.stop, target.given.stop)
    return around or not ledger.map.all(target.bit, chunks)


def marked_is_recorded(ledger: Ledger, chunks: range) -> bool:
    """Whether of each of *chunks* that is marked the sidecars hold all that a write relies on."""
    return not ledger.recorded.behind or all(
        ledger.recorded.holds(range(chunk, chunk + 1), ledger.membership.member_bits)
        for chunk in chunks
        if ledger.map.planes[0][chunk] & INTENT and not ledger.map.planes[0][chunk] & UNVERIFIED
    )


def compare(known: Known, happened: list[Step], asked: Sequence[Asked]) -> Counter[bool]:
    """Compare the two ways; counts which requests were admitted."""
    decided: Counter[bool] = Counter()
    (fast, ledger), (slow, other) = (with_sidecars(known, happened) for _ in range(2))
    gate = Gate()
    open_ = Publisher(gate, fast, keep_zeros=False, writes=True).publish()
    assert left(fast, ledger) == left(slow, other)  # it only looks
    for request in asked:
        data = b"\1" * request.length
        admitted = open_ and admits(gate, request, data)
        decided[admitted] += 1
        if admitted:
            check_admitted(gate, slow, request, data)
        else:
            assert reason_to_refuse(fast, ledger, request)
    fold(gate, fast)
    assert (gate.journalled, gate.requests) == (0, 0)
    assert left(fast, ledger) == left(slow, other)
    return decided


def in_trio(compared: Callable[[], Counter[bool]]) -> Counter[bool]:
    """Run the comparison where there is trio's clock."""

    async def main() -> Counter[bool]:
        return compared()

    return trio.run(main)


def test_what_c_admits_the_long_way_does_the_same_at_once() -> None:
    decided: Counter[bool] = Counter()

    @settings(max_examples=500)
    @given(situations())
    def check(situation: tuple[Known, list[Step], list[Asked]]) -> None:
        decided.update(in_trio(partial(compare, *situation)))

    check()
    assert decided[True] > decided.total() / 5
    assert decided[False] > decided.total() / 5


HEALTHY = Known(
    [Standing.CURRENT, Standing.CURRENT],
    ["fast", "fast"],
    2,
    fifo=False,
    ejected_on_record=True,
    in_use=True,
    entered=True,
    mirroring=False,
    joining=False,
    claims=[],
)
BOTH = [Asked(True, 4096, 4096), Asked(False, 4096, 4096)]


@pytest.mark.parametrize("known", [HEALTHY, replace(HEALTHY, fifo=True)], ids=["quorum", "fifo"])
def test_a_healthy_set_is_served_by_c(known: Known) -> None:
    assert in_trio(partial(compare, known, MARKED, BOTH)) == {True: 2}


def test_c_decides_a_vote_without_one_that_is_far_behind() -> None:
    """Which may be on a store that C cannot use."""
    states, files = [Standing.CURRENT] * 3, ["slow", "fast", "fast"]
    known = replace(HEALTHY, states=states, files=files, behind=(0,))
    assert in_trio(partial(compare, known, MARKED, BOTH[:1])) == {True: 1}
    assert in_trio(partial(compare, replace(known, behind=()), MARKED, BOTH[:1])) == {False: 1}


def test_c_leaves_nobody_out_where_images_were_never_compared() -> None:
    """The long way asks all of them there, and tells of a difference."""
    states, files = [Standing.CURRENT] * 3, ["fast"] * 3
    known = replace(HEALTHY, states=states, files=files, behind=(2,))

    def adopted(ledger: Ledger) -> None:
        ledger.recorded.add(UNVERIFIED, range(len(ledger.map)))

    assert in_trio(partial(compare, known, [*MARKED, adopted], BOTH[:1])) == {False: 1}


@pytest.mark.parametrize("undecided", [True, False])
def test_c_asks_those_who_are_mostly_written_where_replicas_differ(undecided: bool) -> None:
    """The long way does; with fewer voters another version may win."""
    states, files = [Standing.CURRENT] * 5, ["fast"] * 5
    known = replace(HEALTHY, states=states, files=files, mostly=frozenset({2, 3, 4}))
    assert in_trio(partial(compare, known, MARKED, BOTH[:1])) == {True: 1}

    def adopted(ledger: Ledger) -> None:
        ledger.recorded.add(UNVERIFIED, range(len(ledger.map)))

    happened = MARKED if undecided else [*MARKED, adopted]
    known = replace(known, undecided=undecided)
    assert in_trio(partial(compare, known, happened, BOTH[:1])) == {False: 1}


def test_one_for_which_c_has_no_counters_is_left_to_python() -> None:
    """A mount may have more replicas than a set: foreign ones, or without metadata."""

    def served(index: int) -> bool:
        mirror, _ = with_sidecars(HEALTHY, MARKED)
        mirror.replicas[1].index = index
        return Publisher(Gate(), mirror, keep_zeros=False, writes=True).publish()

    async def main() -> list[bool]:
        return [served(REPLICAS - 1), served(REPLICAS)]

    assert trio.run(main) == [True, False]


STALE = replace(HEALTHY, states=[Standing.CURRENT, Standing.STALE], threshold=1)
SPARE = replace(HEALTHY, threshold=1)
FIRST = range(1)
RESYNCED = replace(HEALTHY, states=[Standing.CURRENT, Standing.RESYNCING], threshold=1)
MIRRORED = replace(RESYNCED, mirroring=True)


TORN: list[Step] = [partial(add, UNVERIFIED, FIRST), partial(tear, FIRST)]


@pytest.mark.parametrize(
    ("known", "happened", "admitted"),
    [
        (STALE, [*MARKED, partial(add, out_of_sync(1), range(CHUNKS)), record], "rw"),
        (STALE, MARKED, "r"),  # of the one that is not there nothing is known to be lacking
        (replace(STALE, threshold=2), MARKED, ""),
        (HEALTHY, MARKED[:1], "r"),
        (HEALTHY, [*MARKED, partial(add, UNVERIFIED, FIRST), record], "r"),
        (HEALTHY, [*MARKED, partial(add, out_of_sync(1), FIRST), record], "r"),
        (HEALTHY, [*MARKED, partial(cannot_be_read, FIRST)], ""),
        (HEALTHY, [*MARKED, partial(diverge, FIRST)], "w"),
        (SPARE, [*MARKED, partial(lose, FIRST)], ""),
        (SPARE, [*MARKED, truncate], ""),
        (HEALTHY, [*MARKED, fence], ""),
        (SPARE, [*MARKED, partial(change, FIRST), fail_to_sync], ""),
        (HEALTHY, [*MARKED, *TORN, partial(remove, UNVERIFIED, FIRST), record], ""),
        (RESYNCED, [*MARKED, target_lacks_all], "rw"),
        (RESYNCED, [*MARKED, target_lacks_all, partial(copy, FIRST)], "r"),
        (RESYNCED, [*MARKED, target_lacks_all, partial(end_copy, FIRST)], "r"),
        (RESYNCED, MARKED, "r"),  # the change makes the chunk lacking
        (MIRRORED, MARKED, "rw"),
        (MIRRORED, [*MARKED, target_lacks_all], "r"),
        (MIRRORED, [*MARKED, target_lacks_all, partial(copy, FIRST)], "r"),
        (replace(MIRRORED, joining=True), MARKED, "r"),
        (replace(MIRRORED, files=["fast", "slow"]), MARKED, "r"),
        (replace(RESYNCED, files=["fast", "slow"]), [*MARKED, target_lacks_all], "rw"),
        (replace(HEALTHY, in_use=False), MARKED, "r"),
        (replace(HEALTHY, entered=False), MARKED, "r"),
        (replace(HEALTHY, files=["fast", "slow"]), MARKED, ""),
        (replace(HEALTHY, files=["fast", "slow"], fifo=True), MARKED, "r"),
        (replace(HEALTHY, files=["waits", "fast"]), MARKED, "w"),
        (replace(HEALTHY, files=["rests", "fast"]), MARKED, ""),
        (replace(HEALTHY, claims=[(0, 4097, False)]), MARKED, "r"),
        (replace(HEALTHY, claims=[(0, 4097, True)]), MARKED, ""),
        (replace(HEALTHY, claims=[(0, 4096, True)]), MARKED, "rw"),
        (replace(HEALTHY, claims=[(8192, 8193, False)] * (RANGES + 1)), MARKED, ""),
    ],
)
def test_what_needs_a_decision_is_not(known: Known, happened: list[Step], admitted: str) -> None:
    for letter, request in zip("rw", BOTH, strict=True):
        decided = in_trio(partial(compare, known, happened, [request]))
        assert decided == {letter in admitted: 1}


# Without sidecars

Told = tuple[str, int, int, int]
"""What happened to a replica without sidecars: which, by number, and to which range."""


@st.composite
def told(draw: st.DrawFn) -> Told:
    start = draw(st.integers(0, EXTENT))
    end = start + draw(st.integers(1, EXTENT))
    return (
        draw(st.sampled_from(["wrote", "wrote", "missed", "unsure"])),
        draw(st.integers(0, 1)),
        start,
        end,
    )


def without_sidecars(known: Known, happened: list[Told]) -> tuple[Mirror, Volatile]:
    replicas = make_replicas(known)
    metadata = Volatile(replicas, SIZE, known.threshold)
    for what, index, start, end in happened:
        holdings = metadata.holdings[replicas[index % len(replicas)]]
        if what == "wrote":
            holdings.wrote(start, end)
        elif what == "missed":
            holdings.miss(start, end)
        else:
            holdings.unsure.add(start, end)
    return make_mirror(known, metadata, replicas), metadata


def lost_and_counted(mirror: Mirror, metadata: Volatile) -> object:
    """What is left behind, but for what a flush is to cover."""
    return (
        [(list(one.missed), list(one.unsure)) for one in metadata.holdings.values()],
        (mirror.requests, [one.counters for one in mirror.replicas]),
        [[sum(by.counts) for by in one.health.durations.values()] for one in mirror.replicas],
        [one.standing for one in mirror.replicas],
    )


def unsynced(metadata: Volatile) -> list[set[int]]:
    """By replica, the blocks with bytes that a flush is to cover."""
    return [
        {block for start, end in one._unsynced for block in range(start // BLOCK, -(-end // BLOCK))}
        for one in metadata.holdings.values()
    ]


def compare_volatile(known: Known, happened: list[Told], asked: list[Asked]) -> Counter[bool]:
    decided: Counter[bool] = Counter()
    (fast, metadata), (slow, other) = (without_sidecars(known, happened) for _ in range(2))
    gate = Gate()
    open_ = Publisher(gate, fast, keep_zeros=False, writes=True).publish()
    for request in asked:
        data = b"\1" * request.length
        admitted = open_ and admits(gate, request, data)
        decided[admitted] += 1
        if admitted:
            assert metadata.uniform_members
            check_admitted(gate, slow, request, data)
    fold(gate, fast)
    assert lost_and_counted(fast, metadata) == lost_and_counted(slow, other)
    assert unsynced(metadata) == unsynced(other)  # in whole blocks: a little more is no harm
    return decided


def test_without_sidecars_the_long_way_does_the_same_at_once() -> None:
    decided: Counter[bool] = Counter()

    @settings(max_examples=200)
    @given(
        st.lists(told(), max_size=3),
        st.lists(requests(), min_size=1, max_size=4),
        st.sampled_from([HEALTHY, replace(HEALTHY, claims=[(0, EXTENT, True)], fifo=True)]),
    )
    def check(happened: list[Told], asked: list[Asked], known: Known) -> None:
        decided.update(in_trio(partial(compare_volatile, known, happened, asked)))

    check()
    assert decided[True] > decided.total() / 10
    assert in_trio(partial(compare_volatile, HEALTHY, [], BOTH)) == {True: 2}
