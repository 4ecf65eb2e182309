"""A directory of files whose I/O fails on command.

Replicas live on disks and servers that fail in ways a plain file never does: errors in one
region, hung requests, a flush that lies. This module shows a flat directory of regular files
through FUSE and breaks requests as the test asks, so that the code under test meets the fault
where it will meet it in earnest: as the result of a system call.

The file system runs in a process of its own and is steered over a socket pair with one JSON
document a line: ``[command, argument]`` one way, the answer back. The server says ``null`` once
it is mounted, and goes away when the socket closes, so a killed test run leaves nothing behind.

What it cannot do: see locks (the kernel keeps them), shared mmap (every open is direct I/O, so
that every request reaches the server), or tell a single write with RWF_DSYNC from another.

The kernel sends the plain writes of one file one at a time, and neither an fsync nor a truncate
while one of them is pending, unless the FaultFS is made `parallel`. Asynchronous requests (libaio,
io_uring) it sends twelve at a time for the whole mount, so twelve that hang keep those to every
other file waiting: give each replica a FaultFS of its own where that matters.
"""

import contextlib
import dataclasses
import errno as errno_codes
import functools
import json
import math
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, ParamSpec, Self, TypeVar

from quorumfs.control.mounts import mount_at
from quorumfs.fuse import shim  # before pyfuse3, as it says there

# isort: split
import pyfuse3
import trio

Operation = Literal["read", "write", "fsync", "close", "any"]
P = ParamSpec("P")
T = TypeVar("T")
JSON = Any  # whatever a line holds

# Far above what tests keep waiting, so that hung requests never use up the server's tasks.
PENDING_REQUESTS_MAX = 1000

INVERTED = bytes(range(255, -1, -1))


@dataclasses.dataclass(frozen=True)
class Counters:
    """What reached the server for one file name since it started.

    Requests count on arrival, bytes once they moved between the caller and the backing file.
    """

    reads: int = 0
    writes: int = 0
    fsyncs: int = 0
    closes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    in_flight: int = 0
    in_flight_max: int = 0


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which requests are hit, and by what. See `FaultFS.inject` for the fields."""

    name: str
    op: Operation
    start: int = 0
    end: int | None = None
    count: int | None = None
    probability: float = 1.0
    seed: int = 0
    errno: int | None = None
    delay: float = 0.0
    hang: bool = False
    short: int | None = None
    drop: bool = False
    corrupt: bool = False

    def __post_init__(self) -> None:
        effects = {
            "any": self.errno is not None or self.delay > 0 or self.hang,
            "read": self.short is not None or self.corrupt,
            "write": self.short is not None or self.drop,
            "fsync": self.drop,
        }
        if not (
            effects["any"] or effects.get(self.op) or (self.op == "any" and any(effects.values()))
        ):
            raise ValueError(f"this rule would change nothing: {self}")


class JournalEntry(NamedTuple):
    """A write, or the end of an fsync; one that was dropped leaves none."""

    op: Literal["write", "fsync", "failed fsync"]
    at: int
    """A write's offset; of an fsync, how many entries of the file there were when it arrived."""
    data: str = ""
    """What was written, in hexadecimal digits."""


NO_FAULT = Rule("", "any", errno=0)  # what is left to do once a request may go on: all of it


_UNMOUNTED = {b"fuse_release(): fuse_reply_* failed with No such file or directory"}
"""What pyfuse3 says of a file whose last close is still under way when it is unmounted."""


