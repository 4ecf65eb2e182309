"""The journal of systemd: its own protocol, so that an event can be looked for by what it is about.

See systemd.journal-fields(7), and "Native Journal Protocol" of systemd's documentation.
"""

import errno
import fcntl
import logging
import os
import socket
import sys
import uuid
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # else each command, which may complain, would import what a daemon needs
    from quorumfs.disk.events import Event

SOCKET = "/run/systemd/journal/socket"

ERROR, WARNING = 3, 4
"""Priorities of syslog(3) that what we say without a log has."""

_NAMESPACE = uuid.UUID("7f1f2b1c-6a60-4c0e-9c55-6d0a7f5a9b5e")


def message_id(event: str) -> str:
    """The ``MESSAGE_ID`` of all events of this name."""
    return uuid.uuid5(_NAMESPACE, event).hex


def is_there() -> bool:
    """Whether there is a journal."""
    return Path(SOCKET).is_socket()


def has_stderr() -> bool:
    """Whether what we write to standard error goes into the journal, where ``<N>`` at the begin of
    a line is its priority: see sd-daemon(3)."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        found = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


class JournalHandler(logging.Handler):
    """Sends records to the journal, which knows the time and the priority of each."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        """*fields* are those that every record has."""
        super().__init__()
        self._fields = fields
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        """Send *record*."""
        try:
            self._send(b"".join(_encoded(*field) for field in self._content(record).items()))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Let go of the socket."""
        super().close()
        self._channel.close()

    def _content(self, record: logging.LogRecord) -> dict[str, str]:
        content = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": "quorumfs",
            **self._fields,
        }
        event: Event | None = getattr(record, "event", None)
        if event is not None:
            content |= {"MESSAGE_ID": message_id(event.name), "QUORUMFS_EVENT": event.name}
            replica = event.members.get("replica") or event.members.get("node-name")
            if isinstance(replica, str):
                content["QUORUMFS_REPLICA"] = replica
        return content

    def _send(self, message: bytes) -> None:
        """Send one *message*; one that is too long for a datagram in a file in memory."""
        try:
            self._channel.sendto(message, SOCKET)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            with open(os.memfd_create("journal", os.MFD_ALLOW_SEALING), "wb", 0) as file:
                file.write(message)
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
                rights = array("i", [file.fileno()]).tobytes()
                parts = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                self._channel.sendmsg([], parts, 0, SOCKET)


def _priority(level: int) -> int:
    """That of syslog(3) for a *level* of logging."""
    if level >= logging.CRITICAL:
        return 2
    if level >= logging.ERROR:
        return ERROR
    if level >= logging.WARNING:
        return WARNING
    return 6 if level >= logging.INFO else 7


def _encoded(name: str, value: str) -> bytes:
    text = value.encode("utf-8", "backslashreplace")
    if b"\n" not in text:
        return b"%s=%s\n" % (name.encode(), text)
    return b"%s\n%s%s\n" % (name.encode(), len(text).to_bytes(8, "little"), text)
