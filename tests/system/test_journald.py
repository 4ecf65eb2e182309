"""The journal of systemd: what is told there of a mount, and how it can be found."""

import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeImages
from support.command import PATIENCE_S, file_replaced
from support.mounting import QUORUMFS, make_set

from quorumfs.control import journald, runtime


class Journal:
    """What is sent to the socket that stands in for the journal's."""

    def __init__(self, channel: socket.socket, prefix: list[str]) -> None:
        self._channel = channel
        self.prefix = prefix
        """Of a command that finds it."""

    def receive(self) -> dict[str, str]:
        """The fields of the next message."""
        data, files, _, _ = socket.recv_fds(self._channel, 1 << 20, 1)
        if files:
            with open(files[0], "rb") as file:
                file.seek(0)
                data = file.read()
        fields = {}
        while data:
            line, _, data = data.partition(b"\n")
            name, equals, value = line.partition(b"=")
            if not equals:
                size = int.from_bytes(data[:8], "little")
                value, data = data[8 : 8 + size], data[9 + size :]
            fields[name.decode()] = value.decode()
        return fields

    def find(self, text: str) -> dict[str, str]:
        """The next message with *text*."""
        while text not in (fields := self.receive())["MESSAGE"]:
            pass
        return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    path = tmp_path / "journal"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(PATIENCE_S)
        with file_replaced(Path(journald.SOCKET), path) as prefix:
            yield Journal(channel, prefix)


@contextmanager
def stderr_in_journal(path: Path) -> Iterator[dict[str, Any]]:
    """What a command is started with for its standard error, a file, to be the journal's."""
    with path.open("wb") as file:
        found = os.fstat(file.fileno())
        stream = f"{found.st_dev}:{found.st_ino}"
        yield {"stderr": file, "env": os.environ | {"JOURNAL_STREAM": stream}}


@pytest.mark.parametrize("foreground", [["-f"], []], ids=["a service", "in the background"])
def test_a_lost_replica_is_found_by_priority_and_name(
    journal: Journal, make_images: MakeImages, mountpoint: Path, foreground: list[str]
) -> None:
    """With one timestamp, the journal's own."""
    images = make_images(2)
    make_set(images)
    arguments = ["mount", "-o", "vote-threshold=1", *foreground, *images, mountpoint]
    stderr = mountpoint.parent / "stderr"
    with (
        stderr_in_journal(stderr) as service,
        subprocess.Popen([*journal.prefix, *QUORUMFS, *map(str, arguments)], **service) as command,
        ExitStack() as at_end,
    ):
        at_end.callback(command.kill)  # where the test fails: else it would be waited for
        mounted = journal.find("mounted ")
        assert mounted["MESSAGE"].startswith("mounted ")
        assert mounted["PRIORITY"] == "6"
        assert mounted["SYSLOG_IDENTIFIER"] == "quorumfs"
        assert mounted["QUORUMFS_MOUNTPOINT"] == str(mountpoint)
        assert re.fullmatch("[0-9a-f]{32}", mounted["QUORUMFS_SET"])
        # The mount is in a namespace of its own
        pid = runtime.daemon_pid(str(mountpoint), os.geteuid())
        inside = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", *QUORUMFS]
        subprocess.run([*inside, "offline", mountpoint, images[1]], check=True)
        lost = journal.find(f"{images[1]} is ")
        assert lost["PRIORITY"] == "4"
        assert lost["QUORUMFS_REPLICA"] == str(images[1])
        assert lost["QUORUMFS_EVENT"] == "REPLICA_STATE_CHANGED"
        assert lost["MESSAGE_ID"] == journald.message_id("REPLICA_STATE_CHANGED")
        assert lost["QUORUMFS_SET"] == mounted["QUORUMFS_SET"]
        subprocess.run([*inside, "umount", mountpoint], check=True)
        journal.find("unmounted ")
    assert stderr.read_bytes() == b""


def test_a_refusal_is_an_error_there(make_images: MakeImages, mountpoint: Path) -> None:
    stderr = mountpoint.parent / "stderr"
    with stderr_in_journal(stderr) as service:
        arguments = ["mount", "-f", *map(str, make_images(1)), f"{mountpoint}/none"]
        done = subprocess.run([*QUORUMFS, *arguments], check=False, **service)
    assert done.returncode == 1
    assert stderr.read_text().startswith("<3>quorumfs: the mount point")


def test_a_record_too_long_for_a_datagram_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    monkeypatch.setattr(journald, "SOCKET", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(path))
        channel.settimeout(PATIENCE_S)
        handler = journald.JournalHandler({})
        text = "two\nlines \udcff" + "x" * (4 << 20)
        handler.handle(logging.LogRecord("", logging.CRITICAL, "", 0, text, None, None))
        handler.close()
        fields = Journal(channel, []).receive()
    arrived = fields["MESSAGE"] == text.replace("\udcff", "\\udcff")
    assert arrived
    assert fields["PRIORITY"] == "2"
