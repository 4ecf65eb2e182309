"""Block devices as replicas, beside image files: their sidecars lie in a directory of their own."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from support.claims import claim
from support.command import one_line, wait_until, waits_of_python
from support.faultfs import FaultFS
from support.mounting import as_qemu, quorumfs
from support.programs import run
from support.sets import BLOCK, CHUNK, MIB, SetMount, named, opened, sidecar

from quorumfs.replica.blockdevice import BlockDevice
from quorumfs.replica.devices import device_of
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.lastregions import LastRegions
from quorumfs.replica.punching import Puncher
from quorumfs.replica.sidecarfile import sign
from quorumfs.replica.storage import Kind, Usage

SIZE = 32 * MIB
FIFO = "read-pattern=fifo,vote-threshold=1"
AMID = 6 * MIB + 5 * BLOCK
"""An offset where no sample of a fingerprint is."""


ZRAM = Path("/sys/class/zram-control")
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # linux/loop.h


class Shelf:
    """Files, the loop devices over them, and the directory for sidecars of devices.

    The devices have numbers that nobody else is given: what is detached and attached again has the
    name that the test says, whatever runs beside it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sidecars = directory / "sidecars"
        self.sidecars.mkdir()
        self._attached: dict[Path, ExitStack] = {}
        self._first = 1000 + os.getpid() % 10000 * 8
        self._made: list[int] = []

    def attach(
        self, name: str, size: int = SIZE, letters: bytes = b"", where: Path | None = None
    ) -> Path:
        """A device over the file *name*, which is made of *size* bytes, *letters* again and again.

        It has the first name that is free.
        """
        file = (where or self.directory) / name
        if not file.exists():
            file.write_bytes(letters * (size // len(letters)) if letters else b"")
            os.truncate(file, size)
        numbers = range(self._first, self._first + 8)
        number = next(one for one in numbers if Path(f"/dev/loop{one}") not in self._attached)
        if number not in self._made:
            _control(LOOP_CTL_ADD, number)
            self._made.append(number)
        device = Path(f"/dev/loop{number}")
        run("losetup", device, file)
        self._attached[device] = stack = ExitStack()
        stack.callback(_detach, device)
        return device

    def ram(self, size: int = SIZE) -> Path:
        """A device of *size* bytes in memory, with sectors of 4 KiB, of which nothing stays when it
        is taken away, and no name that it could be known by."""
        if not ZRAM.exists():
            run("modprobe", "zram")
        number = int((ZRAM / "hot_add").read_text())
        self._attached[Path(f"/dev/zram{number}")] = stack = ExitStack()
        stack.callback((ZRAM / "hot_remove").write_text, str(number))
        self.refill(Path(f"/dev/zram{number}"), size)
        return Path(f"/dev/zram{number}")

    def refill(self, device: Path, size: int = SIZE) -> None:
        """Take the medium out of a *device* in memory, and put an empty one in."""
        Path("/sys/block", device.name, "reset").write_text("1")
        Path("/sys/block", device.name, "disksize").write_text(str(size))

    def detach(self, device: Path) -> None:
        """Take *device* away; nobody has it open."""
        self._attached.pop(device).close()

    def detach_all(self) -> None:
        for device in list(self._attached):
            self.detach(device)
        for number in self._made:
            _control(LOOP_CTL_REMOVE, number)

    def options(self, more: str = "") -> str:
        return ",".join(filter(None, [f"sidecars={self.sidecars}", more]))

    def create(self, *replicas: Path, size: int = SIZE, threshold: int = 1) -> None:
        quorumfs(
            "create",
            f"--size={size}",
            f"--vote-threshold={threshold}",
            f"--sidecars={self.sidecars}",
            "--overwrite",
            *replicas,
        )

    def examine(self, *replicas: Path) -> dict[str, Any]:
        done = quorumfs("examine", "--json", f"--sidecars={self.sidecars}", *replicas, check=False)
        content: dict[str, Any] = json.loads(done.stdout)
        return content


def _control(request: int, number: int) -> None:
    with opened(Path("/dev/loop-control"), os.O_RDWR) as fd:
        fcntl.ioctl(fd, request, number)


def _detach(device: Path) -> None:
    run("losetup", "--detach", device)
    # Its last user may let go a little later.
    attached = Path("/sys/block", device.name, "loop")
    wait_until(lambda: not attached.exists(), f"{device} is detached")


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    one = Shelf(tmp_path)
    yield one
    one.detach_all()


def head(path: Path, size: int = SIZE) -> bytes:
    """The first bytes at *path*, as the device has them and no cache."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, size, 0)


def same(replicas: Sequence[Path]) -> bool:
    """Whether all hold the same disk."""
    return len({head(replica) for replica in replicas}) == 1


def fill(disk: SetMount, letter: bytes, offset: int, length: int = BLOCK) -> None:
    """Write to the guest's disk, durably."""
    with opened(disk.file, os.O_RDWR) as fd:
        assert os.pwrite(fd, letter * length, offset) == length
        os.fsync(fd)


def held(path: Path, offset: int, length: int = BLOCK) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, length, offset)


def roll_back(device: Path, before: bytes) -> None:
    """Have *device* hold what it held *before*, as after a merge of a snapshot."""
    with opened(device, os.O_RDWR) as fd:
        os.pwrite(fd, before, 0)
        os.fsync(fd)


def refusal(*arguments: str | Path, exit_code: int = 1) -> str:
    return one_line(quorumfs(*arguments, check=False), exit_code)


# Create and mount


@pytest.mark.parametrize("kinds", ["two devices", "a device and a file"])
def test_devices_hold_a_disk(shelf: Shelf, kinds: str) -> None:
    """Written, verified, and mounted again without a byte compared."""
    other = shelf.attach("b.raw") if kinds == "two devices" else shelf.directory / "b.img"
    replicas = [shelf.attach("a.raw"), other]
    shelf.create(*replicas, threshold=2)
    with SetMount(replicas, shelf.directory, shelf.options()) as disk:
        fill(disk, b"a", 0, MIB)
        fill(disk, b"b", 5 * MIB + 7, 1000)
        fill(disk, b"c", SIZE - BLOCK)
        assert disk.wait_healthy()["size"] == SIZE
        assert os.stat(disk.file).st_size == os.stat(disk.file).st_blocks * 512 == SIZE
        assert held(disk.file, 5 * MIB + 7, 1000) == b"b" * 1000
    assert same(replicas)
    assert head(replicas[0])[:MIB] == b"a" * MIB
    shown = shelf.examine(*replicas)
    assert [one["image"]["changed"] for one in shown["replicas"]] == [False, False]
    assert [member["state"] for member in shown["assembly"]["members"]] == ["current"] * 2
    with SetMount(replicas, shelf.directory, shelf.options()) as disk:
        assert disk.states() == ["current", "current"]
        assert held(disk.file, 0, MIB) == b"a" * MIB
        parts = disk.status()["replicas"]
        assert [part["out_of_sync_bytes"] for part in parts] == [0, 0]
        assert not disk.events("RESYNC_STARTED")


def test_a_device_needs_a_place_for_its_sidecar(shelf: Shelf) -> None:
    """Every command says what to do, and leaves the device as it is."""
    device, image = shelf.attach("a.raw", letters=b"x"), shelf.directory / "b.img"
    mountpoint = shelf.directory / "mnt"
    mountpoint.mkdir()
    commands: list[list[str | Path]] = [
        ["create", "--size=32M", "--overwrite", device, image],
        ["create", "--source", device, device, image],
        ["mount", device, image, mountpoint],
        ["resolve", "--keep", device, device, image],
    ]
    for command in commands:
        line = refusal(*command)
        assert f"{device} is a block device" in line
        assert "sidecars=DIR" in line
        assert "--sidecars DIR" in line
    assert "sidecars=DIR" in quorumfs("examine", device, check=False).stdout
    assert head(device) == b"x" * SIZE
    assert not image.exists()
    gone = shelf.directory / "gone"
    line = refusal("mount", "-o", f"sidecars={gone}", device, mountpoint)
    assert f"{gone}, for the sidecar of {device}, is not there" in line
    assert "is no directory" in refusal(
        "create", "--size=32M", "--overwrite", f"--sidecars={gone}", device, image
    )
    line = refusal("mount", "-o", "sidecars=here", device, mountpoint, exit_code=4)
    assert "absolute path" in line


def test_a_device_is_never_adopted(shelf: Shelf) -> None:
    """Its sidecar may lie on what is not mounted now: an empty directory is no proof of a new set.

    So no stale replica becomes current by that.
    """
    replicas = [shelf.attach("a.raw"), shelf.attach("b.raw")]
    shelf.create(*replicas)
    mountpoint = shelf.directory / "mnt"
    mountpoint.mkdir()
    aside = shelf.sidecars.rename(shelf.directory / "aside")
    shelf.sidecars.mkdir()
    line = refusal("mount", "-o", shelf.options(), *replicas, mountpoint)
    assert str(shelf.sidecars) in line
    assert "quorumfs create" in line
    assert not list(shelf.sidecars.iterdir())
    shelf.sidecars.rmdir()
    aside.rename(shelf.sidecars)
    with SetMount(replicas, shelf.directory, shelf.options()) as disk:
        disk.wait_healthy()


def test_what_a_device_holds_is_not_overwritten_unasked(shelf: Shelf) -> None:
    """And with --overwrite all of the disk is zeros, but nothing behind its end."""
    device, image = shelf.attach("a.raw", SIZE + MIB, b"x"), shelf.directory / "b.img"
    command: list[str | Path] = [
        "create",
        f"--size={SIZE}",
        f"--sidecars={shelf.sidecars}",
        device,
        image,
    ]
    assert "--overwrite" in refusal(*command)
    assert head(device, SIZE + MIB) == b"x" * (SIZE + MIB)
    assert not image.exists()
    assert quorumfs("create", "--check", "--overwrite", *command[1:], check=False).returncode == 5
    assert head(device, SIZE + MIB) == b"x" * (SIZE + MIB)
    quorumfs("create", "--overwrite", *command[1:])
    assert head(device, SIZE + MIB) == bytes(SIZE) + b"x" * MIB
    quorumfs("create", "--if-needed", *command[1:])
    with SetMount([device, image], shelf.directory, shelf.options()) as disk:
        disk.wait_healthy()
        fill(disk, b"e", SIZE - BLOCK)
        with opened(disk.file, os.O_RDWR) as fd, pytest.raises(OSError, match="No space"):
            os.pwrite(fd, b"y", SIZE)
    assert head(device, SIZE + MIB)[SIZE - BLOCK :] == b"e" * BLOCK + b"x" * MIB


def test_a_device_that_is_too_small_is_refused(shelf: Shelf) -> None:
    """By create, as a copy, and when it is added; nothing is written."""
    small, image = shelf.attach("small.raw", SIZE - MIB, b"x"), shelf.directory / "a.img"
    where = f"--sidecars={shelf.sidecars}"
    sizes = (str(SIZE - MIB), str(SIZE))
    line = refusal("create", f"--size={SIZE}", "--overwrite", where, image, small)
    assert all(size in line for size in sizes)
    assert not image.exists()
    image.write_bytes(b"s" * SIZE)
    line = refusal("create", "--source", image, where, image, small)
    assert all(size in line for size in sizes)
    image.unlink()
    quorumfs("create", f"--size={SIZE}", image)
    with SetMount([image], shelf.directory, shelf.options()) as disk:
        line = refusal("add", "--overwrite", disk.mountpoint, small)
        assert all(size in line for size in sizes)
    assert head(small, SIZE - MIB) == b"x" * (SIZE - MIB)


def test_a_device_in_use_is_refused(shelf: Shelf) -> None:
    """By who has it: a file system, another mount, or the same set by another path."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    run("mkfs.ext4", "-q", device)
    used = shelf.directory / "used"
    used.mkdir()
    where = f"--sidecars={shelf.sidecars}"
    command: list[str | Path] = ["create", f"--size={SIZE}", "--overwrite", where, device, image]
    run("mount", device, used)
    try:
        assert f"{device} is in use: it is mounted at {used}" in refusal(*command)
    finally:
        run("umount", used)
    quorumfs(*command)
    second = shelf.directory / "second"
    second.mkdir()
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        line = refusal("mount", "-o", shelf.options("degraded"), device, second)
        assert f"{device} is in use: by pid {disk.pid}" in line
        for theirs in (("mkfs.ext4", "-q", device), ("mount", device, used)):
            assert subprocess.run(theirs, capture_output=True, check=False).returncode
        disk.wait_healthy()
    link = shelf.directory / "link"
    link.symlink_to(device)
    line = refusal("mount", "-o", shelf.options(), device, link, second)
    assert f"{device} and {link} are the same file" in line


def test_two_devices_over_one_file_are_one_store(shelf: Shelf) -> None:
    """Before anything is cleared; ``examine`` says what a mount would."""
    first, second = shelf.attach("a", letters=b"kept"), shelf.attach("a")
    same = f"{first} and {second} are the same file"
    options = (f"--sidecars={shelf.sidecars}", first, second)
    assert same in refusal("create", f"--size={SIZE}", "--overwrite", *options)
    assert (shelf.directory / "a").read_bytes() == b"kept" * (SIZE // 4)
    assert not list(shelf.sidecars.iterdir())
    assert same in shelf.examine(first, second)["assembly"]["refusal"]
    assert same in refusal("mount", "-o", shelf.options(), first, second, shelf.directory)


def test_a_file_and_the_device_over_it_are_one_store(shelf: Shelf) -> None:
    """Nor may what an image in use lies behind, or the disk itself, become a replica."""
    device, file = shelf.attach("a"), shelf.directory / "a"
    create = ("create", "--source", file, "--sidecars", shelf.sidecars, file, device)
    assert f"{file} and {device} are the same file" in refusal(*create)
    shelf.detach(device)
    images = [file, shelf.directory / "b.img"]
    quorumfs("create", "--source", *images[:1], *images)
    with SetMount(images, shelf.directory, shelf.options("vote-threshold=1")) as disk:
        for behind, why in (
            (file, "lies on {}, which is in use, as a replica or else"),
            (disk.file, "lies on {}, the disk that it would be a replica of"),
        ):
            device = shelf.attach(behind.name, where=behind.parent)
            line = refusal("add", "--overwrite", disk.mountpoint, device)
            assert f"{device} {why.format(behind)}" in line
            over = shelf.attach(device.name, where=device.parent)
            line = refusal("add", "--overwrite", disk.mountpoint, over)
            assert f"{over} {why.format(behind)}" in line
            shelf.detach(over)
            shelf.detach(device)
        device = shelf.attach(file.name)
        line = refusal("create", "--size=1M", f"--sidecars={shelf.sidecars}", "--overwrite", device)
        assert f"{device} lies on {file}, which is in use, as a replica or else" in line
    line = refusal("create", "--size=1M", f"--sidecars={shelf.sidecars}", "--overwrite", device)
    assert f"{device} lies on {file}, which is a replica of a set" in line
    line = refusal("mount", "-o", shelf.options("metadata=none"), device, shelf.directory)
    assert f"{device} is a member of a set ({file}.quorumfs)" in line


def test_an_image_in_use_is_known_through_a_device_whatever_its_name(shelf: Shelf) -> None:
    """Behind a loop device it has the path that it was attached by, which may mean nothing here."""
    image, link = shelf.directory / "a.img", shelf.directory / "link"
    quorumfs("create", f"--size={SIZE}", image)
    link.hardlink_to(image)
    device, other = shelf.attach("link"), shelf.directory / "other"
    other.mkdir()
    with SetMount([image], shelf.directory, shelf.options("vote-threshold=1")) as disk:
        disk.file.write_bytes(b"kept")
        for command in (
            ("mount", "-o", shelf.options("vote-threshold=1,metadata=none"), device, other),
            ("mount", "-o", shelf.options("vote-threshold=1"), device, other),
            ("create", f"--size={SIZE}", f"--sidecars={shelf.sidecars}", "--overwrite", device),
            ("create", "--source", device, f"--sidecars={shelf.sidecars}", device, other / "new"),
            ("add", "--overwrite", disk.mountpoint, device),
        ):
            assert f"{device} lies on {link}, which is in use, as a replica" in refusal(*command)
    assert image.read_bytes()[:4] == b"kept"


def test_a_file_is_no_second_replica_beside_the_device_over_it(shelf: Shelf) -> None:
    device, file = shelf.attach("a"), shelf.directory / "a"
    shelf.create(device)
    with SetMount([device], shelf.directory, shelf.options("vote-threshold=1")) as disk:
        link = shelf.directory / "link"
        link.hardlink_to(file)
        for path in (file, link):
            line = refusal("add", "--overwrite", disk.mountpoint, path)
            assert f"{path} is in use: {device} lies on it, and is in use" in line
        assert len(disk.status()["replicas"]) == 1


def test_an_image_on_a_file_system_on_the_disk_itself_is_no_replica(shelf: Shelf) -> None:
    """Each write to the disk would wait for another write to the disk."""
    image, inner = shelf.directory / "a.img", shelf.directory / "inner"
    inner.mkdir()
    quorumfs("create", "--size=16M", image)
    with SetMount([image], shelf.directory, shelf.options("vote-threshold=1")) as disk:
        device = shelf.attach(disk.file.name, where=disk.file.parent)
        run("mkfs.ext4", "-q", device)
        run("mount", device, inner)
        try:
            over = shelf.attach("b", size=16 << 20, where=inner)
            for path in (inner / "new.img", inner / "b", over):
                line = refusal("add", "--overwrite", disk.mountpoint, path)
                assert f"{path} lies on {disk.file}, the disk that it would be a replica" in line
            assert not (inner / "new.img").exists()
            shelf.detach(over)
        finally:
            run("umount", inner)
        shelf.detach(device)


def test_a_file_whose_device_is_in_use_is_refused(shelf: Shelf) -> None:
    devices, files = [shelf.attach("a"), shelf.attach("b")], [shelf.directory / x for x in "ab"]
    shelf.create(*devices)
    with SetMount(devices, shelf.directory, shelf.options()):
        (other := shelf.directory / "other").mkdir()
        line = refusal("mount", *files, other)
        assert f"{files[0]} is in use: {devices[0]} lies on it, and is in use" in line


def test_sidecars_inside_the_mount_are_refused(shelf: Shelf) -> None:
    """The daemon would wait for itself."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    mountpoint = shelf.directory / "mnt"
    shelf.sidecars.rename(mountpoint)
    options = f"sidecars={mountpoint}"
    line = refusal("mount", "-o", options, image, device, mountpoint)
    assert f"is inside the mount point {mountpoint}" in line
    mountpoint.rename(shelf.sidecars)
    with SetMount([image], shelf.directory, FIFO + ",degraded") as disk:
        quorumfs("set", disk.mountpoint, options)
        line = refusal("add", "--overwrite", disk.mountpoint, shelf.attach("c.raw"))
        assert f"is inside the mount point {mountpoint}" in line


# Names and identities


def test_a_partition_is_a_device_of_its_own(shelf: Shelf) -> None:
    """Two of one disk have two sidecars; one keeps its own whatever the other is."""
    disk_device = shelf.attach("a.raw", 80 * MIB)
    for number, start in ((1, 2048), (2, 67584)):
        run("addpart", disk_device, str(number), str(start), "65536")
    parts = [Path(f"{disk_device}p{number}") for number in (1, 2)]
    wait_until(lambda: all(part.exists() for part in parts), "the partitions")
    shelf.create(*parts)
    assert len(list(shelf.sidecars.iterdir())) == 2
    with SetMount(parts, shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"p", MIB)
        assert "in use" in refusal(
            "create", f"--size={SIZE}", "--overwrite", f"--sidecars={shelf.sidecars}", disk_device
        )
        disk.wait_healthy()
    assert same(parts)
    shown = shelf.examine(*parts)["replicas"]
    assert [one["image"]["changed"] for one in shown] == [False, False]
    for number in (1, 2):
        run("delpart", disk_device, str(number))


def test_a_device_is_known_by_what_it_is(shelf: Shelf) -> None:
    """Devices that changed their names find their sidecars; a name leads to no other's."""
    one, two = shelf.attach("a.raw"), shelf.attach("b.raw")
    shelf.create(one, two)
    with SetMount([one, two], shelf.directory, shelf.options(FIFO)) as disk:
        quorumfs("offline", disk.mountpoint, two)
        fill(disk, b"n", 0)
    shelf.detach(one)
    shelf.detach(two)
    now_two, now_one = shelf.attach("b.raw"), shelf.attach("a.raw")
    assert (now_one, now_two) == (two, one)
    with SetMount([two, one], shelf.directory, shelf.options(FIFO)) as disk:
        assert held(disk.file, 0) == b"n" * BLOCK
        assert disk.replica(one)["state"] == "offline"  # it was called two
        quorumfs("online", disk.mountpoint, one)
        disk.wait_healthy()
    assert same([one, two])
    shelf.detach(one)
    stranger = shelf.attach("c.raw")
    assert stranger == one
    mountpoint = shelf.directory / "mnt"
    line = refusal("mount", "-o", shelf.options(), one, two, mountpoint)
    assert f"{one} has no sidecar" in line
    assert head(stranger) == bytes(SIZE)


def test_a_device_changed_behind_its_sidecar_is_noticed(shelf: Shelf) -> None:
    """As a file system on it is used: it is compared, and given what the other one holds."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"r", 0, MIB)
    with opened(device, os.O_RDWR) as fd:
        os.pwrite(fd, b"w" * BLOCK, 0)
    shown = shelf.examine(image, device)
    assert [one["image"]["device"] for one in shown["replicas"]] == [False, True]
    assert [one["image"]["changed"] for one in shown["replicas"]] == [False, True]
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        assert held(disk.file, 0) == b"r" * BLOCK
        disk.wait_healthy()
    assert same([image, device])


def write_once(disk: SetMount) -> None:
    fill(disk, b"n", AMID)


def write_amid_what_stays(disk: SetMount) -> None:
    with opened(disk.file, os.O_RDWR) as fd:
        os.pwrite(fd, b"o" * BLOCK + b"n" * BLOCK + b"o" * BLOCK, AMID - BLOCK)
        os.fsync(fd)


def write_before_what_changes_nothing(disk: SetMount) -> None:
    fill(disk, b"n", AMID)
    for _ in range(30):
        fill(disk, b"o", AMID - 2 * BLOCK)
    fill(disk, b"\0", 8 * MIB, 10 * MIB)


def resync(disk: SetMount) -> None:
    device = disk.replicas[1]
    quorumfs("offline", disk.mountpoint, device)
    fill(disk, b"n", AMID)
    quorumfs("online", disk.mountpoint, device)
    disk.wait_healthy()


@pytest.mark.parametrize("way", ["fast", "long"])
@pytest.mark.parametrize(
    "change", [write_once, write_amid_what_stays, write_before_what_changes_nothing, resync]
)
def test_a_device_that_was_rolled_back_is_noticed(
    shelf: Shelf, change: Callable[[SetMount], None], way: str
) -> None:
    """It lacks the last write that changed anything, wherever that was, and in whichever mount."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    options = f"{FIFO},fast-path={'on' if way == 'fast' else 'off'}"
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(options)) as disk:
        fill(disk, b"o", AMID - 2 * BLOCK, 4 * BLOCK)
    before = head(device)
    with SetMount([image, device], shelf.directory, shelf.options(options)) as disk:
        fill(disk, b"o", AMID)  # the first touch is never on the fast path
        change(disk)
    with SetMount([image, device], shelf.directory, shelf.options(options)) as disk:
        fill(disk, b"o", AMID - BLOCK)
        resyncs = len(disk.events("RESYNC_STARTED"))
        assert resyncs == (change is resync)
    roll_back(device, before)
    with SetMount([device, image], shelf.directory, shelf.options(options)) as disk:
        assert held(disk.file, AMID) == b"n" * BLOCK
        disk.wait_healthy()
        assert len(disk.events("RESYNC_STARTED")) == resyncs + 1
    assert same([image, device])


