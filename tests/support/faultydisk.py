"""A quorumfs disk on replicas that fail on command, used past the page cache as a guest would."""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from support.faultfs import FaultFS
from support.mounting import Mounted, make_set


class DirectFile:
    """A file opened with O_DIRECT, so that every request reaches the file system behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self._fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: bytes) -> int:
        return os.pwrite(self._fd, data, offset)

    def flush(self) -> None:
        os.fsync(self._fd)


Answer = bytes | int | str | None
"""What a request gave: its result, or the name of its errno."""


def answer(call: Callable[..., bytes | int | None], *arguments: object) -> Answer:
    """Make a call and turn its error into an answer, for comparing."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class FaultyDisk:
    """Replicas ``a.img``, ``b.img``, … behind one `FaultFS`, mounted; a context manager.

    Faults are cleared before the unmount, so a hanging one does not outlive its test.
    """

    def __init__(
        self, directory: Path, contents: list[bytes], options: str, *, as_set: bool = False
    ) -> None:
        """One replica for each of *contents*, which are equally long.

        *as_set*: they are a set already, as `make_set` makes it, however they differ.
        """
        self._directory = directory
        self._contents = contents
        self._options = options
        self._as_set = as_set
        self.names = [f"{letter}.img" for letter in "abcdefgh"[: len(contents)]]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.fs = stack.enter_context(FaultFS(self._directory))
            for name, content in zip(self.names, self._contents, strict=True):
                self.fs.backing(name).write_bytes(content)
            replicas = [self.fs.path(name) for name in self.names]
            if self._as_set:
                make_set(replicas)
            self.mounted = stack.enter_context(Mounted(replicas, self._directory, self._options))
            self.file = stack.enter_context(DirectFile(self.mounted.file))
            stack.callback(self.fs.clear)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def replicas(self) -> list[bytes]:
        """What the replicas really hold now."""
        return [self.fs.backing(name).read_bytes() for name in self.names]
