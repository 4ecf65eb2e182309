"""How the image of a replica is read and written: through the page cache, or past it. Pure."""

from enum import Enum
from typing import NamedTuple


class Way(Enum):
    """How bytes go between this process and an image; values are what ``status`` shows."""

    BUFFERED = "buffered"
    """Through the page cache of this host."""
    DIRECT = "direct"
    """Past it, with O_DIRECT."""


class Medium(Enum):
    """What holds an image, as far as this host can tell."""

    MEMORY = "memory"
    """tmpfs, ramfs."""
    ELSEWHERE = "elsewhere"
    """A network file system, FUSE, or a device that is a network's, like NBD."""
    ROTATING = "rotating"
    """A device of this host that says so; virtual ones often do without being it."""
    STEADY = "steady"
    """A device of this host that says that nothing in it rotates."""
    UNKNOWN = "unknown"
    """On this host, but the file system tells of no device."""


class Store(NamedTuple):
    """What is known of the store of one image."""

    medium: Medium
    takes_direct: bool
    """Whether its file system reads and writes with O_DIRECT."""
    read_us: float | None = None
    """How long a small direct read took, in microseconds; None: not measured, or no data is there
    to be read."""


ASKED = ("buffered", "direct", "auto")
"""The values of the option ``replica-io``."""

FAST_US = 1000.0
"""Microseconds that a small read of an NVMe-like store takes at most. Flash takes 50 to 300, an arm
that has to move 4000 and more."""


def way_of(asked: str, store: Store) -> Way | None:
    """How to read and write an image in a *store*, *asked* for one of `ASKED`; None: impossible.

    ``auto`` is direct where that costs little, or where the page cache would hold what others could
    miss: on a store elsewhere, and on one that answers a small read as NVMe does. What a device
    says of itself counts where nothing could be measured. It is buffered in memory, where direct
    only means more copying; on slow disks, which need the cache to gather small writes; and where
    O_DIRECT is refused.
    """
    if asked == "buffered":
        return Way.BUFFERED
    if asked == "direct":
        return Way.DIRECT if store.takes_direct else None
    if not store.takes_direct or store.medium is Medium.MEMORY:
        return Way.BUFFERED
    if store.medium is Medium.ELSEWHERE:
        return Way.DIRECT
    if store.read_us is not None:
        return Way.DIRECT if store.read_us <= FAST_US else Way.BUFFERED
    return Way.DIRECT if store.medium is Medium.STEADY else Way.BUFFERED
