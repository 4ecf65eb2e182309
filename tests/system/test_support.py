"""The test support does what it says, shown by real system calls."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from support import warm
from support.command import filesystem_at, mounted_below, processes_of, wait_until
from support.faultfs import FaultFS, is_mounted
from support.qemu import QuorumExport, RawExport
from support.sets import tmpfs

from quorumfs.control.mounts import of_quorumfs, store_of

BLOCK = 4096
SIZE = 16 * BLOCK
OLD = b"o" * BLOCK
NEW = b"n" * BLOCK


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[FaultFS]:
    with FaultFS(tmp_path) as fs:
        for name in ("a.img", "b.img", "c.img"):
            fs.backing(name).write_bytes(OLD * 16)
        yield fs
    assert not is_mounted(fs.mountpoint)


@pytest.fixture
def fd(fs: FaultFS) -> Iterator[int]:
    fd = os.open(fs.path("b.img"), os.O_RDWR)
    yield fd
    fs.clear()
    os.close(fd)


@pytest.fixture
def background() -> Iterator[Callable[..., Future[object]]]:
    """Start a call that will hang; ended by the release of its request."""
    with ThreadPoolExecutor(max_workers=200) as pool:
        yield pool.submit


def pread_afresh(path: Path, offset: int) -> bytes:
    """Read past the page cache, which an export of QEMU keeps only while it is open."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, BLOCK, offset)
    finally:
        os.close(fd)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_without_faults_it_is_a_plain_directory(fs: FaultFS) -> None:
    new = fs.path("d.img")
    new.write_bytes(NEW)
    os.truncate(new, SIZE)
    new.chmod(0o640)
    os.utime(new, ns=(1, 2))
    status, truth = new.stat(), fs.backing("d.img").stat()
    for field in ("st_size", "st_mode", "st_ino", "st_blocks", "st_uid", "st_mtime_ns", "st_nlink"):
        assert getattr(status, field) == getattr(truth, field), field
    with new.open("r+b") as file:
        os.replace(new, fs.path("b.img"))
        os.unlink(fs.path("b.img"))
        assert file.read() == NEW + bytes(SIZE - BLOCK)
        assert os.fstat(file.fileno()).st_nlink == 0
    assert sorted(os.listdir(fs.mountpoint)) == ["a.img", "c.img"]
    assert sorted(os.listdir(fs.backing_directory)) == ["a.img", "c.img"]
    assert os.statvfs(fs.mountpoint).f_blocks == os.statvfs(fs.backing_directory).f_blocks
    with pytest.raises(FileNotFoundError):
        fs.path("b.img").stat()
    with pytest.raises(FileExistsError):
        os.open(fs.path("a.img"), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with fs.path("a.img").open("wb"):
        assert fs.backing("a.img").stat().st_size == 0


def test_errno_hits_a_byte_range_a_number_of_times(fs: FaultFS, fd: int) -> None:
    fs.inject("b.img", "write", errno=errno.ENOSPC, start=BLOCK, end=2 * BLOCK, count=2)
    assert os.pwrite(fd, NEW, 0) == BLOCK
    assert os.pwrite(fd, NEW, 2 * BLOCK) == BLOCK
    for offset in (BLOCK, 1):
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, NEW, offset)
    assert fs.backing("b.img").read_bytes()[: 3 * BLOCK] == NEW + OLD + NEW
    assert os.pwrite(fd, NEW, BLOCK) == BLOCK
    assert os.pread(fd, 3 * BLOCK, 0) == NEW * 3


def test_the_first_rule_decides_and_clear_ends_it(fs: FaultFS, fd: int) -> None:
    fs.inject("b.img", "read", errno=errno.EROFS, count=1)
    fs.inject("b.img", "any", errno=errno.EIO)
    with pytest.raises(OSError, match="Read-only"):
        os.pread(fd, BLOCK, 0)
    for call in (lambda: os.pread(fd, 1, 0), lambda: os.pwrite(fd, b"n", 0), lambda: os.fsync(fd)):
        with pytest.raises(OSError, match="Input/output"):
            call()
    fs.clear("a.img")
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(fd)
    fs.clear("b.img")
    os.fsync(fd)
    assert fs.path("b.img").read_bytes() == OLD * 16


