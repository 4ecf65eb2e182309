"""The quorumfs command, killed at the N-th step that it takes in a directory.

A step is a system call that changes a file there, and the middle of each write as well. The steps
of a daemon are counted through its fork, in the order in which its threads take them: two runs
may differ, and a run may end before its N-th step.

``python killing.py DIRECTORY STEP ARGUMENT...`` runs ``quorumfs ARGUMENT...``. Steps are counted,
from 1, while DIRECTORY/armed exists. With STEP 0 nothing is killed, and DIRECTORY/steps gets a
byte for each.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

CALLS = ("open", "fsync", "fdatasync", "replace", "unlink", "truncate", "ftruncate")
WRITES = ("write", "pwrite")


class Steps:
    """Counts what is done in *directory*, and ends the process at the step of that number."""

    def __init__(self, directory: str, last: int) -> None:
        self._directory = directory
        self._last = last
        self._taken = 0
        self._lock = threading.Lock()

    def concern(self, file: int | str | os.PathLike[str]) -> bool:
        """Whether a descriptor or a path is one of a file in the directory."""
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
        return path.startswith(f"{self._directory}/")

    def take(self) -> None:
        """Count a step, and perhaps do not come back from it."""
        if not os.path.exists(f"{self._directory}/armed"):
            return
        with self._lock:
            self._taken += 1
            if self._taken == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self._last:
                with open(f"{self._directory}/steps", "ab") as file:
                    file.write(b".")


def counted(steps: Steps, call: Callable[..., Any], *, opens: bool) -> Callable[..., Any]:
    """A system call as one step; one that *opens* only if it may create a file."""

    def stepping(file: int | str, *arguments: Any, **others: Any) -> Any:
        if steps.concern(file) and (not opens or arguments[0] & os.O_CREAT):
            steps.take()
        return call(file, *arguments, **others)

    return stepping


def counted_write(steps: Steps, call: Callable[..., int]) -> Callable[..., int]:
    """A write as two steps, with half of the data written between them."""

    def stepping(fd: int, data: bytes | memoryview, *offset: int) -> int:
        if not steps.concern(fd):
            return call(fd, data, *offset)
        steps.take()
        half = call(fd, data[: len(data) // 2], *offset)
        steps.take()
        return half + call(fd, data[half:], *(each + half for each in offset))

    return stepping


def main() -> None:
    """Replace the calls, and run the command."""
    steps = Steps(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    for name in CALLS:
        setattr(os, name, counted(steps, getattr(os, name), opens=name == "open"))
    for name in WRITES:
        setattr(os, name, counted_write(steps, getattr(os, name)))
    from quorumfs.cli import main as command

    command()


if __name__ == "__main__":
    main()
