"""What the process that starts quorumfs hands down: limits, the umask, signals, streams."""

import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import (
    filesystem_at,
    one_line,
    processes_of,
    quorumfs_in_background,
    wait_until,
)
from support.mounting import QUORUMFS, Mounted, quorumfs
from support.sets import same

MIB = 1 << 20


def inheriting(
    inherit: Callable[[], object], *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end after *inherit* was done in its process."""
    return subprocess.run(
        [*QUORUMFS, *map(str, arguments)],
        preexec_fn=inherit,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def limited(kind: int, soft: int, hard: int | None = None) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (soft, soft if hard is None else hard))


LIMITS = {
    "file size": (limited(resource.RLIMIT_FSIZE, MIB), f"{MIB} bytes, the replicas need {4 * MIB}"),
    "open files": (limited(resource.RLIMIT_NOFILE, 40), "open files is 40, a mount of 2 replicas"),
    "time": (limited(resource.RLIMIT_CPU, 100), "processor time is 100 s"),
}


@pytest.mark.parametrize(("inherit", "text"), LIMITS.values(), ids=LIMITS.keys())
def test_a_limit_that_a_mount_would_meet_later_is_refused(
    make_images: MakeImages, mountpoint: Path, inherit: Callable[[], None], text: str
) -> None:
    """It is named, with the command that lifts it."""
    images = make_images(2, 4 * MIB)
    line = one_line(inheriting(inherit, "mount", *images, mountpoint), 1)
    assert text in line
    assert "ulimit -" in line
    assert filesystem_at(mountpoint) is None
    assert processes_of(mountpoint) == []
    assert not any(Path(f"{image}.quorumfs").exists() for image in images)


def test_no_image_is_begun_that_the_limit_on_files_would_not_let_be(tmp_path: Path) -> None:
    a, b = tmp_path / "a.img", tmp_path / "b.img"
    inherit = limited(resource.RLIMIT_FSIZE, MIB)
    line = one_line(inheriting(inherit, "create", "--size=4M", a, b), 1)
    assert f"{MIB} bytes, the images need {4 * MIB}: run ulimit -f unlimited" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("megabytes", [100, 200])
def test_too_little_memory_leaves_no_mount_behind(
    make_images: MakeImages, mountpoint: Path, megabytes: int
) -> None:
    """However far the mount has come: nobody has used it yet."""
    limit = limited(resource.RLIMIT_AS, megabytes * 1000 * 1000)
    line = one_line(inheriting(limit, "mount", *make_images(2, MIB), mountpoint), 1)
    assert "ulimit -" in line
    assert filesystem_at(mountpoint) is None
    assert processes_of(mountpoint) == []


def test_limits_that_may_be_raised_are_raised(make_images: MakeImages, mountpoint: Path) -> None:
    """What a process may give itself nobody has to be asked for."""
    infinity = resource.RLIM_INFINITY

    def inherit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))
        resource.setrlimit(resource.RLIMIT_CPU, (100, infinity))

    images = make_images(2, MIB)
    assert inheriting(inherit, "mount", *images, mountpoint).returncode == 0
    (pid,) = processes_of(mountpoint)
    assert resource.prlimit(pid, resource.RLIMIT_CPU) == (infinity, infinity)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert 2 * len(os.listdir(f"/proc/{pid}/fd")) < soft <= hard == 4096
    quorumfs("umount", mountpoint)


def test_what_else_is_handed_down_changes_nothing(tmp_path: Path, mountpoint: Path) -> None:
    """Whoever ignores SIGCHLD is not told how a child ended; closed streams are not given to
    images; what is made is for its owner, whatever the umask.
    """

    def inherit() -> None:
        os.umask(0)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for stream in (0, 1, 2):
            os.close(stream)

    paths = [tmp_path / "a.img", tmp_path / "b.img"]
    log = tmp_path / "log"
    assert inheriting(inherit, "create", "--size=1M", *paths).returncode == 0
    mount: tuple[str | Path, ...] = ("mount", "--log-file", log, *paths, mountpoint)
    assert inheriting(inherit, *mount).returncode == 0
    for file in tmp_path.glob("*.*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert inheriting(inherit, *mount).returncode == 1
    assert inheriting(inherit, "umount", mountpoint).returncode == 0
    assert same(paths)
    assert paths[0].read_bytes() == bytes(MIB)


# Sizes that a guest cannot use


def test_a_size_of_no_whole_sectors_is_not_made(tmp_path: Path) -> None:
    """And the next one that is is named."""
    source, other = tmp_path / "a.img", tmp_path / "b.img"
    line = one_line(quorumfs("create", "--size=1000", source, other, check=False), 4)
    assert "1000 bytes, is no multiple of 512" in line
    assert line.endswith("give 1024")
    source.write_bytes(bytes(1000))
    line = one_line(quorumfs("create", "--source", source, other, check=False), 1)
    assert f"truncate -s 1024 {source}" in line
    assert os.listdir(tmp_path) == ["a.img"]


def test_a_mount_warns_of_a_size_of_no_whole_sectors(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """Once on stderr, once in the log; and the status says so as long as it lasts."""
    images = make_images(2, 1000)
    with Mounted(images, tmp_path) as mounted:
        status = quorumfs("status", mounted.mountpoint, check=False).stdout
        quorumfs("umount", mounted.mountpoint)
        done = quorumfs("mount", *images, mounted.mountpoint)
    text = "1000 bytes, is no multiple of 512: a guest cannot write the last 488 bytes"
    assert status.count(text) == 1
    assert done.stderr.count(text) == 1
    assert done.stderr.count("\n") == 1
    assert [text in record.get("message", "") for record in mounted.log()].count(True) == 1


# What was interrupted


def test_a_copy_that_was_interrupted_says_how_it_goes_on(tmp_path: Path) -> None:
    """Ctrl-C ends it in order; nobody waits for what is left."""
    source, other = tmp_path / "a.img", tmp_path / "b.img"
    source.write_bytes(os.urandom(128 * MIB))
    copy = ("create", "--source", source, other)
    with quorumfs_in_background(*copy) as process:
        wait_until(lambda: other.exists() and other.stat().st_blocks, "the begin of the copy")
        for signum in (signal.SIGSTOP, signal.SIGINT, signal.SIGCONT):  # before it goes on
            process.send_signal(signum)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert told.count("\n") == 1
    quorumfs(*copy)
    assert same([source, other])


def test_a_copy_that_was_killed_is_finished_by_the_same_command(tmp_path: Path) -> None:
    """Also with --if-needed: a copy that was begun is not a set that is there already."""
    source, other = tmp_path / "a.img", tmp_path / "b.img"
    source.write_bytes(os.urandom(128 * MIB))
    copy = ("create", "--if-needed", "--source", source, other)
    with quorumfs_in_background(*copy) as process:
        wait_until(lambda: other.exists() and other.stat().st_blocks, "the begin of the copy")
        process.kill()
    assert not same([source, other])
    quorumfs(*copy)
    assert same([source, other])
    assert quorumfs(*copy).stdout.startswith("nothing to do: ")


@pytest.mark.parametrize("ends", [False, True])
def test_a_mount_that_cannot_be_used_until_a_resync_ends_says_so(
    tmp_path: Path, mountpoint: Path, ends: bool
) -> None:
    """Scenario 112: threshold 2 of 3, one current and one stale. A short one is waited for."""
    a, b, c = paths = [tmp_path / f"{letter}.img" for letter in "abc"]
    quorumfs("create", "--size=4M", "--vote-threshold=1", *paths)
    for path in (b, c):
        path.rename(f"{path}.away")
    quorumfs("mount", "-o", "degraded", *paths, mountpoint)
    with (mountpoint / "disk.img").open("r+b") as disk:
        disk.write(os.urandom(4 * MIB))
    quorumfs("umount", mountpoint)
    Path(f"{b}.away").rename(b)
    options = "vote-threshold=2" if ends else "vote-threshold=2,replica-timeout=0.5,resync-rate=64K"
    done = quorumfs("mount", "-o", options, *paths, mountpoint, check=False)
    if ends:
        assert done.returncode == 0
        assert (mountpoint / "disk.img").read_bytes() == a.read_bytes()
    else:
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith("quorumfs: mounted, and stays so, but 1 of 3 replicas are current")
        assert last.endswith(f"until the resync of {b} ends")
        with pytest.raises(OSError, match="Input/output error"):
            (mountpoint / "disk.img").read_bytes()
    quorumfs("umount", mountpoint, check=ends)
