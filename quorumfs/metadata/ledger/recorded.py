"""The dirty map of a set in use, and the part of the map in the sidecars. Pure: no I/O.

The map in memory is *known*. A fact is *recorded* iff the sidecars of all members hold the fact
durably. A write must rely on recorded facts only: if the daemon dies in the write, the next mount
knows nothing else. So for each page where map and sidecars may differ, `Recorded` keeps the facts
that all sidecars surely hold. There are three kinds of fact per chunk: an intent, which is the
presence of `INTENT`; a comparison, which is the absence of `UNVERIFIED`; and the completeness of a
replica, which is the absence of its out-of-sync bit.
"""

from collections.abc import Iterable, Iterator
from functools import cache

from quorumfs.decisions.dirtymap import (
    ALL_OUT_OF_SYNC,
    INTENT,
    REPLICAS_MAX,
    UNVERIFIED,
    DirtyMap,
    plane_bits,
    planes_for,
)
from quorumfs.decisions.sidecar import chunks_of, page_numbers, page_of, pages

Version = dict[int, bytes]
"""By the number of the page, its bytes of the chunks' states."""


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
            self._keep(bits, chunks)
            self.map.add(bits, chunks)

    def remove(self, bits: int, chunks: range) -> None:
        """Clear *bits* for *chunks*, which may be none."""
        if self.map.any(bits, chunks):
            self._keep(bits, chunks)
            self.map.remove(bits, chunks)

    def _keep(self, bits: int, chunks: range) -> None:
        """Keep the recorded facts of *chunks*, before *bits* of the chunks change."""
        for page in self._pages_of(bits, chunks):
            if page not in self.behind:
                self.behind[page] = self._facts(page)

    def _pages_of(self, bits: int, chunks: range) -> Iterator[int]:
        """The numbers of the pages with any of *bits* of *chunks*."""
        for plane in range(len(self.map.planes)):
            if plane_bits(bits, plane):
                yield from range(page_of(chunks.start, plane), page_of(chunks[-1], plane) + 1)

    def found(self, other: DirtyMap) -> None:
        """Note *other* as the map in a sidecar. What it has no room for, it does not hold."""
        if not self.behind and other.planes == self.map.planes:
            return
        for page in page_numbers(self.map):
            plane, chunks = chunks_of(page)
            if plane >= len(other.planes):
                self.behind[page] = bytes(len(self._states(page)))
                continue
            theirs = bytes(other.planes[plane][chunks])
            if page in self.behind or theirs != self._states(page):
                known = self.behind.get(page) or self._facts(page)
                self.behind[page] = _both(known, theirs.translate(_FACTS[plane]))

    def holds(self, chunks: range, current: int) -> bool:
        """Whether `INTENT` and all other known facts of *chunks* are recorded, as a write requires.

        *current*: ``out_of_sync`` bits of the members. No other out-of-sync bit is checked.
        """
        if not self.map.all(INTENT, chunks):
            return False
        return not self.behind or self._is_recorded(chunks, INTENT | UNVERIFIED | current)

    def _is_recorded(self, chunks: range, relevant: int) -> bool:
        for page in self._pages_of(relevant, chunks):
            if surely := self.behind.get(page):
                plane, place = chunks_of(page)
                first, stop = max(chunks.start, place.start), min(chunks.stop, place.stop)
                only = _only(plane_bits(relevant, plane))
                states = self.map.planes[plane][first:stop]
                known = bytes(states.translate(_FACTS[plane]).translate(only))
                if _both(known, surely[first - place.start : stop - place.start]) != known:
                    return False
        return True

    def lagging(self, current: int) -> list[tuple[int, int]]:
        """Ranges (start, end; bytes) outside which every marked chunk is one that `holds` accepts.

        They are whole pages; *current* as for `holds`.
        """
        relevant = INTENT | UNVERIFIED | current
        lagging = []
        for page, surely in self.behind.items():
            plane, chunks = chunks_of(page)
            known = self._facts(page).translate(_only(plane_bits(relevant, plane)))
            if _both(known, surely) != known:
                size = self.map.chunk_size
                lagging.append((chunks.start * size, chunks.stop * size))
        return lagging

    def begin_write(self, also: Iterable[int] = ()) -> Version:
        """The pages to write to all sidecars now; until `written` either version may be there.

        *also*: pages to write even if all sidecars hold them.
        """
        for page in also:
            self.behind.setdefault(page, self._facts(page))
        version = {page: self._states(page) for page in sorted(self.behind)}
        for page, content in version.items():
            self.behind[page] = _both(self.behind[page], self._as_facts(page, content))
        return version

    def written(self, version: Version) -> None:
        """Note *version* as durable in all sidecars."""
        for page, content in version.items():
            if content == self._states(page):
                del self.behind[page]
            else:
                self.behind[page] = self._as_facts(page, content)

    def grow(self, size: int, bits: int) -> None:
        """Take the map for that of a disk of *size* bytes; added chunks have *bits*, recorded."""
        last = page_numbers(self.map, pages(self.map) - 1)
        self.map.grow(size, bits)
        for page in last:
            if (surely := self.behind.get(page)) is not None:
                self.behind[page] = surely + self._facts(page)[len(surely) :]

    def widen(self, slots: int, bits: int) -> None:
        """Have room for *slots* replicas; all chunks have *bits* in what is added, recorded."""
        self.map.widen(slots)
        self.map.add(bits, range(len(self.map)))

    def _states(self, page: int) -> bytes:
        plane, chunks = chunks_of(page)
        return bytes(self.map.planes[plane][chunks])

    def _facts(self, page: int) -> bytes:
        return self._as_facts(page, self._states(page))

    @staticmethod
    def _as_facts(page: int, states: bytes) -> bytes:
        plane, _ = chunks_of(page)
        return states.translate(_FACTS[plane])


def _both(one: bytes, other: bytes) -> bytes:
    """The facts in both *one* and *other*, of equal length."""
    joined = int.from_bytes(one, "little") & int.from_bytes(other, "little")
    return joined.to_bytes(len(one), "little")


@cache
def _only(facts: int) -> bytes:
    """A translation table that keeps only *facts*."""
    return bytes(some & facts for some in range(256))


def _facts_of(plane: int) -> bytes:
    marks, gaps = (plane_bits(b, plane) for b in (INTENT, UNVERIFIED | ALL_OUT_OF_SYNC))
    return bytes((state & marks) | (~state & gaps) for state in range(256))


_FACTS = tuple(_facts_of(plane) for plane in range(planes_for(REPLICAS_MAX)))
"""By plane: from a chunk's byte there to its facts. A missing fact is the safe side."""
