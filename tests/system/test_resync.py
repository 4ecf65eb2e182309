"""A replica that fails or goes away is ejected before the ack, and caught up by itself.

P1, P3 and P5 with real faults: while a replica is away the guest sees nothing of it but one
timeout, no read ever comes from it, and when it is back only what it missed is copied.
"""

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command import OrdinaryUser, ordinary_user, seconds, wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.oracle import BLOCK, Oracle, Writers
from support.qemu import RawExport
from support.sets import (
    CHUNK,
    EXTENT,
    MIB,
    Ext4,
    SetMount,
    create,
    examine,
    filled,
    named,
    opened,
    same,
    tmpfs,
)
from support.sparse import PUNCH, allocated, data_extents, fallocate

SIZE = 4 * MIB
FIFO = "read-pattern=fifo,vote-threshold=1"
ONE = "--vote-threshold=1"
OUT = ("stale", "missing", "suspect")
OLD, NEW, NEWER = (letter * BLOCK for letter in (b"o", b"n", b"N"))


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultFS]:
    """A directory whose replicas fail on command; let go before it is unmounted."""
    with FaultFS(tmp_path) as faulty:
        yield faulty


@contextmanager
def mounted(
    faulty: FaultFS, paths: list[Path], directory: Path, options: str
) -> Iterator[SetMount]:
    """Faults end before the unmount, which must not wait for them."""
    with SetMount(paths, directory, options) as disk:
        try:
            yield disk
        finally:
            faulty.clear()


# Away for a while


