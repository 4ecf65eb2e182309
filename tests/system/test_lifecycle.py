"""How a mount begins and ends: nothing acknowledged is lost, and nothing is left behind."""

import contextlib
import errno
import importlib
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import MakeImages
from support.command import (
    filesystem_at,
    is_alive,
    one_line,
    ordinary_user,
    processes_of,
    quorumfs_in_background,
    wait_until,
)
from support.faultfs import FaultFS
from support.mounting import QUORUMFS, Mounted, make_set, quorumfs
from support.sets import seen, with_sidecars

SIZE = 1 << 20
BLOCK = 4096


@pytest.fixture
def slow(tmp_path: Path, make_images: MakeImages) -> Iterator[FaultFS]:
    """Replicas a.img and b.img on a disk that can be slow, or hang."""
    with FaultFS(tmp_path) as slow:
        make_images(2, SIZE, slow.backing_directory)
        yield slow


@contextlib.contextmanager
def mounted_on(slow: FaultFS, directory: Path) -> Iterator[Mounted]:
    replicas = [slow.path("a.img"), slow.path("b.img")]
    make_set(replicas)
    with Mounted(replicas, directory) as mounted:
        try:
            yield mounted
        except BaseException:
            slow.clear()  # else the unmounting waits for what the test has left hanging
            raise


def on_both_replicas(slow: FaultFS, offset: int, data: bytes) -> bool:
    contents = [slow.backing(name).read_bytes() for name in ("a.img", "b.img")]
    return all(content[offset : offset + len(data)] == data for content in contents)


def overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        assert file.write(data) == len(data)


def close_whatever(fd: int) -> None:
    """Close a file whose file system may be gone, which close(2) tells although it closes."""
    with contextlib.suppress(OSError):
        os.close(fd)


def tell(signum: signal.Signals) -> Callable[[Mounted], None]:
    return lambda mounted: os.kill(mounted.pid, signum)


def run(*command: str) -> Callable[[Mounted], None]:
    def unmount(mounted: Mounted) -> None:
        subprocess.run([*command, mounted.mountpoint], check=True)

    return unmount


def waits_for_fuse(pid: int) -> bool:
    """Whether a thread of *pid* is inside the kernel for a request to a FUSE server."""
    try:
        stacks = [task / "stack" for task in Path(f"/proc/{pid}/task").iterdir()]
        return any("fuse_" in stack.read_text() for stack in stacks)
    except (FileNotFoundError, ProcessLookupError):
        return False


GENTLE_ENDS = {
    "quorumfs umount": lambda mounted: quorumfs("umount", mounted.mountpoint),
    "umount": run("umount"),
    "fusermount3 -u": run("fusermount3", "-u"),
    "SIGTERM": tell(signal.SIGTERM),
    "SIGINT": tell(signal.SIGINT),
}
HARD_ENDS = {
    "SIGTERM": tell(signal.SIGTERM),
    "SIGINT": tell(signal.SIGINT),
    "umount -l": run("umount", "-l"),
}


# Unmounting


@pytest.mark.parametrize("end", GENTLE_ENDS.values(), ids=GENTLE_ENDS)
def test_every_end_syncs_the_replicas(
    slow: FaultFS, tmp_path: Path, end: Callable[[Mounted], object]
) -> None:
    """However a mount ends, its data is durable on every replica when the daemon is gone."""
    with mounted_on(slow, tmp_path) as mounted:
        pid = mounted.pid
        overwrite(mounted.file, b"data")
        synced = [slow.counters(name).fsyncs for name in ("a.img", "b.img")]
        end(mounted)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        assert filesystem_at(mounted.mountpoint) is None
        for name, before in zip(("a.img", "b.img"), synced, strict=True):
            assert slow.counters(name).fsyncs > before
        assert on_both_replicas(slow, 0, b"data")
        assert mounted.log()[-1]["message"] == f"unmounted {mounted.mountpoint}"


