"""The ways to have a disk, each a context manager that leaves nothing behind."""

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from support.faultfs import is_mounted, unmount
from support.qemu import Export, QuorumExport

from benchmark import machine
from benchmark.rows import PATTERN

MIB = 1 << 20
ENDS_S = 300.0
"""How long a daemon may take to end: it syncs its replicas."""


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of replica set: how many, how they are read, how many must agree."""

    replicas: int
    read_pattern: Literal["fifo", "quorum"]
    threshold: int

    @property
    def voting(self) -> bool:
        return self.read_pattern == "quorum"

    @property
    def name(self) -> str:
        return f"{'vote' if self.voting else 'fifo'} over {self.replicas}"


@dataclass(frozen=True, slots=True)
class Space:
    """What a new disk is."""

    size: int
    """Bytes."""
    filled: bool = True
    """With data, in all replicas; else one hole."""
    used_first: int | None = None
    """How many bytes of it are used; None: all."""

    @property
    def used(self) -> int:
        return self.used_first or self.size


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that is ready to be used."""

    path: Path
    pid: int | None
    """Of the daemon that serves it; None: the kernel does."""
    images: Sequence[Path]
    """The files that it keeps its data in."""

    def settle(self) -> None:
        """Write to the store what earlier runs left in the page cache."""
        for image in self.images:
            descriptor = os.open(image, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


class Contender(Protocol):
    """A way to have a disk."""

    @property
    def name(self) -> str: ...

    @property
    def is_floor(self) -> bool:
        """Whether it keeps no replicas, and shows only what FUSE itself costs."""

    def version(self) -> str: ...

    def image_count(self, family: Family) -> int: ...

    def disk(self, family: Family, directory: Path, space: Space) -> AbstractContextManager[Disk]:
        """A disk whose files are in *directory*, which exists and is empty."""


@dataclass(frozen=True, slots=True)
class Quorumfs:
    """Quorumfs, as its users run it: in the background, mounted by the command."""

    name: str
    metadata: Literal["sidecar", "none"] = "sidecar"
    options: str = ""
    """More options of the mount."""
    checkout: Path | None = None
    """Whose quorumfs to run; None: the one that `python -m quorumfs` finds."""
    launcher: tuple[str, ...] = ("-m", "quorumfs")
    """What Python runs to mount."""
    is_floor: bool = False

    def version(self) -> str:
        found = "import quorumfs, pathlib; print(pathlib.Path(quorumfs.__file__).parent)"
        where = Path(self._python("-c", found).strip())
        return f"{machine.checkout_version(where) or 'installed'} in {where}"

    def image_count(self, family: Family) -> int:
        return family.replicas

    @contextmanager
    def disk(self, family: Family, directory: Path, space: Space) -> Iterator[Disk]:
        images = self._set(family, directory, space)
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        options = f"read-pattern={family.read_pattern},vote-threshold={family.threshold}"
        options += f",metadata={self.metadata},{self.options}"
        daemon = None
        try:
            log = directory / "log"
            self._python(
                *self.launcher, "mount", "-o", options, "--log-file", log, *images, mountpoint
            )
            pid = int(json.loads(self.order("status", "--json", mountpoint))["pid"])
            daemon = os.pidfd_open(pid)
            yield Disk(mountpoint / "disk.img", pid, images)
        finally:
            if is_mounted(mountpoint):
                with contextlib.suppress(RuntimeError):  # in use: below it goes lazily
                    self.order("umount", mountpoint)
            unmount(mountpoint)
            if daemon is not None:
                _end(daemon)

    def _set(self, family: Family, directory: Path, space: Space) -> list[Path]:
        images = [directory / f"{number}.img" for number in range(family.replicas)]
        if not space.filled and self.metadata == "sidecar":
            self.order("create", "--size", space.size, *images)
        elif self.metadata == "sidecar" and family.replicas > 1:
            _make_image(images[0], space)
            threshold = ("--vote-threshold", family.threshold)
            self.order("create", "--source", images[0], *threshold, *images)
        else:  # a lone image is adopted at once: there is nothing to compare it with
            for image in images:
                _make_image(image, space)
        return images

    def order(self, *arguments: object) -> str:
        """What ``quorumfs`` says to *arguments*. Raises `RuntimeError` if it fails."""
        return self._python("-m", "quorumfs", *arguments)

    def begin(self, *arguments: object) -> subprocess.Popen[str]:
        """``quorumfs`` with *arguments*, which may take long."""
        return self._begin_python("-m", "quorumfs", *arguments)

    def _python(self, *arguments: object) -> str:
        with self._begin_python(*arguments) as process:
            try:
                told, complaints = process.communicate(timeout=ENDS_S)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(f"{arguments}: {complaints.strip()}")
        return told

    def _begin_python(self, *arguments: object) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if self.checkout is not None:
            environment["PYTHONPATH"] = str(self.checkout)
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us
            cwd=self.checkout,  # Python looks there first
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """QEMU's quorum driver, exported over FUSE; its replicas are opened buffered, like ours.

    QEMU 7.2 exports ignore O_DSYNC; with *writethrough* each write is durable, asked for or not.
    With *direct* the replicas are opened with O_DIRECT.
    """

    name: str = "peer"
    writethrough: bool = False
    program: str = "qemu-storage-daemon"
    direct: bool = False
    is_floor: bool = False

    def version(self) -> str:
        return machine.first_line(self.program, "--version")

    def image_count(self, family: Family) -> int:
        return family.replicas

    @contextmanager
    def disk(self, family: Family, directory: Path, space: Space) -> Iterator[Disk]:
        images = [directory / f"{number}.img" for number in range(family.replicas)]
        for image in images:
            _make_image(image, space)
        export = QuorumExport(
            images,
            directory / "disk.img",
            threshold=family.threshold,
            read_pattern=family.read_pattern,
            events=False,
            direct=self.direct,
            writethrough=self.writethrough,
            program=self.program,
        )
        with _exported(export, images) as disk:
            yield disk


@dataclass(frozen=True, slots=True)
class RawPeer:
    """The floor of the peer: one raw file, exported by the same daemon."""

    name: str = "raw"
    is_floor: bool = True

    def version(self) -> str:
        return str(machine.facts()["qemu"])

    def image_count(self, family: Family) -> int:
        return 1

    @contextmanager
    def disk(self, family: Family, directory: Path, space: Space) -> Iterator[Disk]:
        image = directory / "0.img"
        _make_image(image, space)
        file = {"driver": "file", "filename": str(image)}
        node = {"driver": "raw", "node-name": "top", "file": file}
        with _exported(Export(directory / "disk.img", [], [node]), [image]) as disk:
            yield disk


@dataclass(frozen=True, slots=True)
class Null:
    """Our own floor: a pyfuse3 file system that keeps nothing (``nullfs``)."""

    name: str = "null"
    is_floor: bool = True

    def version(self) -> str:
        return f"pyfuse3 {machine.facts()['pyfuse3']}"

    def image_count(self, family: Family) -> int:
        return 0

    @contextmanager
    def disk(self, family: Family, directory: Path, space: Space) -> Iterator[Disk]:
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("nullfs.py"), mountpoint, str(space.size)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us
        )
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError("the null file system did not mount")
            yield Disk(mountpoint / "disk.img", process.pid, [])
        finally:
            process.kill()
            process.communicate()
            unmount(mountpoint)