def test_a_device_that_was_rolled_back_to_before_a_crash_is_noticed(shelf: Shelf) -> None:
    """What is made equal after a crash is where the last writes were."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    before = head(device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"n", AMID)
        disk.kill()
    wait_until(lambda: not os.path.ismount(disk.mountpoint), "the end of the dead mount")
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait_healthy()
    roll_back(device, before)
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        assert held(disk.file, AMID) == b"n" * BLOCK
        disk.wait_healthy()
    assert same([image, device])


def test_a_device_that_was_offline_and_rolled_back_is_noticed(shelf: Shelf) -> None:
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        before = head(device)
        fill(disk, b"n", AMID)
        quorumfs("offline", disk.mountpoint, device)
        roll_back(device, before)
        quorumfs("online", disk.mountpoint, device)
        disk.wait_healthy()
        assert same([image, device])


def test_sidecars_from_a_backup_prove_nothing(shelf: Shelf) -> None:
    """They say of a device that was away since that it is current: all is compared."""
    device, image = shelf.attach("a.raw"), shelf.attach("b.raw")
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"o", AMID)
    shutil.copytree(shelf.sidecars, backup := shelf.directory / "backup")
    with SetMount([image], shelf.directory, shelf.options(FIFO + ",degraded")) as disk:
        fill(disk, b"n", AMID)
    shutil.rmtree(shelf.sidecars)
    shutil.copytree(backup, shelf.sidecars)
    shown = shelf.examine(image, device)
    assert [one["image"]["changed"] for one in shown["replicas"]] == [True, True]
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait(lambda status: status["undecided_bytes"] > 0, "the difference")
        assert quorumfs("status", disk.mountpoint, check=False).returncode == 3


def test_a_backing_file_put_in_the_place_of_another_is_no_proof(shelf: Shelf) -> None:
    """The same path, the same bytes where a fingerprint looks, and another file."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"o", 100 * CHUNK + BLOCK)
    shelf.detach(device)
    shutil.copy(shelf.directory / "a.raw", shelf.directory / "copy")
    with SetMount([image], shelf.directory, shelf.options(FIFO + ",degraded")) as disk:
        fill(disk, b"n", 100 * CHUNK + BLOCK)
    shelf.attach("a.raw")
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait_healthy()
    shelf.detach(device)
    os.replace(shelf.directory / "copy", shelf.directory / "a.raw")
    shelf.attach("a.raw")
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        assert held(disk.file, 100 * CHUNK + BLOCK) == b"n" * BLOCK
        disk.wait_healthy()
    assert same([image, device])


