"""How large a disk may become, and what is said of images longer than the disk. Pure: no I/O."""

from quorumfs.decisions.dirtymap import CHUNKS_MAX
from quorumfs.decisions.record import Record
from quorumfs.decisions.sectors import SECTOR, whole
from quorumfs.errors import UserError

LONGER = "is longer than the disk"
"""Part of each note made by `longer`."""


def longer(path: str, image_size: int, disk_size: int) -> str | None:
    """What is said of an image with more bytes than the disk; None if it has no more."""
    if image_size <= disk_size:
        return None
    return (
        f"{path} {LONGER}: its end is not used; to have as many bytes on the disk, all zeros "
        f"there, run: quorumfs grow MOUNTPOINT {image_size}"
    )


def wanted_size(record: Record, size: int, *, more: bool = False) -> int:
    """The size (bytes) that the disk of *record* is to have, if *size* is asked for.

    *more*: *size* is to be added. Raises `UserError` if the disk cannot have that size.
    """
    wanted = record.size + size if more else size
    if wanted < record.size:
        raise UserError(
            f"the disk has {record.size} bytes: to shrink it to {wanted} would cut off what is "
            "behind, and is not done"
        )
    if wanted > record.size and wanted % SECTOR:
        raise UserError(
            f"{wanted} bytes are no multiple of {SECTOR}, and a guest could not write the last "
            f"{wanted % SECTOR}: grow to {whole(wanted)}"
        )
    if wanted > (largest := record.chunk_size * CHUNKS_MAX):
        raise UserError(
            f"the set was made with chunk-size={record.chunk_size}, with which a disk has at most "
            f"{largest} bytes: for {wanted}, make a set with larger chunks, and copy the disk"
        )
    return wanted
