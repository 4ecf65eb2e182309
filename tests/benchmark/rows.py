"""The fio jobs that are measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

KIB = 1 << 10
MIB = 1 << 20

PATTERN = bytes.fromhex("deadbeef")
"""What a disk is full of, before and after each run. The FUSE export of QEMU 7.2 mixes up the data
of writes that are in flight together: with any other, its replicas would soon differ, and its vote
fail with EIO."""

DIRECT = ("--ioengine=io_uring", "--direct=1")
THREADS = ("--ioengine=psync", "--direct=1", "--numjobs=8")
"""As QEMU does with ``aio=threads``: each request is a system call of a thread of its own."""
BUFFERED = ("--ioengine=psync", "--direct=0")


@dataclass(frozen=True, slots=True)
class Row:
    """One fio job on a disk."""

    name: str
    block_size: int
    """Bytes."""
    fio: tuple[str, ...]

    @property
    def in_operations(self) -> bool:
        """Whether its speed is told in operations a second, not in bytes."""
        return self.block_size < 64 * KIB


ROWS = (
    Row("4k randread qd1", 4 * KIB, (*DIRECT, "--rw=randread", "--iodepth=1")),
    Row("4k randread qd32", 4 * KIB, (*DIRECT, "--rw=randread", "--iodepth=32")),
    Row("4k randwrite qd1", 4 * KIB, (*DIRECT, "--rw=randwrite", "--iodepth=1")),
    Row("4k randwrite qd32", 4 * KIB, (*DIRECT, "--rw=randwrite", "--iodepth=32")),
    Row("4k randrw qd16", 4 * KIB, (*DIRECT, "--rw=randrw", "--iodepth=16")),
    Row("64k randrw qd8", 64 * KIB, (*DIRECT, "--rw=randrw", "--iodepth=8")),
    Row("1M read qd4", MIB, (*DIRECT, "--rw=read", "--iodepth=4")),
    Row("1M write qd4", MIB, (*DIRECT, "--rw=write", "--iodepth=4")),
    # fio drops the cached pages each time it begins at the start again.
    Row("128k read buffered", 128 * KIB, (*BUFFERED, "--rw=read", "--invalidate=1")),
    Row("128k write buffered", 128 * KIB, (*BUFFERED, "--rw=write", "--end_fsync=1")),
    Row("4k randwrite fsync 8", 4 * KIB, (*DIRECT, "--rw=randwrite", "--iodepth=1", "--fsync=8")),
    Row("4k randwrite dsync", 4 * KIB, (*DIRECT, "--rw=randwrite", "--iodepth=1", "--sync=dsync")),
    Row("4k randread threads 8", 4 * KIB, (*THREADS, "--rw=randread")),
    Row("4k randwrite threads 8", 4 * KIB, (*THREADS, "--rw=randwrite")),
)


def matching(patterns: Sequence[str]) -> list[Row]:
    """The rows whose names match any of the shell *patterns*, in our order.

    Raises `ValueError` if there are none.
    """
    rows = [row for row in ROWS if any(fnmatchcase(row.name, pattern) for pattern in patterns)]
    if not rows:
        raise ValueError(f"no row matches; there are: {', '.join(row.name for row in ROWS)}")
    return rows
