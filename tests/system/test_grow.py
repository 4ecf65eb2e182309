"""``quorumfs grow``: the disk becomes longer while a guest uses it, and the guest sees it."""

import errno
import json
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command import one_line
from support.faultfs import FaultFS
from support.mounting import as_qemu, quorumfs
from support.programs import loop_device, run
from support.sets import (
    BLOCK,
    MIB,
    SetMount,
    create,
    filled,
    named,
    opened,
    same,
    tmpfs,
)

SIZE, LARGER = 4 * MIB, 8 * MIB
TWO_PAGES = 512 * MIB
"""A disk with a second page of the map, for which a sidecar needs space."""
FIFO = "read-pattern=fifo,vote-threshold=1"
ONE = "--vote-threshold=1"


def grow(disk: SetMount, size: int | str, *options: str) -> str:
    """What ``grow`` says."""
    return quorumfs("grow", *options, disk.mountpoint, str(size)).stdout


def refusal(disk: SetMount, size: int | str, exit_code: int = 1) -> str:
    """Why ``grow`` refuses; nothing has changed for the guest."""
    before = disk.file.stat().st_size
    line = one_line(quorumfs("grow", disk.mountpoint, str(size), check=False), exit_code)
    assert disk.file.stat().st_size == disk.status()["size"] == before
    return line


def known_size(path: Path) -> int:
    """The size by which the kernel goes, without asking for it."""
    return int(run("stat", "--cached=always", "--format=%s", path))


def fill(path: Path, offset: int, letter: bytes, *, direct: bool = True) -> None:
    flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
    with opened(path, flags) as fd:
        assert os.pwrite(fd, letter * BLOCK, offset) == BLOCK
        os.fsync(fd)


def held(path: Path, offset: int) -> bytes:
    with opened(path, os.O_RDONLY) as fd:
        return os.pread(fd, BLOCK, offset)


def sizes(paths: list[Path]) -> set[int]:
    return {path.stat().st_size for path in paths}