def test_a_rule_belongs_to_the_name(fs: FaultFS, fd: int) -> None:
    fs.inject("d.img", "read", errno=errno.EIO)
    assert os.pread(fd, BLOCK, 0) == OLD
    os.rename(fs.path("b.img"), fs.path("d.img"))
    with pytest.raises(OSError, match="Input/output"):
        os.pread(fd, BLOCK, 0)


def test_probability_repeats_with_its_seed(fs: FaultFS, fd: int) -> None:
    def failures() -> list[int]:
        fs.clear()
        fs.inject("b.img", "write", errno=errno.EIO, probability=0.5, seed=7)
        failed = []
        for block in range(16):
            try:
                os.pwrite(fd, NEW, block * BLOCK)
            except OSError:
                failed.append(block)
        return failed

    first = failures()
    assert 0 < len(first) < 16
    assert failures() == first


def test_short_transfers(fs: FaultFS, fd: int) -> None:
    fs.inject("b.img", "any", short=100)
    assert os.pwrite(fd, NEW, 0) == 100
    assert os.pread(fd, BLOCK, 0) == NEW[:100]
    assert fs.backing("b.img").read_bytes()[:BLOCK] == NEW[:100] + OLD[100:]


def test_dropped_writes_and_fsyncs_report_success(fs: FaultFS, fd: int) -> None:
    fs.inject("b.img", "any", drop=True)
    assert os.pwrite(fd, NEW, 0) == BLOCK
    os.fsync(fd)
    assert os.pread(fd, BLOCK, 0) == OLD
    counters = fs.counters("b.img")
    assert (counters.writes, counters.fsyncs, counters.bytes_written) == (1, 1, 0)


def test_corrupt_reads_leave_the_file_fine(fs: FaultFS, fd: int) -> None:
    fs.inject("b.img", "read", corrupt=True, count=1)
    assert os.pread(fd, BLOCK, 0) == bytes(255 - byte for byte in OLD)
    assert os.pread(fd, BLOCK, 0) == OLD


def test_a_rule_without_effect_is_a_mistake(fs: FaultFS) -> None:
    for mistake in ({}, {"drop": True}, {"count": 3}):
        with pytest.raises(ValueError, match="change nothing"):
            fs.inject("b.img", "read", **mistake)


def test_delayed_requests_succeed_and_overlap(
    fs: FaultFS, fd: int, background: Callable[..., Future[object]]
) -> None:
    fs.inject("b.img", "read", delay=0.2)
    began = time.monotonic()
    reads = [background(os.pread, fd, BLOCK, 0) for _ in range(8)]
    assert [read.result() for read in reads] == [OLD] * 8
    assert time.monotonic() - began >= 0.2
    assert fs.counters("b.img").in_flight_max == 8


def test_hung_requests_happen_after_release(
    fs: FaultFS, fd: int, background: Callable[..., Future[object]]
) -> None:
    fs.hang("b.img", "write", count=1)
    write = background(os.pwrite, fd, NEW, 0)
    fs.wait_for(lambda c: c.in_flight == 1, "b.img")
    assert os.pread(fd, BLOCK, 0) == OLD
    fs.release("b.img")
    assert write.result(10) == BLOCK
    assert os.pread(fd, BLOCK, 0) == NEW
    counters = fs.counters("b.img")
    assert (counters.reads, counters.writes, counters.fsyncs) == (2, 1, 0)
    assert (counters.bytes_read, counters.bytes_written) == (2 * BLOCK, BLOCK)
    assert (counters.in_flight, counters.in_flight_max) == (0, 2)


def test_many_hung_requests_leave_other_files_alone(
    fs: FaultFS, fd: int, background: Callable[..., Future[object]]
) -> None:
    fs.hang("b.img", "read")
    reads = [background(os.pread, fd, BLOCK, 0) for _ in range(150)]
    fs.wait_for(lambda c: c.in_flight == 150, "b.img")
    assert fs.path("a.img").read_bytes() == OLD * 16
    fs.release()
    assert {read.result(10) for read in reads} == {OLD}


