"""Locks: QEMU and we keep off each other's images, and so do two mounts."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import (
    empty_mountpoint,
    filesystem_at,
    is_alive,
    one_line,
    processes_of,
    quorumfs_in_background,
    refused,
    wait_until,
)
from support.mounting import Mounted, quorumfs
from support.qemu import RawExport


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Another mount point than that of `Mounted`."""
    with empty_mountpoint(tmp_path / "other" / "mnt") as path:
        yield path


def qemu_io(image: Path, command: str = "write 0 512", *options: str) -> str:
    """What qemu-io says; it exits with 0 even after some failures."""
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *options, "-c", command, image],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout + done.stderr


@contextlib.contextmanager
def qemu_io_open(image: Path, *options: str) -> Iterator[int]:
    """A qemu-io that has *image* open and waits for commands; yields its process id."""
    process = subprocess.Popen(
        ["qemu-io", "-f", "raw", *options, image],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"length\n")
    process.stdin.flush()
    # It echoes no prompt to a pipe until a command is done: an answer means the image is open.
    assert b"MiB" in process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.communicate(b"quit\n", timeout=60)


@contextlib.contextmanager
def vm_with(image: Path) -> Iterator[int]:
    """A paused virtual machine with *image* as its disk; yields its process id.

    Unlike QEMU's tools a disk device lets nobody else write.
    """
    command = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-qmp", "stdio"]
    command += ["-blockdev", f"driver=file,node-name=disk,filename={image}"]
    command += ["-device", "virtio-blk-pci,drive=disk"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"QMP" in process.stdout.readline()
        process.stdin.write(b'{"execute": "qmp_capabilities"}')
        process.stdin.flush()
        # The greeting comes early; commands are answered once all devices are there.
        assert b"return" in process.stdout.readline()
        yield process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)


@contextlib.contextmanager
def storage_daemon(image: Path) -> Iterator[int]:
    """A qemu-storage-daemon that exports *image* for writing; yields its process id."""
    with RawExport(image, image.with_suffix(".export")) as export:
        yield export.pid


# QEMU against a mount


def test_qemu_keeps_off_a_mounted_replica(make_images: MakeImages, tmp_path: Path) -> None:
    """A writer beside the mount would destroy the set silently; looking with ``-U`` is fine."""
    replicas = make_images(2)
    with Mounted(replicas, tmp_path):
        for path in replicas:
            assert 'Failed to get "write" lock' in qemu_io(path)
            # Without -U it depends on QEMU's version, as it does beside a virtual machine.
            subprocess.run(["qemu-img", "info", "-U", path], stdout=subprocess.DEVNULL, check=True)
    assert "wrote 512/512" in qemu_io(replicas[0])


