"""Where a block device was written to last: its fingerprint covers these places. Pure.

A device has no times of change, and its fingerprint is of a part of it. An older copy, such as a
snapshot that was merged back, lacks at least the very last write: so it is seen where that was.
"""

from array import array
from collections.abc import Iterable, Iterator

from quorumfs.decisions.devices import SAMPLE
from quorumfs.decisions.record import PLACES


class LastPlaces:
    """The places (offsets, in bytes) of the last writes to one device: where they began and ended.

    The fast path notes its writes in the same memory: ``struct gate_places`` in gate.h. Python does
    so in the trio thread alone, while the gate is closed.
    """

    __slots__ = ("_words", "address")

    def __init__(self, places: Iterable[int] = ()) -> None:
        """*places*: of a mount before."""
        self._words = array("Q", bytes(8 * (1 + PLACES)))
        """How many places there were, and the last ones, each in its turn."""
        self.address = self._words.buffer_info()[0]
        """Of that memory."""
        for place in places:
            self._add(place)

    def note(self, offset: int, length: int) -> None:
        """Note a write of *length* bytes: its begin, and the end of one of more than a block."""
        self._add(offset)
        if length > SAMPLE:
            self._add(offset + length - 1)

    def _add(self, place: int) -> None:
        turn = self._words[0]
        self._words[1 + turn % PLACES] = place
        self._words[0] = turn + 1

    def __iter__(self) -> Iterator[int]:
        """The places known, each once."""
        turn = self._words[0]
        turns = range(max(0, turn - PLACES), turn)
        return iter(dict.fromkeys(self._words[1 + each % PLACES] for each in turns))