def test_release_may_end_in_an_error(
    fs: FaultFS, fd: int, background: Callable[..., Future[object]]
) -> None:
    fs.inject("b.img", "fsync", hang=True, errno=errno.EIO)
    fsync = background(os.fsync, fd)
    fs.wait_for(lambda c: c.in_flight == 1, "b.img")
    fs.release("b.img")
    with pytest.raises(OSError, match="Input/output"):
        fsync.result(10)


def test_wait_for_gives_up(fs: FaultFS) -> None:
    with pytest.raises(TimeoutError, match="in_flight=0"):
        fs.wait_for(lambda c: c.in_flight == 1, "b.img", timeout=0.01)


def test_a_stopped_server_answers_nothing(
    fs: FaultFS, fd: int, background: Callable[..., Future[object]]
) -> None:
    fs.stop()
    assert state_of(fs.pid) == "T"
    read = background(os.pread, fd, BLOCK, 0)
    with pytest.raises(RuntimeError, match="stopped"):
        fs.counters("b.img")
    assert not read.done()
    fs.cont()
    assert read.result(10) == OLD


def test_leaving_releases_what_hangs_and_detaches_what_is_in_use(tmp_path: Path) -> None:
    with FaultFS(tmp_path) as fs:
        fs.backing("b.img").write_bytes(OLD)
        fd = os.open(fs.path("b.img"), os.O_RDWR)
        fs.hang("b.img")
        fs.inject("b.img", "fsync", delay=3600)
        write = threading.Thread(target=os.pwrite, args=(fd, NEW, 0))
        write.start()
        fs.wait_for(lambda c: c.in_flight == 1, "b.img")
        fs.stop()
    write.join(10)
    assert fs.backing("b.img").read_bytes() == NEW
    assert not is_mounted(fs.mountpoint)
    assert not Path(f"/proc/{fs.pid}").exists()
    os.close(fd)


def test_the_death_of_the_server_is_told(tmp_path: Path) -> None:
    def kill_and_ask() -> None:
        with FaultFS(tmp_path) as fs:
            os.kill(fs.pid, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="ended unexpectedly"):
                fs.counters("b.img")

    with pytest.raises(RuntimeError, match="did not end well:\nexit code -9"):
        kill_and_ask()
    assert not is_mounted(tmp_path / "faulty")


def test_the_oracle_votes_and_reports(fs: FaultFS, tmp_path: Path) -> None:
    replicas = [fs.path(name) for name in ("a.img", "b.img", "c.img")]
    with QuorumExport(replicas, tmp_path / "peer.img", threshold=2) as peer:
        fd = os.open(peer.path, os.O_RDWR)
        assert os.pwrite(fd, NEW, BLOCK) == BLOCK
        os.fsync(fd)
        assert [fs.counters(path.name).fsyncs for path in replicas] == [1, 1, 1]
        assert peer.events() == []

        fs.inject("b.img", "read", corrupt=True)
        assert pread_afresh(peer.path, BLOCK) == NEW
        bad = peer.events()[0]
        assert bad["event"] == "QUORUM_REPORT_BAD"
        assert (bad["data"]["node-name"], bad["data"]["type"]) == ("replica1", "read")

        fs.inject("c.img", "write", errno=errno.ENOSPC)
        fs.inject("b.img", "write", errno=errno.ENOSPC)
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, OLD, BLOCK)
        events = peer.wait_for(lambda events: len(events) >= 3)
        assert "QUORUM_FAILURE" in [event["event"] for event in events]
        os.close(fd)
    assert not is_mounted(peer.path)
    assert not Path(f"/proc/{peer.pid}").exists()


def test_the_oracle_refuses_with_the_reason(fs: FaultFS, tmp_path: Path) -> None:
    peer = QuorumExport([fs.path("a.img")], tmp_path / "peer.img", threshold=2)
    with pytest.raises(RuntimeError, match="threshold"), peer:
        pass
    assert not is_mounted(peer.path)


