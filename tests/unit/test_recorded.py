"""What a write may rely on is in every sidecar, however the writes to them end."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quorumfs.decisions.dirtymap import (
    CHUNK_MIN,
    INTENT,
    NARROW,
    REPLICAS_MAX,
    UNVERIFIED,
    DirtyMap,
    out_of_sync,
    plane_bits,
)
from quorumfs.decisions.sidecar import CHUNKS_PER_PAGE, chunks_of, page_numbers, page_of, pages
from quorumfs.metadata.ledger.recorded import Recorded, Version

CHUNKS = 2 * CHUNKS_PER_PAGE + 3
EDGES = [0, 1, 2, CHUNKS_PER_PAGE - 1, CHUNKS_PER_PAGE, CHUNKS_PER_PAGE + 1, CHUNKS - 2, CHUNKS - 1]
"""The chunks that a history is about: both sides of where a page ends."""
NEAR = st.sampled_from([out_of_sync(0), out_of_sync(1)])
FAR = st.sampled_from([out_of_sync(0), out_of_sync(1), out_of_sync(8), out_of_sync(31)])

runs = st.builds(
    lambda one, other: range(min(one, other), max(one, other) + 1), *[st.sampled_from(EDGES)] * 2
)


def states(lacking: st.SearchStrategy[int]) -> st.SearchStrategy[list[dict[int, int]]]:
    marks = st.sampled_from([INTENT, UNVERIFIED, INTENT | UNVERIFIED])
    content = st.dictionaries(st.sampled_from(EDGES), marks | lacking)
    return st.lists(content, min_size=3, max_size=3)


def a_map(content: dict[int, int], slots: int) -> DirtyMap:
    made = DirtyMap(CHUNKS * CHUNK_MIN, CHUNK_MIN, slots=slots)
    for chunk, state in content.items():
        made.add(state, range(chunk, chunk + 1))
    return made


def with_garbage(sidecar: DirtyMap, data: st.DataObject) -> DirtyMap:
    """*sidecar*, with anything where it had no room for many."""
    sidecar.widen(REPLICAS_MAX)
    garbage = data.draw(st.sampled_from([0, 0xFF]))
    for plane in sidecar.planes[1:]:
        plane[:] = bytes([garbage]) * len(plane)
    return sidecar


class Sidecars(RuleBasedStateMachine):
    """A map, and three sidecars that it is written to; a write reaches all, or fails on some."""

    slots = NARROW
    current = out_of_sync(0)

    def __init__(self) -> None:
        super().__init__()
        self.sidecars = [a_map({}, self.slots) for _ in range(3)]
        self.recorded = Recorded(a_map({}, self.slots))
        self.version: Version | None = None

    def holds(self, chunks: range) -> bool:
        return self.recorded.holds(chunks, self.current)

    def lacking(self, data: st.DataObject) -> int:
        return data.draw(NEAR if len(self.recorded.map.planes) == 1 else FAR)

    @precondition(lambda self: self.recorded.map.is_all(0) and len(self.recorded.map) == CHUNKS)
    @rule(data=st.data())
    def is_mounted(self, data: st.DataObject) -> None:
        """With what was found in the sidecars; known is what any of them says."""
        slots = NARROW if len(self.recorded.map.planes) == 1 else REPLICAS_MAX
        found = data.draw(states(NEAR if slots == NARROW else FAR))
        self.sidecars = [a_map(content, slots) for content in found]
        known = a_map({}, slots)
        for sidecar in self.sidecars:
            known.join(sidecar)
        self.recorded = Recorded(known)
        self.version = None
        for number, sidecar in enumerate(self.sidecars):
            if slots > NARROW and data.draw(st.booleans()):  # it is of before there were as many
                narrow = a_map({}, NARROW)
                narrow.join(sidecar)
                self.recorded.found(narrow)
                self.sidecars[number] = with_garbage(narrow, data)
            else:
                self.recorded.found(sidecar)

    @rule(intent=st.booleans(), chunks=runs, data=st.data())
    def learns(self, *, intent: bool, chunks: range, data: st.DataObject) -> None:
        held = [c for c in EDGES if self.holds(range(c, c + 1))]
        self.recorded.add(INTENT if intent else self.lacking(data), chunks)
        for chunk in held:  # what else changes in the page is no reason to wait
            assert self.holds(range(chunk, chunk + 1))

    @rule(mark=st.sampled_from([INTENT, UNVERIFIED, 0]), chunks=runs, data=st.data())
    def forgets(self, mark: int, chunks: range, data: st.DataObject) -> None:
        self.recorded.remove(mark or self.lacking(data), chunks)

    @precondition(lambda self: self.version is None and self.recorded.behind)
    @rule()
    def a_write_begins(self) -> None:
        self.version = self.recorded.begin_write()

    @precondition(lambda self: self.version is None)
    @rule(lacking=st.booleans(), chunks=st.integers(1, 5000), data=st.data())
    def the_disk_grows(self, *, lacking: bool, chunks: int, data: st.DataObject) -> None:
        """What has changed and is not in the sidecars stays so."""
        known = self.recorded.map
        size = known.size + chunks * CHUNK_MIN
        bits = self.lacking(data) if lacking else 0
        behind = [c for c in EDGES if not self.holds(range(c, c + 1))]
        last = page_numbers(known, pages(known) - 1)
        self.version = self.recorded.begin_write(last)
        assert set(last) <= set(self.version)
        self.version = None  # and it failed
        self.recorded.grow(size, bits)
        for sidecar in self.sidecars:
            sidecar.grow(size, bits)
        for chunk in behind:
            assert not self.holds(range(chunk, chunk + 1))

    @precondition(lambda self: self.version is not None)
    @rule(data=st.data())
    def a_page_arrives(self, data: st.DataObject) -> None:
        assert self.version is not None
        sidecar = data.draw(st.sampled_from(self.sidecars))
        self._put(sidecar, data.draw(st.sampled_from(list(self.version))))

    def _put(self, sidecar: DirtyMap, page: int) -> None:
        assert self.version is not None
        plane, chunks = chunks_of(page)
        sidecar.planes[plane][chunks] = self.version[page]

    @precondition(lambda self: self.version is not None)
    @rule(well=st.booleans())
    def a_write_ends(self, well: bool) -> None:
        assert self.version is not None
        if well:
            for page in self.version:
                for sidecar in self.sidecars:
                    self._put(sidecar, page)
            self.recorded.written(self.version)
            for chunk in EDGES:  # what changed meanwhile is no reason to wait either
                one = range(chunk, chunk + 1)
                said = (sidecar.state(chunk) for sidecar in self.sidecars)
                intended = self.recorded.map.any(INTENT, one)
                if intended and all(
                    state & INTENT and not state & (UNVERIFIED | self.current) for state in said
                ):
                    assert self.holds(one) or not self._was_written(chunk)
        self.version = None

    def _was_written(self, chunk: int) -> bool:
        """Whether all that a write relies on was in the last write."""
        assert self.version is not None
        planes = range(len(self.recorded.map.planes))
        relevant = [p for p in planes if plane_bits(INTENT | UNVERIFIED | self.current, p)]
        return all(page_of(chunk, plane) in self.version for plane in relevant)

    @invariant()
    def nothing_is_relied_on_that_a_sidecar_has_not(self) -> None:
        known = self.recorded.map
        for chunk in EDGES:
            one = range(chunk, chunk + 1)
            for sidecar in self.sidecars if self.holds(one) else ():
                assert sidecar.any(INTENT, one)
                relied_on = UNVERIFIED | self.current
                assert not sidecar.state(chunk) & relied_on & ~known.state(chunk)

    @invariant()
    def a_range_is_relied_on_iff_each_chunk_of_it_is(self) -> None:
        for first in EDGES:
            for last in EDGES:
                chunks = [c for c in EDGES if first <= c <= last]
                if first <= last and len(chunks) == last + 1 - first:
                    each = all(self.holds(range(c, c + 1)) for c in chunks)
                    assert self.holds(range(first, last + 1)) == each

    @invariant()
    def what_is_in_all_sidecars_is_relied_on(self) -> None:
        if not self.recorded.behind:
            for sidecar in self.sidecars:
                assert sidecar.planes == self.recorded.map.planes
            for chunk in EDGES:
                one = range(chunk, chunk + 1)
                assert self.holds(one) == self.recorded.map.any(INTENT, one)


class WideSidecars(Sidecars):
    """As `Sidecars`, of a set of many replicas, or of one that gets more."""

    current = out_of_sync(0) | out_of_sync(8)

    @precondition(lambda self: len(self.recorded.map.planes) == 1 and self.version is None)
    @rule(data=st.data())
    def more_replicas_come(self, data: st.DataObject) -> None:
        """Once their planes are in all sidecars; what is not in these stays so."""
        bits = data.draw(st.sampled_from([out_of_sync(8), out_of_sync(31)]))
        before = [self.recorded.holds(range(c, c + 1), out_of_sync(0)) for c in EDGES]
        self.recorded.widen(REPLICAS_MAX, bits)
        for sidecar in self.sidecars:
            sidecar.widen(REPLICAS_MAX)
            sidecar.add(bits, range(len(sidecar)))
        after = [self.recorded.holds(range(c, c + 1), out_of_sync(0)) for c in EDGES]
        assert before == after


def test_a_sidecar_of_before_there_were_as_many_holds_nothing_of_them() -> None:
    """Whatever is in its file there; it is written before it is relied on."""
    recorded = Recorded(a_map({0: INTENT}, REPLICAS_MAX))
    recorded.found(a_map({0: INTENT}, NARROW))
    assert recorded.holds(range(1), out_of_sync(0))
    assert not recorded.holds(range(1), out_of_sync(8))
    version = recorded.begin_write()
    assert list(version) == page_numbers(recorded.map)[pages(recorded.map) :]
    recorded.written(version)
    assert recorded.holds(range(1), out_of_sync(8))


TestWideSidecars = WideSidecars.TestCase
TestWideSidecars.settings = settings(stateful_step_count=30)
TestSidecars = Sidecars.TestCase
TestSidecars.settings = settings(stateful_step_count=30)
