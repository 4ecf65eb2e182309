"""What tells a block device from all others, and its content from an older one. Pure: no I/O.

A device has a name that changes (``/dev/sdb`` is ``/dev/sdc`` after the next start), no times of
change, and no room for a sidecar beside it. So its sidecar lies in a directory that the user names,
under the device's own identity, where it has one: by whatever path the device is given, that
sidecar is found, and that of another device is not.
"""

import os
import re
from collections.abc import Callable, Iterator

import xxhash

Read = Callable[[str], str]
"""The content of an attribute of a device in sysfs, by its path there; empty if there is none."""

NAME_MAX = 200
"""Bytes of a sidecar's name before its ending; a longer one is cut, and ends in a digest."""

SAMPLE = 4096
"""Bytes of each sample."""

ENDS = 16
"""How many samples are taken side by side at both ends of a disk, and where the first partition
begins by custom: there partition tables and the heads of file systems lie, which change whenever a
file system is used."""

REGION = 1 << 20
"""Bytes that a fingerprint covers around each of the last writes."""

FIRST_PARTITION = 1 << 20
"""Bytes before it."""

SPREAD = 32
"""How many more are taken, at equal distances."""


def stable_name(read: Read) -> str | None:
    """What names a device over restarts, whatever ``/dev`` calls it; None if nothing does."""
    if read("partition"):
        whole = stable_name(lambda attribute: read(f"../{attribute}"))
        return whole and f"{whole}-part{read('partition')}-at-{read('start')}"
    if backing := read("loop/backing_file"):
        places = [read(f"loop/{name}") for name in ("offset", "sizelimit")]
        cut = "".join(f"-{place}" for place in places) if any(p.strip("0") for p in places) else ""
        return f"loop-{backing}{cut}"
    if uuid := read("dm/uuid"):
        return f"dm-{uuid}"
    if name := read("dm/name"):
        return f"dm-name-{name}"
    if uuid := read("md/uuid"):
        return f"md-{uuid}"
    for attribute in ("wwid", "device/wwid", "serial", "device/serial", "device/cid"):
        given = read(attribute)
        if re.search("[1-9A-Za-z]", given.rpartition(".")[2]):  # some say 0000
            return f"{attribute.rpartition('/')[2]}-{given}"
    return None


def file_name(name: str) -> str:
    """*name*, any text, as the name of a file that no other text gives, readable if possible."""
    plain = "".join(
        letter if re.fullmatch(r"[A-Za-z0-9:_.-]", letter) else "".join(map(_escaped, letter))
        for letter in name
    )
    if len(plain) <= NAME_MAX:
        return plain
    return f"{plain[: NAME_MAX - 17]}-{xxhash.xxh3_64_hexdigest(os.fsencode(name))}"


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02x}" for byte in os.fsencode(letter))


def number_of(*facts: object) -> int:
    """A number, from 1 to 63 bits long, that other *facts* do not give."""
    return xxhash.xxh3_64_intdigest(repr(facts).encode(errors="surrogateescape")) >> 1 or 1


def samples(size: int) -> Iterator[tuple[int, int]]:
    """The pieces (offset, length; bytes) of a disk of *size* bytes that stand for its content."""
    last = -(-size // SAMPLE)
    """How many pieces there are in all."""
    chosen = {*range(min(ENDS, last)), *range(max(0, last - ENDS), last)}
    first = FIRST_PARTITION // SAMPLE
    chosen.update(range(first, min(first + ENDS, last)))
    chosen.update(last * number // SPREAD for number in range(SPREAD) if last)
    for piece in sorted(chosen):
        yield piece * SAMPLE, min(SAMPLE, size - piece * SAMPLE)
