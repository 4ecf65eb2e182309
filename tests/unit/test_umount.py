"""``umount``: for whom it waits, and for whom it does not."""

import ctypes
import importlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from quorumfs.control import client, mounts, runtime
from quorumfs.errors import UserError

cli = importlib.import_module("quorumfs.cli.umount")  # the name in the package is the command

MOUNTPOINT = "/mnt/vdisk"
STRANGER = 12345

Umount = Callable[[int, int | None], BaseException | None]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of another user that never ends by itself."""
    with subprocess.Popen(["sleep", "600"], user=STRANGER, extra_groups=[]) as process:
        yield process
        process.kill()


@pytest.fixture
def umount(monkeypatch: pytest.MonkeyPatch) -> Umount:
    """Unmounts what this user has mounted, whose daemon is said to be this process."""

    def run(owner: int, pid: int | None) -> BaseException | None:
        mount = mounts.Mount(MOUNTPOINT, mounts.FS_TYPE, owner)
        monkeypatch.setattr(client, "find", lambda _: mount)
        monkeypatch.setattr(runtime.Finder, "daemon_pid", lambda *_: pid)
        monkeypatch.setattr(mounts, "unmount", lambda *_, **__: None)
        return CliRunner().invoke(cli.umount, [MOUNTPOINT], standalone_mode=False).exception

    return run


def test_nobody_waits_for_ever_for_another_user_s_process(
    umount: Umount,
    sleeper: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "PATIENCE_S", 0.1)
    error = umount(STRANGER, sleeper.pid)
    assert isinstance(error, UserError)
    assert f"pid {sleeper.pid} of user {STRANGER} has not ended within 0.1 s" in str(error)


def test_nobody_waits_for_a_process_that_is_not_the_owner_s(
    umount: Umount, sleeper: subprocess.Popen[bytes]
) -> None:
    """Nor for one that has ended, or never was."""
    assert umount(STRANGER, os.getpid()) is None
    assert umount(0, sleeper.pid) is None
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert umount(0, ended.pid) is None


def test_a_daemon_that_lives_and_was_not_found_is_told(
    umount: Umount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where mount was told another runtime directory: nothing says that all is synced."""
    monkeypatch.setattr(mounts, "is_dead", lambda _: False)
    error = umount(os.geteuid(), None)
    assert isinstance(error, UserError)
    assert "may still be syncing" in str(error)
    assert "--runtime-dir" in str(error)
    monkeypatch.setattr(mounts, "is_dead", lambda _: True)
    assert umount(os.geteuid(), None) is None


def test_a_mount_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a look at it, nor the kernel's unmounting, nor a look at who uses it."""
    ended = threading.Event()

    def hang(*_: object) -> int:
        ended.wait()
        return 0

    monkeypatch.setattr(mounts, "LOOK_S", 0.05)
    monkeypatch.setattr(os, "statvfs", hang)
    monkeypatch.setattr(mounts, "_paths_of", lambda _: iter(hang, 0))
    libc = SimpleNamespace(umount2=hang)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    threads = threading.enumerate()
    try:
        assert not mounts.is_dead(MOUNTPOINT)
        assert mounts.users_of(MOUNTPOINT) == []
        with pytest.raises(UserError, match=r"at it for 0\.05 s"):
            mounts.unmount(MOUNTPOINT, patience_s=0.05)
    finally:
        ended.set()
        for thread in set(threading.enumerate()) - set(threads):
            thread.join()
