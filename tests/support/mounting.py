"""A real mount through the real command, for use as a context manager."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import UNKNOWN_IDENTITY, Sidecar
from quorumfs.replica.sidecarfile import replace_sidecar
from support import warm

TESTED_WITH = "QUORUMFS_TESTED_WITH"
"""An environment variable: options for every `Mounted`, which its own ones come after. For running
tests again with an option that must change nothing of what they promise."""

QUORUMFS = warm.COMMAND
"""The command; a test may have another program instead."""


def quorumfs(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; with *check*, a failure raises with what it said."""
    texts = [str(argument) for argument in arguments]
    if QUORUMFS == warm.COMMAND:
        done = warm.run(texts, timeout_s=120)
    else:
        command = [*QUORUMFS, *texts]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode} of {arguments}: {done.stderr}")
    return done


def as_qemu(options: str = "") -> str:
    """*options* for a mount without metadata: what a replica missed is remembered by the byte."""
    return ",".join(filter(None, ["metadata=none", options]))


def make_set(replicas: Sequence[Path]) -> None:
    """Give *replicas* the sidecars of equal replicas that were unmounted in order.

    So nothing reads them but for the test: images that are adopted are compared when mounted.
    """
    size = replicas[0].stat().st_size
    record = new_record([str(path) for path in replicas], size, len(replicas) // 2 + 1)
    for path, role in zip(replicas, record.roles, strict=True):
        disk_map = DirtyMap(size, record.chunk_size)
        sidecar = Sidecar(role.replica_id, record, disk_map, UNKNOWN_IDENTITY)
        replace_sidecar(str(path), sidecar)


class Mounted:
    """*replicas* mounted in the background; unmounted and waited for at the end.

    A record of level error or above in the log that is no event fails the test, unless the test
    says in `expected_errors` which text it expects.
    """

    def __init__(self, replicas: Sequence[Path], directory: Path, options: str = "") -> None:
        """*directory* gets the mount point ``mnt`` and the log; it must exist."""
        self.replicas = replicas
        self.mountpoint = directory / "mnt"
        self.file = self.mountpoint / "disk.img"
        self.log_file = directory / "log.jsonl"
        self.expected_errors: list[str] = []
        self._options = ",".join(filter(None, (os.environ.get(TESTED_WITH), options)))

    def __enter__(self) -> Self:
        with suppress(FileExistsError):  # perhaps with the dead mount of a daemon that was killed
            self.mountpoint.mkdir()
        options = ["-o", self._options] if self._options else []
        logging: list[str | Path] = ["--log-json", "--log-file", self.log_file]
        quorumfs("mount", *options, *logging, *self.replicas, self.mountpoint)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.path.ismount(self.mountpoint):
            quorumfs("umount", self.mountpoint)
        if error is None:
            unexpected = [
                record
                for record in self.log()
                if record.get("level") in ("error", "critical")
                and not any(text in record["message"] for text in self.expected_errors)
            ]
            assert not unexpected, unexpected

    @property
    def pid(self) -> int:
        """The daemon's process id, from the file in its runtime directory."""
        from quorumfs.control import runtime

        pid = runtime.daemon_pid(str(self.mountpoint.resolve()), os.geteuid())
        assert pid is not None
        return pid

    def log(self) -> list[dict[str, Any]]:
        """Every record so far."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of this *name* so far; the last ones may still be on their way."""
        return [record for record in self.log() if record["event"] == name]

    def wait_for_events(
        self, name: str, enough: Callable[[list[dict[str, Any]]], bool] = bool, timeout: float = 60
    ) -> list[dict[str, Any]]:
        """The events of this *name* once they are *enough* (default: any)."""
        deadline = time.monotonic() + timeout
        while not enough(events := self.events(name)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} after {timeout} s: {self.log()}")
            time.sleep(0.01)
        return events