@pytest.mark.parametrize("fsname", ["disk", "user_id=7"])
def test_umount_returns_when_the_daemon_is_gone(
    slow: FaultFS, mountpoint: Path, fsname: str
) -> None:
    """After ``quorumfs umount`` the replicas are synced, free, and can be copied.

    The kernel's unmounting is done long before; no name makes it look for another daemon.
    """
    replicas = [slow.path("a.img"), slow.path("b.img")]
    quorumfs("mount", "-o", f"fsname={fsname}", *replicas, mountpoint)
    slow.inject("b.img", "fsync", delay=0.7)
    quorumfs("umount", mountpoint)
    assert processes_of(mountpoint) == []
    assert slow.counters("b.img").in_flight == 0


@pytest.mark.parametrize("by_root", [False, True], ids=["by the user", "by root"])
@pytest.mark.parametrize("session", [False, True], ids=["no session", "session"])
def test_umount_finds_a_users_daemon(session: bool, by_root: bool) -> None:
    """Waiting works for root, and where the mount was made in a login session but umount runs
    in none, as from cron or sudo.

    The daemon is frozen meanwhile: here the kernel unmounts without it.
    """
    with ordinary_user() as user:
        environment = {"XDG_RUNTIME_DIR": str(user.make_directory("run"))} if session else {}
        mountpoint = user.make_directory("mnt")
        done = user.quorumfs("mount", *user.make_images(2), mountpoint, **environment)
        assert done.returncode == 0, done.stderr
        (pid,) = processes_of(mountpoint)
        os.kill(pid, signal.SIGSTOP)
        umount = (quorumfs_in_background if by_root else user.start)("umount", mountpoint)
        try:
            wait_until(lambda: not filesystem_at(mountpoint), "the kernel's unmounting")
            with pytest.raises(subprocess.TimeoutExpired):
                umount.communicate(timeout=0.5)
        finally:
            os.kill(pid, signal.SIGCONT)
            umount.communicate(timeout=60)
        assert umount.returncode == 0
        assert not is_alive(pid)