def test_a_replica_of_an_ro_mount_can_be_read_but_not_written(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """Reading images together is harmless, so QEMU's readers need no ``-U``."""
    (replica,) = make_images(1)
    with Mounted([replica], tmp_path, "ro"):
        assert 'Failed to get "write" lock' in qemu_io(replica)
        assert "read 512/512" in qemu_io(replica, "read 0 512", "-r")
        subprocess.run(["qemu-img", "info", replica], stdout=subprocess.DEVNULL, check=True)


# A mount against QEMU


@pytest.mark.parametrize(
    ("opened", "name"),  # of names the kernel keeps 15 letters
    [(qemu_io_open, "qemu-io"), (storage_daemon, "qemu-storage-da"), (vm_with, "qemu-system-x86")],
    ids=["qemu-io", "qemu-storage-daemon", "qemu-system"],
)
def test_an_image_in_use_by_qemu_is_refused(
    make_images: MakeImages,
    mountpoint: Path,
    opened: Callable[[Path], contextlib.AbstractContextManager[int]],
    name: str,
) -> None:
    """The line names the image, which need not be the first, and the process to end."""
    replicas = make_images(2)
    with opened(replicas[1]) as pid:
        line = refused(replicas, mountpoint)
    assert f"{replicas[1]} is in use by pid {pid} ({name})" in line
    quorumfs("mount", *replicas, mountpoint)
    quorumfs("umount", mountpoint)


def test_ro_mounts_share_with_readers_only(make_images: MakeImages, mountpoint: Path) -> None:
    """``-o ro`` is refused beside a writer, and works beside a reader."""
    (image,) = make_images(1)
    with qemu_io_open(image) as pid:
        assert f"pid {pid} (qemu-io)" in refused(["-o", "ro", image], mountpoint)
    with qemu_io_open(image, "-r"):
        quorumfs("mount", "-o", "ro", image, mountpoint)
        quorumfs("umount", mountpoint)


# Mounts against each other


def test_a_replica_is_mounted_once(
    make_images: MakeImages, tmp_path: Path, mountpoint: Path
) -> None:
    """Another mount of one of the replicas is refused with the daemon's pid, ro or not."""
    a, b, c = make_images(3)
    with Mounted([a, b], tmp_path) as mounted:
        for options in ([], ["-o", "ro"]):
            line = refused([*options, c, b], mountpoint)
            assert f"{b} is in use by pid {mounted.pid} (" in line
        # The refused one must not have taken what the first one holds.
        assert 'Failed to get "write" lock' in qemu_io(b)
    assert "wrote 512/512" in qemu_io(c)


def test_ro_mounts_may_share_their_replicas(
    make_images: MakeImages, tmp_path: Path, mountpoint: Path
) -> None:
    """Two ro mounts at a time are harmless; a writer comes in only when both are gone."""
    replicas = make_images(2)
    third = tmp_path / "third"
    third.mkdir()
    with Mounted(replicas, tmp_path, "ro") as mounted:
        quorumfs("mount", "-o", "ro", *replicas, mountpoint)
        assert (mountpoint / "disk.img").read_bytes() == mounted.file.read_bytes()
        assert "is in use by pid" in refused(replicas, third)
        quorumfs("umount", mountpoint)
        assert f"is in use by pid {mounted.pid} (" in refused(replicas, third)
    quorumfs("mount", *replicas, third)
    quorumfs("umount", third)


def test_a_killed_daemon_holds_no_lock(make_images: MakeImages, tmp_path: Path) -> None:
    """After ``kill -9`` nothing has to be cleaned up before the images can be used."""
    replicas = make_images(2)
    with Mounted(replicas, tmp_path) as mounted:
        pid = mounted.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        for path in replicas:
            assert "wrote 512/512" in qemu_io(path)
        quorumfs("umount", mounted.mountpoint)


def test_two_mounts_started_at_once_do_not_share(
    make_images: MakeImages, tmp_path: Path, mountpoint: Path
) -> None:
    """Of two mounts of the same replicas at the same moment at most one wins."""
    replicas = make_images(2)
    mountpoints = [mountpoint, tmp_path / "mnt"]
    mountpoints[1].mkdir()
    started = [quorumfs_in_background("mount", *replicas, each) for each in mountpoints]
    for process in started:
        process.communicate(timeout=60)
    won = [each for each in mountpoints if filesystem_at(each)]
    assert len(won) <= 1
    assert max(process.returncode for process in started) == 1
    assert sum(len(processes_of(each)) for each in mountpoints) == len(won)
    for each in won:
        quorumfs("umount", each)


# Users of the disk against each other


def test_qemu_opens_the_disk_once(make_images: MakeImages, tmp_path: Path) -> None:
    """Locks on ``disk.img`` work as on any local file, so two VMs cannot share it by mistake."""
    with Mounted(make_images(2), tmp_path) as mounted:
        with vm_with(mounted.file):
            assert 'Failed to get "write" lock' in qemu_io(mounted.file)
        assert "wrote 512/512" in qemu_io(mounted.file)


def test_a_busy_mount_point_is_named_before_the_images(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """Mounting the same again says that it is mounted, which is what the user needs to hear."""
    replicas = make_images(2)
    with Mounted(replicas, tmp_path) as mounted:
        done = quorumfs("mount", *replicas, mounted.mountpoint, check=False)
        assert f"{mounted.mountpoint} is already" in one_line(done, 1)