def test_a_nameless_device_is_never_believed_where_another_is(shelf: Shelf) -> None:
    """The kernel does not count that another medium is in it, so it is compared at each mount."""
    device, image = shelf.ram(), shelf.directory / "b.img"
    shelf.create(image, device)
    (place,) = (one for one in shelf.sidecars.iterdir())
    assert place.name == f"path-%2fdev%2f{device.name}.quorumfs"
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait_for_events("RESYNC_FINISHED")
        fill(disk, b"m", 3 * MIB + 8 * BLOCK)  # where no fingerprint looks
    shelf.refill(device)
    assert head(device) == bytes(SIZE)
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        assert held(disk.file, 3 * MIB + 8 * BLOCK) == b"m" * BLOCK
        disk.wait_healthy()
    assert same([image, device])


@pytest.mark.parametrize("attached", ["still", "anew"])
def test_after_a_crash_a_device_that_was_gone_is_compared(shelf: Shelf, attached: str) -> None:
    """While it stays attached, it proves itself: only what may differ is compared then."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"k", 3 * MIB)
        disk.kill()
    wait_until(lambda: not os.path.ismount(disk.mountpoint), "the end of the dead mount")
    if attached == "anew":
        shelf.detach(device)
        assert shelf.attach("a.raw") == device
    shown = shelf.examine(image, device)["assembly"]["members"]
    assert [member["state"] for member in shown] == [
        "current",
        "current" if attached == "still" else "suspect",
    ]
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait_healthy()
        began = disk.events("RESYNC_STARTED")
        assert bool(began) == (attached == "anew")
    assert same([image, device])


# Failures


def test_a_device_with_nothing_attached_is_missing(shelf: Shelf) -> None:
    """And comes back as soon as something is: no name, no size, no sidecar is made of nothing."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    shelf.detach(device)
    mountpoint = shelf.directory / "mnt"
    mountpoint.mkdir()
    line = refusal("mount", "-o", shelf.options(), image, device, mountpoint)
    assert f"{device}: nothing is attached to the device" in line
    with SetMount([image, device], shelf.directory, shelf.options(FIFO + ",degraded")) as disk:
        assert disk.states() == ["current", "missing"]
        fill(disk, b"o", MIB)
        assert shelf.attach("a.raw") == device
        disk.wait_healthy()
    assert same([image, device])
    assert len(list(shelf.sidecars.iterdir())) == 1


