"""What is refused before a mount changes anything: replicas and mount points that cannot be."""

import json
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import (
    OrdinaryUser,
    file_replaced,
    filesystem_at,
    is_alive,
    one_line,
    ordinary_user,
    privately,
    processes_of,
    refused,
    seconds,
    wait_until,
)
from support.mounting import QUORUMFS, Mounted, quorumfs
from support.sets import filled, same, tmpfs
from xxhash import xxh3_128_digest

from quorumfs.control import runtime
from quorumfs.replica.ofdlock import try_lock


@pytest.fixture
def user() -> Iterator[OrdinaryUser]:
    with ordinary_user() as user:
        yield user


# One replica that cannot be one


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_device(kind: int) -> Callable[[Path], None]:
    # Numbers no driver has: nothing happens should it be opened after all.
    return lambda path: os.mknod(path, kind | 0o600, os.makedev(240, 255))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file or directory"),
        (Path.mkdir, "a directory"),
        (os.mkfifo, "a FIFO"),  # opening one waits for a writer
        (make_socket, "a socket"),
        (make_device(stat.S_IFCHR), "a character device"),
        (make_device(stat.S_IFBLK), "a block device"),
        (Path.touch, "empty"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.write_bytes(bytes(511)), "511"),  # a.img has 512
    ],
    ids=["missing", "dir", "fifo", "socket", "char", "block", "empty", "dangling", "loop", "size"],
)
def test_what_is_no_replica_is_refused(
    tmp_path: Path,
    mountpoint: Path,
    make: Callable[[Path], object],
    reason: str,
) -> None:
    """The line names the path and the reason; the other replica is not touched."""
    good, bad = tmp_path / "a.img", tmp_path / "b.img"
    good.write_bytes(b"x" * 512)
    os.utime(good, (1, 1))
    make(bad)
    line = refused([good, bad], mountpoint)
    assert str(bad) in line
    assert reason in line
    assert good.read_bytes() == b"x" * 512
    assert good.stat().st_mtime == 1


@pytest.mark.parametrize("way", ["path", "relative", "symlink", "hardlink", "bind mount"])
def test_the_same_file_twice_is_refused(tmp_path: Path, mountpoint: Path, way: str) -> None:
    """Two replicas that are one file are no redundancy; both names are told."""
    image, other = tmp_path / "a.img", tmp_path / "b.img"
    image.write_bytes(bytes(512))
    match way:
        case "path":
            other = image
        case "relative":
            other = Path(os.path.relpath(image))
        case "symlink":
            other.symlink_to(image)
        case "hardlink":
            other.hardlink_to(image)
        case "bind mount":
            other.touch()
            subprocess.run(["mount", "--bind", image, other], check=True)
    try:
        line = refused([image, other], mountpoint)
    finally:
        if way == "bind mount":
            subprocess.run(["umount", other], check=True)
    assert f"{image} and {os.path.abspath(other)} are the same file" in line


@pytest.mark.parametrize("way", ["path", "symlink"])
def test_a_replica_inside_the_mount_point_is_refused(mountpoint: Path, way: str) -> None:
    """The mount would hide its own replica."""
    inside = mountpoint / "a.img"
    inside.write_bytes(bytes(512))
    given = inside
    if way == "symlink":
        given = mountpoint.parent / "link.img"
        given.symlink_to(inside)
    line = refused([given], mountpoint)
    assert f"{given} is inside the mount point {mountpoint}" in line


@pytest.mark.parametrize("size", [1, 511, 4097])
def test_any_size_can_be_mounted(make_images: MakeImages, tmp_path: Path, size: int) -> None:
    """A disk need not be whole sectors: its first and last bytes are as good as any."""
    replicas = make_images(3, size)
    data = os.urandom(size)
    with Mounted(replicas, tmp_path) as mounted:
        assert mounted.file.stat().st_size == size
        with mounted.file.open("r+b", buffering=0) as file:
            assert file.write(data) == size
        assert mounted.file.read_bytes() == data
    assert {path.read_bytes() for path in replicas} == {data}