def test_raw_export_fails_at_a_sector_once(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(OLD * 16)
    inject: list[dict[str, object]] = [
        {"event": "none", "iotype": "write", "errno": errno.ENOSPC, "sector": 8, "once": True},
        {"event": "none", "iotype": "flush"},
    ]
    with RawExport(image, tmp_path / "faulty.img", inject=inject) as export:
        fd = os.open(export.path, os.O_RDWR)
        assert os.pwrite(fd, NEW, 0) == BLOCK
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, NEW, BLOCK)
        assert os.pwrite(fd, NEW, BLOCK) == BLOCK
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(fd)
        with pytest.raises(OSError, match="Input/output"):
            os.close(fd)  # QEMU flushes then, too
    assert image.read_bytes() == NEW * 2 + OLD * 14


def test_raw_export_can_be_slow_or_stopped(
    tmp_path: Path, background: Callable[..., Future[object]]
) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(OLD * 16)
    with RawExport(image, tmp_path / "slow.img", throttle={"iops-total": 50}) as export:
        fd = os.open(export.path, os.O_RDWR)
        began = time.monotonic()
        for block in range(15):
            os.pwrite(fd, NEW, block * BLOCK)
        assert time.monotonic() - began > 0.1  # a tenth of a second's worth may pass at once
        export.stop()
        assert state_of(export.pid) == "T"
        write = background(os.pwrite, fd, NEW, 15 * BLOCK)
        assert not write.done()
        export.cont()
        assert write.result(10) == BLOCK
        os.close(fd)
    assert image.read_bytes() == NEW * 16


@pytest.mark.parametrize(
    "name",
    [b"\xff", b"a\rb", "a\u0085b\u2028c".encode(), b"a b\tc\nd\\e", b"\xa0", b"fuse.quorumfs - x"],
    ids=["no UTF-8", "return", "line ends of Unicode", "escaped", "no-break space", "separator"],
)
def test_whatever_anybody_calls_a_mount_point_the_table_can_be_read(
    tmp_path: Path, name: bytes
) -> None:
    place = tmp_path / os.fsdecode(name)
    with tmpfs(place, 1 << 20):
        assert is_mounted(place)
        assert filesystem_at(place) == "tmpfs"
        assert mounted_below(tmp_path) == [str(place)]
        assert store_of(str(place / "a.img")) == str(place)
        assert place not in [Path(mount.mountpoint) for mount in of_quorumfs()]
    assert not is_mounted(place)


# Commands that are forked, and not started


REPORT = """
import json, os, signal, sys
shown = open("/proc/self/cmdline").read().rstrip("\\0").split("\\0")
fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
mask = os.umask(0)
signals = [str(signal.getsignal(number)) for number in signal.valid_signals()]
environment = sorted(os.environ.items())
print(json.dumps([sys.argv, shown, fds, mask, signals, environment, os.getcwd()], indent=1))
sys.exit("no more to say")
"""
"""Says what a command finds, and fails."""


def test_a_forked_command_finds_what_a_new_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "report.py"
    script.write_text(REPORT)
    warm.run(["--version"], timeout_s=60)  # the process that waits has begun elsewhere
    monkeypatch.setenv("SET_FOR_IT", "a value")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, str(script), "one", "", "two words"]
    environment = dict(os.environ)  # readline, which pytest imports, sets more behind Python's back
    started = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    forked = warm.run(command[2:], timeout_s=60, script=str(script))
    assert forked.stdout.splitlines() == started.stdout.splitlines()
    assert (forked.stderr, forked.args) == (started.stderr, command)
    assert forked.returncode == started.returncode == 1


def test_a_forked_command_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text("import signal\nwhile True:\n    signal.pause()\n")
    with pytest.raises(subprocess.TimeoutExpired):
        warm.run([], timeout_s=1.0, script=str(script))
    wait_until(lambda: not processes_of(script), "the end of what was killed")
