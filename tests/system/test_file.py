"""``disk.img`` through a real mount: a file that any program can use as it would use a disk."""

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import MakeImages
from support import mounting
from support.command import wait_until
from support.faultfs import Counters, FaultFS
from support.mounting import Mounted, make_set, quorumfs
from support.sets import opened, tmpfs

MIB = 1 << 20
BLOCK = 4096
SIZE = 2 * MIB + 1234
"""No multiple of anything, so that the end of the disk lies within a sector and within a page."""

NAMES = ["a.img", "b.img", "c.img"]

RANDOM = random.Random(0).randbytes(4 * MIB)


@pytest.fixture
def replicas(make_images: MakeImages) -> list[Path]:
    """A set of three replicas full of the same random data."""
    paths = make_images(3, SIZE)
    for path in paths:
        path.write_bytes(RANDOM[:SIZE])
    make_set(paths)
    return paths


@pytest.fixture
def disk(replicas: list[Path], tmp_path: Path) -> Iterator[Mounted]:
    with Mounted(replicas, tmp_path) as disk:
        yield disk


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultFS]:
    """Replicas a.img, b.img, c.img of 4 MiB, whose requests can be counted and held."""
    with FaultFS(tmp_path) as faulty:
        for name in NAMES:
            faulty.backing(name).write_bytes(bytes(4 * MIB))
        yield faulty


@pytest.fixture
def counted(faulty: FaultFS, tmp_path: Path) -> Iterator[Mounted]:
    paths = [faulty.path(name) for name in NAMES]
    make_set(paths)
    with Mounted(paths, tmp_path) as disk:
        yield disk
        faulty.clear()


def fsyncs(faulty: FaultFS) -> list[int]:
    return [faulty.counters(name).fsyncs for name in NAMES]


# Names and attributes


def test_the_mount_holds_one_regular_file(disk: Mounted) -> None:
    """A directory of mode 0755 with one regular file: the disk, as big as one replica is."""
    root = disk.mountpoint.stat()
    assert (stat.S_ISDIR(root.st_mode), stat.S_IMODE(root.st_mode)) == (True, 0o755)
    assert os.listdir(disk.mountpoint) == ["disk.img"]
    assert not (disk.mountpoint / "other").exists()
    file = disk.file.stat()
    assert stat.S_ISREG(file.st_mode)
    assert (file.st_size, file.st_nlink, file.st_blksize) == (SIZE, 1, BLOCK)
    assert (file.st_uid, file.st_gid) == (os.getuid(), os.getgid())


def test_allocation_is_that_of_one_replica(make_images: MakeImages, tmp_path: Path) -> None:
    """``du`` and ``df`` show what one replica has allocated, not the sum, and see it grow."""
    replicas = make_images(3, 64 * MIB)
    with Mounted(replicas, tmp_path) as disk:
        assert disk.file.stat().st_blocks == 0
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, RANDOM, 5 * MIB)
            os.fsync(fd)
        blocks = disk.file.stat().st_blocks
        assert blocks == replicas[0].stat().st_blocks >= len(RANDOM) // 512

        space = os.statvfs(disk.mountpoint)
        assert space.f_blocks * space.f_frsize == 64 * MIB
        assert (space.f_blocks - space.f_bfree) * space.f_frsize == blocks * 512
        command = ["df", "--block-size=1", "--output=size,used,fstype", str(disk.mountpoint)]
        df = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert df.split()[-3:] == [str(64 * MIB), str(blocks * 512), "fuse.quorumfs"]


