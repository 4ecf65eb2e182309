"""Sets with sidecars, and what befalls them: kills, absences, full disks, time apart."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import ascii_letters
from typing import Any, Self

from quorumfs.cli.examine import decision_json, replica_json
from quorumfs.control import client
from quorumfs.control.status import Status
from quorumfs.decisions.record import path_for
from quorumfs.mount.examination import decide, look_at
from support.command import PATIENCE_S, is_alive, one_line, wait_until
from support.mounting import Mounted, quorumfs

FIFREEZE, FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h
MIB = 1 << 20
BLOCK = 4096
CHUNK = 64 << 10
EXTENT = 16 << 20


def sidecar(path: Path) -> Path:
    """The record beside an image."""
    return Path(path_for(str(path)))


def with_sidecars(paths: Sequence[Path]) -> list[Path]:
    """The images and what is on record beside them."""
    return [*paths, *map(sidecar, paths)]


def create(paths: Sequence[Path], size: int = 4 * MIB, *options: str) -> list[Path]:
    """A new set."""
    quorumfs("create", "--size", str(size), *options, *paths)
    return list(paths)


def named(directory: Path, count: int) -> list[Path]:
    """Where the replicas are to be."""
    return [directory / f"{letter}.img" for letter in ascii_letters[:count]]


class SetMount(Mounted):
    """A mount of a set with sidecars."""

    def status(self) -> dict[str, Any]:
        """What ``status --json`` shows, without the time that a command takes.

        Whatever the moment, a command must be able to understand it.
        """
        content = client.ask(str(self.mountpoint), "status")
        Status.from_json(content)
        return content

    def replica(self, path: Path) -> dict[str, Any]:
        """One replica's part of the status."""
        parts: list[dict[str, Any]] = self.status()["replicas"]
        return next(part for part in parts if part["path"] == str(path))

    def states(self) -> list[str]:
        """What each replica is."""
        return [part["state"] for part in self.status()["replicas"]]

    def wait(
        self,
        condition: Callable[[dict[str, Any]], object],
        what: str,
        timeout_s: float = PATIENCE_S,
    ) -> dict[str, Any]:
        """The status once it fulfils *condition*."""
        last: dict[str, Any] = {}

        def holds() -> object:
            nonlocal last
            last = self.status()
            return condition(last)

        try:
            wait_until(holds, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; the last status: {json.dumps(last)}") from None
        return last

    def wait_healthy(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The status once all replicas hold the same."""
        return self.wait(lambda status: status["state"] == "healthy", "a healthy disk", timeout_s)

    def wait_for_state(
        self, path: Path, *states: str, timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """The part of one replica once it is in one of these states."""

        def there(status: dict[str, Any]) -> bool:
            return any(
                part["path"] == str(path) and part["state"] in states for part in status["replicas"]
            )

        self.wait(there, f"{path.name} {' or '.join(states)}", timeout_s)
        return self.replica(path)

    def kill(self) -> None:
        """SIGKILL the daemon, wait for its end, and take its dead mount away."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the end of a killed daemon")
        subprocess.run(["umount", "-l", self.mountpoint], check=True)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_DIRECT) -> Iterator[int]:
    """A descriptor, by default past the page cache."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def same(paths: Sequence[Path]) -> bool:
    """Whether all files hold the same bytes."""
    return all(
        subprocess.run(["cmp", "-s", paths[0], other], check=False).returncode == 0
        for other in paths[1:]
    )


def seen(paths: Sequence[Path]) -> dict[str, tuple[str, int]]:
    """Contents and times of modification, for telling whether anything was written."""
    return {
        path.name: (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in paths
    }


def refused(paths: Sequence[Path], directory: Path, exit_code: int = 1, options: str = "") -> str:
    """Why a mount at *directory*/mnt is refused; nothing is written to the replicas by it."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir(exist_ok=True)
    files = [path for path in with_sidecars(paths) if path.exists()]
    before = seen(files)
    given = ["-o", options] if options else []
    line = one_line(quorumfs("mount", *given, *paths, mountpoint, check=False), exit_code)
    assert seen(files) == before
    return line


