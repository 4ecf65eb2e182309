"""QEMU's own block layer as a file: the model to compare with, and a source of faulty replicas.

Both classes run a qemu-storage-daemon which exports a block node over FUSE onto a regular file.

The kernel caches what is read from and written to such an export (QEMU asks for no direct I/O), and
reads ahead. A test that wants every read to reach QEMU opens with O_DIRECT, or opens afresh, which
drops the cached pages. QEMU handles one request of an export at a time, so one that hangs holds
up all others, and the control socket with them.
"""

import contextlib
import json
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from support.faultfs import is_mounted, stop, unmount

JSON = dict[str, Any]


class Export:
    """A qemu-storage-daemon which shows its node `top` at `path`; a context manager."""

    def __init__(
        self,
        path: Path,
        objects: Sequence[JSON],
        nodes: Sequence[JSON],
        *,
        writethrough: bool = False,
        program: str = "qemu-storage-daemon",
    ) -> None:
        """With *writethrough* every write is durable when it is answered."""
        self._program = program
        self._writethrough = writethrough
        self.path = path.parent.resolve() / path.name
        self._arguments = [f"--object={json.dumps(each)}" for each in objects]
        self._arguments += [f"--blockdev={json.dumps(each)}" for each in nodes]
        self._seen: list[JSON] = []

    def __enter__(self) -> Self:
        self.path.touch()  # QEMU mounts onto an existing file only
        with contextlib.ExitStack() as stack:
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            export: JSON = {"type": "fuse", "id": "export", "node-name": "top", "writable": True}
            export |= {"mountpoint": str(self.path), "writethrough": self._writethrough}
            with theirs:
                self._process = subprocess.Popen(
                    [
                        self._program,
                        f"--chardev=socket,id=control,fd={theirs.fileno()}",
                        *self._arguments,
                        f"--export={json.dumps(export)}",
                        # Options take effect in order: the greeting means the export is there.
                        "--monitor=control",
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=self._stderr,
                    start_new_session=True,  # Ctrl-C is for the test, which then cleans up
                )
            stack.callback(unmount, self.path)  # for a QEMU that had to be killed
            stack.callback(self._end)
            self._socket = stack.enter_context(ours)
            self._socket.settimeout(60)
            self._answers = stack.enter_context(ours.makefile("r"))
            self._receive("QMP")
            self._execute("qmp_capabilities")
            if not is_mounted(self.path):
                raise RuntimeError(f"nothing is mounted at {self.path}")
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

    def stop(self) -> None:
        """Freeze QEMU: every request hangs."""
        stop(self._process)

    def cont(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def _execute(self, command: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # reading tells more
            self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
        self._receive("return")

    def _receive(self, expected: str) -> None:
        """Read up to the expected answer, and keep the events that come before it."""
        message: JSON = {}
        while expected not in message:
            try:
                line = self._answers.readline()
            except ConnectionResetError:
                line = ""
            message = json.loads(line or '{"error": "connection closed"}')
            if "error" in message:
                raise RuntimeError(f"qemu-storage-daemon: {message}\n{self._complaints()}")
            if "event" in message:
                self._seen.append(message)

    def _complaints(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode()

    def _end(self) -> None:
        self.cont()
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=30)
        if self._process.returncode != 0:
            code = self._process.returncode
            raise RuntimeError(f"qemu-storage-daemon ended with {code}\n{self._complaints()}")


class QuorumExport(Export):
    """QEMU's quorum driver over raw files, named replica0, replica1, … in its events.

    The options are those of the driver. `events=False` leaves events unrecorded, for long runs.
    With `direct` the replicas are opened with O_DIRECT; without, QEMU does not trust a file again
    once its fsync has failed, and lets every later flush of it fail as well.
    """

    def __init__(
        self,
        replicas: Sequence[Path],
        path: Path,
        *,
        threshold: int,
        read_pattern: Literal["quorum", "fifo"] = "quorum",
        rewrite_corrupted: bool = False,
        blkverify: bool = False,
        events: bool = True,
        direct: bool = False,
        writethrough: bool = False,
        program: str = "qemu-storage-daemon",
    ) -> None:
        nodes: list[JSON] = [
            {
                "driver": "raw",
                "node-name": f"replica{index}",
                "file": {
                    "driver": "file",
                    "filename": str(replica),
                    "cache": {"direct": direct},
                },
            }
            for index, replica in enumerate(replicas)
        ]
        quorum: JSON = {
            "driver": "quorum",
            "node-name": "top",
            "children": [node["node-name"] for node in nodes],
            "vote-threshold": threshold,
            "read-pattern": read_pattern,
            "rewrite-corrupted": rewrite_corrupted,
            "blkverify": blkverify,
        }
        super().__init__(path, [], [*nodes, quorum], writethrough=writethrough, program=program)
        self._recording = events

    def events(self) -> list[JSON]:
        """Every event up to now, as QMP words them.

        QEMU sends at most one QUORUM_REPORT_BAD a second for each child, and one QUORUM_FAILURE a
        second, keeping back only the latest: use `wait_for` for any but the first, and do not
        count them.
        """
        self._execute("query-block-exports")  # its answer comes after all earlier events
        if not self._recording:
            self._seen.clear()
        return list(self._seen)

    def wait_for(self, condition: Callable[[list[JSON]], bool], timeout: float = 60) -> list[JSON]:
        """Return the events once they fulfil the condition.

        Raises TimeoutError after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not condition(events := self.events()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout} s: {events}")
            time.sleep(0.01)
        return events


class RawExport(Export):
    """One raw file with exact faults, for use as a replica.

    `inject` holds blkdebug's inject-error rules: `event` ("none": from the start), and optionally
    `iotype` (read, write, write-zeroes, discard, flush, block-status; without it all), `errno`
    (5 = EIO is the default), `sector` (of 512 bytes; without it everywhere) and `once`.
    `throttle` holds limits by QEMU's names, such as {"iops-total": 10} or {"bps-write": 65536}.
    """

    def __init__(
        self,
        file: Path,
        path: Path,
        *,
        inject: Sequence[Mapping[str, object]] = (),
        throttle: Mapping[str, int] | None = None,
    ) -> None:
        node: JSON = {"driver": "raw", "file": {"driver": "file", "filename": str(file)}}
        objects: list[JSON] = []
        if throttle:
            objects = [{"qom-type": "throttle-group", "id": "limits", "limits": dict(throttle)}]
            node = {"driver": "throttle", "throttle-group": "limits", "file": node}
        if inject:
            rules = [dict(rule) for rule in inject]
            node = {"driver": "blkdebug", "image": node, "inject-error": rules}
        super().__init__(path, objects, [{**node, "node-name": "top"}])
