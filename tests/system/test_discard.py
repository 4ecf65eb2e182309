"""Discards and requests for zeros: writes of zeros in every respect but the space they take."""

import ctypes
import errno
import mmap
import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import MakeImages
from support import vm
from support.command import wait_until
from support.faultfs import FaultFS
from support.faultydisk import DirectFile, FaultyDisk, answer
from support.mounting import Mounted, as_qemu, make_set
from support.programs import loop_device, run
from support.sets import SetMount, tmpfs
from support.sparse import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH,
    UNSHARE,
    ZERO_RANGE,
    allocated,
    fallocate,
)

from quorumfs.replica import punching
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40
BLOCK = 4096

ZEROING = [PUNCH, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE]
NOISE = random.Random(0).randbytes(4 * MIB)


@pytest.fixture
def full(make_images: MakeImages) -> list[Path]:
    """Two replicas full of the same noise."""
    replicas = make_images(2, len(NOISE))
    for path in replicas:
        path.write_bytes(NOISE)
    return replicas


# What is zeros afterwards, and where


def test_any_range_becomes_zeros_on_every_replica(full: list[Path], tmp_path: Path) -> None:
    """Random ranges of any alignment, by every mode, among writes: each read past and through the
    page cache gives what a model has, and so does each replica in the end."""
    rng = random.Random(1)
    model = bytearray(NOISE)
    with Mounted(full, tmp_path) as disk, DirectFile(disk.file) as direct:
        fd = os.open(disk.file, os.O_RDWR)
        for _ in range(300):
            length = int(2 ** rng.uniform(0, 19))
            offset = rng.randint(0, len(model) - length)
            if rng.random() < 0.7:
                fallocate(fd, rng.choice(ZEROING), offset, length)
                model[offset : offset + length] = bytes(length)
            else:
                cut = rng.randint(0, len(NOISE) - length)
                os.pwrite(fd, NOISE[cut : cut + length], offset)
                model[offset : offset + length] = NOISE[cut : cut + length]
            start = max(offset - 5000, 0)
            assert os.pread(fd, length + 9000, start) == model[start : start + length + 9000]
            assert direct.read(start & -512, length) == model[start & -512 :][:length]
        os.close(fd)
    for path in full:
        assert path.read_bytes() == model


def test_a_discard_gives_the_space_back_on_every_replica(full: list[Path], tmp_path: Path) -> None:
    """``fallocate --punch-hole``: du shrinks by as much on each replica and through the mount."""
    with Mounted(full, tmp_path) as disk:
        before = [allocated(path) for path in full]
        run("fallocate", "--punch-hole", "--offset", str(MIB), "--length", str(2 * MIB), disk.file)
        after = [allocated(path) for path in full]
        assert after == [space - 2 * MIB for space in before]
        assert disk.file.stat().st_blocks * 512 == after[0]
        run("fallocate", "--punch-hole", "--length", str(4 * MIB), disk.file)
        assert max(allocated(path) for path in full) <= 64 * KIB  # a block of the extent tree


