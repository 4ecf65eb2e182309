"""What ``status`` says while requests fail because a replica cannot be ejected.

It must never call a disk healthy whose flushes fail, names what is wrong with which replica, and
is healthy again once that is mended; what it says to do is what mends it.
"""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command import one_line, wait_until
from support.faultfs import FaultFS
from support.mounting import as_qemu, quorumfs
from support.sets import (
    BLOCK,
    CHUNK,
    EXTENT,
    MIB,
    SetMount,
    create,
    filled,
    named,
    opened,
    read,
    same,
    sidecar,
    tmpfs,
    write,
)

from quorumfs.repair.rejoin import RETRY_S

SIZE = 4 * MIB
FIFO = "read-pattern=fifo,vote-threshold=1"


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultFS]:
    """A directory whose replicas fail on command; let go before it is unmounted."""
    with FaultFS(tmp_path) as faulty:
        yield faulty


@contextmanager
def mounted(
    faulty: FaultFS, paths: list[Path], directory: Path, options: str = ""
) -> Iterator[SetMount]:
    """Faults end before the unmount, which must not fail for them."""
    with SetMount(paths, directory, options) as disk:
        try:
            yield disk
        finally:
            faulty.clear()


@pytest.mark.parametrize("request_", ["write", "flush"])
def test_a_lower_threshold_is_in_force_from_the_first_request_on(
    request_: str, faulty: FaultFS, tmp_path: Path
) -> None:
    """One of two that had to agree is lost before anything was asked of the disk."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, "--vote-threshold=2")
    with mounted(faulty, images, tmp_path, FIFO) as disk:
        for name in "b.img", "b.img.quorumfs":
            faulty.inject(name, "write", errno=errno.EIO)
            faulty.inject(name, "fsync", errno=errno.EIO)
        if request_ == "write":
            write(disk, b"w")
        else:
            with opened(disk.file) as fd:
                os.fsync(fd)
        assert disk.replica(images[1])["state"] != "current"
        faulty.clear()
        disk.wait_healthy()


def told(disk: SetMount, exit_code: int) -> str:
    """What the command prints of *disk*, which gives this exit code."""
    done = quorumfs("status", disk.mountpoint, check=False)
    assert done.returncode == exit_code, done.stdout + done.stderr
    return done.stdout


def fails(disk: SetMount, number: int, chunk: int = 0) -> None:
    """A write of the guest, made durable, gets this error."""
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write(disk, b"w", chunk)
    assert caught.value.errno == number


def unmounted_with_failure(disk: SetMount) -> None:
    """Unmount what cannot be flushed, which says so."""
    disk.expected_errors.append("the last flush failed")
    one_line(quorumfs("umount", disk.mountpoint, check=False), 1)


def fails_to_flush(fd: int) -> None:
    """The guest's flush gets an error."""
    with pytest.raises(OSError):  # noqa: PT011 (whatever a store says)
        os.fsync(fd)


def test_a_truncated_one_of_two_that_must_agree(tmp_path: Path) -> None:
    """Until the next mount, with its length back or not: until then no flush can succeed."""
    images = create(named(tmp_path, 2), SIZE)
    with SetMount(images, tmp_path) as disk:
        write(disk, b"o")
        os.truncate(images[1], MIB)
        fails(disk, errno.EIO)
        truncated = f"{images[1]}: its image was truncated to {MIB} bytes"
        text = told(disk, 2)
        assert "no-quorum" in text
        assert truncated in text
        assert f"truncate -s {SIZE} {images[1]}" in text
        assert "nothing to do" not in text
        assert [part["trouble"] for part in disk.status()["replicas"]] == [None, "truncated"]
        os.truncate(images[1], SIZE)
        with opened(disk.file) as fd:
            fails_to_flush(fd)
        assert truncated in told(disk, 2)
        unmounted_with_failure(disk)
    with SetMount(images, tmp_path) as disk:  # as it said
        disk.expected_errors.append("the last flush failed")  # of the mount before
        disk.wait_healthy()
        write(disk, b"n")
    assert same(images)