def test_df_knows_what_the_stores_have_left(tmp_path: Path) -> None:
    """Two sparse replicas on one small store: each gets half of what is free there."""
    with tmpfs(tmp_path / "small", 8 * MIB) as store:
        paths = [store / "a.img", store / "b.img"]
        quorumfs("create", "--size=64M", *paths)
        with Mounted(paths, tmp_path) as disk:
            wait_until(lambda: space(disk).f_bavail < 8 * MIB // BLOCK, "a look at the stores")
            free = os.statvfs(store)
            assert space(disk).f_bavail == free.f_bavail * free.f_frsize // BLOCK // 2
            assert space(disk).f_bfree == 64 * MIB // BLOCK
            assert space(disk).f_files == 0
            inodes = subprocess.run(
                ["df", "--output=ipcent", disk.mountpoint],
                capture_output=True,
                text=True,
                check=True,
            )
            assert inodes.stdout.split()[-1] == "-"


def space(disk: Mounted) -> os.statvfs_result:
    return os.statvfs(disk.mountpoint)


def test_owner_and_mode_options(replicas: list[Path], tmp_path: Path) -> None:
    """The mount options decide whose file it is, as nobody can chown it later."""
    with Mounted(replicas, tmp_path, "uid=1234,gid=5678,mode=0640") as disk:
        status = disk.file.stat()
        assert (status.st_uid, status.st_gid) == (1234, 5678)
        assert stat.S_IMODE(status.st_mode) == 0o640


NOT_PERMITTED = "Operation not permitted"
NOT_SUPPORTED = "Operation not supported"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "create": (lambda mnt: os.open(mnt / "new", os.O_CREAT | os.O_WRONLY), NOT_PERMITTED),
    "O_TMPFILE": (lambda mnt: os.open(mnt, os.O_TMPFILE | os.O_RDWR), NOT_SUPPORTED),
    "mknod": (lambda mnt: os.mknod(mnt / "new"), NOT_PERMITTED),
    "mkfifo": (lambda mnt: os.mkfifo(mnt / "new"), NOT_PERMITTED),
    "mkdir": (lambda mnt: (mnt / "new").mkdir(), NOT_PERMITTED),
    "symlink": (lambda mnt: (mnt / "new").symlink_to("disk.img"), NOT_PERMITTED),
    "link": (lambda mnt: os.link(mnt / "disk.img", mnt / "new"), NOT_PERMITTED),
    "unlink": (lambda mnt: (mnt / "disk.img").unlink(), NOT_PERMITTED),
    "rename": (lambda mnt: (mnt / "disk.img").rename(mnt / "new"), NOT_PERMITTED),
    "chmod": (lambda mnt: (mnt / "disk.img").chmod(0o666), NOT_PERMITTED),
    "chown": (lambda mnt: os.chown(mnt / "disk.img", 1, 1), NOT_PERMITTED),
    "chmod of the root": (lambda mnt: mnt.chmod(0o777), NOT_PERMITTED),
    "chown of the root": (lambda mnt: os.chown(mnt, 1, 1), NOT_PERMITTED),
    "setxattr": (lambda mnt: os.setxattr(mnt / "disk.img", "user.a", b"1"), NOT_SUPPORTED),
    "getxattr": (lambda mnt: os.getxattr(mnt / "disk.img", "user.a"), NOT_SUPPORTED),
    "removexattr": (lambda mnt: os.removexattr(mnt / "disk.img", "user.a"), NOT_SUPPORTED),
}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """One mount for all refusals: none of them may change it."""
    directory = tmp_path_factory.mktemp("refusing")
    replica = directory / "a.img"
    replica.write_bytes(RANDOM[:SIZE])
    with Mounted([replica], directory) as disk:
        yield disk


@pytest.mark.parametrize("what", REFUSED)
def test_what_one_file_cannot_do_is_refused(what: str, refusing: Mounted) -> None:
    """Refused each time with an errno that programs expect: libvirt gives up at ENOSYS."""
    attempt, message = REFUSED[what]
    before = refusing.file.stat(), refusing.mountpoint.stat()
    for _ in range(2):  # the kernel remembers an ENOSYS and may answer otherwise from then on
        with pytest.raises(OSError, match=message):
            attempt(refusing.mountpoint)
    assert os.listdir(refusing.mountpoint) == ["disk.img"]
    assert (refusing.file.stat(), refusing.mountpoint.stat()) == before


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 1 << 40])
def test_the_size_is_fixed(size: int, refusing: Mounted) -> None:
    """Truncating to another size is refused and changes nothing."""
    with opened(refusing.file, os.O_RDWR) as fd:
        for target in (refusing.file, fd):
            with pytest.raises(PermissionError):
                os.truncate(target, size)
            assert refusing.file.stat().st_size == SIZE
        assert os.pread(fd, SIZE, 0) == RANDOM[:SIZE]