class FaultFS:
    """A faulty view of a directory, for use as a context manager.

    `backing_directory` is the truth, `mountpoint` the view through FUSE. A fault belongs to a
    file name: it follows whatever file bears the name when the request arrives. A file that was
    removed or replaced while open keeps its last name.
    """

    def __init__(self, directory: Path, *, parallel: bool = False, closing: bool = False) -> None:
        """*parallel*: let the kernel send writes of one file together, by quorumfs' own shim.

        *closing*: be asked at each close(2), as network file systems are; else that never fails,
        nor waits for a server that is stopped.
        """
        self._options = [*(["parallel"] if parallel else []), *(["closing"] if closing else [])]
        self.backing_directory = directory.resolve() / "backing"
        self.mountpoint = directory.resolve() / "faulty"
        self._lock = threading.Lock()
        self._stopped = False

    def __enter__(self) -> Self:
        self.backing_directory.mkdir(exist_ok=True)
        self.mountpoint.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            with theirs:
                arguments: list[str | Path] = [
                    self.backing_directory,
                    self.mountpoint,
                    str(theirs.fileno()),
                    *self._options,
                ]
                environment = {**os.environ}
                environment.pop("QUORUMFS_NO_SHIM", None)  # that is for the mounts under test
                self._process = subprocess.Popen(
                    [sys.executable, __file__, *arguments],
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=self._stderr,
                    stderr=self._stderr,
                    start_new_session=True,  # Ctrl-C is for the test, which then cleans up
                )
            stack.callback(self._wait_for_end)
            stack.enter_context(ours)
            ours.settimeout(60)
            self._socket = ours
            self._answers = stack.enter_context(ours.makefile("r"))
            stack.callback(unmount, self.mountpoint)
            self._receive()
            stack.callback(self._let_go)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        return self._process.pid

    def path(self, name: str) -> Path:
        """The file through the mount."""
        return self.mountpoint / name

    def backing(self, name: str) -> Path:
        """The same file underneath, out of reach of any fault."""
        return self.backing_directory / name

    def inject(
        self,
        name: str,
        op: Operation,
        *,
        start: int = 0,
        end: int | None = None,
        count: int | None = None,
        probability: float = 1.0,
        seed: int = 0,
        errno: int | None = None,
        delay: float = 0.0,
        hang: bool = False,
        short: int | None = None,
        drop: bool = False,
        corrupt: bool = False,
    ) -> None:
        """Break requests for a file; of several rules that fit, the oldest decides alone.

        Which requests: those of kind `op` that overlap the bytes from `start` up to, not
        including, `end` (None: without limit; an fsync overlaps everything), each with
        `probability` drawn from `seed`, at most `count` of them (None: all). "any" is any but a
        close.

        What happens, in this order: wait `delay` seconds, hang until released, fail with
        `errno`; otherwise move only `short` bytes and say so, report success without doing
        anything (`drop`, for writes and fsyncs), return every byte inverted (`corrupt`, for
        reads).
        """
        rule = Rule(
            name=name,
            op=op,
            start=start,
            end=end,
            count=count,
            probability=probability,
            seed=seed,
            errno=errno,
            delay=delay,
            hang=hang,
            short=short,
            drop=drop,
            corrupt=corrupt,
        )
        self._command("inject", dataclasses.asdict(rule))

    def hang(self, name: str, op: Operation = "any", *, count: int | None = None) -> None:
        """Let requests wait until `release`, and then really happen."""
        self.inject(name, op, hang=True, count=count)

    def release(self, name: str | None = None) -> None:
        """Forget the hanging rules of a file, or of all, and let their requests go on."""
        self._command("release", name)

    def clear(self, name: str | None = None) -> None:
        """Forget every rule of a file, or of all; requests that hang or are delayed go on."""
        self._command("clear", name)

    def lose_open_files(self) -> None:
        """Answer requests to files that are open now with EIO for ever; as sshfs does after an
        outage, which serves files that are opened later."""
        self._command("outage", None)

    def counters(self, name: str) -> Counters:
        return Counters(**self._command("counters", name))

    def wait_for(
        self, condition: Callable[[Counters], bool], name: str, timeout: float = 60.0
    ) -> Counters:
        """Return the counters once they fulfil the condition.

        Raises TimeoutError after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not condition(counters := self.counters(name)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} after {timeout} s: {counters}")
            time.sleep(0.002)
        return counters

    def record(self) -> None:
        """Keep a journal of every file from now on."""
        self._command("record", None)

    def journals(self) -> dict[str, list[JournalEntry]]:
        """What was done to each file since `record`, all of it at one moment."""
        entries = self._command("journals", None)
        return {name: [JournalEntry(*each) for each in entries[name]] for name in entries}

    def stop(self) -> None:
        """Freeze the server: every request to any file hangs, even stat(2)."""
        self._stopped = True
        stop(self._process)

    def cont(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._stopped = False

    def _command(self, command: str, argument: object) -> JSON:
        if self._stopped:
            raise RuntimeError("the server is stopped and would never answer: cont() first")
        with self._lock:
            try:
                self._socket.sendall(json.dumps([command, argument]).encode() + b"\n")
                return self._receive()
            except (BrokenPipeError, ConnectionResetError):
                raise self._died() from None

    def _receive(self) -> JSON:
        line = self._answers.readline()
        if not line:
            raise self._died()
        return json.loads(line)

    def _died(self) -> RuntimeError:
        self._process.wait()
        return RuntimeError(f"faultfs ended unexpectedly:\n{self._complaints()}")

    def _complaints(self) -> str:
        self._stderr.seek(0)
        return f"exit code {self._process.returncode}\n{self._stderr.read().decode()}"

    def _let_go(self) -> None:
        if self._process.poll() is None:
            self.cont()
            self.clear()

    def _wait_for_end(self) -> None:
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().splitlines() if line not in _UNMOUNTED]
        if self._process.returncode != 0 or said:
            raise RuntimeError(f"faultfs did not end well:\n{self._complaints()}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Return once the process is frozen; the signal alone leaves it time for another request."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def is_mounted(path: Path) -> bool:
    """Look in the mount table; a stat would hang or fail if the server is gone."""
    return mount_at(str(path)) is not None


def unmount(mountpoint: Path) -> None:
    """Unmount, if need be lazily after a second: whoever still uses it belongs to a failed test."""
    deadline = time.monotonic() + 1
    while is_mounted(mountpoint):
        lazy = time.monotonic() > deadline
        how = "-uz" if lazy else "-u"
        subprocess.run(["fusermount3", how, "-q", mountpoint], check=lazy)
        time.sleep(0.01)


# The server from here on.


class ActiveRule:
    """A rule at work; `released` ends the waiting of the requests it holds."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.left = math.inf if rule.count is None else rule.count
        self.random = random.Random(rule.seed)
        self.released = trio.Event()

    def applies(self, name: str, op: Operation, offset: int, end: float) -> bool:
        """Decide on one request, and count it if it is hit."""
        rule = self.rule
        hit = (
            self.left > 0
            and rule.name == name
            and (rule.op == op or (rule.op == "any" and op != "close"))
            and offset < (math.inf if rule.end is None else rule.end)
            and end > rule.start
            and self.random.random() < rule.probability
        )
        self.left -= hit
        return hit