# Sets that cannot be made


@pytest.mark.parametrize("how", ["size", "source", "resolve"])
def test_a_set_of_too_many_replicas_is_not_made(tmp_path: Path, how: str) -> None:
    """A record has 32 places. Nothing is left of the attempt."""
    source, *others = paths = [tmp_path / f"{number}.img" for number in range(33)]
    if how != "size":
        source.write_bytes(bytes(4096))
    if how == "resolve":
        for path in others:
            path.write_bytes(bytes(4096))
    before = sorted(os.listdir(tmp_path))
    arguments = {
        "size": "create --size=1M",
        "source": f"create --source={source}",
        "resolve": f"resolve --keep={source}",
    }[how].split()
    line = one_line(quorumfs(*arguments, *paths, check=False), 1)
    assert "33 replicas: a set with sidecars has at most 32" in line
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("how", ["size", "source"])
def test_a_threshold_above_the_number_of_replicas_is_refused(tmp_path: Path, how: str) -> None:
    """No mount would take that set as it was made; as many as there are it does take."""
    source, other = tmp_path / "a.img", tmp_path / "b.img"
    paths = [source, other]
    if how == "source":
        source.write_bytes(bytes(4096))
        paths = [other]
    make = ["create", "--size=4096"] if how == "size" else ["create", "--source", source]
    line = one_line(quorumfs(*make, "--vote-threshold=3", *paths, check=False), 4)
    assert "--vote-threshold 3 is more than there are replicas: 2" in line
    assert not other.exists()
    quorumfs(*make, "--vote-threshold=2", *paths)
    with Mounted([source, other], tmp_path):
        pass


def test_a_set_is_not_made_twice(tmp_path: Path) -> None:
    """What is there is a member, not a stranger; what the line says to do then works."""
    a, b = paths = [tmp_path / "a.img", tmp_path / "b.img"]
    quorumfs("create", "--size=1M", *paths)
    line = one_line(quorumfs("create", "--size=1M", *paths, check=False), 1)
    assert f"{a} is a member of a set already: mount it; or" in line
    assert f"remove it and {a}.quorumfs first" in line
    line = one_line(quorumfs("create", "--source", b, a, check=False), 1)
    assert f"{a} is a member of a set already" in line
    a.unlink()
    line = one_line(quorumfs("create", "--size=1M", *paths, check=False), 1)
    assert f"{a}.quorumfs is there without its image: bring {a} back" in line
    for path in (b, Path(f"{a}.quorumfs"), Path(f"{b}.quorumfs")):
        path.unlink()
    quorumfs("create", "--size=1M", *paths)


