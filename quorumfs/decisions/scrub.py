"""What a set remembers of its scrubs: how far one under way is, what the last one found.

It is kept at the end of each sidecar (`quorumfs.decisions.sidecar`). Nothing of the data depends on
it: a set that forgets it is scrubbed from the start. Pure: no I/O, no clock.
"""

import struct
from dataclasses import dataclass, field

import xxhash

HALF = 2048
"""Bytes: of one version in its page."""

UNDECIDED_MAX = 110
"""Ranges that are remembered; what is found beyond is found again by the next scrub."""

_HEAD = struct.Struct("<QQBQ5QQQQB5QI")
_RUNNING, _PAUSED, _REPAIRING = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Counts:
    """What a scrub found, in blocks of `quorumfs.decisions.voting.BLOCK` bytes."""

    mismatches: int = 0
    """Blocks that replicas hold differently."""
    repaired: int = 0
    """Blocks with a mismatch, or unreadable on some replica, that all hold alike now."""
    unreadable: int = 0
    """Blocks that some replica could not be read at."""
    undecided: int = 0
    """Mismatches of which nothing tells who is right."""
    unrepaired: int = 0
    """Blocks that were left as they were found."""


@dataclass(frozen=True, slots=True)
class ScrubRecord:
    """The scrubs of one set, as the sidecars have them."""

    version: int = 0
    """Counts the versions of this record."""
    number: int = 0
    """Counts the scrubs; of the latest."""
    running: bool = False
    """The latest has not ended."""
    paused: bool = False
    repairing: bool = False
    """It was asked to repair what is certain."""
    position: int = 0
    """Bytes from the start of the disk that it has behind it."""
    counts: Counts = field(default_factory=Counts)
    """What it has found so far."""
    seconds: int = 0
    """How long it has been at work."""
    ended: int = 0
    """When the last one ended: seconds since 1970 by the host's clock; 0: there was none."""
    took: int = 0
    """How long (seconds) that one was at work."""
    stopped: bool = False
    """That one was stopped before its end."""
    found: Counts = field(default_factory=Counts)
    """What that one found."""
    undecided: tuple[tuple[int, int], ...] = ()
    """Bytes ``[start, end)`` where nothing tells who is right."""


NO_SCRUB = ScrubRecord()


def encode_scrub(record: ScrubRecord, set_id: bytes, place: int) -> tuple[int, bytes]:
    """A version of the record: its offset in the file, and its bytes. *place*: of its page.

    The version before is not overwritten, so that one is left if this one is torn.
    """
    undecided = record.undecided[:UNDECIDED_MAX]
    flags = record.running * _RUNNING | record.paused * _PAUSED | record.repairing * _REPAIRING
    body = _HEAD.pack(
        record.version,
        record.number,
        flags,
        record.position,
        *_numbers(record.counts),
        record.seconds,
        record.ended,
        record.took,
        record.stopped,
        *_numbers(record.found),
        len(undecided),
    )
    body += struct.pack(f"<{2 * len(undecided)}Q", *(bound for each in undecided for bound in each))
    half = (body + _checksum(body, set_id, place)).ljust(HALF, b"\0")
    return place + record.version % 2 * HALF, half


def decode_scrub(page: bytes, set_id: bytes, place: int, size: int) -> ScrubRecord:
    """The latest version in *page*, at *place* in the file, for a disk of *size* bytes.

    A version that is torn, or of another set, or that cannot be, counts as none.
    """
    halves = (_decode_half(page[at : at + HALF], set_id, place, size) for at in (0, HALF))
    return max((one for one in halves if one), key=lambda one: one.version, default=NO_SCRUB)


def _decode_half(half: bytes, set_id: bytes, place: int, size: int) -> ScrubRecord | None:
    if len(half) < HALF:
        return None
    version, number, flags, position, *rest = _HEAD.unpack_from(half)
    counts, (seconds, ended, took, stopped), found, (length,) = (
        rest[:5],
        rest[5:9],
        rest[9:14],
        rest[14:],
    )
    end = _HEAD.size + 16 * min(length, UNDECIDED_MAX)
    if half[end : end + 16] != _checksum(half[:end], set_id, place):
        return None
    bounds = struct.unpack_from(f"<{(end - _HEAD.size) // 8}Q", half, _HEAD.size)
    undecided = tuple(zip(bounds[::2], bounds[1::2], strict=True))
    if position > size or any(not start < stop <= size for start, stop in undecided):
        return None
    return ScrubRecord(
        version,
        number,
        bool(flags & _RUNNING),
        bool(flags & _PAUSED),
        bool(flags & _REPAIRING),
        position,
        Counts(*counts),
        seconds,
        ended,
        took,
        bool(stopped),
        Counts(*found),
        undecided,
    )


def _numbers(counts: Counts) -> tuple[int, ...]:
    return (
        counts.mismatches,
        counts.repaired,
        counts.unreadable,
        counts.undecided,
        counts.unrepaired,
    )


def _checksum(body: bytes, set_id: bytes, place: int) -> bytes:
    return xxhash.xxh3_128_digest(b"".join([body, set_id, place.to_bytes(8, "little")]))