@contextmanager
def qemu(path: Path) -> Iterator["Monitor"]:
    """A QEMU with *path* as the node ``disk``."""
    node = {"driver": "raw", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}}
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    command += ["-qmp", "stdio", "-blockdev", json.dumps(node)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            monitor = Monitor(process)
            monitor.execute("qmp_capabilities")
            yield monitor
        finally:
            process.terminate()


class Monitor:
    """The monitor of a QEMU."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._requests, self._answers = process.stdin, process.stdout

    def execute(self, command: str, **arguments: object) -> object:
        """Have it done; returns what it gives."""
        print(json.dumps({"execute": command, "arguments": arguments}), file=self._requests)
        self._requests.flush()
        while True:
            answer = json.loads(self._answers.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    @property
    def size(self) -> int:
        """Bytes of its disk."""
        nodes = self.execute("query-named-block-nodes", flat=True)
        assert isinstance(nodes, list)
        (node,) = (node for node in nodes if node["node-name"] == "disk")
        return int(node["image"]["virtual-size"])


def test_whoever_uses_the_disk_sees_it_grow(tmp_path: Path) -> None:
    """stat, an open file, QEMU and a loop device; and what they write there is found later."""
    replicas = create(named(tmp_path, 3), SIZE)
    with (
        SetMount(replicas, tmp_path) as disk,
        loop_device(disk.file) as loop,
        qemu(disk.file) as guest,
        opened(disk.file, os.O_RDWR) as fd,
    ):
        assert known_size(disk.file) == guest.size == SIZE
        assert "8.0 MiB (8388608 bytes), before 4.0 MiB" in grow(disk, "8M")
        assert known_size(disk.file) == LARGER
        assert disk.file.stat().st_size == os.lseek(fd, 0, os.SEEK_END) == LARGER
        run("losetup", "--set-capacity", loop)
        assert int(run("blockdev", "--getsize64", loop)) == LARGER
        guest.execute("block_resize", **{"node-name": "disk", "size": LARGER})
        assert guest.size == LARGER
        assert os.pread(fd, BLOCK, LARGER - BLOCK) == bytes(BLOCK)
        assert os.pwrite(fd, b"b" * BLOCK, SIZE) == BLOCK
        fill(loop, LARGER - BLOCK, b"l", direct=False)
        fill(disk.file, SIZE + BLOCK, b"d")
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.pwrite(fd, b"x", LARGER)
        status = disk.wait_healthy()
        assert status["size"] == LARGER
    assert sizes(replicas) == {LARGER}
    assert same(replicas)
    with SetMount(replicas, tmp_path) as disk:
        for offset, letter in ((SIZE, b"b"), (SIZE + BLOCK, b"d"), (LARGER - BLOCK, b"l")):
            assert held(disk.file, offset) == letter * BLOCK


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_it_grows_under_writes_up_to_its_end(tmp_path: Path, direct: bool) -> None:
    """Sizes end within pages, as the kernel keeps them. No write fails, and none is lost."""
    replicas = create(named(tmp_path, 2), SIZE, ONE)
    stop = threading.Event()
    with SetMount(replicas, tmp_path, FIFO) as disk:
        errors: list[OSError] = []

        def write() -> None:
            try:
                while not stop.is_set():
                    fill(disk.file, SIZE - BLOCK, b"w", direct=direct)
            except OSError as error:
                errors.append(error)

        writers = [threading.Thread(target=write) for _ in range(3)]
        for writer in writers:
            writer.start()
        size = SIZE
        for added in (512, 512, 3072, MIB + 1024, MIB - 1024):
            size += added
            grow(disk, f"+{added}")
            assert known_size(disk.file) == size
            with opened(disk.file, os.O_RDWR) as fd:
                assert os.pread(fd, added + 1, size - added) == bytes(added)
                os.pwrite(fd, b"e" * added, size - added)
        stop.set()
        for writer in writers:
            writer.join()
        assert not errors
        assert disk.file.read_bytes()[SIZE:] == b"e" * (size - SIZE)
    assert same(replicas)
    assert replicas[0].read_bytes()[SIZE - BLOCK :] == b"w" * BLOCK + b"e" * (size - SIZE)


def test_what_it_says(tmp_path: Path) -> None:
    """In words and as JSON; and what it refuses."""
    replicas = create(named(tmp_path, 2), SIZE)
    with SetMount(replicas, tmp_path) as disk:
        answer = json.loads(grow(disk, "+4M", "--json"))
        assert (answer["size"], answer["size_before"], answer["ejected"]) == (LARGER, SIZE, [])
        assert "already" in grow(disk, LARGER)
        assert "to shrink it to 4194304" in refusal(disk, SIZE)
        assert f"grow to {LARGER + 512}" in refusal(disk, LARGER + 1)
        assert "chunk-size=65536" in refusal(disk, "1T")
        assert "allowed: a number of bytes" in refusal(disk, "much", 4)
        assert "allowed: a number of bytes" in refusal(disk, "+0", 4)
    for options in ("ro", as_qemu()):
        if "none" in options:
            for path in replicas:
                path.with_name(f"{path.name}.quorumfs").unlink()
        with SetMount(replicas, tmp_path, options) as disk:
            assert "needs a set with sidecars that is mounted for writing" in refusal(disk, "16M")
    assert sizes(replicas) == {LARGER}


@pytest.mark.parametrize("threshold", [1, 2])
def test_one_whose_file_system_is_full(tmp_path: Path, threshold: int) -> None:
    """There is no space for its map: it is ejected, or, where it is needed, nothing changes."""
    with tmpfs(tmp_path / "small", MIB) as small:
        replicas = [tmp_path / "a.img", small / "b.img"]
        create(replicas, SIZE, f"--vote-threshold={threshold}")
        with SetMount(replicas, tmp_path, f"read-pattern=fifo,vote-threshold={threshold}") as disk:
            with filled(small):
                if threshold == 2:
                    line = refusal(disk, TWO_PAGES)
                    assert f"keeps its {SIZE} bytes: {os.strerror(errno.ENOSPC)}" in line
                    assert disk.states() == ["current", "current"]
                    assert sizes(replicas) == {SIZE}
                else:
                    assert f"without {replicas[1]}" in grow(disk, TWO_PAGES)
                    assert disk.states()[0] == "current"
                    assert disk.states()[1] != "current"
                    assert known_size(disk.file) == TWO_PAGES
                    fill(disk.file, TWO_PAGES - BLOCK, b"e")
            disk.wait_healthy()
            grow(disk, TWO_PAGES)
            fill(disk.file, TWO_PAGES - BLOCK, b"e")
        assert sizes(replicas) == {TWO_PAGES}
        assert {held(path, TWO_PAGES - BLOCK) for path in replicas} == {b"e" * BLOCK}


def test_where_no_image_may_be_so_long_nothing_changes(tmp_path: Path) -> None:
    replicas = create(named(tmp_path, 2), SIZE)
    with SetMount(replicas, tmp_path) as disk:
        limits = resource.prlimit(disk.pid, resource.RLIMIT_FSIZE, (SIZE + MIB, -1))
        assert os.strerror(errno.EFBIG) in refusal(disk, LARGER)
        assert disk.states() == ["current", "current"]
        assert sizes(replicas) == {SIZE}
        resource.prlimit(disk.pid, resource.RLIMIT_FSIZE, limits)
        grow(disk, LARGER)
    assert sizes(replicas) == {LARGER}


def test_one_that_was_offline_is_made_longer_when_it_comes_back(tmp_path: Path) -> None:
    replicas = create(named(tmp_path, 2), SIZE, ONE)
    with SetMount(replicas, tmp_path, FIFO) as disk:
        quorumfs("offline", disk.mountpoint, replicas[1])
        grow(disk, LARGER)
        fill(disk.file, LARGER - BLOCK, b"e")
        assert replicas[1].stat().st_size == SIZE
        quorumfs("online", disk.mountpoint, replicas[1])
        disk.wait_healthy()
    assert same(replicas)


def test_one_that_failed_is_made_longer_by_the_next_mount(tmp_path: Path) -> None:
    """Its record knows the old size alone. An image shorter than that is a truncated one (R10)."""
    with FaultFS(tmp_path) as faulty:
        replicas = [tmp_path / "a.img", faulty.path("b.img")]
        create(replicas, SIZE, ONE)
        with SetMount(replicas, tmp_path, FIFO) as disk:
            faulty.inject("b.img", "any", errno=errno.EIO)
            fill(disk.file, 0, b"a")
            disk.wait_for_state(replicas[1], "stale", "missing")
            grow(disk, LARGER)
            fill(disk.file, LARGER - BLOCK, b"e")
        faulty.clear()
        os.truncate(replicas[1], SIZE - BLOCK)
        with SetMount(replicas, tmp_path, FIFO) as disk:
            assert "truncated to" in disk.replica(replicas[1])["reason"]
            os.truncate(replicas[1], SIZE)
            disk.wait_healthy()
            assert held(disk.file, LARGER - BLOCK) == b"e" * BLOCK
        assert same(replicas)


def test_longer_images_are_told_with_the_command(tmp_path: Path) -> None:
    """An administrator made them longer, and has not said that the disk is to be."""
    replicas = create(named(tmp_path, 2), SIZE)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    for path in replicas:
        os.truncate(path, LARGER)
    said = quorumfs("mount", *replicas, mountpoint).stderr
    assert said.count("is longer than the disk") == 2
    assert f"quorumfs grow MOUNTPOINT {LARGER}" in said
    assert "is longer than the disk" in quorumfs("status", mountpoint, check=False).stdout
    quorumfs("grow", mountpoint, str(LARGER))
    assert "is longer than the disk" not in quorumfs("status", mountpoint, check=False).stdout
    quorumfs("umount", mountpoint)
    assert not quorumfs("mount", *replicas, mountpoint).stderr
    assert (mountpoint / "disk.img").stat().st_size == LARGER
    quorumfs("umount", mountpoint)