# A set of which one replica cannot be used: what the line says to do then works


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two members of a set in which one is enough, closed in order and holding something."""
    directory = tmp_path / "pair"
    directory.mkdir()
    paths = [directory / "a.img", directory / "b.img"]
    quorumfs("create", "--size=1M", "--vote-threshold=1", *paths)
    with Mounted(paths, directory) as mounted:
        mounted.file.write_bytes(b"x" * 8192)
    return paths


def test_a_mistyped_path_is_named(pair: list[Path], mountpoint: Path) -> None:
    a, b = pair
    typo = a.with_name("nob.img")
    line = refused([a, typo], mountpoint)
    assert f"{typo}: No such file or directory" in line
    assert f"{b} is not among the replicas given" in line
    assert f"{b}: " not in line, "nobody looked there"


def test_a_truncated_replica_gets_its_length_back(pair: list[Path], mountpoint: Path) -> None:
    """As the line says; then what it holds is compared, not believed."""
    os.truncate(pair[1], 4096)
    line = refused(pair, mountpoint)
    command = f"truncate -s {1 << 20} {pair[1]}"
    assert f"{pair[1]}: the image was truncated to 4096 bytes" in line
    assert line.index(command) < line.index("-o degraded")
    subprocess.run(command.split(), check=True)
    with Mounted(pair, pair[0].parent) as mounted:
        wait_until(lambda: is_healthy(mounted.mountpoint), "the comparison")
    assert same(pair)


def test_a_replica_with_an_unreadable_sidecar_is_made_a_copy(
    pair: list[Path], mountpoint: Path
) -> None:
    """By the very command in the line."""
    a, b = pair
    Path(f"{b}.quorumfs").write_bytes(bytes(4096))
    line = refused(pair, mountpoint)
    command = f"quorumfs resolve --keep {a} {a} {b}"
    assert f"the sidecar of {b} cannot be read (" in line
    assert line.index(command) < line.index("-o degraded")
    quorumfs(*command.split()[1:])
    with Mounted(pair, pair[0].parent) as mounted:
        wait_until(lambda: is_healthy(mounted.mountpoint), "the copy")
    assert same(pair)


@pytest.mark.parametrize("lie", ["a byte a chunk", "huge", "sparse", "fifo"])
def test_whatever_lies_in_place_of_a_sidecar_is_refused_soon(
    pair: list[Path], mountpoint: Path, lie: str
) -> None:
    """A checksum that fits proves nothing: no memory is taken, and nothing waited for, by the word
    of a file that anybody may have written.
    """
    place = Path(f"{pair[0]}.quorumfs")
    content = bytearray(place.read_bytes())
    size, chunk_size = {"a byte a chunk": (1 << 32, 1), "huge": (1 << 62, 1)}.get(lie, (0, 0))
    for slot in (0, 4096):
        content[slot + 56 : slot + 72] = struct.pack("<QQ", size, chunk_size)
        content[slot + 4080 : slot + 4096] = xxh3_128_digest(content[slot : slot + 4080])
    place.write_bytes(content)
    if lie == "sparse":
        os.truncate(place, 1 << 30)
    if lie == "fifo":
        place.unlink()
        os.mkfifo(place)
    why = "not a regular file" if lie == "fifo" else "slot 0: it cannot be true: "
    little = ["prlimit", f"--as={1 << 30}", *QUORUMFS]
    for paths in (pair[:1], pair):
        commands: list[list[str | Path]] = [["examine", *paths], ["mount", *paths, mountpoint]]
        for command in commands:
            done = subprocess.run(
                list(map(str, [*little, *command])),
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode in (1, 2)
            assert why in done.stdout + done.stderr
            assert "Traceback" not in done.stderr


def is_healthy(mountpoint: Path) -> bool:
    return quorumfs("status", mountpoint, check=False).returncode == 0


@pytest.mark.parametrize("what", ["dir", "missing", "fifo", "empty", "second in use"])
def test_a_source_that_cannot_be_copied_leaves_nothing(tmp_path: Path, what: str) -> None:
    """Images that were made for its copies are taken away again; what was there stays."""
    source, new, there = tmp_path / "a.img", tmp_path / "b.img", tmp_path / "c.img"
    there.write_bytes(content := os.urandom(4096))
    match what:
        case "dir":
            source.mkdir()
        case "fifo":
            os.mkfifo(source)
        case "empty":
            source.touch()
        case "second in use":
            source.write_bytes(bytes(4096))
    before = sorted(os.listdir(tmp_path))
    with there.open("rb") as file:
        if what == "second in use":
            assert try_lock(file.fileno(), 201, 1, exclusive=False)  # as QEMU: nobody else writes
        done = quorumfs("create", "--source", source, new, there, check=False)
    assert str(there if what == "second in use" else source) in one_line(done, 1)
    assert sorted(os.listdir(tmp_path)) == before
    assert there.read_bytes() == content


def test_a_sidecar_that_cannot_be_written_leaves_none(tmp_path: Path) -> None:
    """`create --source` can be said again once there is space: nobody is a member yet."""
    directory = tmp_path / "full"
    source = tmp_path / "a.img"
    source.write_bytes(os.urandom(1 << 20))
    with tmpfs(directory, 2 << 20):
        others = [tmp_path / "b.img", directory / "c.img"]
        others[1].write_bytes(bytes(1 << 20))
        with filled(directory):
            line = one_line(quorumfs("create", "--source", source, *others, check=False), 1)
        assert f"cannot write {others[1]}.quorumfs: No space left" in line
        assert sorted(os.listdir(tmp_path)) == ["a.img", "full"]
        assert os.listdir(directory) == ["c.img"]
        quorumfs("create", "--source", source, *others)
        assert same([source, *others])


# Mount points


@pytest.mark.parametrize("path", ["mnt", "m\rnt", "m\vn t"], ids=repr)
def test_mounts_without_a_source_are_understood(tmp_path: Path, path: str) -> None:
    """The kernel's table has an empty field there, and escapes not all white space of a path."""
    mountpoint = tmp_path / path
    mountpoint.mkdir()
    # Out of sight of everybody else, who may read the table too.
    script = 'mount -i -t tmpfs "" "$1" && shift && exec "$@"'
    command = [*QUORUMFS, "umount", str(mountpoint)]
    private = [*privately(script), str(mountpoint)]
    done = subprocess.run([*private, *command], capture_output=True, text=True, check=False)
    assert "is not a quorumfs mount" in one_line(done, 4)
    show = "import sys; from quorumfs.control.mounts import *; m = mount_at(sys.argv[1])"
    command = [sys.executable, "-c", f"{show}; print([m.mountpoint, m.fs_type])", str(mountpoint)]
    done = subprocess.run([*private, *command], capture_output=True, text=True, check=True)
    assert done.stdout == f"{[str(mountpoint), 'tmpfs']}\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "No such file or directory"), ("file", "not a directory")],
)
def test_a_mount_point_must_be_a_directory(
    make_images: MakeImages, tmp_path: Path, name: str, reason: str
) -> None:
    """The line names the mount point and the reason, and nothing is created."""
    (tmp_path / "file").touch()
    images = make_images(2)
    before = sorted(os.listdir(tmp_path))
    line = one_line(quorumfs("mount", *images, tmp_path / name, check=False), 1)
    assert str(tmp_path / name) in line
    assert reason in line
    assert sorted(os.listdir(tmp_path)) == before
    assert processes_of(tmp_path) == []