def test_a_device_that_fails_is_ejected_and_comes_back_under_another_name(shelf: Shelf) -> None:
    """No read is stale meanwhile. The path given is a link, as udev keeps them."""
    store, image = shelf.directory / "store", shelf.directory / "b.img"
    store.mkdir()
    link = shelf.directory / "by-id"
    with FaultFS(store) as faulty:
        device = shelf.attach("a.raw", where=faulty.path("a.raw").parent)
        link.symlink_to(device)
        shelf.create(link, image)
        with SetMount([link, image], shelf.directory, shelf.options(FIFO)) as disk:
            fill(disk, b"1", 0)
            faulty.inject("a.raw", "write", errno=errno.EIO)
            fill(disk, b"2", 0)
            disk.wait(lambda status: status["state"] == "degraded", "an ejection")
            assert held(disk.file, 0) == b"2" * BLOCK
            faulty.clear("a.raw")
            disk.wait_healthy()
            assert same([link, image])
            quorumfs("offline", disk.mountpoint, link)
            fill(disk, b"3", MIB)
            shelf.detach(device)
            occupied = shelf.attach("other.raw")
            assert occupied == device  # as the next disk gets the name that is free
            quorumfs("online", disk.mountpoint, link)
            again = shelf.attach("a.raw", where=faulty.path("a.raw").parent)
            assert disk.replica(link)["state"] != "current"
            assert head(occupied) == bytes(SIZE)
            link.unlink()
            link.symlink_to(again)
            disk.wait_healthy()
            assert held(disk.file, MIB) == b"3" * BLOCK
        assert head(occupied) == bytes(SIZE)
        assert same([link, image])
        shelf.detach(again)


