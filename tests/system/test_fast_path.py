"""Requests served without the interpreter: what it is for, and what must not come of it."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from support import mounting
from support.command import PATIENCE_S, wait_until, waits_of_python
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.oracle import Oracle, Writers
from support.programs import loop_device, run
from support.sets import BLOCK, MIB, SetMount, create, opened, same

import quorumfs as package_of_quorumfs
from quorumfs.disk.readorder import BUDGET_MAX

ONE = "--vote-threshold=1"
FIFO = "read-pattern=fifo,vote-threshold=1"
SIZE = 8 * MIB
DELAY_S = 0.05


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


REQUESTS = 200


@pytest.mark.parametrize(("fast", "pattern"), [("on", "fifo"), ("on", "quorum"), ("off", "fifo")])
def test_python_sleeps_while_no_request_needs_a_decision(
    fast: str, pattern: str, tmp_path: Path
) -> None:
    images = create([tmp_path / f"{letter}.img" for letter in "abc"], SIZE)
    options = f"read-pattern={pattern},fast-path={fast}"
    with SetMount(images, tmp_path, options) as disk, opened(disk.file) as fd:
        os.pwrite(fd, bytes(BLOCK), 0)  # the first touch has its marks written by threads
        before, waits = disk.status(), waits_of_python(disk.pid)
        data = os.urandom(BLOCK)
        for _ in range(REQUESTS):
            os.pwrite(fd, data, 0)
            assert os.pread(fd, BLOCK, 0) == data
        waits, after = waits_of_python(disk.pid) - waits, disk.status()
        if fast == "on":
            assert waits < REQUESTS / 2, "now and then a busy machine makes a file look slow"
        else:
            assert waits >= 2 * REQUESTS
        reads = [
            now["reads"] - then["reads"]
            for now, then in zip(after["replicas"], before["replicas"], strict=True)
        ]
        if pattern == "quorum":
            assert reads == [REQUESTS] * 3
        else:
            assert reads[0] == REQUESTS
            assert sum(reads[1:]) <= BUDGET_MAX, "now and then a busy machine makes a read late"
    assert same(images)


def test_an_idle_disk_uses_no_processor(tmp_path: Path) -> None:
    images = create([tmp_path / "a.img", tmp_path / "b.img"], SIZE)
    with SetMount(images, tmp_path, FIFO) as disk:
        with opened(disk.file) as fd:
            for number in range(500):  # a series of requests, after which it looks for more
                os.pwrite(fd, bytes(BLOCK), number * BLOCK)
        used = processor_s(disk.pid)
        time.sleep(5)  # what is measured is this time
        assert processor_s(disk.pid) - used < 0.25


class SlowDisk:
    """An ext4 whose every write waits for its device, and a device that gets slow."""

    def __init__(self, faulty: FaultFS, directory: Path) -> None:
        self._faulty = faulty
        self.directory = directory

    def get_slow(self) -> None:
        """From now on every request to the device takes `DELAY_S`."""
        self._faulty.inject("device", "any", delay=DELAY_S)

    def recover(self) -> None:
        """It is as fast as before."""
        self._faulty.clear("device")


@contextmanager
def ext4_device(directory: Path, size: int) -> Iterator[tuple[FaultFS, Path]]:
    """A new ext4 on a device over the file «device», whose requests can be made to fail."""
    with FaultFS(directory, parallel=True) as faulty:
        with faulty.backing("device").open("wb") as file:
            file.truncate(size)
        run("mkfs.ext4", "-q", "-m", "0", faulty.backing("device"))
        with loop_device(faulty.path("device")) as device:
            yield faulty, device


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[SlowDisk]:
    with ExitStack() as stack:
        faulty, device = stack.enter_context(ext4_device(tmp_path, 64 * MIB))
        stack.enter_context(mounted_sync(device, tmp_path / "slow"))
        stack.callback(faulty.clear)
        yield SlowDisk(faulty, tmp_path / "slow")


@contextmanager
def mounted_sync(device: Path, directory: Path) -> Iterator[None]:
    directory.mkdir()
    run("mount", "-o", "sync", device, directory)
    try:
        yield
    finally:
        run("umount", directory)


def test_a_local_replica_that_gets_slow_leaves_the_fast_path(
    slow_disk: SlowDisk, tmp_path: Path
) -> None:
    """P5: it may hold up others for one I/O, and then it has its own threads again."""
    images = create([tmp_path / "a.img", slow_disk.directory / "b.img"], SIZE, ONE)
    with SetMount(images, tmp_path, FIFO) as disk:
        oracle = Oracle(range(0, SIZE // BLOCK, 41))
        writers = Writers(oracle, disk.file, threads=4)
        try:
            wait_until(lambda: oracle.acknowledgements > 200, "some writes")
            slow_disk.get_slow()
            slow = oracle.acknowledgements
            wait_until(lambda: oracle.acknowledgements > slow + 20, "writes on a slow disk")
            answers = []
            for _ in range(100):
                asked = time.monotonic()
                disk.status()
                answers.append(time.monotonic() - asked)
            assert statistics.median(answers) < DELAY_S / 2, "status waits for the slow disk"
        finally:
            slow_disk.recover()
            writers.stop()
        assert not writers.errors
        disk.wait_healthy()
        with opened(disk.file) as fd:
            oracle.look(fd)
    assert same(images)


def test_requests_that_nobody_waits_for_any_more_do_no_harm(tmp_path: Path) -> None:
    """Readers and writers are killed in the middle of their requests, again and again."""
    images = create([tmp_path / "a.img", tmp_path / "b.img"], SIZE)
    with SetMount(images, tmp_path, FIFO) as disk:
        for _ in range(20):
            victims = [
                subprocess.Popen(
                    ["dd", *ends, "bs=64k", "count=128", *flags],
                    stderr=subprocess.DEVNULL,
                )
                for ends, flags in (
                    (["if=/dev/zero", f"of={disk.file}"], ["conv=notrunc", "oflag=direct"]),
                    ([f"if={disk.file}", "of=/dev/null"], ["iflag=direct"]),
                    (["if=/dev/zero", f"of={disk.file}"], ["conv=notrunc"]),
                    ([f"if={disk.file}", "of=/dev/null"], []),
                )
            ]
            for victim in victims:
                victim.kill()
                victim.wait()
        with opened(disk.file) as fd:
            os.pwrite(fd, b"w" * BLOCK, 0)
            assert os.pread(fd, BLOCK, 0) == b"w" * BLOCK
        quorumfs("umount", disk.mountpoint)
    assert same(images)


PREEMPTED = """
import sys, time
import pyfuse3

