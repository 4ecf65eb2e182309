"""What a write may rely on is in every sidecar, however the writes to them end."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quorumfs.decisions.dirtymap import CHUNK_MIN, INTENT, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.sidecar import CHUNKS_PER_PAGE, pages
from quorumfs.metadata.ledger.recorded import Recorded, Version

CHUNKS = 2 * CHUNKS_PER_PAGE + 3
EDGES = [0, 1, 2, CHUNKS_PER_PAGE - 1, CHUNKS_PER_PAGE, CHUNKS_PER_PAGE + 1, CHUNKS - 2, CHUNKS - 1]
"""The chunks that a history is about: both sides of where a page ends."""
CURRENT = out_of_sync(0)

runs = st.builds(
    lambda one, other: range(min(one, other), max(one, other) + 1), *[st.sampled_from(EDGES)] * 2
)
states = st.dictionaries(
    st.sampled_from(EDGES),
    st.sampled_from([INTENT, UNVERIFIED, INTENT | UNVERIFIED, out_of_sync(1)]),
)


def a_map(content: dict[int, int]) -> DirtyMap:
    made = DirtyMap(CHUNKS * CHUNK_MIN, CHUNK_MIN)
    for chunk, state in content.items():
        made.states[chunk] = state
    return made


class Sidecars(RuleBasedStateMachine):
    """A map, and three sidecars that it is written to; a write reaches all, or fails on some."""

    def __init__(self) -> None:
        super().__init__()
        self.sidecars = [a_map({}) for _ in range(3)]
        self.recorded = Recorded(a_map({}))
        self.version: Version | None = None

    @precondition(lambda self: self.recorded.map.states == bytes(CHUNKS))
    @rule(found=st.lists(states, min_size=3, max_size=3))
    def is_mounted(self, found: list[dict[int, int]]) -> None:
        """With what was found in the sidecars; known is what any of them says."""
        self.sidecars = [a_map(content) for content in found]
        known = a_map({})
        for sidecar in self.sidecars:
            known.join(sidecar)
        self.recorded = Recorded(known)
        self.version = None
        for sidecar in self.sidecars:
            self.recorded.found(sidecar)

    @rule(bits=st.sampled_from([INTENT, out_of_sync(0), out_of_sync(1)]), chunks=runs)
    def learns(self, bits: int, chunks: range) -> None:
        held = [c for c in EDGES if self.recorded.holds(range(c, c + 1), CURRENT)]
        self.recorded.add(bits, chunks)
        for chunk in held:  # what else changes in the page is no reason to wait
            assert self.recorded.holds(range(chunk, chunk + 1), CURRENT)

    @rule(bits=st.sampled_from([INTENT, UNVERIFIED, out_of_sync(0)]), chunks=runs)
    def forgets(self, bits: int, chunks: range) -> None:
        self.recorded.remove(bits, chunks)

    @precondition(lambda self: self.version is None and self.recorded.behind)
    @rule()
    def a_write_begins(self) -> None:
        self.version = self.recorded.begin_write()

    @precondition(lambda self: self.version is None)
    @rule(bits=st.sampled_from([0, out_of_sync(0), out_of_sync(1)]), chunks=st.integers(1, 5000))
    def the_disk_grows(self, bits: int, chunks: int) -> None:
        """What has changed and is not in the sidecars stays so."""
        known = self.recorded.map
        size = known.size + chunks * CHUNK_MIN
        behind = [c for c in EDGES if not self.recorded.holds(range(c, c + 1), CURRENT)]
        self.version = self.recorded.begin_write(pages(known) - 1)
        assert pages(known) - 1 in self.version
        self.version = None  # and it failed
        self.recorded.grow(size, bits)
        for sidecar in self.sidecars:
            sidecar.grow(size, bits)
        for chunk in behind:
            assert not self.recorded.holds(range(chunk, chunk + 1), CURRENT)

    @precondition(lambda self: self.version is not None)
    @rule(data=st.data())
    def a_page_arrives(self, data: st.DataObject) -> None:
        assert self.version is not None
        sidecar = data.draw(st.sampled_from(self.sidecars))
        self._put(sidecar, data.draw(st.sampled_from(list(self.version))))

    def _put(self, sidecar: DirtyMap, page: int) -> None:
        assert self.version is not None
        first = page * CHUNKS_PER_PAGE
        sidecar.states[first : first + CHUNKS_PER_PAGE] = self.version[page]

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
                if chunk // CHUNKS_PER_PAGE in self.version:
                    one = range(chunk, chunk + 1)
                    verified = not self.sidecars[0].any(UNVERIFIED | CURRENT, one)
                    intended = self.recorded.map.any(INTENT, one)
                    if intended and self.sidecars[0].any(INTENT, one) and verified:
                        assert self.recorded.holds(one, CURRENT)
        self.version = None

    @invariant()
    def nothing_is_relied_on_that_a_sidecar_has_not(self) -> None:
        known = self.recorded.map
        for chunk in EDGES:
            one = range(chunk, chunk + 1)
            for sidecar in self.sidecars if self.recorded.holds(one, CURRENT) else ():
                assert sidecar.any(INTENT, one)
                for bit in (UNVERIFIED, CURRENT):
                    assert known.any(bit, one) or not sidecar.any(bit, one)

    @invariant()
    def a_range_is_relied_on_iff_each_chunk_of_it_is(self) -> None:
        for first in EDGES:
            for last in EDGES:
                chunks = [c for c in EDGES if first <= c <= last]
                if first <= last and len(chunks) == last + 1 - first:
                    each = all(self.recorded.holds(range(c, c + 1), CURRENT) for c in chunks)
                    assert self.recorded.holds(range(first, last + 1), CURRENT) == each

    @invariant()
    def what_is_in_all_sidecars_is_relied_on(self) -> None:
        if not self.recorded.behind:
            for sidecar in self.sidecars:
                assert sidecar.states == self.recorded.map.states
            for chunk in EDGES:
                one = range(chunk, chunk + 1)
                assert self.recorded.holds(one, CURRENT) == self.recorded.map.any(INTENT, one)


TestSidecars = Sidecars.TestCase
TestSidecars.settings = settings(stateful_step_count=30)