@pytest.mark.parametrize("sampled", [False, True], ids=["anywhere", "in the fingerprint"])
def test_a_bad_sector_is_read_elsewhere(shelf: Shelf, sampled: bool) -> None:
    """Also where a fingerprint looks: the device is used all the same, once it was compared."""
    store, image = shelf.directory / "store", shelf.directory / "b.img"
    store.mkdir()
    bad = MIB if sampled else 3 * MIB + 8 * BLOCK
    with FaultFS(store) as faulty:
        where = faulty.path("a.raw").parent
        device = shelf.attach("a.raw", where=where)
        shelf.create(device, image)
        with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
            fill(disk, b"g", MIB, 4 * MIB)
            fill(disk, b"h", 6 * MIB, 20 * MIB)  # a fingerprint covers what was written to last
        shelf.detach(device)
        faulty.inject("a.raw", "read", start=bad, end=bad + BLOCK, errno=errno.EIO)
        device = shelf.attach("a.raw", where=where)
        with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
            assert held(disk.file, bad) == b"g" * BLOCK
            if sampled:
                disk.wait_for_events("RESYNC_STARTED")
            else:
                assert disk.replica(device)["errors"]["read"]
            faulty.clear("a.raw")
            disk.wait_healthy()
        assert same([device, image])
        shelf.detach(device)