class Faults:
    """The rules and the counters: what the socket steers and the file system asks."""

    def __init__(self) -> None:
        self.rules: list[ActiveRule] = []
        self.recording = False
        self.outages = 0
        self.journals: defaultdict[str, list[JournalEntry]] = defaultdict(list)
        self.counters: defaultdict[str, Counter[str]] = defaultdict(
            lambda: Counter(dataclasses.asdict(Counters()))
        )

    @contextlib.asynccontextmanager
    async def request(
        self, name: str, op: Literal["read", "write", "fsync", "close"], offset: int, end: float
    ) -> AsyncIterator[Rule]:
        """Count a request, let it wait or fail, and hand over the rule for the rest."""
        counters = self.counters[name]
        counters[f"{op}s"] += 1
        counters["in_flight"] += 1
        counters["in_flight_max"] = max(counters["in_flight_max"], counters["in_flight"])
        try:
            active = next((r for r in self.rules if r.applies(name, op, offset, end)), None)
            if active is None:
                yield NO_FAULT
                return
            with trio.move_on_after(active.rule.delay):
                await active.released.wait()
            if active.rule.hang:
                await active.released.wait()
            if active.rule.errno is not None:
                raise pyfuse3.FUSEError(active.rule.errno)
            yield active.rule
        finally:
            counters["in_flight"] -= 1

    def forget(self, name: str | None, *, only_hanging: bool = False) -> None:
        """Drop the rules of a file, or of all, and let go what they hold."""
        kept = []
        for active in self.rules:
            if name in (None, active.rule.name) and (active.rule.hang or not only_hanging):
                active.released.set()
            else:
                kept.append(active)
        self.rules = kept

    def obey(self, command: str, argument: JSON) -> object:
        match command:
            case "inject":
                self.rules.append(ActiveRule(Rule(**argument)))
            case "release":
                self.forget(argument, only_hanging=True)
            case "clear":
                self.forget(argument)
            case "outage":
                self.outages += 1
            case "record":
                self.recording = True
            case "journals":
                return self.journals
            case "counters":
                return self.counters[argument]
            case _:
                raise ValueError(command)
        return None