def test_umount_tells_of_a_long_wait(
    slow: FaultFS, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits longer than some seconds is told for what, and is let go when it is done."""
    module = importlib.import_module("quorumfs.cli.umount")
    monkeypatch.setattr(module, "PATIENCE_S", 1.0)
    quorumfs("mount", slow.path("a.img"), mountpoint)
    (pid,) = processes_of(mountpoint)
    slow.inject("a.img", "fsync", delay=5, count=1)
    done = CliRunner().invoke(module.umount, [str(mountpoint)])
    assert done.exit_code == 0
    # Not done.stderr: click 8.1 mixes it into the output, and this is all of that.
    general, particular = done.output.splitlines()
    assert general == f"waiting for pid {pid} to sync the replicas of {mountpoint}"
    assert particular.startswith(f"waiting for {slow.path('a.img')}: no answer to a flush for ")
    assert not is_alive(pid)


@pytest.mark.parametrize("use", ["open file", "working directory", "mapping"])
def test_a_busy_mount_names_its_user_and_works_on(
    make_images: MakeImages, tmp_path: Path, use: str
) -> None:
    """Unmounting what is in use is refused with the user's pid; nothing is lost or changed."""
    script = {
        "open file": "f = open('disk.img', 'r+b'); os.chdir('/')",
        "working directory": "pass",
        "mapping": "f = open('disk.img', 'r+b'); m = mmap.mmap(f.fileno(), 4096); "
        "os.closerange(3, 100); os.chdir('/')",
    }[use]
    with Mounted(make_images(2), tmp_path) as mounted:
        code = f"import mmap, os, sys; {script}; print(flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=mounted.mountpoint,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            command = [*QUORUMFS, "umount", str(mounted.mountpoint)]
            for cwd in tmp_path, mounted.mountpoint:
                done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
                line = one_line(done, 1)
                assert f"busy; in use by pid {process.pid} (python" in line
                assert line.count("pid ") == 1, "its user, not the daemon or the command itself"
            assert is_alive(mounted.pid)
            overwrite(mounted.file, b"still works")
        finally:
            process.communicate(timeout=60)
    assert all(path.read_bytes().startswith(b"still works") for path in mounted.replicas)


def test_umount_takes_quorumfs_mounts_only(tmp_path: Path) -> None:
    """Another file system is not unmounted by mistake: exit code 4, and it stays."""
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        done = quorumfs("umount", tmp_path, check=False)
        assert f"{tmp_path} is not a quorumfs mount" in one_line(done, 4)
        assert filesystem_at(tmp_path) == "tmpfs"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Requests under way


@pytest.mark.parametrize("end", HARD_ENDS.values(), ids=HARD_ENDS)
def test_a_write_in_flight_is_finished(
    slow: FaultFS, tmp_path: Path, end: Callable[[Mounted], object]
) -> None:
    """A daemon told to end while a slow write is under way ends it first, with success."""
    with mounted_on(slow, tmp_path) as mounted, ThreadPoolExecutor() as pool:
        pid = mounted.pid
        for name in ("a.img", "b.img"):
            slow.inject(name, "write", delay=0.5)
        fd = os.open(mounted.file, os.O_RDWR)
        try:
            write = pool.submit(os.pwrite, fd, b"late" * 1024, BLOCK)
            for name in ("a.img", "b.img"):
                slow.wait_for(lambda seen: seen.in_flight > 0, name)
            end(mounted)
            assert write.result(timeout=60) == BLOCK
        finally:
            close_whatever(fd)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        assert on_both_replicas(slow, BLOCK, b"late" * 1024)
        assert min(slow.counters(name).fsyncs for name in ("a.img", "b.img")) > 0
        assert filesystem_at(mounted.mountpoint) is None


@pytest.mark.parametrize("command", ["quorumfs umount", "umount", "fusermount3 -u"])
def test_unmounting_under_a_write_is_refused_and_harms_nothing(
    slow: FaultFS, tmp_path: Path, command: str
) -> None:
    """Whoever writes has the file open, so a gentle unmount fails, and the write does not."""
    with mounted_on(slow, tmp_path) as mounted, ThreadPoolExecutor() as pool:
        slow.inject("a.img", "write", delay=0.5, count=1)
        fd = os.open(mounted.file, os.O_RDWR)
        try:
            write = pool.submit(os.pwrite, fd, b"late" * 1024, BLOCK)
            slow.wait_for(lambda seen: seen.in_flight > 0, "a.img")
            with pytest.raises((subprocess.CalledProcessError, AssertionError)):
                GENTLE_ENDS[command](mounted)
            assert write.result(timeout=60) == BLOCK
            assert os.pwrite(fd, b"more", 0) == 4
        finally:
            os.close(fd)
    assert on_both_replicas(slow, 0, b"more" + bytes(BLOCK - 4) + b"late" * 1024)


@pytest.mark.parametrize("end", HARD_ENDS.values(), ids=HARD_ENDS)
def test_what_a_mapping_wrote_is_not_lost(
    slow: FaultFS, tmp_path: Path, end: Callable[[Mounted], object]
) -> None:
    """Pages dirtied through a mapping reach the replicas, although the file is still open.

    The replicas are slow, and the pages apart, which the kernel writes back a dozen at a time:
    a daemon that does not wait for all of them is found out.
    """
    data = b"".join(os.urandom(BLOCK) + bytes(BLOCK) for _ in range(SIZE // BLOCK // 2))
    with mounted_on(slow, tmp_path) as mounted:
        pid = mounted.pid
        for name in ("a.img", "b.img"):
            slow.inject(name, "write", delay=0.01)
        fd = os.open(mounted.file, os.O_RDWR)
        with mmap.mmap(fd, SIZE) as mapping:
            for start in range(0, SIZE, 2 * BLOCK):
                mapping[start : start + BLOCK] = data[start : start + BLOCK]
            end(mounted)
            if end is not HARD_ENDS["umount -l"]:  # which waits for the last user
                wait_until(lambda: not is_alive(pid), "the daemon's end")
        close_whatever(fd)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        assert on_both_replicas(slow, 0, data)


def test_readers_and_writers_at_the_end_get_data_or_an_error(slow: FaultFS, tmp_path: Path) -> None:
    """SIGTERM under load: every write that was acknowledged is on the replicas."""
    with mounted_on(slow, tmp_path) as mounted:
        pid = mounted.pid
        acknowledged: list[int] = []
        fd = os.open(mounted.file, os.O_RDWR)
        busy = threading.Event()

        def write() -> OSError | None:
            try:
                for block in range(SIZE // BLOCK):
                    os.pwrite(fd, b"%04d" % block * 1024, block * BLOCK)
                    acknowledged.append(block)
                    if block == 10:
                        busy.set()
            except OSError as error:
                return error
            return None

        with ThreadPoolExecutor() as pool:
            slow.inject("a.img", "write", delay=0.005)
            writer = pool.submit(write)
            assert busy.wait(10)
            os.kill(pid, signal.SIGTERM)
            error = writer.result(timeout=60)
        close_whatever(fd)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        assert error is None or error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        assert len(acknowledged) > 10
        for block in acknowledged:
            assert on_both_replicas(slow, block * BLOCK, b"%04d" % block * 1024)


# After a crash


@pytest.fixture
def crashed(make_images: MakeImages, tmp_path: Path) -> Iterator[Mounted]:
    """A mount whose daemon was killed."""
    with Mounted(make_images(2), tmp_path) as mounted:
        pid = mounted.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        try:
            yield mounted
        finally:
            while filesystem_at(mounted.mountpoint):
                subprocess.run(["umount", "-l", mounted.mountpoint], check=True)


def test_a_dead_mount_point_stays_dead(crashed: Mounted) -> None:
    """After a crash clients get ENOTCONN, and never find the empty directory below."""
    for call in (
        lambda: os.listdir(crashed.mountpoint),
        lambda: os.open(crashed.file, os.O_RDWR | os.O_CREAT),
        lambda: os.open(crashed.mountpoint / "new", os.O_RDWR | os.O_CREAT),
    ):
        with pytest.raises(OSError, match="Transport endpoint") as caught:
            call()
        assert caught.value.errno == errno.ENOTCONN
    assert filesystem_at(crashed.mountpoint) == "fuse.quorumfs"


def test_a_dead_mount_is_cleared_by_the_next_one(crashed: Mounted) -> None:
    """After a crash the same mount command works again, and leaves no dead mount below."""
    quorumfs("mount", *crashed.replicas, crashed.mountpoint)
    overwrite(crashed.file, b"again")
    quorumfs("umount", crashed.mountpoint)
    assert filesystem_at(crashed.mountpoint) is None
    assert all(path.read_bytes().startswith(b"again") for path in crashed.replicas)


def test_a_dead_mount_is_cleared_under_a_client(make_images: MakeImages, tmp_path: Path) -> None:
    """A client that still clings to the dead mount does not keep the next one from working."""
    with Mounted(make_images(2), tmp_path) as mounted:
        pid = mounted.pid
        fd = os.open(mounted.file, os.O_RDWR)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        try:
            quorumfs("mount", *mounted.replicas, mounted.mountpoint)
            with pytest.raises(OSError, match="Transport endpoint"):
                os.pwrite(fd, b"old", 0)
            overwrite(mounted.file, b"new")
        finally:
            close_whatever(fd)
    assert all(path.read_bytes().startswith(b"new") for path in mounted.replicas)


def test_a_dead_mount_can_be_unmounted(crashed: Mounted) -> None:
    """``quorumfs umount`` takes a dead mount away, and the command is done at once."""
    quorumfs("umount", crashed.mountpoint)
    assert filesystem_at(crashed.mountpoint) is None
    assert os.listdir(crashed.mountpoint) == []


def test_a_refused_mount_leaves_a_dead_mount_point_dead(crashed: Mounted) -> None:
    """A mistake in the next mount command does not open the empty directory to clients."""
    done = quorumfs("mount", "/no/such.img", crashed.mountpoint, check=False)
    assert "/no/such.img" in one_line(done, 1)
    assert filesystem_at(crashed.mountpoint) == "fuse.quorumfs"


# A mount that cannot begin


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("option", [[], ["-f"]], ids=["background", "foreground"])
def test_a_mount_that_waits_for_a_hung_replica_can_be_stopped(
    slow: FaultFS, mountpoint: Path, signum: signal.Signals, option: list[str]
) -> None:
    """45: Ctrl-C (or timeout(1)) ends the command; no process and no mount comes of it, nothing
    is changed, and the set can be mounted once the replica answers. It says whom it waits for."""
    replicas = [mountpoint.parent / "well.img", slow.path("a.img")]
    replicas[0].write_bytes(bytes(SIZE))
    make_set(replicas)  # and the kernel has greeted the server: what hangs now is the request
    before = seen(with_sidecars(replicas))
    slow.stop()
    process = quorumfs_in_background("mount", *option, *replicas, mountpoint)
    try:
        wait_until(lambda: any(map(waits_for_fuse, processes_of(mountpoint))), "the hanging")
        assert process.stderr
        assert f"waiting for {replicas[1]}" in process.stderr.readline()
        process.send_signal(signum)
        # To the end of its stderr: whatever the command started has ended as well.
        _, stderr = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "Traceback" not in stderr
        wait_until(lambda: not processes_of(mountpoint), "the end of all processes")
    finally:
        for pid in processes_of(mountpoint):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        slow.cont()
    assert filesystem_at(mountpoint) is None
    assert seen(with_sidecars(replicas)) == before
    quorumfs("mount", *replicas, mountpoint)
    quorumfs("umount", mountpoint)


def test_closed_standard_streams_cost_no_replica(make_images: MakeImages, mountpoint: Path) -> None:
    """As under some service managers: an image must not become descriptor 0, 1 or 2."""
    replicas = make_images(2)
    arguments = ["mount", "-o", "vote-threshold=2", *map(str, replicas), str(mountpoint)]
    command = [sys.executable, "-m", "quorumfs", *arguments]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    subprocess.run(closed, check=True, timeout=30)
    with open(mountpoint / "disk.img", "r+b") as file:
        file.write(b"x" * BLOCK)
    quorumfs("umount", mountpoint)
    assert [path.read_bytes()[:BLOCK] for path in replicas] == [b"x" * BLOCK] * 2
    command = ["resolve", "--keep", *map(str, [replicas[1], *replicas])]
    closed[4:] = [sys.executable, "-m", "quorumfs", *command]
    subprocess.run(closed, check=True, timeout=30)


def test_sigterm_while_only_the_directory_is_in_use(slow: FaultFS, tmp_path: Path) -> None:
    """Busy, though the kernel has no page of the file, or has forgotten it."""
    with mounted_on(slow, tmp_path) as mounted:
        pid = mounted.pid
        before = slow.counters("a.img").fsyncs
        with subprocess.Popen(["sleep", "60"], cwd=mounted.mountpoint) as sleeper:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid), "the end of the daemon")
            sleeper.kill()
        assert slow.counters("a.img").fsyncs > before
        assert filesystem_at(mounted.mountpoint) is None


def test_umount_tells_of_a_last_flush_that_failed(slow: FaultFS, tmp_path: Path) -> None:
    """Whoever unmounts to take the replicas away must hear that they are not all on the disk."""
    with mounted_on(slow, tmp_path) as mounted:
        mounted.expected_errors.append("the last flush failed")
        for name in ("a.img", "b.img"):
            slow.inject(name, "fsync", errno=errno.EIO)
        line = one_line(quorumfs("umount", mounted.mountpoint, check=False), 1)
        assert "flush failed" in line
        assert filesystem_at(mounted.mountpoint) is None


def test_a_replica_that_hangs_in_the_last_flush_is_ejected(slow: FaultFS, tmp_path: Path) -> None:
    """The end of a mount has a deadline as every request has."""
    replicas = [slow.path("a.img"), slow.path("b.img")]
    options = "vote-threshold=1,replica-timeout=1s"
    with Mounted(replicas, tmp_path, options) as mounted:
        slow.hang("b.img", "fsync")
        pid = mounted.pid
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: filesystem_at(mounted.mountpoint) is None, "the unmount")
        wait_until(lambda: mounted.events("LOG")[-1]["message"].startswith("unmounted"), "its end")
        slow.release()
        wait_until(lambda: not is_alive(pid), "the end of the daemon")


def test_a_replica_s_name_may_hold_any_bytes(tmp_path: Path, mountpoint: Path) -> None:
    """Its events are told all the same."""
    replicas = [tmp_path / os.fsdecode(name) for name in (b"a\xff.img", b"b.img", b"c.img")]
    for path in replicas:
        path.write_bytes(bytes(SIZE))
    replicas[0].write_bytes(b"rot" + bytes(SIZE - 3))
    make_set(replicas)
    log = tmp_path / "log"
    quorumfs("mount", "--log-file", log, *replicas, mountpoint)
    assert (mountpoint / "disk.img").read_bytes() == bytes(SIZE)
    quorumfs("umount", mountpoint)
    assert "a\\udcff.img at 0" in log.read_text()
