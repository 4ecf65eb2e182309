"""A guest reads and writes a disk in whole sectors."""

SECTOR = 512
"""Bytes of the smallest sector of any disk."""


def whole(size: int) -> int:
    """The smallest size, at least *size* bytes, that is whole sectors."""
    return -(-size // SECTOR) * SECTOR


def unreachable(size: int) -> str | None:
    """Why a guest cannot use all of a disk of *size* bytes, in words; None if it can."""
    if not size % SECTOR:
        return None
    return (
        f"the size of the disk, {size} bytes, is no multiple of {SECTOR}: a guest cannot write the "
        f"last {size % SECTOR} bytes"
    )
