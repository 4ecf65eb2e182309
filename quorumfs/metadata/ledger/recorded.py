"""The dirty map of a set in use, and what of it the sidecars have. Pure: no I/O.

The map in memory is what is *known*. *Recorded* is what the sidecars of all current replicas have
durably. Where the two may differ, a write must not rely on what is known: should the daemon die in
it, only what is recorded tells the next mount. So for each page in which they may differ it is kept
what its sidecars surely say of these facts: an intent counts as recorded only if all of them have
it, and so does it that a chunk was compared, which is the absence of `UNVERIFIED`, and that a
replica lacks nothing there, which is the absence of its out-of-sync bit.
"""

from functools import cache

from quorumfs.decisions.dirtymap import ALL_OUT_OF_SYNC, INTENT, UNVERIFIED, DirtyMap
from quorumfs.decisions.sidecar import CHUNKS_PER_PAGE, page_of, pages

Version = dict[int, bytes]
"""By page, the states of its chunks."""


class Recorded:
    """A dirty map that remembers what of it is not in the sidecars."""

    __slots__ = ("behind", "map")

    def __init__(self, known: DirtyMap) -> None:
        """*known* is what all sidecars say, until it is told otherwise."""
        self.map = known
        self.behind: dict[int, bytes] = {}
        """By page in which the sidecars may say something else than the map: a byte per chunk, the
        facts (`_FACTS`) that all of them have."""

    def add(self, bits: int, chunks: range) -> None:
        """Set *bits* for *chunks*, which may be none."""
        if not self.map.has(bits, chunks):
            self._keep(chunks)
            self.map.add(bits, chunks)

    def remove(self, bits: int, chunks: range) -> None:
        """Clear *bits* for *chunks*, which may be none."""
        if self.map.any(bits, chunks):
            self._keep(chunks)
            self.map.remove(bits, chunks)

    def _keep(self, chunks: range) -> None:
        """Before *chunks* change: keep what the sidecars say of them."""
        for page in range(page_of(chunks.start), page_of(chunks[-1]) + 1):
            if page not in self.behind:
                self.behind[page] = self._facts(page)

    def found(self, other: DirtyMap) -> None:
        """Note that a sidecar has *other*."""
        if not self.behind and other.states == self.map.states:
            return
        for page in range(pages(self.map)):
            theirs = bytes(other.states[_chunks_of(page)])
            if page in self.behind or theirs != self.map.states[_chunks_of(page)]:
                known = self.behind.get(page) or self._facts(page)
                self.behind[page] = _both(known, theirs.translate(_FACTS))

    def holds(self, chunks: range, current: int) -> bool:
        """Whether a write of *chunks* may rely on what is known of them: an intent, at least.

        *current*: ``out_of_sync`` of the current replicas. The others lack what is written.
        """
        if not self.map.all(INTENT, chunks):
            return False
        return not self.behind or self._is_recorded(chunks, _only(INTENT | UNVERIFIED | current))

    def _is_recorded(self, chunks: range, relevant: bytes) -> bool:
        for page in range(page_of(chunks.start), page_of(chunks[-1]) + 1):
            if surely := self.behind.get(page):
                start = page * CHUNKS_PER_PAGE
                first, stop = max(chunks.start, start), min(chunks.stop, start + CHUNKS_PER_PAGE)
                known = bytes(self.map.states[first:stop].translate(_FACTS).translate(relevant))
                if _both(known, surely[first - start : stop - start]) != known:
                    return False
        return True

    def begin_write(self) -> Version:
        """What is to be written to all sidecars now. Until it ends they have either."""
        states = self.map.states
        version = {page: bytes(states[_chunks_of(page)]) for page in sorted(self.behind)}
        for page, content in version.items():
            self.behind[page] = _both(self.behind[page], content.translate(_FACTS))
        return version

    def written(self, version: Version) -> None:
        """Note that all sidecars have *version* durably."""
        for page, content in version.items():
            if content == self.map.states[_chunks_of(page)]:
                del self.behind[page]
            else:
                self.behind[page] = content.translate(_FACTS)

    def _facts(self, page: int) -> bytes:
        return bytes(self.map.states[_chunks_of(page)].translate(_FACTS))


def _chunks_of(page: int) -> slice:
    return slice(page * CHUNKS_PER_PAGE, (page + 1) * CHUNKS_PER_PAGE)


def _both(one: bytes, other: bytes) -> bytes:
    """The facts that both have; they are equally long."""
    joined = int.from_bytes(one, "little") & int.from_bytes(other, "little")
    return joined.to_bytes(len(one), "little")


@cache
def _only(facts: int) -> bytes:
    """From some facts to those of *facts*."""
    return bytes(some & facts for some in range(256))


_FACTS = bytes((state & INTENT) | (~state & (UNVERIFIED | ALL_OUT_OF_SYNC)) for state in range(256))
"""From a chunk's state to what must be recorded of it: a fact is better present than absent."""