def test_a_live_mount_point_is_refused(make_images: MakeImages, tmp_path: Path) -> None:
    """A second mount would hide the first one's disk from whoever opens it next."""
    other = tmp_path / "other"
    other.mkdir()
    with Mounted(make_images(2), tmp_path) as mounted:
        before = mounted.file.stat()
        images = make_images(1, directory=other)
        done = quorumfs("mount", *images, mounted.mountpoint, check=False)
        assert f"{mounted.mountpoint} is already" in one_line(done, 1)
        assert mounted.file.stat() == before
        assert len(processes_of(mounted.mountpoint)) == 1


# As an ordinary user


def test_an_unreadable_replica_is_refused(user: OrdinaryUser) -> None:
    """Both "no rights on the file" and "no way to it" name the path and the reason."""
    mountpoint = user.make_directory("mnt")
    a, b = user.make_images(2)
    b.chmod(0)
    line = one_line(user.quorumfs("mount", a, b, mountpoint), 1)
    assert f"cannot open the replica {b}: Permission denied" in line

    private = user.directory / "private"
    private.mkdir(mode=0o700)
    line = one_line(user.quorumfs("mount", a, private / "b.img", mountpoint), 1)
    assert f"cannot open the replica {private}/b.img: Permission denied" in line
    assert filesystem_at(mountpoint) is None
    assert processes_of(mountpoint) == []