def test_an_export_that_dies_and_comes_back(tmp_path: Path) -> None:
    """71: ENOTCONN: ejected before the ack; what it missed is copied by itself, and no more."""
    with ExitStack() as stack:
        export = FaultFS(tmp_path)
        export.__enter__()
        stack.callback(end_of_killed, export)
        again = stack.enter_context(ExitStack())
        images = create([*named(tmp_path, 2), export.path("c.img")], 4 * EXTENT)
        disk = stack.enter_context(SetMount(images, tmp_path))
        with opened(disk.file) as fd:
            for offset in range(0, 4 * EXTENT, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
            os.fsync(fd)
            disk.wait_healthy()
            before = disk.replica(images[2])["copied_bytes"]
            os.kill(export.pid, signal.SIGKILL)
            os.pwrite(fd, OLD, 0)
            assert disk.replica(images[2])["state"] in OUT
            assert states_on_record(images[0]) == ["current", "current", "stale"]
            for chunk in 3, 100, 101, 900:
                os.pwrite(fd, NEW, chunk * CHUNK)
            os.fsync(fd)
            subprocess.run(["umount", "-l", export.mountpoint], check=True)
            again.enter_context(FaultFS(tmp_path))
            disk.wait_healthy()
            assert disk.replica(images[2])["copied_bytes"] - before <= 5 * CHUNK
        assert same([*images[:2], export.backing("c.img")])


def end_of_killed(export: FaultFS) -> None:
    """A FaultFS says that it did not end well when it was killed."""
    with pytest.raises(RuntimeError, match="did not end well"):
        export.__exit__(None, None, None)


def test_one_missed_write_costs_one_chunk(faulty: FaultFS, tmp_path: Path) -> None:
    """P3: not all that was written since the mount, however long ago that was."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], 4 * EXTENT, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        for offset in range(0, 4 * EXTENT, MIB):
            os.pwrite(fd, os.urandom(MIB), offset)
        os.fsync(fd)
        disk.wait_healthy()
        before = disk.replica(images[1])["copied_bytes"]
        faulty.inject("b.img", "write", errno=errno.EIO, count=1)
        os.pwrite(fd, NEW, 0)
        disk.wait_healthy()
        assert disk.replica(images[1])["copied_bytes"] - before <= CHUNK
    assert same([images[0], faulty.backing("b.img")])


def states_on_record(image: Path) -> list[str]:
    """Who is what by the sidecar of *image*, which may be in use."""
    (replica,) = examine(image)["replicas"]
    return [role["state"] for role in replica["roles"]]


@pytest.mark.parametrize("how", ["renamed", "unmounted"])
def test_files_that_are_open_do_not_miss_their_name(how: str, tmp_path: Path) -> None:
    """56: a rename, or a lazy unmount, takes nothing from who has the file open."""
    with ExitStack() as stack:
        ext4 = stack.enter_context(Ext4(tmp_path))
        images = create([*named(tmp_path, 1), ext4.mountpoint / "b.img"])
        disk = stack.enter_context(SetMount(images, tmp_path))
        away = ext4.mountpoint / "away"
        if how == "renamed":
            images[1].rename(away)
        else:
            ext4.unmount()
        with opened(disk.file) as fd:
            os.pwrite(fd, NEW, 0)
            os.fsync(fd)
        assert disk.status()["state"] == "healthy"
        quorumfs("umount", disk.mountpoint)
        if how == "renamed":
            away.rename(images[1])
        else:
            ext4.mount()
        assert same(images)
        with disk:
            assert disk.wait_healthy()["replicas"][1]["copied_bytes"] == 0


@pytest.mark.parametrize("how", ["renamed", "unmounted", "not given"])
def test_one_that_was_away_at_the_mount_comes_back(how: str, tmp_path: Path) -> None:
    """17: two of three are enough; the third gets the chunks it missed, as soon as it is there."""
    with ExitStack() as stack:
        ext4 = stack.enter_context(Ext4(tmp_path))
        images = create([*named(tmp_path, 2), ext4.mountpoint / "c.img"], EXTENT)
        away = ext4.mountpoint / "away"
        if how == "renamed":
            images[2].rename(away)
        elif how == "unmounted":
            ext4.unmount()
        given = images[:2] if how == "not given" else images
        with SetMount(given, tmp_path) as disk:
            with opened(disk.file) as fd:
                os.pwrite(fd, NEW, 5 * CHUNK)
                os.fsync(fd)
            status = disk.status()
            assert status["state"] == "degraded"
            assert disk.replica(images[2])["state"] == "missing"
            if how == "renamed":
                away.rename(images[2])
            elif how == "unmounted":
                ext4.mount()
            if how != "not given":
                disk.wait_healthy()
                # Nothing says what it holds of the extent that was marked: that is compared.
                assert disk.replica(images[2])["copied_bytes"] <= EXTENT
        with SetMount(images, tmp_path) as disk:
            disk.wait_healthy()
            assert disk.replica(images[2])["copied_bytes"] <= CHUNK
        assert same(images)


def test_a_file_system_away_under_a_failing_replica(tmp_path: Path) -> None:
    """It fails, is lazily unmounted, and what is mounted there later is opened anew."""
    with ExitStack() as stack:
        ext4 = stack.enter_context(Ext4(tmp_path))
        images = create([*named(tmp_path, 1), ext4.mountpoint / "b.img"], EXTENT, ONE)
        disk = stack.enter_context(SetMount(images, tmp_path, FIFO))
        with opened(disk.file) as fd:
            os.pwrite(fd, OLD, 0)
            subprocess.run(["mount", "-o", "remount,ro", ext4.mountpoint], check=False)
            os.truncate(images[1], SIZE // 2)
            os.pwrite(fd, NEW, 0)
            assert disk.replica(images[1])["state"] in OUT
            ext4.unmount()
            os.pwrite(fd, NEW, 7 * CHUNK)
            ext4.mount()
            os.truncate(images[1], EXTENT)
            disk.wait_healthy()
        assert same(images)


# Failed writes


@pytest.mark.parametrize("killed", [False, True])
def test_the_first_of_fifo_misses_one_write(killed: bool, faulty: FaultFS, tmp_path: Path) -> None:
    """P1, the acceptance test: no read ever returns the old data, nor after a kill."""
    images = create([faulty.path("a.img"), faulty.path("b.img")], SIZE, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk:
        with opened(disk.file) as fd:
            os.pwrite(fd, OLD, 0)
            os.fsync(fd)
            # Exactly one fails; resync is kept away, or there would be no old data any more.
            faulty.inject("a.img", "write", errno=errno.EIO, count=1)
            faulty.inject("a.img.quorumfs", "write", errno=errno.EIO)
            os.pwrite(fd, NEW, 0)
            assert faulty.backing("a.img").read_bytes()[:BLOCK] == OLD
            assert states_on_record(images[1]) == ["stale", "current"]
            assert [os.pread(fd, BLOCK, 0) for _ in range(20)] == [NEW] * 20
        if killed:
            disk.kill()
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        assert os.pread(fd, BLOCK, 0) == NEW
        disk.wait_healthy()
        assert os.pread(fd, BLOCK, 0) == NEW
    assert faulty.backing("a.img").read_bytes()[:BLOCK] == NEW


def test_one_generation_for_one_change(faulty: FaultFS, tmp_path: Path) -> None:
    """R3: minted when one is ejected, not once for each write it misses."""
    images = create([faulty.path(f"{name}.img") for name in "abc"])
    with mounted(faulty, images, tmp_path, "") as disk, opened(disk.file) as fd:
        disk.wait_healthy()
        os.pwrite(fd, OLD, 0)
        generations = {disk.status()["generation"]}
        faulty.inject("b.img", "any", errno=errno.EIO)
        faulty.inject("b.img.quorumfs", "any", errno=errno.EIO)
        for number in range(20):
            os.pwrite(fd, NEW, number * CHUNK)
            generations.add(disk.status()["generation"])
        assert len(generations) == 2
        faulty.clear()
        disk.wait_healthy()
        assert disk.replica(images[1])["copied_bytes"] <= 20 * CHUNK
    assert same([faulty.backing(f"{name}.img") for name in "abc"])


def test_two_come_back_in_any_order(tmp_path: Path) -> None:
    """99: ejected at different times, one fails again: each gets exactly what it missed."""
    with ExitStack() as stack:
        faults = []
        for name in "bc":
            (tmp_path / name).mkdir()
            faults.append(stack.enter_context(FaultFS(tmp_path / name)))
        images = [tmp_path / "a.img", faults[0].path("b.img"), faults[1].path("c.img")]
        create(images, EXTENT, ONE)
        disk = stack.enter_context(SetMount(images, tmp_path, FIFO))
        fd = stack.enter_context(opened(disk.file))
        for fault in faults:
            stack.callback(fault.clear)
        os.pwrite(fd, OLD, 0)
        break_(faults[1], "c.img")
        os.pwrite(fd, NEW, 1 * CHUNK)  # missed by c
        break_(faults[0], "b.img")
        os.pwrite(fd, NEW, 2 * CHUNK)  # missed by b and c
        faults[1].clear()
        disk.wait_for_state(images[2], "current")
        break_(faults[1], "c.img")
        os.pwrite(fd, NEW, 3 * CHUNK)  # missed by b and c again
        for fault in faults:
            fault.clear()
        disk.wait_healthy()
        assert disk.replica(images[1])["copied_bytes"] <= 3 * CHUNK
        assert disk.replica(images[2])["copied_bytes"] <= 6 * CHUNK
        assert same([images[0], faults[0].backing("b.img"), faults[1].backing("c.img")])


def break_(faulty: FaultFS, name: str) -> None:
    """Let every request to a replica fail."""
    for file in name, f"{name}.quorumfs":
        faulty.inject(file, "any", errno=errno.EIO)


# A replica that hangs


@contextmanager
def stopped(stop: Callable[[], None], cont: Callable[[], None]) -> Iterator[None]:
    """Freeze a server of a replica for a while."""
    stop()
    try:
        yield
    finally:
        cont()


@pytest.mark.parametrize("kind", ["faultfs", "qemu"])
def test_a_stopped_export_costs_one_timeout(kind: str, tmp_path: Path) -> None:
    """P5: under load the guest waits once; status answers at once; no late write survives (R7).

    All is in memory, for the ejection waits for the survivor's record (R3): on a busy disk that
    may take longer than the timeout.
    """
    timeout_s = 4.0
    with ExitStack() as stack:
        memory = stack.enter_context(tmpfs(tmp_path / "memory", 8 * EXTENT))
        if kind == "faultfs":
            server: FaultFS | RawExport = stack.enter_context(FaultFS(memory, parallel=True))
            assert isinstance(server, FaultFS)
            images = create([memory / "a.img", server.path("b.img")], EXTENT, ONE)
            real = server.backing("b.img")
        else:
            real, shown = memory / "real.img", memory / "b.img"
            real.write_bytes(bytes(EXTENT))
            server = stack.enter_context(RawExport(real, shown))
            image = memory / "a.img"
            image.write_bytes(bytes(EXTENT))
            quorumfs("create", "--source", image, "--vote-threshold=1", shown)
            images = [image, shown]
        options = f"{FIFO},replica-timeout={timeout_s:g}s"
        disk = stack.enter_context(SetMount(images, memory, options))
        oracle = Oracle(range(0, EXTENT // BLOCK, 41))
        writers = Writers(oracle, disk.file, threads=8)
        stack.callback(writers.stop)
        wait_until(lambda: oracle.acknowledgements > 50, "some writes")
        with stopped(server.stop, server.cont):
            status_s = [seconds(disk.status)]
            acknowledged = oracle.acknowledgements

            def goes_on() -> bool:
                status_s.append(seconds(disk.status))
                return oracle.acknowledgements > acknowledged + 200

            wait_until(goes_on, "the guest goes on without the replica")
            began = time.monotonic()
            command = quorumfs("status", disk.mountpoint, check=False)
            command_s = time.monotonic() - began
            part = disk.replica(images[1])
        writers.stop()
        assert not writers.errors
        # Who waited did so at the same time: a request that began later never waits.
        waits = [r for r in writers.requests if r.ended - r.began > timeout_s * 2 / 3]
        assert waits
        assert max(wait.began for wait in waits) < min(wait.ended for wait in waits)
        assert max(wait.ended - wait.began for wait in waits) < 2 * timeout_s
        assert max(status_s) < timeout_s / 2
        assert (command.returncode, command_s < timeout_s) == (1, True)
        assert part["state"] in OUT
        assert part["in_flight"] > 0
        disk.wait_healthy()
        with opened(disk.file) as fd:
            oracle.look(fd)
        quorumfs("umount", disk.mountpoint)
        assert same([images[0], real])


def test_no_resync_before_the_last_old_request_returned(faulty: FaultFS, tmp_path: Path) -> None:
    """R7: one write hangs, the rest of the replica is well: it is asked for nothing until then."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, ONE)
    options = FIFO + ",replica-timeout=3s"
    with mounted(faulty, images, tmp_path, options) as disk, opened(disk.file) as fd:
        os.pwrite(fd, OLD, 0)
        faulty.hang("b.img", "write", count=1)
        os.pwrite(fd, NEW, 0)
        assert disk.replica(images[1])["in_flight"] == 1
        assert disk.replica(images[1])["store"] == str(images[1].parent)
        os.pwrite(fd, NEWER, 0)
        before = faulty.counters("b.img"), faulty.counters("b.img.quorumfs")
        use(disk, fd, 3.0)  # longer than the first waits between two tries
        assert (faulty.counters("b.img"), faulty.counters("b.img.quorumfs")) == before
        assert disk.replica(images[1])["state"] in OUT
        faulty.release()
        disk.wait_healthy()
        assert os.pread(fd, BLOCK, 0) == NEWER
    assert same([images[0], faulty.backing("b.img")])


def use(disk: SetMount, fd: int, at_least_s: float) -> None:
    """Read for some time, more than once; no read waits for a replica that hangs."""
    began = time.monotonic()
    count = 0
    while count < 10 or time.monotonic() < began + at_least_s:
        asked = time.monotonic()
        assert os.pread(fd, BLOCK, 0) == NEWER
        assert time.monotonic() - asked < 2
        disk.status()
        time.sleep(0.02)  # the pace of a guest
        count += 1


# Flushes


def test_one_failed_fsync_makes_all_since_the_last_good_one_suspect(
    faulty: FaultFS, tmp_path: Path
) -> None:
    """R4: ejected at once; all written since is copied, though a cached read compares equal."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], EXTENT, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        disk.wait_healthy()
        os.pwrite(fd, OLD, 0)
        os.fsync(fd)
        before = disk.replica(images[1])["copied_bytes"]
        for chunk in 5, 9:
            os.pwrite(fd, NEW, chunk * CHUNK)
        faulty.inject("b.img", "fsync", errno=errno.EIO, count=1)
        generation = disk.status()["generation"]
        os.fsync(fd)
        assert disk.status()["generation"] != generation
        assert same([images[0], faulty.backing("b.img")])  # nothing to see by comparing
        disk.wait_healthy()
        copied = disk.replica(images[1])["copied_bytes"] - before
        assert 2 * BLOCK <= copied <= 2 * CHUNK


def test_a_flush_that_too_few_replicas_can_do_blames_nobody(
    faulty: FaultFS, tmp_path: Path
) -> None:
    """R2, R4: the guest hears of it, and a later flush does not say that all is well."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], EXTENT)
    with mounted(faulty, images, tmp_path, "") as disk, opened(disk.file) as fd:
        disk.wait_healthy()
        os.pwrite(fd, NEW, 5 * CHUNK)
        faulty.inject("b.img", "fsync", errno=errno.EIO, count=1)
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(fd)
        assert disk.states() == ["current", "current"]
        # What it took before is given to it again, and then a flush is what it says.
        disk.wait_healthy()
        assert disk.replica(images[1])["copied_bytes"] >= BLOCK
        os.fsync(fd)


# No space


def test_no_space_on_one(tmp_path: Path) -> None:
    """51: ejected, the guest sees nothing; caught up by itself when there is space again."""
    with tmpfs(tmp_path / "small", 8 * MIB) as small:
        images = create([tmp_path / "a.img", small / "b.img"], EXTENT, ONE)
        with SetMount(images, tmp_path, FIFO) as disk:
            with filled(small), opened(disk.file) as fd:
                for offset in range(0, 2 * MIB, CHUNK):
                    os.pwrite(fd, NEW, offset)
                os.fsync(fd)
                part = disk.replica(images[1])
                assert part["state"] in (*OUT, "resyncing")  # it is tried again now and then
                assert part["errors"]["write"] >= 1
            disk.wait_healthy()
            assert disk.replica(images[1])["copied_bytes"] <= 2 * MIB
        assert same(images)


def test_no_space_on_all(tmp_path: Path) -> None:
    """52: the guest gets ENOSPC, nobody is blamed, it stays readable, and goes on with space."""
    with tmpfs(tmp_path / "small", 8 * MIB) as small:
        images = create(named(small, 2), EXTENT)
        with SetMount(images, tmp_path) as disk, opened(disk.file) as fd:
            os.pwrite(fd, OLD, 0)
            with filled(small):
                with pytest.raises(OSError, match="No space"):
                    os.pwrite(fd, NEW, 5 * MIB)
                assert os.pread(fd, BLOCK, 0) == OLD
                assert os.pread(fd, BLOCK, 5 * MIB) in (bytes(BLOCK), NEW)
                os.pwrite(fd, NEW, 0)  # what has its space already
                assert disk.states() == ["current", "current"]
            os.pwrite(fd, NEW, 5 * MIB)
            os.fsync(fd)
            disk.wait_healthy()
            assert os.pread(fd, BLOCK, 5 * MIB) == NEW
        assert same(images)


def test_no_space_for_the_record_of_one(faulty: FaultFS, tmp_path: Path) -> None:
    """53: what cannot record the intent is ejected; the guest sees nothing."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        faulty.inject("b.img.quorumfs", "write", errno=errno.ENOSPC)
        os.pwrite(fd, NEW, 0)
        part = disk.replica(images[1])
        assert part["state"] in OUT
        assert "space" in part["reason"]
        # The first try to bring it back must have been in vain.
        faulty.wait_for(lambda counters: counters.writes >= 2, "b.img.quorumfs")
        faulty.clear()
        disk.wait_healthy()
    assert same([images[0], faulty.backing("b.img")])


def test_no_space_for_any_record(faulty: FaultFS, tmp_path: Path) -> None:
    """53: the write fails with ENOSPC, and no image has a byte of it."""
    images = create([faulty.path("a.img"), faulty.path("b.img")], SIZE, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        for name in "ab":
            faulty.inject(f"{name}.img.quorumfs", "write", errno=errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            os.pwrite(fd, NEW, 0)
        assert not any(any(faulty.backing(f"{name}.img").read_bytes()) for name in "ab")
        assert os.pread(fd, BLOCK, 0) == bytes(BLOCK)
        faulty.clear()
        os.pwrite(fd, NEW, 0)
        disk.wait_healthy()
        assert os.pread(fd, BLOCK, 0) == NEW


# Resync beside a guest, and with faults of its own


def test_a_guest_writes_ahead_inside_and_behind(faulty: FaultFS, tmp_path: Path) -> None:
    """73, 74: at full speed all over the disk; it ends while the guest goes on, all is equal."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], 2 * EXTENT, ONE)
    oracle = Oracle(range(0, 2 * EXTENT // BLOCK, 7))
    with mounted(faulty, images, tmp_path, FIFO) as disk:
        break_(faulty, "b.img")
        with opened(disk.file) as fd:
            for offset in range(0, 2 * EXTENT, MIB):
                os.pwrite(fd, bytes(MIB), offset)
        writers = Writers(oracle, disk.file, threads=4)
        try:
            wait_until(lambda: oracle.acknowledgements > 100, "some writes")
            faulty.clear()
            seen = [sample for _, sample in watched(disk)]
            count = oracle.acknowledgements
            wait_until(lambda: oracle.acknowledgements > count + 20, "the guest goes on")
        finally:
            writers.stop()
        assert not writers.errors
        assert all(0 <= each["done_bytes"] <= each["total_bytes"] for each in seen)
        assert all(each["eta_s"] is None or each["eta_s"] >= 0 for each in seen)
        with opened(disk.file) as fd:
            oracle.look(fd)
    assert same([images[0], faulty.backing("b.img")])


def test_a_source_that_cannot_read(faulty: FaultFS, tmp_path: Path) -> None:
    """75: a chunk that one member cannot read comes from another."""
    images = create([faulty.path("a.img"), tmp_path / "b.img", faulty.path("c.img")], EXTENT)
    options = "read-pattern=fifo,vote-threshold=2"
    with mounted(faulty, images, tmp_path, options) as disk, opened(disk.file) as fd:
        disk.wait_healthy()
        break_(faulty, "c.img")
        for chunk in range(8):
            os.pwrite(fd, NEW, chunk * CHUNK)
        faulty.inject("a.img", "read", start=3 * CHUNK, end=4 * CHUNK, errno=errno.EIO)
        faulty.clear("c.img")
        faulty.clear("c.img.quorumfs")
        disk.wait_for_state(images[2], "current")
    assert same([images[1], faulty.backing("c.img")])


def test_a_source_that_cannot_read_alone(faulty: FaultFS, tmp_path: Path) -> None:
    """75: with no other source that chunk waits, the rest is done, and the guest goes on."""
    images = create([faulty.path("a.img"), faulty.path("b.img")], EXTENT, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        break_(faulty, "b.img")
        for chunk in range(0, 64, 4):
            os.pwrite(fd, NEW, chunk * CHUNK)
        faulty.inject("a.img", "read", start=8 * CHUNK, end=9 * CHUNK, errno=errno.EIO)
        faulty.clear("b.img")
        faulty.clear("b.img.quorumfs")
        wait_until(
            lambda: disk.replica(images[1])["out_of_sync_bytes"] == CHUNK,
            "all but the unreadable chunk to be copied",
        )
        assert disk.replica(images[1])["state"] in (*OUT, "resyncing")
        faulty.clear()
        disk.wait_healthy()
    assert same([faulty.backing("a.img"), faulty.backing("b.img")])


def test_a_target_that_fails_again(faulty: FaultFS, tmp_path: Path) -> None:
    """76: it is ejected again, keeps what it got, and nobody else is touched."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], EXTENT, ONE)
    with mounted(faulty, images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
        break_(faulty, "b.img")
        for chunk in range(256):
            os.pwrite(fd, NEW, chunk * CHUNK)
        faulty.clear()
        faulty.inject("b.img", "write", start=200 * CHUNK, errno=errno.EIO)
        disk.wait_for_events("RESYNC_FINISHED", lambda events: any(e["error"] for e in events))
        assert disk.replica(images[1])["state"] in (*OUT, "resyncing")
        os.pwrite(fd, NEWER, 0)
        assert os.pread(fd, BLOCK, 0) == NEWER
        faulty.clear()
        disk.wait_healthy()
        assert disk.replica(images[0])["copied_bytes"] == 0
    assert same([images[0], faulty.backing("b.img")])


def test_the_rate_is_kept_and_shown(tmp_path: Path) -> None:
    """74, 78: within 20 %, and at most a few pieces at once; the progress and the time that is
    left are those that a watch shows. In memory: a disk may be slower than that."""
    total, limit, at_once = 2 * EXTENT, 4 * MIB, 4 * MIB
    with ExitStack() as stack:
        memory = stack.enter_context(tmpfs(tmp_path / "memory", 8 * EXTENT))
        faulty = stack.enter_context(FaultFS(memory))
        images = create([memory / "a.img", faulty.path("b.img")], total, ONE)
        disk = stack.enter_context(mounted(faulty, images, memory, FIFO + ",resync-rate=4M"))
        break_(faulty, "b.img")
        with opened(disk.file) as fd:
            for offset in range(0, total, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
        faulty.clear()
        samples = watched(disk)
        assert disk.replica(images[1])["copied_bytes"] == total
        (finished,) = disk.wait_for_events("RESYNC_FINISHED")
        assert (finished["bytes"], finished["error"]) == (total, None)
        assert same([images[0], faulty.backing("b.img")])
    assert {sample["total_bytes"] for _, sample in samples} == {total}
    done = [sample["done_bytes"] for _, sample in samples]
    assert done == sorted(done)
    assert done[0] <= at_once
    assert total - at_once <= done[-1] <= total
    began, ended = samples[0][0], samples[-1][0]
    assert 0.6 * limit < done[-1] / (ended - began) < 1.2 * limit + at_once / (ended - began)
    for at, sample in samples:
        assert sample["done_bytes"] <= at_once + 1.2 * limit * (at - began)
        if sample["done_bytes"] >= total // 2:
            left_s = ended - at
            assert left_s / 2 - 1 <= sample["eta_s"] <= 2 * left_s + 1
            assert limit / 2 <= sample["rate_bytes_per_s"] <= 2 * limit


def watched(disk: SetMount) -> list[tuple[float, dict[str, Any]]]:
    """What the status shows of a resync until all is well, and when (monotonic, seconds)."""
    seen = []

    def healthy(status: dict[str, Any]) -> bool:
        if status["resync"]:
            seen.append((time.monotonic(), status["resync"]))
        return bool(status["state"] == "healthy")

    disk.wait(healthy, "the end of the resync")
    return seen


def test_holes_stay_holes(tmp_path: Path) -> None:
    """79: what the source has as a hole the target has as one, and du agrees within 1 %."""
    with ExitStack() as stack:
        ext4 = stack.enter_context(Ext4(tmp_path, 96 * MIB))
        images = create([tmp_path / "a.img", ext4.mountpoint / "b.img"], 4 * EXTENT, ONE)
        with SetMount(images, tmp_path) as disk, opened(disk.file) as fd:
            for offset in range(0, 4 * EXTENT, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
        ext4.unmount()
        with SetMount(images, tmp_path, "degraded") as disk, opened(disk.file) as fd:
            fallocate(fd, PUNCH, EXTENT, 2 * EXTENT)
            os.pwrite(fd, NEW, 2 * EXTENT)
        ext4.mount()
        assert allocated(images[1]) > 3 * EXTENT
        with SetMount(images, tmp_path) as disk:
            disk.wait_healthy()
        assert same(images)
        assert abs(allocated(images[1]) - allocated(images[0])) <= allocated(images[0]) // 100
        assert data_extents(images[0]) == data_extents(images[1])


# Without rights


def test_an_ordinary_user_has_all_of_it(tmp_path: Path) -> None:
    """Create, mount, lose a replica, get it back, status, resolve."""
    with ordinary_user() as user:
        mountpoint = user.make_directory("mnt")
        images = [user.directory / f"{name}.img" for name in "ab"]
        assert run(user, "create", "--size", str(SIZE), "--vote-threshold=1", *images) == 0
        assert run(user, "mount", *images, mountpoint) == 0
        try:
            assert run(user, "status", mountpoint) == 0
            os.truncate(images[1], SIZE // 2)
            write = ["dd", "if=/dev/urandom", f"of={mountpoint}/disk.img", "bs=64k", "count=64"]
            assert user.run(*write, "conv=notrunc,fsync").returncode == 0
            assert run(user, "status", mountpoint) == 1
            os.truncate(images[1], SIZE)
            wait_until(lambda: run(user, "status", mountpoint) == 0, "a healthy disk")
        finally:
            assert run(user, "umount", mountpoint) == 0
        assert same(images)
        assert run(user, "examine", *images) == 0
        assert run(user, "resolve", "--dry-run", "--keep", images[0], *images) == 0


def run(user: OrdinaryUser, *arguments: str | Path) -> int:
    """The exit code of a command of this user."""
    return user.quorumfs(*arguments).returncode