wait = pyfuse3._wait_fuse_readable

async def preempted():
    ready = await wait()
    until = time.perf_counter() + 0.0005
    while time.perf_counter() < until:
        pass
    return ready

pyfuse3._wait_fuse_readable = preempted
from quorumfs.cli import main
sys.exit(main())
"""
"""Quorumfs on a machine that gives the processor to others before a request is read."""


@pytest.mark.parametrize("fast", ["on", "off"])
def test_the_loop_goes_on_when_a_request_is_gone_before_it_is_read(
    fast: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was killed, and no other request comes: the file stays open elsewhere."""
    program = tmp_path / "preempted.py"
    program.write_text(PREEMPTED)
    monkeypatch.setattr(mounting, "QUORUMFS", [sys.executable, str(program)])
    images = create([tmp_path / "a.img", tmp_path / "b.img"], SIZE)
    options = f"{FIFO},fast-path={fast}"
    with SetMount(images, tmp_path, options) as disk, opened(disk.file) as fd:
        for number in range(10):
            os.lseek(fd, 0, os.SEEK_SET)
            victim = subprocess.Popen(
                ["dd", "of=/dev/null", "bs=4k"], stdin=fd, stderr=subprocess.DEVNULL
            )
            time.sleep(0.02 + 0.003 * (number % 7))  # any moment of its requests
            victim.kill()
            victim.wait()
            disk.status()


LARGE = 64 * MIB


@pytest.fixture
def scattered(tmp_path: Path) -> Iterator[tuple[FaultFS, list[Path]]]:
    """Images with many extents, of which nothing is cached; the first one's device can hang."""
    with ExitStack() as stack:
        faulty, device = stack.enter_context(ext4_device(tmp_path, 2 * LARGE))
        directory = tmp_path / "local"
        directory.mkdir()
        run("mount", device, directory)
        stack.callback(run, "umount", directory)
        stack.callback(faulty.clear)
        images = create([directory / "a.img", tmp_path / "b.img"], LARGE, ONE)
        with SetMount(images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
            for offset in range(0, LARGE, 2 * BLOCK):
                os.pwrite(fd, b"x" * BLOCK, offset)
        run("umount", directory)
        run("mount", device, directory)
        yield faulty, images


HANGS = f"{FIFO},replica-timeout=1"


def test_a_read_from_a_local_device_that_hangs_costs_one_timeout(
    scattered: tuple[FaultFS, list[Path]], tmp_path: Path
) -> None:
    """P5: not even the file system's own data, which tells where the file's is, is waited for."""
    faulty, images = scattered
    with SetMount(images, tmp_path, HANGS) as disk, opened(disk.file) as fd:
        disk.expected_errors = [""]
        faulty.hang("device", "read")
        with ThreadPoolExecutor() as pool:
            try:
                reading = pool.submit(os.pread, fd, BLOCK, LARGE // 2)
                assert reading.result(PATIENCE_S) == b"x" * BLOCK  # by the other replica
                disk.wait(lambda status: status["replicas"][0]["state"] == "missing", "its timeout")
            finally:
                faulty.clear()


def test_a_shim_that_pyfuse3_does_not_fit_takes_no_requests(tmp_path: Path) -> None:
    """pyfuse3 was built with the headers of another libfuse: then it reads the requests itself."""
    package = tmp_path / "quorumfs"
    shutil.copytree(Path(package_of_quorumfs.__file__).parent, package)
    source = package / "fuse" / "shim.c"
    text = source.read_text()
    assert "size != sizeof(ours)" in text
    source.write_text(text.replace("size != sizeof(ours)", "size == sizeof(ours)"))
    flags, libraries = (
        subprocess.run(
            ["pkg-config", kind, "fuse3"], capture_output=True, text=True, check=True
        ).stdout.split()
        for kind in ("--cflags", "--libs")
    )
    command = ["gcc", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread", *flags, "-o"]
    command += [
        str(package / "fuse" / "_shim.abi3.so"),
        str(source),
        "-Wl,--no-as-needed",
        *libraries,
    ]
    subprocess.run(command, check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = partial(subprocess.run, env=environment, timeout=60, check=True, cwd=tmp_path)
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    quorumfs_ = [sys.executable, "-m", "quorumfs"]
    run([*quorumfs_, "create", "--size", "1M", "a.img", "b.img"])
    run([*quorumfs_, "mount", "a.img", "b.img", mountpoint])
    try:
        copy = ["dd", "if=/dev/urandom", f"of={mountpoint}/disk.img", "bs=4k", "count=4"]
        run([*copy, "conv=notrunc"])
        told = run([*quorumfs_, "status", mountpoint], stdout=subprocess.PIPE, text=True).stdout
        assert "pyfuse3 was built for another libfuse" in told
    finally:
        run([*quorumfs_, "umount", mountpoint])
    assert (tmp_path / "a.img").read_bytes() == (tmp_path / "b.img").read_bytes()