def test_a_replica_one_may_only_read_needs_ro(user: OrdinaryUser) -> None:
    """Mode 0444 is enough for ``-o ro``, and is refused without."""
    mountpoint = user.make_directory("mnt")
    images = user.make_images(2)
    for path in images:
        os.chown(path, 0, 0)
        path.chmod(0o444)
    assert "Permission denied" in one_line(user.quorumfs("mount", *images, mountpoint), 1)
    assert user.quorumfs("mount", "-o", "ro", *images, mountpoint).returncode == 0
    assert user.run("cmp", images[0], mountpoint / "disk.img").returncode == 0
    assert user.quorumfs("umount", mountpoint).returncode == 0


@pytest.mark.parametrize("suffix", ["", ".quorumfs"])
def test_a_member_one_may_not_use_is_named_with_the_reason(user: OrdinaryUser, suffix: str) -> None:
    """It is neither missing nor to be given up, and the other one is not blamed."""
    mountpoint = user.make_directory("mnt")
    a, b = (user.directory / name for name in ("a.img", "b.img"))
    assert user.quorumfs("create", "--size=1M", a, b, "--vote-threshold=1").returncode == 0
    closed = Path(f"{b}{suffix}")
    closed.chmod(0o444)
    os.chown(closed, 0, 0)
    line = one_line(user.quorumfs("mount", a, b, mountpoint), 1)
    mend = line.index("let this user read and write it")
    assert line.index(f"{closed}: Permission denied") < mend < line.index("-o degraded")
    os.chown(closed, user.uid, user.gid)
    closed.chmod(0o644)
    assert user.quorumfs("mount", a, b, mountpoint).returncode == 0
    assert user.quorumfs("umount", mountpoint).returncode == 0
    line = one_line(user.quorumfs("mount", "/etc/shadow", b, mountpoint), 1)
    assert "/etc/shadow: Permission denied" in line
    assert f"{a} is not among the replicas given" in line
    assert str(b) not in line


def test_a_mount_point_of_somebody_else_is_refused(user: OrdinaryUser) -> None:
    """fusermount3's reason arrives in the one line."""
    mountpoint = user.directory / "mnt"
    mountpoint.mkdir()
    line = one_line(user.quorumfs("mount", *user.make_images(2), mountpoint), 1)
    assert f"cannot mount at {mountpoint}" in line
    assert "fusermount3: user has no write access to mountpoint" in line
    assert processes_of(mountpoint) == []


def test_a_mount_of_somebody_else_is_not_unmounted(user: OrdinaryUser) -> None:
    """The line says whose it is, as ``status`` does; fusermount3 knows no more than its own."""
    directory = user.directory / "root's"
    directory.mkdir()
    with Mounted(user.make_images(2), directory) as mounted:
        line = one_line(user.quorumfs("umount", mounted.mountpoint), 1)
        assert f"{mounted.mountpoint} is a mount of root" in line
        assert "only that user and root may unmount it" in line
        assert filesystem_at(mounted.mountpoint) == "fuse.quorumfs"


def test_allow_other_is_the_administrators_to_allow(user: OrdinaryUser, tmp_path: Path) -> None:
    """Without user_allow_other in fuse.conf the line says just that."""
    tmp_path.joinpath("fuse.conf").write_text("# user_allow_other\n")
    tmp_path.joinpath("fuse.conf").chmod(0o644)
    mountpoint = user.make_directory("mnt")
    command = user.command("mount", "-o", "allow_other", *user.make_images(2), mountpoint)
    become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
    with file_replaced(Path("/etc/fuse.conf"), tmp_path / "fuse.conf") as prefix:
        done = subprocess.run(
            [*prefix, *become, *command],
            env=user.environment,
            capture_output=True,
            text=True,
            check=False,
        )
    line = one_line(done, 1)
    assert "user_allow_other" in line
    assert "fusermount3" in line
    assert processes_of(mountpoint) == []


