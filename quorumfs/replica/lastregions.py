"""Where a block device was written to last: its fingerprint covers these regions. Pure.

A device has no times of change, and its fingerprint is of a part of it. An older copy, such as a
snapshot that was merged back, lacks at least the last write that changed something: so it is seen
where that was, unless so much was written since that changed nothing.
"""

from array import array
from collections.abc import Iterable, Iterator

from quorumfs.decisions.devices import REGION
from quorumfs.decisions.record import REGIONS


class LastRegions:
    """The regions that one device was written to last.

    The fast path notes its writes in the same memory: ``struct gate_regions`` in gate.h. Python
    does so in the trio thread alone, while the gate is closed.
    """

    __slots__ = ("_words", "address")

    def __init__(self, regions: Iterable[int] = ()) -> None:
        """*regions*: of a mount before, the latest one first."""
        self._words = array("Q", bytes(8 * REGIONS))
        """The number of each region plus 1, the latest one first; 0: there are no more."""
        self.address = self._words.buffer_info()[0]
        """Of that memory."""
        for region in reversed(tuple(regions)):
            self._note(region)

    def note(self, offset: int, length: int) -> None:
        """Note a write of *length* bytes; of a longer one than all regions, begin and end."""
        first, last = offset // REGION, max(offset, offset + length - 1) // REGION
        for region in range(first, last + 1) if last - first < REGIONS else (first, last):
            self._note(region)

    def _note(self, region: int) -> None:
        words = [word for word in self._words if word not in (0, region + 1)]
        words = [region + 1, *words][:REGIONS]
        self._words[: len(words)] = array("Q", words)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the regions, the latest one first."""
        return (word - 1 for word in list(self._words) if word)
