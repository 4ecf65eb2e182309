"""``--if-needed`` and ``--check``: commands that may be given again, and that may be tried."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import filesystem_at, one_line
from support.mounting import quorumfs

from quorumfs.errors import ExitCode


def state_of(directory: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All that a command might change of the files in *directory*."""
    found = {}
    for path in [directory, *directory.iterdir()]:
        status = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[path.name] = (status.st_mtime_ns, status.st_mode, status.st_size, content)
    return found


def nothing_to_do(*arguments: str | Path) -> None:
    """*arguments* exit with 0 and say that it is so already, with ``--check`` as without."""
    for more in (["--if-needed"], ["--if-needed", "--check"]):
        done = quorumfs(*arguments[:1], *more, *arguments[1:])
        assert done.stdout.startswith("nothing to do: ")
        assert not done.stderr


def refusal(*arguments: str | Path) -> str:
    """Why *arguments* are refused with ``--if-needed``, as they are with ``--check`` too."""
    lines = [
        one_line(quorumfs(*arguments[:1], *more, *arguments[1:], check=False), ExitCode.FAILED)
        for more in (["--if-needed"], ["--if-needed", "--check"])
    ]
    assert lines[0] == lines[1]
    return lines[0]


def would(*arguments: str | Path) -> str:
    """What *arguments* would do, by ``--check``."""
    done = quorumfs(*arguments[:1], "--check", *arguments[1:], check=False)
    assert done.returncode == ExitCode.WOULD_CHANGE
    assert not done.stderr
    return done.stdout


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Where a test makes its set."""
    return [tmp_path / "a.img", tmp_path / "b.img"]


@pytest.fixture
def mounted(images: list[Path], mountpoint: Path) -> Iterator[Path]:
    """A set with the options ``fifo`` and threshold 1, mounted."""
    quorumfs("create", "--size", "1M", *images)
    quorumfs("mount", "-o", "read-pattern=fifo,vote-threshold=1", *images, mountpoint)
    yield mountpoint
    if filesystem_at(mountpoint):
        quorumfs("umount", mountpoint)


# create


def test_a_set_is_created_once(images: list[Path], tmp_path: Path) -> None:
    """P6: the same command may be given again, and nothing is written; another one is refused."""
    command: list[str | Path] = ["create", "--size", "1M", *images]
    before = state_of(tmp_path)
    assert would(*command) == f"would make {images[0]}, {images[1]}, of 1.0 MiB each\n"
    assert state_of(tmp_path) == before
    quorumfs("create", "--if-needed", "--size", "1M", *images)
    before = state_of(tmp_path)
    nothing_to_do(*command)
    nothing_to_do("create", "--source", images[0], images[1])
    assert "is 1048576 bytes, not 2097152" in refusal("create", "--size", "2M", *images)
    assert "vote-threshold is 2, not 1" in refusal(*command, "--vote-threshold", "1")
    assert "is 0600, not 0660" in refusal(*command, "--mode", "0660")
    assert f"it has 2 replicas: {images[0]}, {images[1]}" in refusal(*command[:-1])
    assert "is a member of a set" in refusal(*command, tmp_path / "c.img")
    assert state_of(tmp_path) == before


def test_a_set_in_use_is_not_created_again(images: list[Path], mounted: Path) -> None:
    assert mounted.is_dir()
    nothing_to_do("create", "--size", "1M", *images)


def test_copies_are_made_once(make_images: MakeImages, tmp_path: Path) -> None:
    a, b = make_images(2)
    a.write_bytes(os.urandom(1 << 20))
    c = tmp_path / "c.img"
    before = state_of(tmp_path)
    assert would("create", "--source", a, b, c) == f"would copy {a} over {b}, {c}\n"
    assert state_of(tmp_path) == before
    quorumfs("create", "--if-needed", "--source", a, b, c)
    assert a.read_bytes() == b.read_bytes() == c.read_bytes()
    nothing_to_do("create", "--source", a, b, c)


def test_images_that_were_only_taken_as_they_are_are_no_copies(
    make_images: MakeImages, mountpoint: Path
) -> None:
    """Nobody has decided which of them is the disk."""
    a, b = make_images(2)
    a.write_bytes(os.urandom(1 << 20))
    b.write_bytes(os.urandom(1 << 20))
    quorumfs("mount", a, b, mountpoint)
    quorumfs("umount", mountpoint)
    line = refusal("create", "--source", a, a, b)
    assert "not found equal: mount them, and quorumfs status tells where they differ" in line
    assert f"quorumfs resolve --keep {a} {a} {b}" in line


@pytest.mark.parametrize(
    ("options", "names", "reason"),
    [
        (["--size", "1M"], ["a.img", "new.img"], "cannot create {0}/a.img: File exists"),
        (["--size", "1M"], ["no/x.img", "y.img"], "cannot create {0}/no/x.img: No such file"),
        (["--size", "1M"], ["y.img", "y.img"], "{0}/y.img are the same file"),
        (["--source", "a.img"], ["no/x.img"], "{0}/no/x.img: No such file"),
        (["--source", "gone.img"], ["x.img"], "{0}/gone.img: No such file"),
        (["--source", "a.img"], ["linked.img"], "{0}/linked.img has other names"),
    ],
)
def test_a_check_refuses_what_the_command_would(
    make_images: MakeImages, tmp_path: Path, options: list[str], names: list[str], reason: str
) -> None:
    make_images(1)[0].write_bytes(b"x" * (1 << 20))
    (tmp_path / "linked.img").write_bytes(b"y" * (1 << 20))
    os.link(tmp_path / "linked.img", tmp_path / "other")
    before = state_of(tmp_path)
    command = [word if "." not in word else str(tmp_path / word) for word in [*options, *names]]
    for check in (["--check"], []):
        line = one_line(quorumfs("create", *check, *command, check=False), ExitCode.FAILED)
        assert reason.format(tmp_path) in line
    left = state_of(tmp_path)
    assert left.pop(tmp_path.name)[1:] == before.pop(tmp_path.name)[1:]
    assert left == before


# mount and umount


def test_a_disk_is_mounted_once(images: list[Path], mountpoint: Path, tmp_path: Path) -> None:
    """The same replicas and options are nothing to do; what differs is named, all of it."""
    quorumfs("create", "--size", "1M", *images)
    command: list[str | Path] = ["mount", "-o", "read-pattern=fifo", *images, mountpoint]
    before = state_of(tmp_path)
    assert would(*command) == f"would mount {images[0]}, {images[1]} at {mountpoint}\n"
    assert state_of(tmp_path) == before
    quorumfs("mount", "--if-needed", *command[1:])
    nothing_to_do(*command)
    reason = refusal("mount", "-o", "sync,mode=0640", images[0], tmp_path / "c.img", mountpoint)
    for difference in (
        f"{images[1]} is a replica there",
        f"{tmp_path}/c.img is no replica there",
        "read-pattern=fifo instead of read-pattern=quorum",
        "mode=0600 instead of mode=0640",
        "no sync instead of sync",
    ):
        assert difference in reason
    order = refusal("mount", "-o", "read-pattern=fifo", *reversed(images), mountpoint)
    assert f"reads the replicas in the order {images[0]}, {images[1]}" in order
    quorumfs("set", mountpoint, "resync-rate=1M")
    assert "resync-rate=1048576 instead of resync-rate=none" in refusal(*command)
    nothing_to_do("mount", "-o", "read-pattern=fifo,resync-rate=1M", *images, mountpoint)
    one_line(quorumfs("mount", "--check", *command[1:], check=False), ExitCode.FAILED)
    quorumfs("umount", mountpoint)


def test_a_mount_by_other_names_is_the_same(
    images: list[Path], mounted: Path, tmp_path: Path
) -> None:
    """A symbolic link leads to the same file; one replica given twice is no set of two."""
    link = tmp_path / "link.img"
    link.symlink_to(images[1])
    options = ("-o", "read-pattern=fifo,vote-threshold=1")
    nothing_to_do("mount", *options, images[0], link, mounted)
    line = one_line(
        quorumfs("mount", "--if-needed", *options, *images, images[1], mounted, check=False),
        ExitCode.FAILED,
    )
    assert f"{images[1]} and {images[1]} are the same file" in line


def test_a_check_of_a_mount_says_what_it_would_find(
    make_images: MakeImages, mountpoint: Path, tmp_path: Path
) -> None:
    """Raw images get no sidecars by it; what a mount refuses it refuses, and leaves no lock."""
    a, b = make_images(2)
    assert "would be adopted" in would("mount", a, b, mountpoint)
    assert not list(tmp_path.glob("*.quorumfs"))
    b.write_bytes(b"shorter")
    lines = [
        one_line(quorumfs("mount", *check, a, b, mountpoint, check=False), ExitCode.FAILED)
        for check in (["--check"], [])
    ]
    assert lines[0] == lines[1]
    assert f"{b} has 7" in lines[0]


def test_a_disk_is_unmounted_once(mounted: Path, tmp_path: Path) -> None:
    with (mounted / "disk.img").open("rb"):
        busy = quorumfs("umount", "--check", mounted, check=False)
        assert f"pid {os.getpid()} (" in one_line(busy, ExitCode.FAILED)
    assert would("umount", mounted) == f"would unmount {mounted}\n"
    assert filesystem_at(mounted) == "fuse.quorumfs"
    quorumfs("umount", "--if-needed", mounted)
    assert filesystem_at(mounted) is None
    nothing_to_do("umount", mounted)
    nothing_to_do("umount", tmp_path / "never")
    one_line(quorumfs("umount", "--check", mounted, check=False), ExitCode.USAGE)


def test_another_file_system_is_not_taken_for_unmounted(mountpoint: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=True)
    try:
        assert f"{mountpoint} is a mount of tmpfs" in refusal("umount", mountpoint)
    finally:
        subprocess.run(["umount", mountpoint], check=True)