def test_one_after_the_other_is_truncated(tmp_path: Path) -> None:
    """The first is ejected, the last cannot be: both are named, and nothing is left."""
    images = create(named(tmp_path, 2), SIZE, "--vote-threshold=1")
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"o")
        for path in reversed(images):
            os.truncate(path, MIB)
            if path is images[1]:
                write(disk, b"w", 20)
            else:
                fails(disk, errno.EIO, 20)
        text = told(disk, 2)
        assert f"0 of {len(images)} replicas are current and usable" in text
        for path in images:
            assert f"{path}" in text.partition("REPLICA")[0]
        assert disk.replica(images[0])["trouble"] == "truncated"
        assert "truncated" in disk.replica(images[1])["reason"]
        for path in images:
            os.truncate(path, SIZE)
        unmounted_with_failure(disk)


def test_one_that_cannot_flush_and_is_needed(faulty: FaultFS, tmp_path: Path) -> None:
    """Though nothing was written that could have been lost; until a flush of it succeeds."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE)
    with mounted(faulty, images, tmp_path) as disk, opened(disk.file) as fd:
        os.pwrite(fd, b"w" * BLOCK, 0)
        os.fsync(fd)
        disk.wait_healthy()
        faulty.inject("b.img", "fsync", errno=errno.EIO)
        for _ in range(2):
            fails_to_flush(fd)
            assert f"{images[1]}: the last flush of it failed: Input/output" in told(disk, 2)
        last = disk.replica(images[1])["last_error"]
        assert (last["operation"], last["errno"]) == ("flush", "EIO")
        faulty.clear()
        os.fsync(fd)
        disk.wait_healthy()
        assert disk.replica(images[1])["last_error"] is None


def test_one_that_could_not_flush_without_metadata(faulty: FaultFS, tmp_path: Path) -> None:
    """QEMU's way: its flushes succeed again, and still do not count, until that is written anew."""
    images = [faulty.path("a.img"), faulty.path("b.img")]
    for path in images:
        with path.open("wb") as file:
            file.truncate(SIZE)
    options = as_qemu("vote-threshold=2")
    with mounted(faulty, images, tmp_path, options) as disk, opened(disk.file) as fd:
        faulty.inject("b.img", "fsync", errno=errno.EIO, count=1)
        os.pwrite(fd, b"w" * BLOCK, 0)
        for _ in range(2):
            fails_to_flush(fd)
        assert disk.replica(images[1])["errors"]["flush"] == 1
        assert f"{images[1]}: it could not make writes durable" in told(disk, 2)
        os.pwrite(fd, b"w" * BLOCK, 0)
        os.fsync(fd)
        assert "healthy" in told(disk, 0)


def test_a_full_one_of_two_that_must_agree(tmp_path: Path) -> None:
    """Who has no space is told, whatever succeeds meanwhile, until there is some."""
    with tmpfs(tmp_path / "small", 32 * MIB) as small:
        images = create([tmp_path / "a.img", small / "b.img"], 2 * EXTENT)
        with SetMount(images, tmp_path) as disk:
            write(disk, b"o")
            disk.wait_healthy()
            with filled(small):
                fails(disk, errno.ENOSPC, 3)
                write(disk, b"w")  # where it has space already
                text = told(disk, 2)
                full = f"{images[1]}: the last write to it failed: No space left on device ("
                assert full in text
                assert "make space there" in text
                assert disk.replica(images[0])["trouble"] is None
            disk.wait_healthy()
            assert disk.replica(images[1])["last_error"] is None
        assert same(images)