@dataclasses.dataclass
class File:
    """A file the kernel knows. The O_PATH descriptor stays valid through rename and unlink."""

    path_fd: int
    name: str
    lookups: int = 0

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.path_fd}"

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        status = os.fstat(self.path_fd)
        attributes = pyfuse3.EntryAttributes()
        for field in ("mode", "nlink", "uid", "gid", "size", "blksize", "blocks"):
            setattr(attributes, f"st_{field}", getattr(status, f"st_{field}"))
        for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(attributes, field, getattr(status, field))
        attributes.st_ino = pyfuse3.InodeT(inode)
        attributes.entry_timeout = 0
        attributes.attr_timeout = 0
        return attributes


def guarded(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn every error into an errno: anything but FUSEError would end the whole mount."""

    @functools.wraps(handler)
    async def guard(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno_codes.EIO) from error
        except Exception as error:
            traceback.print_exc()  # the client reports it when it finds the server complaining
            raise pyfuse3.FUSEError(errno_codes.EIO) from error

    return guard


class Passthrough(pyfuse3.Operations):
    """The regular files of one directory; inode numbers are those of the backing files."""

    def __init__(self, backing: str, faults: Faults, *, closing: bool) -> None:
        super().__init__()
        self.faults = faults
        self.closing = closing
        self.root_fd = os.open(backing, os.O_PATH | os.O_DIRECTORY)
        self.files: dict[int, File] = {pyfuse3.ROOT_INODE: File(self.root_fd, "", lookups=1)}
        self.open_files: dict[int, File] = {}
        self.outages: dict[int, int] = {}
        """By open file, how many outages there had been before."""
        self.listings: dict[int, list[str]] = {}

    def find(self, name: str) -> tuple[int, File]:
        """The inode number and file behind a name; directories and links do not exist here."""
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self.root_fd)
        status = os.fstat(fd)
        known = self.files.get(status.st_ino)
        if known is not None or not stat.S_ISREG(status.st_mode):
            os.close(fd)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno_codes.ENOENT, name)
        file = self.files.setdefault(status.st_ino, known or File(fd, name))
        file.name = name
        return status.st_ino, file

    def info(self, fd: int, file: File) -> pyfuse3.FileInfo:
        self.open_files[fd] = file
        self.outages[fd] = self.faults.outages
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fd), direct_io=True, keep_cache=False)

    def name_of(self, fh: int) -> str:
        """The name of an open file; raises `pyfuse3.FUSEError` if an outage took the file."""
        if self.outages[fh] < self.faults.outages:
            raise pyfuse3.FUSEError(errno_codes.EIO)
        return self.open_files[fh].name

    @guarded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        inode, file = self.find(os.fsdecode(name))
        attributes = file.attributes(inode)
        file.lookups += 1
        return attributes

    @guarded
    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            file = self.files[inode]
            file.lookups -= lookups
            if file.lookups <= 0:
                os.close(self.files.pop(inode).path_fd)

    @guarded
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self.files[inode].attributes(inode)

    @guarded
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        file = self.files[inode]
        if fields.update_size:
            os.truncate(file.path, attr.st_size)
        if fields.update_mode:
            os.chmod(file.path, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            os.chown(file.path, uid, attr.st_gid if fields.update_gid else -1)
        if fields.update_atime or fields.update_mtime:
            now = os.fstat(file.path_fd)
            atime_ns = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
            mtime_ns = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
            os.utime(file.path, ns=(atime_ns, mtime_ns))
        return file.attributes(inode)

    @guarded
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        os.unlink(name, dir_fd=self.root_fd)

    @guarded
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: bytes,
        parent_inode_new: pyfuse3.InodeT,
        name_new: bytes,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if flags:
            raise pyfuse3.FUSEError(errno_codes.EINVAL)
        os.rename(name_old, name_new, src_dir_fd=self.root_fd, dst_dir_fd=self.root_fd)
        self.find(os.fsdecode(name_new))  # learns the new name

    @guarded
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: bytes,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        flags_kept = flags & (os.O_EXCL | os.O_TRUNC | os.O_SYNC)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | flags_kept, mode, dir_fd=self.root_fd)
        inode, file = self.find(os.fsdecode(name))
        attributes = file.attributes(inode)
        file.lookups += 1
        return self.info(fd, file), attributes

    @guarded
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        file = self.files[inode]
        fd = os.open(file.path, os.O_RDWR | flags & (os.O_TRUNC | os.O_SYNC))
        return self.info(fd, file)

    @guarded
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        if not self.closing:
            raise pyfuse3.FUSEError(errno_codes.ENOSYS)
        async with self.faults.request(self.open_files[fh].name, "close", 0, math.inf):
            pass

    @guarded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        del self.open_files[fh]
        os.close(fh)

    @guarded
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        name = self.name_of(fh)
        async with self.faults.request(name, "read", off, off + size) as fault:
            data = os.pread(fh, size, off)[: fault.short]
            self.faults.counters[name]["bytes_read"] += len(data)
            return data.translate(INVERTED) if fault.corrupt else data

    @guarded
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        # Writes are as durable, and as direct, as the file was opened: the shim's marks are not
        # needed.
        fh = pyfuse3.FileHandleT(fh & ~(shim.DURABLE_WRITE | shim.DIRECT_WRITE))
        name = self.name_of(fh)
        async with self.faults.request(name, "write", off, off + len(buf)) as fault:
            data = buf[: fault.short]
            if fault.drop:
                return len(data)
            written = os.pwrite(fh, data, off)
            self.faults.counters[name]["bytes_written"] += written
            if self.faults.recording:
                entry = JournalEntry("write", off, data[:written].hex())
                self.faults.journals[name].append(entry)
            return written

    @guarded
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        name = self.name_of(fh)
        journal = self.faults.journals[name]
        arrived = len(journal)
        try:
            async with self.faults.request(name, "fsync", 0, math.inf) as fault:
                if fault.drop:
                    return
                os.fdatasync(fh)
        except (pyfuse3.FUSEError, OSError):
            journal.append(JournalEntry("failed fsync", arrived))
            raise
        journal.append(JournalEntry("fsync", arrived))

    @guarded
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        handle = max(self.listings, default=0) + 1
        self.listings[handle] = sorted(os.listdir(f"/proc/self/fd/{self.root_fd}"))
        return pyfuse3.FileHandleT(handle)

    @guarded
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        for index, name in enumerate(self.listings[fh][start_id:], start_id + 1):
            with contextlib.suppress(FileNotFoundError):
                inode, file = self.find(name)
                attributes = file.attributes(inode)
                if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, index):
                    return
                file.lookups += 1

    @guarded
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        del self.listings[fh]

    @guarded
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        fd = os.open(f"/proc/self/fd/{self.root_fd}", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status = os.statvfs(self.root_fd)
        answer = pyfuse3.StatvfsData()
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{field}", getattr(status, f"f_{field}"))
        answer.f_namemax = status.f_namemax
        return answer


async def steer(connection: socket.socket, faults: Faults) -> None:
    """Obey the client until it closes the socket, then end the server."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    await stream.send_all(b"null\n")
    received = b""
    async for chunk in stream:
        *lines, received = (received + chunk).split(b"\n")
        for line in lines:
            answer = faults.obey(*json.loads(line))
            await stream.send_all(json.dumps(answer).encode() + b"\n")
    faults.forget(None)
    pyfuse3.terminate()


async def refuse(*_: object) -> NoReturn:
    raise OSError(errno_codes.ENOSYS, "not here")


async def serve(
    backing: str, mountpoint: str, connection: socket.socket, *, parallel: bool, closing: bool
) -> None:
    os.umask(0)  # the kernel has applied the caller's
    faults = Faults()
    if parallel:
        shim.configure(PENDING_REQUESTS_MAX, None)
    options = {"allow_other", "fsname=faultfs", "subtype=faultfs"}
    pyfuse3.init(Passthrough(backing, faults, closing=closing), mountpoint, options)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(steer, connection, faults)
            shim.serve(shim.Handlers(refuse, refuse), nursery)
            await pyfuse3.main(max_tasks=PENDING_REQUESTS_MAX)
            nursery.cancel_scope.cancel()
    finally:
        # A mount that is gone already makes libfuse complain when told to unmount.
        pyfuse3.close(unmount=is_mounted(Path(mountpoint)))


if __name__ == "__main__":
    backing, mountpoint, fd, *options = sys.argv[1:]
    trio.run(
        functools.partial(serve, parallel="parallel" in options, closing="closing" in options),
        backing,
        mountpoint,
        socket.socket(fileno=int(fd)),
    )