# Changes while a guest uses the disk


def test_a_file_is_replaced_by_a_device_and_back(shelf: Shelf) -> None:
    """While it is in use; holes of the sources are zeros on the device, whatever it held."""
    images = named(shelf.directory, 2)
    quorumfs("create", f"--size={SIZE}", "--vote-threshold=1", *images)
    device = shelf.attach("d.raw", letters=b"old!")
    with SetMount(images, shelf.directory, FIFO) as disk:
        fill(disk, b"f", 2 * MIB, MIB)
        assert "sidecars=DIR" in refusal("replace", disk.mountpoint, images[1], device)
        quorumfs("set", disk.mountpoint, f"sidecars={shelf.sidecars}")
        line = refusal("replace", disk.mountpoint, images[1], device)
        assert "may hold data" in line
        assert "--overwrite" in line
        assert head(device) == b"old!" * (SIZE // 4)
        quorumfs("replace", "--overwrite", disk.mountpoint, images[1], device)
        status = disk.wait_healthy()
        assert [part["path"] for part in status["replicas"]] == [str(images[0]), str(device)]
        line = refusal("set", disk.mountpoint, "sidecars=none", exit_code=4)
        assert "unmount" in line
        fill(disk, b"h", 20 * MIB + 100, 1000)
    assert same([images[0], device])
    with SetMount([images[0], device], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait_healthy()
        images[1].unlink()
        sidecar(images[1]).unlink()
        quorumfs("replace", disk.mountpoint, device, images[1])
        disk.wait_healthy()
        run("mkfs.ext4", "-q", "-F", device)  # it is free
    assert same(images)


@pytest.mark.parametrize("sector", [512, 4096])
def test_discard_makes_zeros_on_a_device(shelf: Shelf, sector: int) -> None:
    """Of whole sectors and of parts of them; the space of whole ones is given back."""
    device = shelf.attach("a.raw") if sector == 512 else shelf.ram()
    assert run("blockdev", "--getss", device).strip() == str(sector)
    image = shelf.directory / "b.img"
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"d", 0, 8 * MIB)
        run("fallocate", "-p", "-o", "1000", "-l", str(4 * MIB), disk.file)
        run("fallocate", "-z", "-o", str(6 * MIB - 7), "-l", "600", disk.file)
        expected = bytearray(b"d" * 8 * MIB)
        expected[1000 : 1000 + 4 * MIB] = bytes(4 * MIB)
        expected[6 * MIB - 7 : 6 * MIB + 593] = bytes(600)
        assert held(disk.file, 0, 8 * MIB) == expected
        disk.wait_healthy()
    assert head(device)[: 8 * MIB] == expected
    assert same([image, device])
    if sector == 512:
        assert (shelf.directory / "a.raw").stat().st_blocks * 512 < 5 * MIB


def test_grow_needs_a_longer_device_first(shelf: Shelf) -> None:
    """Then the disk is zeros there, whatever the device held; also where it was away meanwhile."""
    one = shelf.attach("a.raw")
    two = shelf.attach("b.raw")
    shelf.create(one, two)
    larger = SIZE + 8 * MIB
    with SetMount([one, two], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"a", SIZE - BLOCK)
        line = refusal("grow", disk.mountpoint, str(larger))
        assert f"the device has {SIZE} bytes" in line
        assert "make it longer first" in line
        assert disk.status()["size"] == SIZE
        for name, device in (("a.raw", one), ("b.raw", two)):
            with (shelf.directory / name).open("r+b") as file:
                file.seek(SIZE)
                file.write(b"garbage!" * MIB)
            run("losetup", "--set-capacity", device)
        quorumfs("offline", disk.mountpoint, two)
        quorumfs("grow", disk.mountpoint, str(larger))
        assert held(disk.file, SIZE - BLOCK, 2 * BLOCK) == b"a" * BLOCK + bytes(BLOCK)
        fill(disk, b"z", larger - BLOCK)
        quorumfs("online", disk.mountpoint, two)
        assert disk.wait_healthy()["size"] == larger
        (began,) = disk.events("RESYNC_STARTED")
        assert began["bytes"] == larger - SIZE  # what was before the end is as it was left
    expected = bytes(8 * MIB - BLOCK) + b"z" * BLOCK
    assert head(one, larger)[SIZE:] == expected
    assert head(two, larger)[SIZE:] == expected
    with SetMount([one, two], shelf.directory, shelf.options(FIFO)) as disk:
        assert disk.wait_healthy()["size"] == larger
        assert disk.events("RESYNC_STARTED") == [began]


def test_a_device_that_is_too_short_costs_no_copy(shelf: Shelf) -> None:
    """Whoever forgot to make it longer still has two replicas."""
    image, device = shelf.directory / "near.img", shelf.attach("b.raw")
    shelf.create(image, device)
    with SetMount([image, device], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"a", 0)
        line = refusal("grow", disk.mountpoint, str(SIZE + MIB))
        assert f"{device}: the device has {SIZE} bytes" in line
        assert disk.states() == ["current", "current"]
        assert disk.status()["size"] == SIZE
        assert image.stat().st_size == SIZE


# Without sidecars, and without writing


def test_devices_without_metadata_need_no_directory(shelf: Shelf) -> None:
    devices = [shelf.attach("a.raw"), shelf.attach("b.raw")]
    with SetMount(devices, shelf.directory, as_qemu()) as disk:
        fill(disk, b"q", 0)
    assert same(devices)
    assert head(devices[0])[:BLOCK] == b"q" * BLOCK


def test_a_read_only_mount_writes_nothing(shelf: Shelf) -> None:
    """Nor could it: the device is open for reading."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    (place,) = shelf.sidecars.iterdir()
    before = place.read_bytes()
    with SetMount([device, image], shelf.directory, shelf.options("ro")) as disk:
        assert held(disk.file, 0) == bytes(BLOCK)
        assert disk.states() == ["current", "current"]
        assert access_of(disk, device) == {os.O_RDONLY}
    assert place.read_bytes() == before
    with SetMount([device, image], shelf.directory, shelf.options()) as disk:
        assert access_of(disk, device) == {os.O_RDWR}


def access_of(disk: SetMount, device: Path) -> set[int]:
    """How the daemon has *device* open."""
    found = set()
    for entry in Path(f"/proc/{disk.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # another file, closed meanwhile
            if os.readlink(entry) == str(device):
                text = Path(f"/proc/{disk.pid}/fdinfo/{entry.name}").read_text()
                flags = next(line.split()[1] for line in text.splitlines() if "flags" in line)
                found.add(int(flags, 8) & os.O_ACCMODE)
    return found


def test_small_requests_take_the_fast_path(shelf: Shelf) -> None:
    """As with files on this host: Python sleeps meanwhile."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(image, device)
    with (
        SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk,
        opened(disk.file) as fd,
    ):
        os.pwrite(fd, bytes(BLOCK), 0)  # the first touch has its marks written by threads
        waits, data = waits_of_python(disk.pid), os.urandom(BLOCK)
        for _ in range(500):
            os.pwrite(fd, data, 0)
            assert os.pread(fd, BLOCK, 0) == data
        assert waits_of_python(disk.pid) - waits < 250
        os.fsync(fd)
    assert same([image, device])


def test_df_knows_that_a_device_needs_no_more_space(shelf: Shelf) -> None:
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(device, image)
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        free = os.statvfs(disk.mountpoint)
        assert free.f_blocks * free.f_frsize == SIZE
        assert free.f_bavail == 0


# One device by itself


@pytest.mark.parametrize("store", ["itself", "a file system that makes no holes"])
def test_zeros_begin_and_end_anywhere(shelf: Shelf, store: str) -> None:
    """A device makes them of whole sectors; the rest is written, as is all where it makes none."""
    with ExitStack() as stack:
        where = shelf.directory
        if store != "itself":
            (faulty := shelf.directory / "store").mkdir()
            where = stack.enter_context(FaultFS(faulty)).path("a.raw").parent
        device = shelf.attach("a.raw", MIB, b"x", where=where)
        stack.callback(shelf.detach, device)
        expected = bytearray(b"x" * MIB)
        with opened(device, os.O_RDWR | os.O_EXCL) as fd:
            file = BlockDevice(fd, MIB, device_of(fd), LastRegions())
            puncher = Puncher(file)
            for offset, length in ((1000, 9000), (20480, 4096), (40000, 7), (MIB - 700, 700)):
                for kind in (Kind.DISCARD, Kind.ZERO):
                    file.write(offset, b"y" * length)
                    puncher.make_zeros(kind, offset, length)
                    expected[offset : offset + length] = bytes(length)
                    assert file.read(0, MIB) == expected
            os.fsync(fd)
        assert head(device, MIB) == expected


async def test_what_a_device_says_of_itself(shelf: Shelf) -> None:
    """Its space is its own, all of it; a path that leads elsewhere is noticed."""
    device, other = shelf.attach("a.raw"), shelf.attach("b.raw")
    with opened(device, os.O_RDWR) as fd:
        storage = FileStorage(fd, SIZE, "device")
        assert storage.usage() == Usage(device.stat().st_rdev, SIZE // 512, None)
        assert storage.device == device.stat().st_rdev
        assert storage.astray(str(device)) is None
        link = shelf.directory / "link"
        link.symlink_to(device)
        assert storage.astray(str(link)) is None
        assert "another" in (storage.astray(str(other)) or "")
        assert "nothing is at its path" in (storage.astray("/dev/nothing") or "")


# A set that is not mounted


@pytest.mark.parametrize("kept", ["the device", "the image"])
def test_a_copy_is_made_of_one_kind_to_the_other(shelf: Shelf, kept: str) -> None:
    """By create, which asks nothing more where it says that it overwrites; and after a split."""
    device, image = shelf.attach("a.raw", letters=b"d"), shelf.directory / "b.img"
    image.write_bytes(b"i" * SIZE)
    source, other = (device, image) if kept == "the device" else (image, device)
    where = f"--sidecars={shelf.sidecars}"
    quorumfs("create", where, "--vote-threshold=1", "--source", source, source, other)
    expected = (b"d" if kept == "the device" else b"i") * SIZE
    assert head(source) == head(other) == expected
    with SetMount([source, other], shelf.directory, shelf.options(FIFO)) as disk:
        disk.wait_healthy()
    for one, letter in ((source, b"1"), (other, b"2")):
        options = shelf.options(FIFO + ",degraded")
        with SetMount([one], shelf.directory, options) as disk:
            fill(disk, letter, 0)
    mountpoint = shelf.directory / "mnt"
    line = refusal("mount", "-o", shelf.options(), source, other, mountpoint, exit_code=3)
    assert "split brain" in line
    quorumfs("resolve", where, "--keep", other, source, other)
    with SetMount([source, other], shelf.directory, shelf.options(FIFO)) as disk:
        assert held(disk.file, 0) == b"2" * BLOCK
        disk.wait_healthy()
    assert same([device, image])


def test_another_host_may_take_a_device_over(shelf: Shelf) -> None:
    """What it finds in the sidecar after its wait is what counts; the device is whole."""
    device, image = shelf.attach("a.raw"), shelf.directory / "b.img"
    shelf.create(device, image)
    with SetMount([device, image], shelf.directory, shelf.options(FIFO)) as disk:
        fill(disk, b"t", MIB)
        disk.kill()
    for path in (*shelf.sidecars.iterdir(), sidecar(image)):
        with opened(path, os.O_RDWR) as fd:
            sign(fd, claim(host="nas1"))
    mountpoint = shelf.directory / "mnt"
    line = refusal("mount", "-o", shelf.options(FIFO), device, image, mountpoint)
    assert "takeover" in line
    options = shelf.options(FIFO + ",takeover")
    with SetMount([device, image], shelf.directory, options) as disk:
        assert held(disk.file, MIB) == b"t" * BLOCK
        disk.wait_healthy()
    assert same([device, image])
