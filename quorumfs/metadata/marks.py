"""The dirty map of a set in use, and what of it the sidecars do not have yet. Pure: no I/O."""

from quorumfs.dirtymap import DirtyMap
from quorumfs.sidecar import page_of, pages


class Marks:
    """Changes a dirty map, and remembers which pages of it changed."""

    __slots__ = ("_changed", "map")

    def __init__(self, dirty_map: DirtyMap) -> None:
        self.map = dirty_map
        self._changed: set[int] = set()

    def add(self, bits: int, chunks: range) -> None:
        """Set *bits* for *chunks*, which may be none."""
        if chunks:
            self.map.add(bits, chunks)
            self._changed.update(range(page_of(chunks.start), page_of(chunks[-1]) + 1))

    def remove(self, bits: int, chunks: range) -> None:
        """Clear *bits* for *chunks*, which may be none."""
        if chunks:
            self.map.remove(bits, chunks)
            self._changed.update(range(page_of(chunks.start), page_of(chunks[-1]) + 1))

    def rewrite(self) -> None:
        """Have all of it written: some sidecar has another map."""
        self._changed.update(range(pages(self.map)))

    def take_changed(self) -> set[int]:
        """The pages that changed; from here on none has."""
        taken, self._changed = self._changed, set()
        return taken

    def put_back(self, taken: set[int]) -> None:
        """Note that *taken* could not be written."""
        self._changed |= taken
