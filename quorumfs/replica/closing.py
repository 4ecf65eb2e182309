"""The files that a replica uses no more, until they are closed."""

import errno
import logging
from collections.abc import Iterator

from quorumfs.replica.storage import Kind, Operation, Storage

log = logging.getLogger(__name__)


class Closing:
    """The files that a replica uses no more, with their paths, until they are closed.

    A close may take long, or hang, and does not hold up the close of another file.
    """

    def __init__(self) -> None:
        self.waiting: dict[Storage, str] = {}
        """Files whose close has not begun."""
        self.under_way: dict[Operation, tuple[Storage, str]] = {}
        self._kept: dict[Storage, str] = {}
        """Files that stay open, and locked, until `keep_none`."""

    def keep(self, files: dict[Storage, str]) -> None:
        """Leave *files* open until `keep_none`."""
        self._kept |= files

    def keep_none(self) -> None:
        """Have the kept files closed, too."""
        self.waiting |= self._kept
        self._kept.clear()

    def begin(self) -> Iterator[tuple[Operation, Storage]]:
        """Begin the close of each waiting file; yields operations to submit, and their files."""
        waiting, self.waiting = self.waiting, {}
        for storage, path in waiting.items():
            operation = Operation(Kind.CLOSE)
            self.under_way[operation] = storage, path
            yield operation, storage

    def ended(self, operation: Operation, error: OSError | None) -> str:
        """Note the outcome of a close; after EAGAIN the file waits again. Returns its path."""
        storage, path = self.under_way.pop(operation)
        if error is not None and error.errno == errno.EAGAIN:
            self.waiting[storage] = path
        elif error is not None:
            # A sync has told what is durable, and the file is closed despite the error.
            log.warning("closing %s: %s", path, error.strerror)
        return path
