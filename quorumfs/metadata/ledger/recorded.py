"""The dirty map of a set in use, and the part of the map in the sidecars. Pure: no I/O.

The map in memory is *known*. A fact is *recorded* iff the sidecars of all members hold the fact
durably. A write must rely on recorded facts only: if the daemon dies in the write, the next mount
knows nothing else. So for each page where map and sidecars may differ, `Recorded` keeps the facts
that all sidecars surely hold. There are three kinds of fact per chunk: an intent, which is the
presence of `INTENT`; a comparison, which is the absence of `UNVERIFIED`; and the completeness of a
replica, which is the absence of its out-of-sync bit.
"""

from functools import cache

from quorumfs.decisions.dirtymap import ALL_OUT_OF_SYNC, INTENT, UNVERIFIED, DirtyMap
from quorumfs.decisions.sidecar import CHUNKS_PER_PAGE, page_of, pages

Version = dict[int, bytes]
"""By page, the states of the chunks."""


class Recorded:
    """A dirty map, with the pages not yet in all sidecars."""

    __slots__ = ("behind", "map")

    def __init__(self, known: DirtyMap) -> None:
        """*known*: the map that all sidecars hold, unless `found` shows a difference."""
        self.map = known
        self.behind: dict[int, bytes] = {}
        """By page where a sidecar may differ from the map: a byte per chunk, with the facts
        (`_FACTS`) that all sidecars hold."""

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
        """Keep the recorded facts of *chunks*, before the chunks change."""
        for page in range(page_of(chunks.start), page_of(chunks[-1]) + 1):
            if page not in self.behind:
                self.behind[page] = self._facts(page)

    def found(self, other: DirtyMap) -> None:
        """Note *other* as the map in a sidecar."""
        if not self.behind and other.states == self.map.states:
            return
        for page in range(pages(self.map)):
            theirs = bytes(other.states[_chunks_of(page)])
            if page in self.behind or theirs != self.map.states[_chunks_of(page)]:
                known = self.behind.get(page) or self._facts(page)
                self.behind[page] = _both(known, theirs.translate(_FACTS))

    def holds(self, chunks: range, current: int) -> bool:
        """Whether `INTENT` and all other known facts of *chunks* are recorded, as a write requires.

        *current*: ``out_of_sync`` bits of the members. No other out-of-sync bit is checked.
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

    def lagging(self, current: int) -> list[tuple[int, int]]:
        """Ranges (start, end; bytes) outside which every marked chunk is one that `holds` accepts.

        They are whole pages; *current* as for `holds`.
        """
        relevant = _only(INTENT | UNVERIFIED | current)
        page_bytes = CHUNKS_PER_PAGE * self.map.chunk_size
        return [
            (page * page_bytes, (page + 1) * page_bytes)
            for page, surely in self.behind.items()
            if _both(known := self._facts(page).translate(relevant), surely) != known
        ]

    def begin_write(self, also: int | None = None) -> Version:
        """The pages to write to all sidecars now; until `written` either version may be there.

        *also*: a page to write even if all sidecars hold it.
        """
        states = self.map.states
        if also is not None and also not in self.behind:
            self.behind[also] = self._facts(also)
        version = {page: bytes(states[_chunks_of(page)]) for page in sorted(self.behind)}
        for page, content in version.items():
            self.behind[page] = _both(self.behind[page], content.translate(_FACTS))
        return version

    def written(self, version: Version) -> None:
        """Note *version* as durable in all sidecars."""
        for page, content in version.items():
            if content == self.map.states[_chunks_of(page)]:
                del self.behind[page]
            else:
                self.behind[page] = content.translate(_FACTS)

    def grow(self, size: int, bits: int) -> None:
        """Take the map for that of a disk of *size* bytes; added chunks have *bits*, recorded."""
        last = page_of(len(self.map) - 1)
        self.map.grow(size, bits)
        if (surely := self.behind.get(last)) is not None:
            self.behind[last] = surely + self._facts(last)[len(surely) :]

    def _facts(self, page: int) -> bytes:
        return bytes(self.map.states[_chunks_of(page)].translate(_FACTS))


def _chunks_of(page: int) -> slice:
    return slice(page * CHUNKS_PER_PAGE, (page + 1) * CHUNKS_PER_PAGE)


def _both(one: bytes, other: bytes) -> bytes:
    """The facts in both *one* and *other*, of equal length."""
    joined = int.from_bytes(one, "little") & int.from_bytes(other, "little")
    return joined.to_bytes(len(one), "little")


@cache
def _only(facts: int) -> bytes:
    """A translation table that keeps only *facts*."""
    return bytes(some & facts for some in range(256))


_FACTS = bytes((state & INTENT) | (~state & (UNVERIFIED | ALL_OUT_OF_SYNC)) for state in range(256))
"""A translation table from a chunk's state to its facts. A missing fact is the safe side."""