def test_a_runtime_directory_of_somebody_else_is_done_without(user: OrdinaryUser) -> None:
    """Whoever makes our directory below /tmp first leads no command astray, and stops none."""
    shutil.rmtree(user.runtime, ignore_errors=True)
    user.runtime.mkdir()
    mountpoint = user.make_directory("mnt")
    try:
        done = user.quorumfs("mount", *user.make_images(2), mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(quorumfs("status", "--json", mountpoint).stdout)["owner"] == user.uid
        done = user.quorumfs("umount", mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert list(user.runtime.iterdir()) == []
    finally:
        user.runtime.rmdir()
        for private in Path("/tmp").glob(f"quorumfs-{user.uid}-*"):
            shutil.rmtree(private)


@pytest.mark.parametrize(
    ("options", "reason"),
    [("ro", "Read-only file system"), ("size=4k,nr_inodes=2", "No space left on device")],
    ids=["read-only", "full"],
)
def test_a_runtime_directory_that_takes_nothing_is_named_with_what_to_do(
    make_images: MakeImages, mountpoint: Path, options: str, reason: str
) -> None:
    home = runtime.directories(0)[0]
    home.mkdir(mode=0o700, exist_ok=True)
    script = f'mount -t tmpfs -o mode=700,{options} none {home} && exec "$@"'
    command = [*QUORUMFS, "mount", *map(str, make_images(1)), str(mountpoint)]
    done = subprocess.run(
        [*privately(script), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    refusal = f"quorumfs: cannot use the runtime directory {home}: {reason}; --runtime-dir names"
    assert one_line(done, 1).startswith(refusal)
    assert filesystem_at(mountpoint) is None


def test_another_user_can_neither_hold_up_root_nor_hide_a_mount(
    user: OrdinaryUser, make_images: MakeImages, tmp_path: Path
) -> None:
    """A daemon that is not ours answers for that mount, and nothing else there is what it was."""
    mountpoint = user.make_directory("mnt")
    assert user.quorumfs("mount", *user.make_images(1), mountpoint).returncode == 0
    (pid,) = processes_of(mountpoint)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    path = runtime.path_for(str(mountpoint), "sock", user.runtime)
    script = (
        "import json, os, socket, sys; path = sys.argv[1]; os.unlink(path)\n"
        "for suffix in ('pid', 'where', 'word'):\n"
        "    name = path.replace('sock', suffix); os.unlink(name); os.mkfifo(name)\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(path); listener.listen()\n"
        "print(flush=True); channel = listener.accept()[0]\n"
        "claim = {'schema': 1, 'mountpoint': '/mnt/roots-own', 'size': 'x'}\n"
        "channel.sendall(json.dumps(claim).encode() + b'\\n')\n"
    )
    user.directory.joinpath("fake.py").write_text(script)
    command = [user.python, user.directory / "fake.py", path]
    with (
        Mounted(make_images(1), tmp_path) as mounted,
        subprocess.Popen(
            list(map(str, command)), user=user.uid, extra_groups=[], stdout=subprocess.PIPE
        ) as fake,
    ):
        assert fake.stdout is not None
        fake.stdout.readline()
        done = quorumfs("status", "--json", check=False)
        answers = {answer["mountpoint"]: answer for answer in json.loads(done.stdout)}
        assert done.returncode == 2
        assert answers[str(mounted.mountpoint)]["state"] == "healthy"
        assert answers[str(mountpoint)]["problem"] == "invalid-answer"
        assert str(path) in answers[str(mountpoint)]["error"]
        assert "/mnt/roots-own" not in done.stdout
    assert seconds(lambda: quorumfs("umount", mountpoint)) < 20


def test_an_ordinary_user_mounts_writes_and_unmounts(user: OrdinaryUser) -> None:
    """No rights are needed but those on the files, the mount point and /dev/fuse."""
    mountpoint = user.make_directory("mnt")
    images = user.make_images(2)
    done = user.quorumfs("mount", *images, mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (pid,) = processes_of(mountpoint)
    write = "printf user | dd of=mnt/disk.img conv=notrunc status=none && stat -c %u mnt/disk.img"
    assert user.run("sh", "-c", write).stdout.split() == [str(user.uid)]
    done = user.quorumfs("umount", mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not is_alive(pid)
    assert all(path.read_bytes().startswith(b"user\0") for path in images)
