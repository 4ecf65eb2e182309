"""One set by two paths that share no locks, as two hosts have it: one mount at a time has it."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import empty_mountpoint, refused, wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.sets import BLOCK, SetMount, create, named, opened, seen, with_sidecars

from quorumfs.control import client


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaultFS]:
    with FaultFS(tmp_path) as server:
        yield server


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """Another mount point than that of `SetMount`."""
    with empty_mountpoint(tmp_path / "other" / "mnt") as path:
        yield path


def test_the_second_path_is_refused_and_takes_over_if_told_so(
    store: FaultFS, tmp_path: Path, mountpoint: Path
) -> None:
    """Who has the set is named; who lost it has nothing to do with the files any more."""
    here, there = named(store.backing_directory, 2), named(store.mountpoint, 2)
    create(here)
    with SetMount(here, tmp_path) as first:
        first.expected_errors += ["fenced", "no quorum"]
        with opened(first.file) as fd:
            os.pwrite(fd, b"1" * BLOCK, 0)
            os.fsync(fd)
            for options in ([], ["-o", "ro"]):
                line = refused([*options, *there], mountpoint)
                assert f"{there[0]} is in use by pid {first.pid} on {os.uname().nodename} " in line
                assert "unmount it first" in line
            os.pwrite(fd, b"2" * BLOCK, 0)  # it has lost nothing by that

            quorumfs("mount", "-o", "takeover", *there, mountpoint)
            wait_until(lambda: first.status()["fenced"], "the end of the first mount")
            # The second settles what the first had written to last; then it is held still, so that
            # whatever is written is written by the first.
            wait_until(
                lambda: client.ask(str(mountpoint), "status")["state"] == "healthy",
                "the end of settling",
            )
            second = first.status()["fenced"]["pid"]
            os.kill(second, signal.SIGSTOP)
            before = seen(with_sidecars(here))
            for request in (
                lambda: os.pwrite(fd, b"3" * BLOCK, 0),
                lambda: os.pread(fd, BLOCK, 0),
                lambda: os.fsync(fd),
            ):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    request()
        status = quorumfs("status", first.mountpoint, check=False)
        assert status.returncode == 2
        assert ": no-quorum (fenced)" in status.stdout
        assert "use the disk there" in status.stdout
        (event,) = first.events("FENCED")
        assert event["host"] == os.uname().nodename
        assert second == event["pid"] != first.pid
        quorumfs("umount", first.mountpoint)
        assert seen(with_sidecars(here)) == before
        os.kill(second, signal.SIGCONT)
        assert (mountpoint / "disk.img").read_bytes()[:BLOCK] == b"2" * BLOCK
        quorumfs("umount", mountpoint)
    quorumfs("mount", *here, mountpoint)  # it was released
    quorumfs("umount", mountpoint)
