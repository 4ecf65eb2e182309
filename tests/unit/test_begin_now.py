"""The ledger's fast path equals its slow one: `begin_now` is `prepared` and `begin` in one.

It is spelled out because every write goes there. Whatever the ledger knows, it must give the same
answer and leave the same behind; and refuse only what would have to wait.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from quorumfs.decisions.assembly import new_record
from quorumfs.decisions.dirtymap import CHUNK_MIN, EXTENT, INTENT, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.record import RoleState
from quorumfs.disk.disk import NOW_MAX
from quorumfs.metadata.ledger.commit import Records
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.replica.replica import Replica

SIZE = 3 * EXTENT + 5 * 512
CHUNKS = len(DirtyMap(SIZE, CHUNK_MIN))
MOUNT = 7
"""The identity of the mount."""


@dataclass(frozen=True)
class Known:
    """What a ledger is to know, apart from its map."""

    states: list[Standing]
    """Of the replicas; one that is `RESYNCING` is the target."""
    threshold: int
    ejected_on_record: bool
    """Whoever is not current is on record as such."""
    in_use: bool
    entered: bool
    mirroring: bool
    joining: bool


Step = Callable[[Ledger], None]
"""Something that happens to a ledger."""

Request = tuple[int, int]
"""Offset and length, bytes."""


def ledger_of(known: Known, steps: list[Step]) -> Ledger:
    paths = [f"r{number}" for number in range(len(known.states))]
    record = new_record(paths, SIZE, known.threshold, random_bytes=lambda size: b"\1" * size)
    if known.ejected_on_record:
        for slot, state in enumerate(known.states):
            if state is not Standing.CURRENT:
                record = record.with_role(slot, state=RoleState.STALE)
    record = record.entered(MOUNT, changed=known.entered)
    members = tuple(
        Member(path, slot, Standing.CURRENT if state is Standing.CURRENT else Standing.STALE)
        for slot, (path, state) in enumerate(zip(paths, known.states, strict=True))
    )
    plan = Plan("any", record, known.threshold, DirtyMap(SIZE, CHUNK_MIN), members)
    replicas = [Replica(slot, path, None, 1.0) for slot, path in enumerate(paths)]
    ledger = Ledger(
        replicas,
        plan,
        [Found(path, None) for path in paths],
        Records(plan, threshold=known.threshold, identity=MOUNT),
        read_only=False,
        notify=lambda: None,
    )
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
    return ledger


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


def cannot_be_read(chunks: range, ledger: Ledger) -> None:
    ledger.agreement.unreadable.add(*ledger.map.bounds_of(chunks))


def copy_to_target(chunks: range, ledger: Ledger) -> None:
    if ledger.target is not None:
        ledger.target.copying(ledger.members, chunks)
        ledger.target.copied(chunks)


MARKED: list[Step] = [partial(add, INTENT, range(CHUNKS)), record]


@st.composite
def knowns(draw: st.DrawFn) -> Known:
    mostly = st.sampled_from([True] * 12 + [False])
    states = draw(st.lists(st.sampled_from([Standing.CURRENT] * 3 + [Standing.STALE]), max_size=3))
    target = draw(st.sampled_from([[], [Standing.RESYNCING]]))
    states = [Standing.CURRENT, *states, *target]
    enough = draw(mostly)
    threshold = draw(st.integers(1, states.count(Standing.CURRENT))) if enough else len(states)
    return Known(
        states,
        threshold,
        ejected_on_record=draw(mostly),
        in_use=draw(mostly),
        entered=draw(mostly),
        mirroring=draw(st.booleans()),
        joining=not draw(mostly),
    )


@st.composite
def steps(draw: st.DrawFn, slots: int) -> Step:
    start = draw(st.integers(0, CHUNKS - 1))
    run = range(start, draw(st.integers(start + 1, CHUNKS)))
    whole = range(CHUNKS)
    chunks = draw(st.sampled_from([run, whole]))
    bits = draw(st.sampled_from([INTENT, INTENT, UNVERIFIED, *map(out_of_sync, range(slots))]))
    possible: list[Step] = [
        partial(add, bits, chunks),
        partial(remove, bits, chunks),
        record,
        begin_to_record,
        partial(change, run),
        flush,
        partial(cannot_be_read, run),
        partial(copy_to_target, chunks),
    ]
    return draw(st.sampled_from(possible))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Often at the bounds of chunks and extents."""
    near = st.sampled_from([0, CHUNK_MIN, EXTENT, 2 * EXTENT, SIZE - 512])
    offset = draw(st.integers(0, SIZE - 1) | near.flatmap(lambda at: st.integers(at - 2, at + 2)))
    offset = min(max(0, offset), SIZE - 1)
    length = draw(st.integers(1, NOW_MAX) | st.sampled_from([1, 512, CHUNK_MIN, NOW_MAX]))
    return offset, min(length, SIZE - offset)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Known, list[Step], Request]:
    known = draw(knowns())
    happened = draw(st.lists(steps(len(known.states)), max_size=8))
    marked = draw(st.sampled_from([MARKED, MARKED, MARKED[:1], []]))
    return known, [*marked, *happened], draw(requests())


