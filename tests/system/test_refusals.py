"""What is refused before a mount changes anything: replicas and mount points that cannot be."""

import os
import shutil
import socket
import stat
import subprocess
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
    processes_of,
    refused,
)
from support.mounting import Mounted, quorumfs


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


# Mount points


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


def test_a_mount_point_of_somebody_else_is_refused(user: OrdinaryUser) -> None:
    """fusermount3's reason arrives in the one line."""
    mountpoint = user.directory / "mnt"
    mountpoint.mkdir()
    line = one_line(user.quorumfs("mount", *user.make_images(2), mountpoint), 1)
    assert f"cannot mount at {mountpoint}" in line
    assert "fusermount3: user has no write access to mountpoint" in line
    assert processes_of(mountpoint) == []


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


def test_a_runtime_directory_of_somebody_else_is_not_used(user: OrdinaryUser) -> None:
    """Whoever makes our directory below /tmp first cannot lead our commands astray."""
    shutil.rmtree(user.runtime, ignore_errors=True)
    user.runtime.mkdir()
    mountpoint = user.make_directory("mnt")
    try:
        line = one_line(user.quorumfs("mount", *user.make_images(2), mountpoint), 1)
    finally:
        user.runtime.rmdir()
    assert f"the runtime directory {user.runtime} belongs to somebody else" in line


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