def test_truncating_to_the_same_size_does_nothing(refusing: Mounted) -> None:
    """Programs that set the size they want may go on."""
    os.truncate(refusing.file, SIZE)
    with opened(refusing.file, os.O_RDWR) as fd:
        os.ftruncate(fd, SIZE)
        assert os.pread(fd, SIZE + 1, 0) == RANDOM[:SIZE]


@pytest.mark.parametrize("flags", [0, os.O_CREAT, os.O_DIRECT], ids=["", "O_CREAT", "O_DIRECT"])
def test_o_trunc_truncates_nothing(flags: int, refusing: Mounted) -> None:
    """``>disk.img`` by mistake costs nothing, as on a block device."""
    with opened(refusing.file, os.O_RDWR | os.O_TRUNC | flags) as fd:
        assert os.fstat(fd).st_size == SIZE
        assert os.pread(fd, SIZE, 0) == RANDOM[:SIZE]


def test_o_trunc_is_refused_while_others_have_the_file_open(disk: Mounted) -> None:
    """Not ignored then: the kernel would show them an empty file for a moment."""
    with opened(disk.file, os.O_RDWR), pytest.raises(OSError, match="busy"):
        os.open(disk.file, os.O_WRONLY | os.O_TRUNC)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
def test_o_trunc_harms_no_reader(flags: int, disk: Mounted) -> None:
    """Who reads at the moment somebody opens with O_TRUNC never sees a shorter disk.

    QEMU takes a short read for the end of the image and shows the guest zeros.
    """
    end = threading.Event()

    def keep_truncating() -> None:
        while not end.is_set():
            with contextlib.suppress(OSError), opened(disk.file, os.O_WRONLY | os.O_TRUNC):
                pass

    with ThreadPoolExecutor(2) as pool, opened(disk.file, os.O_RDONLY | flags) as fd:
        truncating = [pool.submit(keep_truncating) for _ in range(2)]
        try:
            for block in itertools.islice(itertools.cycle(range(SIZE // BLOCK)), 4000):
                expected = RANDOM[block * BLOCK : (block + 1) * BLOCK]
                assert os.pread(fd, BLOCK, block * BLOCK) == expected
        finally:
            end.set()
        for each in truncating:
            each.result()


def test_o_trunc_harms_no_mapping(disk: Mounted) -> None:
    """What was stored through a mapping survives somebody else's O_TRUNC, and so does the process.

    In a process of its own: access to a mapping behind the end of a file kills with SIGBUS.
    """
    program = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "mapped = mmap.mmap(fd, 1 << 20)\n"
        "mapped[5:10] = b'store'\n"
        "try: os.close(os.open(sys.argv[1], os.O_WRONLY | os.O_TRUNC))\n"
        "except OSError: pass\n"
        "assert mapped[5:10] == b'store', mapped[5:10]\n"
    )
    command = [sys.executable, "-c", program, str(disk.file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (signal.strsignal(-done.returncode), done.stderr)
    assert [path.read_bytes()[5:10] for path in disk.replicas] == [b"store"] * 3


def test_times_can_be_set(disk: Mounted) -> None:
    """``touch`` and ``rsync --times`` work."""
    os.utime(disk.file, (1, 2))
    assert disk.file.stat().st_mtime == 2
    subprocess.run(["touch", disk.file], check=True)
    assert disk.file.stat().st_mtime > 2


@pytest.mark.parametrize("looked", [False, True], ids=["", "after a stat while it was open"])
def test_the_time_of_change_moves_when_a_writer_closes(looked: bool, disk: Mounted) -> None:
    """A backup that goes by mtime sees that the disk was written to; reading does not move it."""
    os.utime(disk.file, (1, 1))
    with opened(disk.file, os.O_RDWR) as fd:
        os.pread(fd, 1, 0)
    assert disk.file.stat().st_mtime == 1
    began = time.time()
    with opened(disk.file, os.O_RDWR) as fd:
        os.pwrite(fd, b"x", 0)
        if looked:
            os.fstat(fd)
    # The kernel sends the release on its own.
    wait_until(lambda: disk.file.stat().st_mtime >= began - 1, "the time of change")


# The two ends of the disk


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
def test_requests_at_the_end(flags: int, disk: Mounted) -> None:
    """A read is short at the end and empty behind it; a write behind it gives ENOSPC."""
    with opened(disk.file, os.O_RDWR | flags) as fd:
        assert os.pread(fd, 5000, SIZE - 10) == RANDOM[SIZE - 10 : SIZE]
        assert os.pread(fd, 3 * MIB, 0) == RANDOM[:SIZE]
        for offset in (SIZE, SIZE + 1, SIZE + MIB, 1 << 50):
            assert os.pread(fd, 4096, offset) == b""

        for offset in (SIZE, SIZE + 1, SIZE + MIB, 1 << 50):
            for length in (1, 4096, MIB):
                with pytest.raises(OSError, match="No space left"):
                    os.pwrite(fd, bytes(length), offset)
        assert os.fstat(fd).st_size == SIZE
    assert [path.stat().st_size for path in disk.replicas] == [SIZE] * 3
    assert disk.file.read_bytes() == RANDOM[:SIZE]


@pytest.mark.parametrize("length", [11, BLOCK, MIB])
@pytest.mark.parametrize("later", [False, True], ids=["opened", "fcntl"])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
def test_a_write_across_the_end(flags: int, later: bool, length: int, disk: Mounted) -> None:
    """It writes what fits and says how much, as on a block device; EIO would be a sick disk.

    ENOSPC would do for O_DIRECT: there the kernel makes EIO of every short write.
    """
    old, new = RANDOM[SIZE - 10 : SIZE], os.urandom(length)
    allowed = [new[:10]]
    with opened(disk.file, os.O_RDWR | (0 if later else flags)) as fd:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        try:
            assert os.pwrite(fd, new, SIZE - 10) == 10
        except OSError as error:
            assert (error.errno, flags) == (errno.ENOSPC, os.O_DIRECT)  # noqa: PT017
            allowed.append(old)  # no promise about a request that failed
        assert os.fstat(fd).st_size == SIZE
        end = os.pread(fd, length, SIZE - 10)
        assert end in allowed
    assert [path.read_bytes() for path in disk.replicas] == [RANDOM[: SIZE - 10] + end] * 3


# Data


@pytest.mark.parametrize("ways", ["buffered", "direct", "mapped", "buffered direct mapped"])
def test_any_place_and_any_size(ways: str, disk: Mounted) -> None:
    """Random requests of 1 byte to 1 MiB, anywhere, in every way a program can make them, and
    all ways mixed: each read gives what the last write put there, and so do the replicas."""
    model = bytearray(RANDOM[:SIZE])
    rng = random.Random(ways)
    with (
        opened(disk.file, os.O_RDWR) as buffered,
        opened(disk.file, os.O_RDWR | os.O_DIRECT) as direct,
        mmap.mmap(buffered, SIZE) as mapped,
    ):
        for step in range(300):
            offset = rng.choice([rng.randrange(SIZE), SIZE - rng.randint(1, 2 * BLOCK)])
            length = min(int(2 ** rng.uniform(0, 20)), SIZE - offset)
            end = offset + length
            way = rng.choice(ways.split())
            fd = direct if way == "direct" else buffered
            where = f"step {step}: {way} {offset}+{length}"
            if rng.random() < 0.5:
                start = rng.randrange(len(RANDOM) - length)
                data = RANDOM[start : start + length]
                if way == "mapped":
                    mapped[offset:end] = data
                else:
                    assert os.pwrite(fd, data, offset) == length, where
                model[offset:end] = data
            else:
                got = mapped[offset:end] if way == "mapped" else os.pread(fd, length, offset)
                assert got == model[offset:end], where
        mapped.flush()
    assert [path.read_bytes() == model for path in disk.replicas] == [True] * 3


@pytest.mark.parametrize("engine", ["native", "io_uring", "threads"])
def test_qemu_reads_and_writes(engine: str, counted: Mounted, faulty: FaultFS) -> None:
    """Every way of QEMU to do I/O works with cache=none."""
    commands = ["write -P 7 4096 1048576", "read -P 7 4096 1048576", "read -P 0 2M 4096", "flush"]
    subprocess.run(qemu_io(counted.file, engine, *commands), check=True, stdout=subprocess.DEVNULL)
    for name in NAMES:
        assert faulty.backing(name).read_bytes()[:MIB] == bytes(BLOCK) + b"\7" * (MIB - BLOCK)


def qemu_io(file: Path, engine: str, *commands: str) -> list[str]:
    """A command line that runs *commands* with cache=none; any failure gives exit code 1."""
    each = [word for command in commands for word in ("-c", command)]
    return ["qemu-io", "-f", "raw", "-n", "-i", engine, *each, str(file)]


@pytest.mark.parametrize("engine", ["native", "io_uring"])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_requests_are_in_flight_together(
    kind: str, engine: str, counted: Mounted, faulty: FaultFS
) -> None:
    """Eight requests that a program has in flight are on their way to the replicas at once.

    What tells: reads that wait on all replicas, or writes that wait on one (the kernel sends
    the plain writes of one file one at a time, so that one is the first) while the others go on.
    """
    if kind == "read":
        for name in NAMES:
            faulty.inject(name, "read", start=MIB, hang=True)  # QEMU probes with a read at 0
    else:
        faulty.hang("a.img", "write")

    def together(counters: Counters) -> bool:
        return (counters.in_flight if kind == "read" else counters.writes) == 8

    pattern = 0 if kind == "read" else 9
    requests = [f"aio_{kind} -P {pattern} {MIB + n * BLOCK} 4096" for n in range(8)]
    command = qemu_io(counted.file, engine, *requests, "aio_flush")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            faulty.wait_for(together, "c.img")
        finally:
            faulty.clear()
    assert process.returncode == 0
    for name in NAMES:
        data = faulty.backing(name).read_bytes()
        assert data[MIB : MIB + 8 * BLOCK] == bytes([pattern]) * 8 * BLOCK


@pytest.mark.parametrize("kind", ["read", "write"])
def test_one_mib_is_one_request(kind: str, faulty: FaultFS, tmp_path: Path) -> None:
    """A direct request of 1 MiB reaches the replica as one, not as eight of 128 KiB.

    The request that holds the first byte is spoilt at the replica, and how far the damage goes
    is how long it was. (Counting requests would not tell: between daemon and FaultFS the kernel
    cuts off what does not fit into 256 pages, as the daemon's memory is not aligned.)
    """
    buffer = mmap.mmap(-1, MIB)  # aligned to pages
    if kind == "read":
        faulty.inject("a.img", "read", start=0, end=1, corrupt=True)
    else:
        faulty.inject("a.img", "write", start=0, end=1, drop=True)
        buffer[:] = b"\xff" * MIB
    with (
        Mounted([faulty.path("a.img")], tmp_path) as disk,
        opened(disk.file, os.O_RDWR | os.O_DIRECT) as fd,
    ):
        if kind == "read":
            assert os.preadv(fd, [buffer], 0) == MIB
            spoilt = buffer[:].rstrip(b"\0")
            assert set(spoilt) == {0xFF}
            length = len(spoilt)
        else:
            assert os.pwritev(fd, [buffer], 0) == MIB
            length = faulty.backing("a.img").read_bytes().find(b"\xff")
        counters = faulty.counters("a.img")
    assert length in (-1, MIB) or length > MIB - BLOCK
    assert (counters.reads if kind == "read" else counters.writes) <= 2


def test_many_openers(disk: Mounted) -> None:
    """Hundreds have it open at once, and each sees at once what any other wrote."""
    with contextlib.ExitStack() as stack:
        modes = [os.O_RDWR, os.O_RDWR | os.O_DIRECT]
        fds = [stack.enter_context(opened(disk.file, mode)) for mode in modes * 150]
        for number, fd in enumerate(fds):
            os.pwrite(fd, bytes([number % 256]), number * 1000)
            assert os.pread(fds[-1 - number], 1, number * 1000) == bytes([number % 256])


# Durability


def test_fsync_is_a_flush_of_every_replica(counted: Mounted, faulty: FaultFS) -> None:
    """fsync, fdatasync and msync reach every replica, once; open, write and close flush nothing."""
    with opened(counted.file, os.O_RDWR) as fd, mmap.mmap(fd, BLOCK) as mapped:
        os.pwrite(fd, b"x" * BLOCK, BLOCK)
        assert fsyncs(faulty) == [0, 0, 0]
        os.fsync(fd)
        assert fsyncs(faulty) == [1, 1, 1]
        os.fdatasync(fd)
        assert fsyncs(faulty) == [2, 2, 2]
        mapped[:] = b"m" * BLOCK
        mapped.flush()
        assert fsyncs(faulty) == [3, 3, 3]
        for name in NAMES:
            assert faulty.backing(name).read_bytes()[: 2 * BLOCK] == b"m" * BLOCK + b"x" * BLOCK
    with opened(counted.file, os.O_RDWR) as fd:
        os.pwrite(fd, b"y", 0)
    assert fsyncs(faulty) == [3, 3, 3]


def fio(file: Path, directory: Path, *job: str) -> None:
    """Run one fio job on *file*; *directory* gets the state files that verifying leaves."""
    command = ["fio", "--name=job", f"--filename={file}", "--allow_file_create=0", *job]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("engine", "direct"),
    [("mmap", 0), *itertools.product(["psync", "libaio", "io_uring"], [0, 1])],
)
def test_fio_verifies(engine: str, direct: int, disk: Mounted, tmp_path: Path) -> None:
    """What fio wrote with many requests in flight, fio reads back."""
    job = [f"--ioengine={engine}", f"--direct={direct}", "--iodepth=16", "--verify=crc32c"]
    fio(disk.file, tmp_path, "--rw=randwrite", "--bsrange=4k-128k", "--size=2m", *job)
    first, *others = [path.read_bytes() for path in disk.replicas]
    assert others == [first] * 2


# Locks

LOCKS = {
    "OFD": "fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 9, 1, 0))",
    "POSIX": "fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 9)",
    "flock": "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
}


@pytest.mark.parametrize("kind", LOCKS)
def test_locks_exclude(kind: str, disk: Mounted) -> None:
    """A lock on the file keeps another process out until its holder is gone, even by SIGKILL."""
    program = (
        "import fcntl, os, struct, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        f"{LOCKS[kind]}\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(disk.file)]

    def lock() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, input="")

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"locked\n"
            assert "BlockingIOError" in lock().stderr
        finally:
            holder.kill()
    assert lock().stdout == "locked\n"


def test_two_qemus_exclude_each_other(counted: Mounted) -> None:
    """QEMU's own image locks work: a second guest on the same disk is refused."""
    guest = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-monitor", "stdio"]
    guest += ["-blockdev", f"driver=file,node-name=disk,filename={counted.file}"]
    guest += ["-device", "virtio-blk-pci,drive=disk"]

    def start_and_quit() -> subprocess.CompletedProcess[str]:
        return subprocess.run(guest, capture_output=True, text=True, check=False, input="quit\n")

    with subprocess.Popen(guest, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline().startswith(b"QEMU")  # it has opened the file
            refused = start_and_quit()
        finally:
            holder.kill()
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr
    allowed = start_and_quit()
    assert allowed.returncode == 0, allowed.stderr


# Caches


@pytest.mark.parametrize("way", ["read", "mapping"])
def test_cached_pages_never_hide_a_repair(way: str, disk: Mounted) -> None:
    """Whoever opens the file sees what the replicas hold, whatever the kernel had cached."""
    with opened(disk.file, os.O_RDWR) as old, mmap.mmap(old, BLOCK, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == os.pread(old, BLOCK, 0) == RANDOM[:BLOCK]
        for path in disk.replicas:
            with path.open("r+b") as replica:
                replica.write(b"r" * BLOCK)
        with opened(disk.file, os.O_RDONLY) as new:
            assert os.pread(new, BLOCK, 0) == b"r" * BLOCK
        assert (mapped[:] if way == "mapping" else os.pread(old, BLOCK, 0)) == b"r" * BLOCK


# Programs

COPIERS = {
    "cp": "cp SOURCE TARGET",
    "cat": "cat SOURCE > TARGET",
    "dd": "dd if=SOURCE of=TARGET bs=100000",
    "dd conv=notrunc": "dd if=SOURCE of=TARGET bs=100000 conv=notrunc",
    "dd conv=fsync": "dd if=SOURCE of=TARGET bs=64k conv=notrunc,fsync",
    "dd oflag=direct": "dd if=SOURCE of=TARGET bs=64k oflag=direct",
    "qemu-img convert": "qemu-img convert -n -f raw -O raw SOURCE TARGET",
    "qemu-img convert -t none": "qemu-img convert -n -t none -f raw -O raw SOURCE TARGET",
}


@pytest.mark.parametrize("copier", COPIERS)
def test_an_image_can_be_copied_onto_the_disk(copier: str, tmp_path: Path) -> None:
    """The usual ways to restore an image write all of it, on a disk that held something else."""
    source = tmp_path / "source.img"
    # Zeros too, which qemu-img writes in its own way: they must replace what was there.
    image = RANDOM[:MIB] + bytes(MIB) + RANDOM[MIB : 2 * MIB]
    source.write_bytes(image)
    replicas = [tmp_path / "a.img", tmp_path / "b.img"]
    for path in replicas:
        path.write_bytes(b"\xaa" * len(image))
    with Mounted(replicas, tmp_path) as disk:
        command = COPIERS[copier].replace("SOURCE", str(source)).replace("TARGET", str(disk.file))
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert disk.file.read_bytes() == image
    assert [path.read_bytes() == image for path in replicas] == [True, True]


# Errors of our own

BROKEN = """
import sys, quorumfs.cli, quorumfs.disk.disk
real = getattr(quorumfs.disk.disk.Disk, {method!r})
left = 3
async def broken(self, *arguments):
    global left
    if left and arguments[:1] in [(), ({offset},)]:
        left -= 1
        raise RuntimeError("injected")
    return await real(self, *arguments)
if "mount" in sys.argv:
    setattr(quorumfs.disk.disk.Disk, {method!r}, broken)
quorumfs.cli.main()
"""
"""The command with the first three requests at one offset, or flushes, failing by a mistake."""


@pytest.mark.parametrize("method", ["read", "write", "flush"])
def test_an_internal_error_costs_one_request(
    method: str, replicas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours in one request gives that request EIO, and the log says where it is.

    Everything else goes on: requests in flight meanwhile, later ones, and the mount.
    """
    offset = 8 * BLOCK
    program = BROKEN.format(method=method, offset=offset)
    monkeypatch.setattr(mounting, "QUORUMFS", [sys.executable, "-c", program])
    requests: dict[str, Callable[[int], object]] = {
        "read": lambda fd: os.pread(fd, BLOCK, offset),
        "write": lambda fd: os.pwrite(fd, bytes(BLOCK), offset),
        "flush": os.fsync,
    }
    request = requests[method]

    # C makes no such mistake, for it asks nobody: here all goes the long way.
    with Mounted(replicas, tmp_path, "fast-path=off") as disk:
        disk.expected_errors = ["internal error"]
        with opened(disk.file, os.O_RDWR | os.O_DIRECT) as fd, ThreadPoolExecutor(4) as pool:
            others = pool.map(lambda n: os.pread(fd, BLOCK, n % 8 * BLOCK), range(200))
            for _ in range(3):
                with pytest.raises(OSError, match="Input/output error"):
                    request(fd)
            assert list(others) == [RANDOM[n % 8 * BLOCK :][:BLOCK] for n in range(200)]
            request(fd)
            assert os.pwrite(fd, b"n" * BLOCK, 0) == BLOCK
            assert os.pread(fd, BLOCK, 0) == b"n" * BLOCK
        assert os.listdir(disk.mountpoint) == ["disk.img"]

        def traced() -> bool:
            return sum("injected" in record.get("traceback", "") for record in disk.log()) == 3

        wait_until(traced, "three tracebacks in the log")
    assert [path.read_bytes()[:BLOCK] for path in replicas] == [b"n" * BLOCK] * 3
