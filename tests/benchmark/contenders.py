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
    pid: int
    """Of the daemon that serves it."""
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
            pid = int(json.loads(self._quorumfs("status", "--json", mountpoint))["pid"])
            daemon = os.pidfd_open(pid)
            yield Disk(mountpoint / "disk.img", pid, images)
        finally:
            if is_mounted(mountpoint):
                with contextlib.suppress(RuntimeError):  # in use: below it goes lazily
                    self._quorumfs("umount", mountpoint)
            unmount(mountpoint)
            if daemon is not None:
                _end(daemon)

    def _set(self, family: Family, directory: Path, space: Space) -> list[Path]:
        images = [directory / f"{number}.img" for number in range(family.replicas)]
        if not space.filled and self.metadata == "sidecar":
            self._quorumfs("create", "--size", space.size, *images)
        elif self.metadata == "sidecar" and family.replicas > 1:
            _make_image(images[0], space)
            threshold = ("--vote-threshold", family.threshold)
            self._quorumfs("create", "--source", images[0], *threshold, *images)
        else:  # a lone image is adopted at once: there is nothing to compare it with
            for image in images:
                _make_image(image, space)
        return images

    def _quorumfs(self, *arguments: object) -> str:
        return self._python("-m", "quorumfs", *arguments)

    def _python(self, *arguments: object) -> str:
        environment = dict(os.environ)
        if self.checkout is not None:
            environment["PYTHONPATH"] = str(self.checkout)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=ENDS_S,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us
            cwd=self.checkout,  # Python looks there first
        )
        if done.returncode:
            raise RuntimeError(f"{arguments}: {done.stderr.strip()}")
        return done.stdout


@dataclass(frozen=True, slots=True)
class Peer:
    """QEMU's quorum driver, exported over FUSE; its replicas are opened buffered, like ours.

    QEMU 7.2 exports ignore O_DSYNC; with *writethrough* each write is durable, asked for or not.
    With *direct* the replicas are opened with O_DIRECT.
    """

    name: str = "peer"
    writethrough: bool = False
    direct: bool = False
    is_floor: bool = False

    def version(self) -> str:
        return str(machine.facts()["qemu"])

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


STANDARD: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Peer(),
        Peer("durable", writethrough=True),
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
    """A contender of `STANDARD`, or for ``NAME=CHECKOUT`` the quorumfs of another checkout.

    Raises `ValueError` if it is neither.
    """
    label, _, checkout = name.partition("=")
    if checkout and label not in STANDARD and (Path(checkout) / "quorumfs").is_dir():
        return Quorumfs(label, checkout=Path(checkout).resolve())
    if name not in STANDARD:
        raise ValueError(f"{name}: neither of {', '.join(STANDARD)}, nor NAME=CHECKOUT")
    return STANDARD[name]


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
