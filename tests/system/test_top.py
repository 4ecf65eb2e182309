"""What a disk does, on one screen: ``quorumfs top``."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from support.command import PATIENCE_S, one_line, wait_until
from support.mounting import QUORUMFS, quorumfs
from support.sets import MIB, SetMount, create, named, opened

from quorumfs.cli.top import Picture, drawn, look
from quorumfs.control import client
from quorumfs.control.diskmap import CELLS_MAX
from quorumfs.control.recent import Recent, Told

SIZE = 16 * MIB


@contextmanager
def half_written_while_one_was_out(directory: Path) -> Iterator[SetMount]:
    """A disk of two replicas, of which the second one lacks the second half."""
    images = create(named(directory, 2), SIZE)
    with SetMount(images, directory, "read-pattern=fifo,vote-threshold=1") as disk:
        quorumfs("offline", disk.mountpoint, images[1])
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, os.urandom(SIZE // 2), SIZE // 2)
        yield disk


def test_the_map_shows_where_a_replica_is_out_of_sync(tmp_path: Path) -> None:
    with half_written_while_one_was_out(tmp_path) as disk:
        mount = client.find(str(disk.mountpoint))
        first, second = client.disk_map(mount, 64).replicas
        assert (first.path, second.path) == tuple(map(str, disk.replicas))
        assert (first.cells, second.cells) == ("." * 64, "." * 32 + "#" * 32)
        assert client.disk_map(mount, 3).replicas[1].cells == ".+#"
        assert client.disk_map(mount, CELLS_MAX).scrubbed is None
        quorumfs("online", disk.mountpoint, disk.replicas[1])
        disk.wait_healthy()
        assert client.disk_map(mount, 64).replicas[1].cells == "." * 64


@pytest.mark.parametrize("cells", [0, CELLS_MAX + 1, -1, "64", True, None])
def test_a_map_of_so_many_cells_is_refused(tmp_path: Path, cells: object) -> None:
    images, refused = create(named(tmp_path, 2), MIB), "'cells' is to be a number from 1 to"
    with SetMount(images, tmp_path) as disk, pytest.raises(client.ControlError, match=refused):
        client.ask(str(disk.mountpoint), "map", cells=cells)


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_a_picture_has_rates_maps_and_events(tmp_path: Path, width: int) -> None:
    def shown(picture: Picture) -> str:
        console = Console(file=StringIO(), width=width, force_terminal=False)
        console.print(drawn(picture, width))
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    with half_written_while_one_was_out(tmp_path) as disk:
        mount = client.find(str(disk.mountpoint))
        before = look(mount, None, Recent(1, 0), None)
        with opened(disk.file) as fd:
            os.pread(fd, 4096, 0)
        events = (Told(1, "{}", "\x1b[2Jsomething happened"),)
        text = shown(look(mount, before, Recent(1, 1, 0, events), None))
        assert str(disk.replicas[0]).replace("/", "") in re.sub(r"[\s/]", "", text)
        assert re.search(rf"{disk.replicas[0].name} +current ", text)  # a name is not cut up
        assert "writes/s" in text
        assert ("B/s" in text) is (width >= 80)
        assert "█" in text
        assert "something happened" in text
        assert "\x1b[2J" not in text
        assert max(map(len, text.splitlines())) <= width


def test_it_runs_on_a_terminal_until_q(tmp_path: Path) -> None:
    with half_written_while_one_was_out(tmp_path) as disk:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        command = [*QUORUMFS, "top", "--interval", "0.2", str(disk.mountpoint)]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            seen = bytearray()

            def shows_the_map() -> bool:
                seen.extend(os.read(ours, 65536))
                return "█".encode() in seen

            wait_until(shows_the_map, "the picture")
            os.write(ours, b"q")
            with suppress(OSError):  # the other end is closed
                while os.read(ours, 65536):
                    pass
            assert process.wait(PATIENCE_S) == 0
        os.close(ours)


def test_elsewhere_it_says_what_to_use(tmp_path: Path) -> None:
    with SetMount(create(named(tmp_path, 2), MIB), tmp_path) as disk:
        done = quorumfs("top", disk.mountpoint, check=False)
        assert "top needs a terminal; for a file or a pipe there is" in one_line(done, 1)
