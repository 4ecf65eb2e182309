"""A virtual machine on the disk: what the whole thing is for."""

import errno
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import MakeImages
from support import vm
from support.command import wait_until
from support.faultfs import FaultFS
from support.mounting import Mounted, quorumfs
from support.sets import SetMount, create

MIB = 1 << 20
DISK_SIZE = 128 * MIB


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all boots, so that the initramfs is built once."""
    return tmp_path_factory.mktemp("vm")


def holds_a_file_system(replica: Path) -> bool:
    """Whether there is a superblock, which mkfs writes last."""
    with replica.open("rb") as file:
        file.seek(1024 + 56)
        return file.read(2) == b"\x53\xef"


def assert_holds_the_guests_files(replica: Path) -> None:
    """The guest's ext4 is clean, and its big file is the one that it wrote."""
    check = ["/usr/sbin/e2fsck", "-fn", str(replica)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    show = ["/usr/sbin/debugfs", "-R", "cat /big", str(replica)]
    big = subprocess.run(show, capture_output=True, check=True).stdout
    lines = "".join(f"{n}\n" for n in range(1, 20_001)).encode()
    assert big == (lines * 200)[:20_000_000]


def test_a_guest_lives_on_the_disk(make_images: MakeImages, tmp_path: Path, workdir: Path) -> None:
    """A Linux guest makes, fills and verifies a file system, which every replica then holds."""
    replicas = make_images(2, DISK_SIZE)
    with Mounted(replicas, tmp_path) as disk:
        result = vm.boot(disk.file, vm.EXT4_SCRIPT, workdir)
        print(f"guest: {result.seconds:.1f} s")
        assert result.exit_status == 0, result.console
        assert disk.events("QUORUM_REPORT_BAD") == []
    subprocess.run(["cmp", *replicas], check=True)
    assert_holds_the_guests_files(replicas[0])


@pytest.mark.parametrize(("sick", "aio"), [("a.img", "native"), ("b.img", "io_uring")])
def test_a_replica_fails_under_a_guest(
    sick: str, aio: vm.AioMode, tmp_path: Path, workdir: Path
) -> None:
    """When one of two replicas stops taking writes in the middle of the guest's life, the guest
    notices nothing: it reads all it wrote, before and after, though one replica lacks half of it.
    """
    with FaultFS(tmp_path) as faulty:
        names = ["a.img", "b.img"]
        for name in names:
            with faulty.backing(name).open("wb") as file:
                file.truncate(DISK_SIZE)
        replicas = [faulty.path(name) for name in names]
        options = "read-pattern=fifo,vote-threshold=1"
        with Mounted(replicas, tmp_path, options) as disk, ThreadPoolExecutor(1) as pool:
            guest = pool.submit(vm.boot, disk.file, vm.EXT4_SCRIPT, workdir, aio=aio)
            try:
                faulty.wait_for(lambda c: c.bytes_written > 4 * MIB, sick)
                faulty.inject(sick, "write", errno=errno.EIO)
            finally:
                result = guest.result()
            assert result.exit_status == 0, result.console
            # So the fault did come in the middle: there were files to write after it.
            bad = disk.wait_for_events("QUORUM_REPORT_BAD")
            assert {(event["node-name"], event["type"]) for event in bad} == {
                (str(faulty.path(sick)), "write")
            }
            (healthy,) = set(names) - {sick}
            subprocess.run(["cmp", disk.file, faulty.backing(healthy)], check=True)
            missed = subprocess.run(["cmp", "-s", *map(faulty.backing, names)], check=False)
            assert missed.returncode == 1
        assert_holds_the_guests_files(faulty.backing(healthy))


def test_a_replica_is_replaced_under_a_guest(tmp_path: Path, workdir: Path) -> None:
    """The guest notices nothing. What is offline meanwhile is a copy as after a power cut: its
    journal is replayed, and its file system is whole.
    """
    replicas, new = create([tmp_path / "a.img", tmp_path / "b.img"], DISK_SIZE), tmp_path / "c.img"
    copy = tmp_path / "copy.img"
    with SetMount(replicas, tmp_path, "read-pattern=fifo") as disk, ThreadPoolExecutor(1) as pool:
        quorumfs("add", "--wait", disk.mountpoint, tmp_path / "backup.img")
        guest = pool.submit(vm.boot, disk.file, vm.EXT4_SCRIPT, workdir)
        try:
            disk.wait(lambda status: status["replicas"][0]["bytes_written"] > 4 * MIB, "a start")
            quorumfs("replace", disk.mountpoint, replicas[0], new)
            wait_until(lambda: holds_a_file_system(new), "the guest's file system")
            quorumfs("offline", disk.mountpoint, "backup.img")
            subprocess.run(["cp", tmp_path / "backup.img", copy], check=True)
            quorumfs("online", disk.mountpoint, "backup.img")
        finally:
            result = guest.result()
        assert result.exit_status == 0, result.console
        disk.wait_healthy()
    subprocess.run(["cmp", new, replicas[1]], check=True)
    subprocess.run(["cmp", new, tmp_path / "backup.img"], check=True)
    assert_holds_the_guests_files(new)
    for arguments, allowed in (("-fp", (0, 1)), ("-fn", (0,))):
        check = subprocess.run(["/usr/sbin/e2fsck", arguments, copy], check=False)
        assert check.returncode in allowed


def test_a_disk_grows_under_a_guest(tmp_path: Path, workdir: Path) -> None:
    """The guest enlarges its file system while it is in use, and fills what was added."""
    replicas = create([tmp_path / "a.img", tmp_path / "b.img"], 64 * MIB)
    control = tmp_path / "qmp"
    with SetMount(replicas, tmp_path, "read-pattern=fifo") as disk, ThreadPoolExecutor(1) as pool:
        guest = pool.submit(vm.boot, disk.file, vm.GROWTH_SCRIPT, workdir, control=control)
        try:
            disk.wait(lambda status: status["replicas"][0]["bytes_written"] > 2 * MIB, "a start")
            quorumfs("grow", disk.mountpoint, str(DISK_SIZE + 64 * MIB))
            vm.resize(control, DISK_SIZE + 64 * MIB)
        finally:
            result = guest.result()
        assert result.exit_status == 0, result.console
        disk.wait_healthy()
    subprocess.run(["cmp", *replicas], check=True)
    subprocess.run(["/usr/sbin/e2fsck", "-fn", replicas[0]], check=True)