def write(disk: SetMount, letter: bytes, chunk: int = 0) -> None:
    """A block of one letter, durably."""
    with opened(disk.file) as fd:
        os.pwrite(fd, letter * BLOCK, chunk * CHUNK)
        os.fsync(fd)


def read(disk: SetMount, chunk: int = 0) -> bytes:
    """The letter that a block is full of."""
    with opened(disk.file, os.O_RDONLY | os.O_DIRECT) as fd:
        (letter,) = set(os.pread(fd, BLOCK, chunk * CHUNK))
    return bytes([letter])


def examine(*paths: Path) -> dict[str, Any]:
    """What ``quorumfs examine --json`` shows, without the time that a command takes."""
    all_examined = [look_at(str(path)) for path in paths]
    return {
        "replicas": [replica_json(examined) for examined in all_examined],
        "assembly": decision_json(decide(all_examined)),
    }


@contextlib.contextmanager
def tmpfs(mountpoint: Path, size: int) -> Iterator[Path]:
    """A file system in memory with this much space."""
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)


@contextlib.contextmanager
def filled(directory: Path, leave: int = 0) -> Iterator[Path]:
    """All space of a file system taken but for *leave* bytes; given back at the end."""
    ballast = directory / "ballast"
    try:
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            while True:
                os.write(file.fileno(), bytes(BALLAST))
        os.truncate(ballast, ballast.stat().st_size - leave)
        yield ballast
    finally:
        ballast.unlink(missing_ok=True)


BALLAST = 64 << 10


class Ext4:
    """A small ext4 on a loop device, which comes and goes."""

    def __init__(self, directory: Path, size: int = 32 * MIB, *, sector: int = 512) -> None:
        """*sector*: bytes that its device reads or writes at least."""
        self.sector = sector
        self.device = directory / "ext4.raw"
        self.mountpoint = directory / "ext4"
        self.mountpoint.mkdir()
        with self.device.open("wb") as file:
            file.truncate(size)
        blocks = ["-b", str(sector)] if sector > 1024 else []  # what it takes for so small a one
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", *blocks, self.device], check=True)

    def __enter__(self) -> Self:
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()
        # What has it open, or shares its mounts, may let go of it a little later.
        wait_until(lambda: not self._attached, f"no loop device is on {self.device}")

    @property
    def _attached(self) -> bool:
        command = ["losetup", "--associated", str(self.device)]
        return bool(subprocess.run(command, capture_output=True, check=True).stdout)

    def mount(self) -> None:
        """Have it there."""
        if self.sector == 512:
            subprocess.run(["mount", "-o", "loop", self.device, self.mountpoint], check=True)
            return
        attach = ["losetup", "--find", "--show", "--sector-size", str(self.sector)]
        done = subprocess.run([*attach, self.device], capture_output=True, text=True, check=True)
        loop = done.stdout.strip()
        try:
            subprocess.run(["mount", loop, self.mountpoint], check=True)
        finally:  # as soon as it is not mounted any more
            subprocess.run(["losetup", "--detach", loop], check=True)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have whoever writes to it wait, until the end.

        Without a process: if the mount hangs with it, none could be started by who has it open.
        """
        directory = os.open(self.mountpoint, os.O_RDONLY)
        fcntl.ioctl(directory, FIFREEZE)
        try:
            yield
        finally:
            fcntl.ioctl(directory, FITHAW)
            os.close(directory)

    def unmount(self, *options: str) -> None:
        """Take it away; what is open on it stays usable after a lazy unmount."""
        if os.path.ismount(self.mountpoint):
            subprocess.run(["umount", *(options or ("-l",)), self.mountpoint], check=True)
