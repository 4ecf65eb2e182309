"""Where the log goes, and in what form.

Records are handed to a thread through a bounded queue: a log daemon or a disk that hangs must not
hold up requests. What does not fit in the queue is counted and the number is logged.

Where the log goes is noted in the runtime directory, for whoever finds the daemon gone.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quorumfs.control import journald, runtime
from quorumfs.control.advice import describe
from quorumfs.control.human import human_bytes, time_stamp
from quorumfs.control.journald import JournalHandler
from quorumfs.control.status import Status
from quorumfs.disk.events import Event
from quorumfs.errors import UserError

SYSLOG_SOCKET = "/dev/log"
QUEUE_MAX = 10_000
"""Records waiting for a slow log before further ones are left out."""

RUNTIME_LOG_MAX = 1 << 20
"""Bytes of a log in the runtime directory, and of an older one beside it: it is in memory."""

STOP_S = 2.0
"""How long the end of a mount waits for the log to take what is left."""

READABLE = "%(asctime)s %(levelname)s: %(message)s"
"""A line of the log, for a reader."""

events_log = logging.getLogger("quorumfs.events")
"""Where the events go."""


def tell(event: Event) -> None:
    """Put *event* into the log."""
    events_log.log(event.level, "%s", event.text, extra={"event": event})


class ReadableFormatter(logging.Formatter):
    """One line for a reader; tracebacks follow on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        # A path may hold any bytes; whoever stores the line wants UTF-8.
        line = super().format(record).encode("utf-8", "backslashreplace").decode("utf-8")
        event: Event | None = getattr(record, "event", None)
        if event is None:
            return line
        dropped = f" ({event.dropped} more left out)" if event.dropped else ""
        return f"{line}{dropped} [{event.name}]"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: events with their members, other records as ``LOG``."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time_stamp(record.created)
        event: Event | None = getattr(record, "event", None)
        if event is not None:
            content: dict[str, Any] = {"event": event.name, "time": stamp, **event.members}
            if event.dropped:
                content["dropped"] = event.dropped
        else:
            content = {
                "event": "LOG",
                "time": stamp,
                "level": record.levelname.lower(),
                "message": record.getMessage(),
            }
            if record.exc_info:
                content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content)


class _BoundedQueueHandler(logging.handlers.QueueHandler):
    """Leaves records out, and says how many, instead of waiting or growing."""

    def __init__(self, records: "queue.Queue[Any]") -> None:
        super().__init__(records)
        self._left_out = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the listener is a thread of this process: nothing needs flattening

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
            if self._left_out:
                count, self._left_out = self._left_out, 0
                logging.getLogger(__name__).warning("%d log records were left out", count)
        except queue.Full:
            self._left_out += 1


class _PatientListener(logging.handlers.QueueListener):
    """Ends in a bounded time even if the destination hangs and the queue is full."""

    def __init__(self, records: "queue.Queue[Any]", destination: logging.Handler) -> None:
        super().__init__(records, destination)
        self._records = records
        self._destination = destination

    def enqueue_sentinel(self) -> None:
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=STOP_S)

    def stop(self) -> None:
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(STOP_S)
            if not self._thread.is_alive():  # else closing would wait for it
                self._destination.close()
            self._thread = None


class _RuntimeLog(logging.handlers.RotatingFileHandler):
    """A log that nobody asked for: bounded, and gone with a mount of which it tells no trouble."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=RUNTIME_LOG_MAX, backupCount=1)
        self._ordinary = os.path.getsize(path) == 0  # else of a mount that did not end well
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        self._ordinary = self._ordinary and record.levelno <= logging.INFO
        super().emit(record)

    def close(self) -> None:
        super().close()
        if self._ordinary:
            self._path.unlink(missing_ok=True)


def start(destination: logging.Handler, *, as_json: bool) -> logging.handlers.QueueListener:
    """Send every record to *destination* from a thread of its own; stop it to flush the rest."""
    readable = READABLE
    if isinstance(destination, logging.handlers.SysLogHandler):
        readable = "%(levelname)s: %(message)s"  # syslog has its own idea of the time
    elif isinstance(destination, JournalHandler):
        readable = "%(message)s"  # the journal knows the level, too
    destination.setFormatter(JsonFormatter() if as_json else ReadableFormatter(readable))
    records: queue.Queue[Any] = queue.Queue(QUEUE_MAX)
    root = logging.getLogger()
    root.handlers[:] = [_BoundedQueueHandler(records)]
    root.setLevel(logging.INFO)
    listener = _PatientListener(records, destination)
    listener.start()
    return listener


def destination(
    log_file: Path | None, *, detached: bool, fallback: Path, fields: Mapping[str, str]
) -> logging.Handler:
    """The log's handler: the file asked for, else the journal or syslog; in the foreground, where
    that is not the journal, stderr.

    Where there is no syslog (a container), a detached mount logs to *fallback*, the mount's place
    for it in the runtime directory. In the journal each record has *fields*. Raises `UserError`
    when the file cannot be written.
    """
    handler: logging.Handler
    if log_file is None and journald.is_there() and (detached or journald.has_stderr()):
        place, handler = "the journal (journalctl -t quorumfs)", JournalHandler(fields)
    elif log_file is None and not detached:
        place, handler = "its standard error", logging.StreamHandler(sys.stderr)
    elif log_file is None and Path(SYSLOG_SOCKET).is_socket():
        place, handler = "syslog (tag quorumfs)", _syslog()
    else:
        place = str(log_file or fallback)
        try:
            if log_file is None:
                handler = _RuntimeLog(fallback)
            else:
                _refuse_unread(log_file)
                handler = logging.handlers.WatchedFileHandler(log_file)  # survives logrotate
        except OSError as error:
            raise UserError(f"cannot write the log file {place}: {error.strerror}") from None
    runtime.note_log(fallback, place)
    return handler


def _refuse_unread(log_file: Path) -> None:
    """Raise `OSError` if *log_file* is a FIFO that nobody reads: to open it would wait for that."""
    with contextlib.suppress(FileNotFoundError):
        os.close(os.open(log_file, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _syslog() -> logging.Handler:
    handler = logging.handlers.SysLogHandler(
        SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON
    )
    handler.ident = "quorumfs: "
    return handler


def status_event(status: Status) -> Event:
    """All of *status*, for the log."""
    facts = [
        f"{replica.path} is {replica.state}, {replica.in_flight} requests in flight, "
        f"{replica.errors.total} errors, {human_bytes(replica.out_of_sync_bytes)} out of sync"
        for replica in status.replicas
    ]
    if (resync := status.resync) is not None:
        done, total = human_bytes(resync.done_bytes), human_bytes(resync.total_bytes)
        facts.append(f"{resync.kind.value}: {done} of {total}")
    text = f"{status.mountpoint} is {status.state.value}: "
    text += "; ".join([*facts, *describe(status), *status.notes])
    return Event("STATUS", status.to_json(), text, logging.INFO)