@dataclass(frozen=True, slots=True)
class Btrfs:
    """The kernel's own mirror: a file on btrfs RAID1, over loop devices on one file each.

    Without copy-on-write, as is usual for disks of virtual machines. Needs root, and mkfs.btrfs.
    """

    name: str = "btrfs"
    is_floor: bool = False

    def version(self) -> str:
        return f"kernel {machine.facts()['kernel']}"

    def image_count(self, family: Family) -> int:
        return 2 * family.replicas  # with room for what the file system needs

    @contextmanager
    def disk(self, family: Family, directory: Path, space: Space) -> Iterator[Disk]:
        images = [directory / f"{number}.img" for number in range(family.replicas)]
        for image in images:
            with image.open("wb") as file:
                file.truncate(2 * space.size + 512 * MIB)
        mountpoint = directory / "mnt"
        mountpoint.mkdir()
        with contextlib.ExitStack() as stack:
            devices = []
            for image in images:
                devices.append(_output("losetup", "--find", "--show", image))
                stack.callback(_output, "losetup", "--detach", devices[-1])
            profile = {2: "raid1", 3: "raid1c3", 4: "raid1c4"}[family.replicas]
            _output("mkfs.btrfs", "--quiet", "--data", profile, "--metadata", profile, *devices)
            members = ",".join(f"device={device}" for device in devices)
            _output("mount", "-o", f"nodatacow,{members}", devices[0], mountpoint)
            stack.callback(unmount, mountpoint)
            _make_image(mountpoint / "disk.img", space)
            yield Disk(mountpoint / "disk.img", None, [mountpoint / "disk.img"])


STANDARD: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Peer(),
        Peer("durable", writethrough=True),
        Btrfs(),
        Peer("peer-direct", direct=True),
        Quorumfs("ours"),
        Quorumfs("direct", options="replica-io=direct"),
        Quorumfs("none", metadata="none"),
        RawPeer(),
        Null(),
    )
}


def both() -> list[Contender]:
    """Who is compared where nothing else is asked for: the peer, and ours."""
    return [STANDARD["peer"], STANDARD["ours"]]


def named(name: str) -> Contender:
    """A contender of `STANDARD`, or another version of one.

    ``NAME=CHECKOUT`` is the quorumfs of another checkout, and ``NAME=PROGRAM`` another
    qemu-storage-daemon. Raises `ValueError` if it is none of these.
    """
    label, _, place = name.partition("=")
    path = Path(place).resolve()
    if place and label not in STANDARD:
        if (path / "quorumfs").is_dir():
            return Quorumfs(label, checkout=path)
        if path.is_file() and os.access(path, os.X_OK):
            return Peer(label, program=str(path))
    if name not in STANDARD:
        what = f"neither of {', '.join(STANDARD)}, nor NAME=CHECKOUT or NAME=PROGRAM"
        raise ValueError(f"{name}: {what}")
    return STANDARD[name]


def _output(*command: str | Path) -> str:
    """What a command says. Raises `RuntimeError` with its complaint if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def _exported(export: Export, images: Sequence[Path]) -> Iterator[Disk]:
    with export:
        disk = Disk(export.path, export.pid, images)
        try:
            yield disk
        finally:
            disk.settle()  # QEMU flushes as it ends, and is not given long


def _make_image(path: Path, space: Space) -> None:
    """Filled with what fio writes, see `PATTERN`.

    Raises `ValueError` if the file system has no files of this size.
    """
    with path.open("wb") as file:
        if space.filled:
            block = PATTERN * (MIB // len(PATTERN))
            for _ in range(space.size // MIB):
                file.write(block)
        try:
            file.truncate(space.size)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            what = f"{space.size >> 30} GiB: {path.parent.parent} has no files as large"
            raise ValueError(what) from None


def _end(daemon: int) -> None:
    """Wait until the process of a pidfd has ended, and help it if it does not."""
    try:
        if not select.select([daemon], [], [], ENDS_S)[0]:
            signal.pidfd_send_signal(daemon, signal.SIGKILL)
            select.select([daemon], [], [], ENDS_S)
    finally:
        os.close(daemon)