def test_an_image_that_is_overwritten_while_it_is_out_is_compared(tmp_path: Path) -> None:
    """It has the same inode and size; that it was written to since it was closed tells."""
    with tmpfs(tmp_path / "small", 32 * MIB) as small:
        images = create([small / "b.img", tmp_path / "a.img"], 4 * EXTENT)
        with SetMount(images, tmp_path, FIFO) as disk:
            write(disk, b"o")
        older = images[0].read_bytes()
        with SetMount(images, tmp_path, FIFO) as disk:
            write(disk, b"n")
        with SetMount(images, tmp_path, FIFO) as disk:
            with filled(small):
                write(disk, b"e", 2 * EXTENT // CHUNK)
                disk.wait_for_events("REPLICA_STATE_CHANGED")

                def is_out() -> bool:  # and it was tried again, in vain, a moment ago
                    tried = disk.replica(images[0])["reason"] == "No space left on device"
                    files = Path(f"/proc/{disk.pid}/fd").iterdir()
                    return tried and images[0] not in [file.resolve() for file in files]

                wait_until(is_out, "an attempt that failed")
                with images[0].open("r+b") as image:
                    image.write(older[:BLOCK])
            disk.wait_healthy()
            assert read(disk) == b"n"
        assert same(images)


def test_one_that_does_not_answer_a_flush(faulty: FaultFS, tmp_path: Path) -> None:
    """Long before it is given up: whoever waits for the flush sees whom it waits for."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE)
    with (
        mounted(faulty, images, tmp_path) as disk,
        opened(disk.file) as fd,
        ThreadPoolExecutor() as pool,
    ):
        os.pwrite(fd, b"w" * BLOCK, 0)
        os.fsync(fd)
        disk.wait_healthy()
        faulty.inject("b.img", "fsync", hang=True)
        flush = pool.submit(os.fsync, fd)

        def named_as_slow(status: dict[str, Any]) -> bool:
            return "no answer to a flush for" in (status["replicas"][1]["reason"] or "")

        status = disk.wait(named_as_slow, "a replica that is waited for")
        assert status["state"] == "degraded"
        assert f"{images[1]}: no answer to a flush for" in told(disk, 1)
        faulty.clear()
        flush.result()
        disk.wait_healthy()


def test_one_whose_sidecar_cannot_be_written(faulty: FaultFS, tmp_path: Path) -> None:
    """The image takes every write, and the guest gets errors all the same."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE)
    with mounted(faulty, images, tmp_path) as disk:
        faulty.inject("b.img.quorumfs", "write", errno=errno.EIO)
        fails(disk, errno.EIO)
        text = told(disk, 2)
        assert f"{images[1]}: the last write to its sidecar failed: Input/output error" in text
        faulty.clear()
        write(disk, b"w")
        disk.wait_healthy()
        assert disk.replica(images[1])["last_error"] is None


def test_one_whose_sidecar_cannot_be_read_at_mount(faulty: FaultFS, tmp_path: Path) -> None:
    """It is away like one without an image, and comes back by itself: a person decides nothing."""
    images = create([*named(tmp_path, 2), faulty.path("c.img")], SIZE)
    faulty.inject("c.img.quorumfs", "read", errno=errno.EIO)
    with mounted(faulty, images, tmp_path) as disk:
        assert disk.states() == ["current", "current", "missing"]
        assert "c.img.quorumfs: Input/output error" in told(disk, 1)
        faulty.clear()
        disk.wait_healthy()
    assert same(images)


def test_one_failed_write_that_was_made_good(faulty: FaultFS, tmp_path: Path) -> None:
    """P8: the guest got an error, the replicas were made equal, and all is well."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE)
    with mounted(faulty, images, tmp_path) as disk, opened(disk.file) as fd:
        os.pwrite(fd, b"o" * BLOCK, 0)
        faulty.inject("b.img", "write", errno=errno.EIO, count=1)
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(fd, b"w" * BLOCK, 3 * CHUNK)
        disk.wait_healthy()
        assert disk.replica(images[1])["errors"]["write"] == 1
        assert disk.replica(images[1])["last_error"] is None


def test_a_file_system_that_is_gone_and_comes_back(tmp_path: Path) -> None:
    """P8: of two that must agree one dies, is back, and all is well though nobody flushed."""
    with ExitStack() as stack:
        export = FaultFS(tmp_path)
        export.__enter__()
        stack.callback(end_of_killed, export)
        again = stack.enter_context(ExitStack())
        images = create([tmp_path / "a.img", export.path("b.img")], SIZE)
        disk = stack.enter_context(SetMount(images, tmp_path))
        with opened(disk.file) as fd:
            os.pwrite(fd, b"o" * BLOCK, 0)
            os.kill(export.pid, signal.SIGKILL)
            fails_to_flush(fd)
        assert str(images[1]) in told(disk, 2).partition("REPLICA")[0]
        subprocess.run(["umount", "-l", export.mountpoint], check=True)
        again.enter_context(FaultFS(tmp_path))
        disk.wait_healthy()


def end_of_killed(export: FaultFS) -> None:
    """A FaultFS says that it did not end well when it was killed."""
    with pytest.raises(RuntimeError, match="did not end well"):
        export.__exit__(None, None, None)


@pytest.mark.parametrize("idle", [False, True])
def test_files_that_are_never_served_again_are_opened_anew(
    faulty: FaultFS, tmp_path: Path, *, idle: bool
) -> None:
    """After an outage of sshfs, for one; also if both have to take each write."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, "--vote-threshold=2")
    with mounted(faulty, images, tmp_path) as disk:
        write(disk, b"w")
        faulty.lose_open_files()
        with pytest.raises(OSError, match="Input/output error"):
            write(disk, b"x")

        def writes() -> bool:
            try:
                write(disk, b"y")
            except OSError:
                return False
            return True

        if idle:
            disk.wait_healthy()
        wait_until(writes, "writes succeed again")
        disk.wait_healthy()
        write(disk, b"z", 1)
    assert same([images[0], faulty.backing("b.img")])


def test_a_bad_sector_is_no_reason_to_open_files_anew(faulty: FaultFS, tmp_path: Path) -> None:
    """Meanwhile all that is not bad would fail."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, "--vote-threshold=2")
    with mounted(faulty, images, tmp_path) as disk:
        write(disk, b"w")
        write(disk, b"x", 1)
        faulty.inject("b.img", "read", start=CHUNK, end=2 * CHUNK, errno=errno.EIO)
        until = time.monotonic() + 4 * RETRY_S[0]
        while time.monotonic() < until:
            for _ in range(10):
                with pytest.raises(OSError, match="Input/output error"):
                    read(disk, 1)
            assert read(disk) == b"w"


def test_after_an_outage_a_replica_returns_and_meanwhile_its_store_can_be_unmounted(
    tmp_path: Path,
) -> None:
    """A server that is away fails everything, the close as well; each file is closed all the same.

    `umount` of the store, by hand, needs all of them closed.
    """
    images = [tmp_path / "faulty" / "a.img", tmp_path / "b.img"]
    with ExitStack() as stack:
        store = stack.enter_context(FaultFS(tmp_path, closing=True))
        disk = stack.enter_context(SetMount(create(images), tmp_path, FIFO))
        write(disk, b"1")
        for image in (images[0], sidecar(images[0])):
            for op in ("write", "close"):
                store.inject(image.name, op, errno=errno.EIO)
        write(disk, b"2")
        assert disk.states() != ["current", "current"]
        store.wait_for(lambda counters: counters.closes > 0, "a.img")
        wait_until(lambda: unmounts(store.mountpoint), "the store is not busy", 10)
        write(disk, b"3")
        stack.enter_context(FaultFS(tmp_path, closing=True))
        disk.wait_healthy()
        quorumfs("umount", disk.mountpoint)
        assert same(images)


def unmounts(store: Path) -> bool:
    """Whether a store can be unmounted by hand, and is."""
    return not subprocess.run(["fusermount3", "-uq", store], check=False).returncode
