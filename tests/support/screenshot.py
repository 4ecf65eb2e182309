"""Draws ``.github/top.svg``, which README shows: ``quorumfs top`` of a resync beside a guest.

``cd tests && python -m support.screenshot``
"""

import os
import tempfile
from io import StringIO
from pathlib import Path
from threading import Event, Thread

from rich.console import Console

from quorumfs.cli.top import drawn, look
from quorumfs.control import client
from support.mounting import quorumfs
from support.sets import MIB, SetMount, create, named, opened

SIZE = 256 * MIB
WIDTH = 110
PICTURE = Path(__file__).parents[2] / ".github" / "top.svg"


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        images, stop = create(named(Path(place), 3), SIZE), Event()
        with SetMount(images, Path(place), "vote-threshold=2") as disk:
            quorumfs("offline", disk.mountpoint, images[2])
            with opened(disk.file, os.O_RDWR) as fd:
                os.pwrite(fd, os.urandom(SIZE // 4), SIZE // 2)

                def guest() -> None:
                    while not stop.is_set():
                        os.pwrite(fd, os.urandom(65536), 0)
                        os.pread(fd, 65536, 0)

                worker = Thread(target=guest)
                worker.start()
                quorumfs("set", disk.mountpoint, "resync-rate=16M")
                mount = client.find(str(disk.mountpoint))
                last = client.events(mount, None).last
                quorumfs("online", disk.mountpoint, images[2])
                disk.wait(lambda status: (status["resync"] or {}).get("done_bytes"), "a resync")
                before = look(mount, None, client.events(mount, last), None)
                disk.wait(lambda status: status["resync"]["done_bytes"] > SIZE // 8, "half of it")
                picture = look(mount, before, client.events(mount, last), None)
                stop.set()
                worker.join()
    console = Console(record=True, width=WIDTH, file=StringIO())
    console.print(drawn(picture, WIDTH))
    text = console.export_svg(title="quorumfs top").replace(place, "")
    PICTURE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
