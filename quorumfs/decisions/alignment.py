"""How a request is cut where a store takes whole, aligned blocks alone. Pure arithmetic, in bytes.

"Aligned" is of an offset that is a multiple of the block, counted from the start of the disk.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Piece(NamedTuple):
    """Part of a request, with the whole blocks around it."""

    start: int
    """Where its first block begins."""
    stop: int
    """Where its last block ends."""
    first: int
    """The first byte asked for."""
    end: int
    """Behind the last byte asked for."""


def pieces(offset: int, end: int, block: int, limit: int) -> Iterator[Piece]:
    """The range from *offset* to *end* in pieces of whole blocks, each of *limit* bytes at most.

    *limit* is a multiple of *block*.
    """
    assert limit >= block
    assert not limit % block
    start, last = offset - offset % block, -(-end // block) * block
    while offset < end:
        stop = min(start + limit, last)
        yield Piece(start, stop, offset, min(stop, end))
        start = offset = stop


def kept(piece: Piece, block: int) -> list[int]:
    """Where the blocks of *piece* begin of which a write leaves some bytes as they are."""
    blocks = set()
    if piece.first > piece.start:
        blocks.add(piece.start)
    if piece.end < piece.stop:
        blocks.add(piece.stop - block)
    return sorted(blocks)


def ragged(offset: int, end: int, block: int) -> list[int]:
    """The numbers of the blocks that the range from *offset* to *end* has some bytes of."""
    if offset >= end:
        return []
    edges = (edge for edge in (offset, end) if edge % block)
    return sorted({edge // block for edge in edges})