def left(ledger: Ledger) -> object:
    """All that a change which begins may eject."""
    epochs, target = ledger.epochs, ledger.target
    receivers = ledger.membership.receivers
    return (
        bytes(ledger.map.states),
        dict(ledger.recorded.behind),
        bytes(ledger.marks.intents.touched),
        (epochs.now, list(epochs.latest.runs())),
        [(epochs.covered(one), sorted(map(repr, epochs.unsynced(one)))) for one in receivers],
        target and ([target.state(chunk) for chunk in range(CHUNKS)], target.unsynced),
        (target and target.mirroring, target and target.joining),
    )


def would_wait(ledger: Ledger, offset: int, length: int) -> bool:
    """Whether the slow way would have more to do than to note it and to ask the receivers."""
    chunks = ledger.map.chunks(offset, length)
    return (
        not ledger.prepared(offset, length)  # for the sidecars
        or ledger.unverified(offset, length)  # until it is compared
        or ledger.map.any(ledger.membership.member_bits, chunks)  # until one is given it, or told
        or ledger.unreadable.overlaps(offset, offset + length)  # until it is durable
        or len(ledger.members) < ledger.threshold  # and fails
        or ledger.joining  # for a flush that knows of it
    )


def slots_of(replicas: object) -> list[int | None]:
    assert isinstance(replicas, list | tuple)
    return [replica.slot for replica in replicas]


@settings(max_examples=400)
@given(situations())
def test_begin_now_is_prepared_and_begin(situation: tuple[Known, list[Step], Request]) -> None:
    known, happened, request = situation
    fast, slow = ledger_of(known, happened), ledger_of(known, happened)
    before = left(fast)
    assert left(slow) == before
    receivers = fast.begin_now(*request)
    event(f"taken: {bool(receivers)}")
    if not receivers:
        assert would_wait(slow, *request)
        assert left(fast) == before
        return
    assert not would_wait(slow, *request)
    assert slots_of(receivers) == slots_of(slow.begin(*request))
    assert left(fast) == left(slow)


IN_USE = Known(
    [Standing.CURRENT, Standing.CURRENT],
    2,
    ejected_on_record=True,
    in_use=True,
    entered=True,
    mirroring=False,
    joining=False,
)


def test_a_write_to_what_is_marked_is_taken() -> None:
    assert ledger_of(IN_USE, MARKED).begin_now(0, 4096)


@pytest.mark.parametrize(
    ("known", "happened"),
    [
        (IN_USE, MARKED[:1]),
        (IN_USE, [*MARKED, partial(add, UNVERIFIED, range(1))]),
        (IN_USE, [*MARKED, partial(add, out_of_sync(1), range(1))]),
        (IN_USE, [*MARKED, partial(cannot_be_read, range(1))]),
        (replace(IN_USE, in_use=False), MARKED),
        (replace(IN_USE, entered=False), MARKED),
        (replace(IN_USE, states=[Standing.CURRENT, Standing.STALE]), MARKED),
    ],
)
def test_a_write_that_would_have_to_wait_is_not(known: Known, happened: list[Step]) -> None:
    ledger = ledger_of(known, happened)
    assert would_wait(ledger, 0, 4096)
    assert not ledger.begin_now(0, 4096)