@pytest.mark.parametrize("mode", [ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_zeros_keep_their_space(mode: int, full: list[Path], tmp_path: Path) -> None:
    """Where the file system can, what was asked to be zeros is not given back."""
    with Mounted(full, tmp_path) as disk:
        before = [allocated(path) for path in full]
        fallocate(disk.file, mode, 0, 4 * MIB)
        assert [allocated(path) for path in full] == before
    assert full[0].read_bytes() == full[1].read_bytes() == bytes(4 * MIB)


def test_zeros_where_the_file_system_can_only_punch(tmp_path: Path) -> None:
    """tmpfs has no ZERO_RANGE: a hole is as good."""
    with tmpfs(tmp_path / "memory", 16 * MIB) as memory:
        image = memory / "a.img"
        image.write_bytes(NOISE)
        with Mounted([image], tmp_path) as disk:
            fallocate(disk.file, ZERO_RANGE, MIB + 1, MIB)
        assert image.read_bytes() == NOISE[: MIB + 1] + bytes(MIB) + NOISE[2 * MIB + 1 :]
        assert allocated(image) < 4 * MIB


def test_zeros_are_written_on_a_replica_whose_file_system_cannot_punch(tmp_path: Path) -> None:
    """A replica without fallocate beside one with it: both hold the same zeros, neither is ever
    reported, and only the other one becomes smaller."""
    with FaultFS(tmp_path) as faulty:
        replicas = [faulty.path("a.img"), tmp_path / "b.img"]
        faulty.backing("a.img").write_bytes(NOISE)
        replicas[1].write_bytes(NOISE)
        model = bytearray(NOISE)
        with Mounted(replicas, tmp_path) as disk:
            ranges = [(0, 2 * MIB), (5, 3 * MIB), (3 * MIB + 700, 4096)]
            for (offset, length), mode in zip(ranges, ZEROING, strict=True):
                before = faulty.counters("a.img").bytes_written
                fallocate(disk.file, mode, offset, length)
                assert faulty.counters("a.img").bytes_written - before == length
                model[offset : offset + length] = bytes(length)
            assert disk.file.read_bytes() == model
            fallocate(disk.file, 0, 0, 4 * MIB)  # reserving is not for the bytes' sake
            assert faulty.counters("a.img").bytes_written == sum(length for _, length in ranges)
            assert disk.events("QUORUM_REPORT_BAD") == []
        assert faulty.backing("a.img").read_bytes() == replicas[1].read_bytes() == model


async def test_a_missing_mode_is_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file system was found not to have is remembered: zeros are written straight away."""
    asked: list[int] = []

    class Libc:
        @staticmethod
        def fallocate(_fd: int, mode: int, _offset: int, _length: int) -> int:
            asked.append(mode)
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(punching, "_libc", Libc)
    path = tmp_path / "a.img"
    path.write_bytes(NOISE)
    file = FileStorage(os.open(path, os.O_RDWR), len(NOISE), "a")
    replica = Replica(0, "a", file, timeout_s=8)
    for kind in [Kind.ZERO, Kind.DISCARD, Kind.ZERO, Kind.ALLOCATE, Kind.ALLOCATE]:
        operation = Operation(kind, 1, 2 * MIB)
        fan_out = FanOut(1)
        fan_out.submit(replica, operation)
        await fan_out.complete()
        assert operation.error is None
    await replica.close()
    assert asked == [ZERO_RANGE | KEEP_SIZE, PUNCH, KEEP_SIZE]
    assert path.read_bytes() == NOISE[:1] + bytes(2 * MIB) + NOISE[2 * MIB + 1 :]


def test_mapped_pages_see_the_zeros(full: list[Path], tmp_path: Path) -> None:
    """Pages in the kernel's cache, dirty ones too, do not outlive a discard of them."""
    model = bytearray(NOISE)
    model[: 2 * MIB] = NOISE[MIB : 3 * MIB]
    with (
        Mounted(full, tmp_path) as disk,
        disk.file.open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as mapped,
    ):
        mapped[: 2 * MIB] = NOISE[MIB : 3 * MIB]
        fallocate(file.fileno(), PUNCH, MIB // 2 + 1, MIB)
        model[MIB // 2 + 1 : MIB // 2 + 1 + MIB] = bytes(MIB)
        assert mapped[:] == model
    assert full[0].read_bytes() == full[1].read_bytes() == model


# Order and verdict


@pytest.mark.parametrize("first", ["write", "discard"])
def test_the_later_of_a_write_and_a_discard_wins_everywhere(first: str, tmp_path: Path) -> None:
    """While one hangs on one replica the other comes, for the same bytes: the replicas end up
    equal, with what came later."""
    data = NOISE[: 64 * KIB]
    with FaultFS(tmp_path) as faulty, ExitStack() as stack:
        replicas = [faulty.path("a.img"), tmp_path / "b.img"]
        faulty.backing("a.img").write_bytes(NOISE)
        replicas[1].write_bytes(NOISE)
        disk = stack.enter_context(Mounted(replicas, tmp_path))
        # Two opens: nothing but quorumfs need order the requests of two descriptors.
        file, other = (stack.enter_context(DirectFile(disk.file)) for _ in range(2))
        pool = stack.enter_context(ThreadPoolExecutor(2))
        stack.callback(faulty.clear)

        def write() -> object:
            return file.write(0, data)

        def discard() -> None:
            fallocate(other._fd, PUNCH, 0, len(data))

        order = [write, discard] if first == "write" else [discard, write]
        faulty.hang("a.img", "write")
        slow = pool.submit(order[0])
        faulty.wait_for(lambda c: c.in_flight == 1, "a.img")
        fast = pool.submit(order[1])
        faulty.release("a.img")
        slow.result(timeout=60)
        fast.result(timeout=60)
        expected = (bytes(len(data)) if first == "write" else data) + NOISE[len(data) :]
        assert disk.file.read_bytes() == expected
        assert faulty.backing("a.img").read_bytes() == replicas[1].read_bytes() == expected


@pytest.mark.parametrize("mode", ZEROING)
@pytest.mark.parametrize(
    ("errors", "threshold", "expected"),
    [
        ([0, 0, errno.EIO], 2, None),
        ([0, errno.EIO, errno.EIO], 2, "EIO"),
        ([0, errno.ENOSPC, errno.ENOSPC], 2, "ENOSPC"),
        ([0, errno.EIO, errno.EIO], 1, None),
    ],
)
def test_the_verdict_is_that_of_a_write(
    errors: list[int], threshold: int, expected: str | None, mode: int, tmp_path: Path
) -> None:
    """Success with the threshold; else the error that most failed with; each failure is told as
    a failed write, the only word that QEMU's event has for it."""
    content = NOISE[: 256 * KIB]
    options = f"vote-threshold={threshold},read-pattern=fifo"
    with FaultyDisk(tmp_path, [content] * 3, options) as disk:
        for name, number in zip(disk.names, errors, strict=True):
            if number:
                disk.fs.inject(name, "write", errno=number)
        assert answer(fallocate, disk.mounted.file, mode, 4096, 64 * KIB) == expected
        bad = [str(disk.fs.path(n)) for n, e in zip(disk.names, errors, strict=True) if e]
    events = disk.mounted.events("QUORUM_REPORT_BAD")  # all of them: it is unmounted
    assert sorted(event["node-name"] for event in events) == bad
    assert {event["type"] for event in events} == {"write"}
    assert len(disk.mounted.events("QUORUM_FAILURE")) == (expected is not None)


def test_a_replica_that_missed_a_discard_is_not_read_there(tmp_path: Path) -> None:
    """P1: the first replica still has the old bytes, and answers; reads give the zeros, until a
    later discard has reached it too."""
    content = NOISE[: 256 * KIB]
    options = as_qemu("read-pattern=fifo,vote-threshold=1")
    with FaultyDisk(tmp_path, [content] * 2, options) as disk:
        disk.fs.inject("a.img", "write", errno=errno.EIO)
        fallocate(disk.mounted.file, PUNCH, 1000, 100_000)
        expected = content[:1000] + bytes(100_000) + content[101_000:]
        assert disk.replicas() == [content, expected]
        assert disk.file.read(0, len(content)) == expected
        assert disk.mounted.file.read_bytes() == expected
        disk.fs.clear()
        fallocate(disk.mounted.file, PUNCH, 1000, 100_000)
        reads = disk.fs.counters("b.img").reads
        assert disk.file.read(0, len(content)) == expected
        assert disk.fs.counters("b.img").reads == reads
        assert disk.replicas() == [expected] * 2


# The edge of the disk, and what a disk cannot do


def test_nothing_makes_the_disk_grow(full: list[Path], tmp_path: Path) -> None:
    """Across the end: refused with ENOSPC without KEEP_SIZE; with it, the inside alone."""
    size = len(NOISE)
    model = bytearray(NOISE)
    with Mounted(full, tmp_path) as disk:
        for mode in (0, ZERO_RANGE):
            for offset, length in [(0, size + 1), (size - 10, 11), (size, 1), (TIB, MIB)]:
                assert answer(fallocate, disk.file, mode, offset, length) == "ENOSPC"
        assert full[0].read_bytes() == full[1].read_bytes() == NOISE
        for mode, offset in [(PUNCH, size - 5000), (ZERO_RANGE | KEEP_SIZE, size - 9000)]:
            fallocate(disk.file, mode, offset, MIB)
            model[offset:] = bytes(size - offset)
            assert full[0].read_bytes() == full[1].read_bytes() == model
        for mode in (PUNCH, ZERO_RANGE | KEEP_SIZE, KEEP_SIZE):
            for offset in (size, size + 1, TIB):
                fallocate(disk.file, mode, offset, MIB)
        fallocate(disk.file, KEEP_SIZE, 0, size + MIB)
        assert disk.file.stat().st_size == size
        assert disk.file.read_bytes() == model
    assert full[0].read_bytes() == full[1].read_bytes() == model


def test_what_a_disk_cannot_do_is_refused(full: list[Path], tmp_path: Path) -> None:
    """COLLAPSE_RANGE, INSERT_RANGE, UNSHARE: not supported, and nothing changes; nothing at all
    on a read-only mount or descriptor."""
    with Mounted(full, tmp_path) as disk:
        for mode in (COLLAPSE_RANGE, INSERT_RANGE, UNSHARE, UNSHARE | KEEP_SIZE):
            assert answer(fallocate, disk.file, mode, 0, BLOCK) == "ENOTSUP"  # the same number
        fd = os.open(disk.file, os.O_RDONLY)
        assert answer(fallocate, fd, PUNCH, 0, BLOCK) == "EBADF"
        os.close(fd)
    with Mounted(full, tmp_path, "ro") as disk:
        assert answer(fallocate, disk.file, PUNCH, 0, BLOCK) == "EROFS"
    assert full[0].read_bytes() == full[1].read_bytes() == NOISE


def test_space_is_reserved(make_images: MakeImages, tmp_path: Path) -> None:
    """posix_fallocate inside the disk takes the space on every replica, and changes no byte."""
    replicas = make_images(2, 4 * MIB)
    with Mounted(replicas, tmp_path) as disk:
        with disk.file.open("r+b") as file:
            os.posix_fallocate(file.fileno(), MIB, 2 * MIB)
        assert [allocated(path) for path in replicas] == [2 * MIB] * 2
        assert disk.file.read_bytes() == bytes(4 * MIB)


@pytest.mark.parametrize(("threshold", "expected"), [(1, None), (2, "ENOSPC")])
def test_space_that_a_replica_does_not_have(
    threshold: int, expected: str | None, tmp_path: Path
) -> None:
    """Reserving needs the threshold, like a write; and failing makes no replica stale."""
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2m", "none", small)
    try:
        replicas = [small / "a.img", tmp_path / "b.img"]
        for path in replicas:
            path.touch()
            os.truncate(path, 4 * MIB)
        with Mounted(replicas, tmp_path, f"vote-threshold={threshold}") as disk:
            assert answer(fallocate, disk.file, 0, 0, 4 * MIB) == expected
            assert disk.file.read_bytes() == bytes(4 * MIB)
            assert disk.events("QUORUM_REPORT_BAD") == []
    finally:
        run("umount", small)


def test_a_discard_changes_the_time_of_the_file(full: list[Path], tmp_path: Path) -> None:
    """As a write does, once the descriptor is closed: copying tools go by it."""
    with Mounted(full, tmp_path) as disk:
        before = disk.file.stat().st_mtime_ns
        fallocate(disk.file, PUNCH, 0, MIB)
        # The kernel sends the release on its own.
        wait_until(lambda: disk.file.stat().st_mtime_ns != before, "another time")


def test_a_whole_large_disk_is_discarded_at_a_few_goes(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """1 TiB, sparse, two replicas, data at both ends and in the middle: the number of changes of
    each replica does not follow the length (they were 16384, of 64 MiB)."""
    replicas = make_images(2, TIB)
    make_set(replicas)
    with SetMount(replicas, tmp_path) as disk:
        with DirectFile(disk.file) as file:
            for offset in (0, TIB // 2, TIB - MIB):
                file.write(offset, NOISE[:MIB])
        before = disk.replica(replicas[0])["writes"]
        run("fallocate", "--punch-hole", "--length", str(TIB), disk.file)
        assert disk.replica(replicas[0])["writes"] - before < 200
        assert max(allocated(path) for path in replicas) <= 64 * KIB


# Zeros that are written


@pytest.mark.parametrize(
    ("option", "kept"), [("off", 4 * MIB), ("on", 4 * MIB), ("unmap", 3 * MIB)]
)
def test_detected_zeros(option: str, kept: int, full: list[Path], tmp_path: Path) -> None:
    """An aligned write of zeros: zeros on every replica in any case, and a hole with unmap."""
    with Mounted(full, tmp_path, f"detect-zeroes={option}") as disk:
        with DirectFile(disk.file) as file:
            for offset in range(MIB, 2 * MIB, 128 * KIB):  # one request each, wherever it lies
                assert file.write(offset, bytes(128 * KIB)) == 128 * KIB
            assert file.read(MIB - 512, MIB + 1024) == (
                NOISE[MIB - 512 : MIB] + bytes(MIB) + NOISE[2 * MIB : 2 * MIB + 512]
            )
        assert [allocated(path) for path in full] == [kept] * 2
    assert full[0].read_bytes() == full[1].read_bytes()


@pytest.mark.parametrize("option", ["off", "on", "unmap"])
def test_zeros_that_are_not_detected(option: str, full: list[Path], tmp_path: Path) -> None:
    """Unaligned zeros and writes that are zeros but for one byte are written as they are."""
    model = bytearray(NOISE)
    almost = [bytes(65535) + b"x", b"x" + bytes(65535), bytes(30_000) + b"x" + bytes(35_535)]
    writes = [(100_001, bytes(10_000)), (0, bytes(100)), (len(NOISE) - 77, bytes(77))]
    writes += [(MIB * (n + 1), data) for n, data in enumerate(almost)]
    with Mounted(full, tmp_path, f"detect-zeroes={option}") as disk:
        fd = os.open(disk.file, os.O_RDWR)
        for offset, data in writes:
            assert os.pwrite(fd, data, offset) == len(data)
            model[offset : offset + len(data)] = data
        os.close(fd)
    assert full[0].read_bytes() == full[1].read_bytes() == model
    assert [allocated(path) for path in full] == [len(NOISE)] * 2


@pytest.mark.parametrize(("flags", "kept"), [("-z", 4 * MIB), ("-z -u", 2 * MIB)])
def test_zeros_of_qemu(flags: str, kept: int, full: list[Path], tmp_path: Path) -> None:
    """``qemu-io write -z`` arrives as a request for zeros: with -u the space goes too."""
    with Mounted(full, tmp_path) as disk:
        command = f"write {flags} 1M 2M"
        run("qemu-io", "-f", "raw", "-d", "unmap", "-t", "none", "-c", command, disk.file)
        assert [allocated(path) for path in full] == [kept] * 2
    expected = NOISE[:MIB] + bytes(2 * MIB) + NOISE[3 * MIB :]
    assert full[0].read_bytes() == full[1].read_bytes() == expected


@pytest.mark.parametrize("options", ["", "detect-zeroes=unmap"])
def test_an_image_is_converted_onto_the_disk(
    options: str, full: list[Path], tmp_path: Path
) -> None:
    """``qemu-img convert -n`` of a sparse image over old data leaves its bytes on each replica,
    and, as a target that can be zeroed, its holes."""
    source = tmp_path / "source.img"
    source.write_bytes(bytes(MIB) + NOISE[:MIB] + bytes(2 * MIB))
    command = "qemu-img convert -n -t none -f raw -O raw"
    with Mounted(full, tmp_path, options) as disk:
        run(*command.split(), source, disk.file)
    assert full[0].read_bytes() == full[1].read_bytes() == source.read_bytes()
    if options:
        assert max(allocated(path) for path in full) == MIB


# Loop devices and guests


def test_a_loop_device_discards(full: list[Path], tmp_path: Path) -> None:
    """blkdiscard and blkdiscard -z on a loop device over the mount reach every replica."""
    with Mounted(full, tmp_path) as disk, loop_device(disk.file, "--direct-io=on") as device:
        run("blkdiscard", "--offset", str(MIB), "--length", str(MIB), device)
        assert [allocated(path) for path in full] == [3 * MIB] * 2
        run("blkdiscard", "--zeroout", "--offset", str(3 * MIB), device)
        expected = NOISE[:MIB] + bytes(MIB) + NOISE[2 * MIB : 3 * MIB] + bytes(MIB)
        assert device.read_bytes() == expected
    assert full[0].read_bytes() == full[1].read_bytes() == expected


def test_a_file_system_is_made_with_discard(make_images: MakeImages, tmp_path: Path) -> None:
    """``mkfs.ext4 -E discard`` through a loop device leaves nothing of 64 MiB of old data."""
    replicas = make_images(2, 64 * MIB)
    for path in replicas:
        path.write_bytes(NOISE * 16)
    with Mounted(replicas, tmp_path) as disk, loop_device(disk.file, "--direct-io=on") as device:
        run("/usr/sbin/mkfs.ext4", "-q", "-E", "discard", device)
        run("/usr/sbin/e2fsck", "-fn", device)
    assert replicas[0].read_bytes() == replicas[1].read_bytes()
    assert max(allocated(path) for path in replicas) < 16 * MIB


GUEST_SCRIPT = """\
mkfs.ext4 -q -E nodiscard /dev/vda 96M
mkdir /mnt
mount -t ext4 /dev/vda /mnt
yes "$(seq 20000)" | head -c 40000000 > /mnt/big
seq 1000 > /mnt/small
sync
rm /mnt/big
sync
fstrim -v /mnt
[ "$(seq 1000)" = "$(cat /mnt/small)" ]
umount /mnt
e2fsck -fn /dev/vda
dd if=/dev/zero of=/dev/vda bs=1M seek=96 count=16 oflag=direct
blkdiscard -z -o $((112 << 20)) -l $((8 << 20)) /dev/vda
"""


def test_a_guest_gives_space_back(make_images: MakeImages, tmp_path: Path) -> None:
    """On both replicas: a guest's fstrim frees all but what its file system holds, and QEMU's
    detect-zeroes=unmap makes holes of the zeros that the guest writes."""
    replicas = make_images(2, 128 * MIB)
    for path in replicas:
        path.write_bytes(NOISE * 32)
    with Mounted(replicas, tmp_path) as disk:
        result = vm.boot(disk.file, GUEST_SCRIPT, tmp_path / "vm", detect_zeroes="unmap")
        assert result.exit_status == 0, result.console
    content = replicas[0].read_bytes()
    assert content == replicas[1].read_bytes()
    assert content[96 * MIB : 120 * MIB] == bytes(24 * MIB)
    assert content[120 * MIB :] == NOISE * 2
    used = [allocated(path) for path in replicas]
    print(f"guest: {result.seconds:.1f} s, {[space >> 20 for space in used]} MiB left")
    assert max(used) < (8 + 24) * MIB  # the noise at the end, and ext4's own structures
