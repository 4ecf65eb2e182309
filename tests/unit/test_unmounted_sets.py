"""Sets are made: what a command that was killed left behind is no obstacle to the same command."""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from support.killing import CALLS, WRITES, Steps, counted, counted_write
from support.sets import tmpfs
from support.sidecars import decode

from quorumfs.decisions.record import path_for
from quorumfs.decisions.standing import Standing
from quorumfs.errors import UserError
from quorumfs.mount.copies import _failed, create_from
from quorumfs.mount.creating import create_empty
from quorumfs.mount.keeping import keep_one
from quorumfs.replica.imagelock import lock_image
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Storage

SIZE = 1 << 20


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Where the images are: they are synced often, and nobody is to wait for a disk."""
    with tmpfs(tmp_path / "memory", 512 << 20) as memory:
        yield memory


def named(directory: Path, count: int) -> list[str]:
    directory.mkdir(exist_ok=True)
    return [str(directory / f"{letter}.img") for letter in "abcd"[:count]]


def in_child(work: Callable[[], None]) -> bool:
    """Do *work* in a process of its own; whether that was not killed."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0
    return True


def killed_at(step: int, directory: Path, work: Callable[[], None]) -> bool:
    """Do *work*, killed at the *step*-th change in *directory*; whether it came to its end."""

    def until_killed() -> None:
        steps = Steps(str(directory), step)
        for name in CALLS:
            setattr(os, name, counted(steps, getattr(os, name), opens=name == "open"))
        for name in WRITES:
            setattr(os, name, counted_write(steps, getattr(os, name)))
        work()

    (directory / "armed").touch()
    return in_child(until_killed)


def done_again(work: Callable[[], None]) -> bool:
    """Do *work*; False if it had been done to its end before it was killed."""
    try:
        work()
    except UserError as error:
        if "is a member of a set already: mount it" not in str(error):
            raise
        return False
    return True


def test_a_creation_that_was_killed_is_done_by_the_same_command(memory: Path) -> None:
    """After each of its steps; and then nothing tells that it was ever killed."""
    for step in range(1, 100):
        paths = named(memory / str(step), 3)
        ended = killed_at(step, memory / str(step), partial(create_empty, paths, SIZE, 1))
        if not done_again(partial(create_empty, paths, SIZE, 2, 0o640)):
            assert all(os.path.exists(path_for(path)) for path in paths)
        for path in paths:
            assert Path(path).read_bytes() == bytes(SIZE)
            assert mode_of(path) == mode_of(path_for(path))
        if ended:
            break
    assert 12 < step < 99


def test_a_copy_that_was_killed_is_done_by_the_same_command(memory: Path) -> None:
    """One of two copies is made anew, the other one overwrites what was there."""
    content = os.urandom(SIZE)
    for step in range(1, 400, 3):
        source, new, old = paths = named(memory / str(step), 3)
        Path(source).write_bytes(content)
        Path(old).write_bytes(os.urandom(SIZE))
        copy = partial(create_from, source, [new, old], 2, lambda *_: None)
        ended = killed_at(step, memory / str(step), copy)
        done_again(copy)
        assert {Path(path).read_bytes() for path in paths} == {content}
        if ended:
            break
    assert 30 < step < 397


def set_of(paths: list[str]) -> list[bytes]:
    return [Path(file).read_bytes() for path in paths for file in (path, path_for(path))]


def test_what_is_used_since_is_not_made_anew(memory: Path) -> None:
    """Whatever is missing of it: an image, a sidecar, all but one."""
    a, b = paths = named(memory, 2)
    create_empty(paths, SIZE, 1)
    Path(path_for(b)).unlink()
    with open(a, "r+b") as file:
        file.write(b"x")
    before = Path(a).read_bytes(), Path(path_for(a)).read_bytes()
    with pytest.raises(UserError, match="is a member of a set already"):
        create_empty(paths, SIZE, 1)
    with pytest.raises(UserError, match="is a member of a set"):
        create_from(b, [a], 1, lambda *_: None)
    with pytest.raises(UserError, match="is a member of a set"):
        create_from(a, [b], 1, lambda *_: None)
    assert (Path(a).read_bytes(), Path(path_for(a)).read_bytes()) == before


def test_a_set_that_is_complete_is_not_copied_again(memory: Path) -> None:
    """Its source may have been changed since by who wants that copied: it would be overwritten."""
    a, b = paths = named(memory, 2)
    Path(a).write_bytes(bytes(SIZE))
    create_from(a, [b], 1, lambda *_: None)
    Path(a).write_bytes(b"x" * SIZE)
    before = set_of(paths)
    for source, other in (paths, paths[::-1]):
        with pytest.raises(UserError, match=f"{other} is a member of a set already: mount it"):
            create_from(source, [other], 1, lambda *_: None)
    assert set_of(paths) == before


@pytest.mark.parametrize("what", ["data", "size", "link", "symlink", "fifo", "in use", "directory"])
def test_a_new_image_takes_no_place_that_is_taken(memory: Path, what: str) -> None:
    """A file that is empty, or a hole of the right size, is as good as none; any other stays."""
    new, there = paths = named(memory, 2)
    if what not in ("fifo", "directory", "symlink"):
        Path(there).touch()
        os.truncate(there, SIZE + (what == "size"))
    match what:
        case "data":
            Path(there).write_bytes(bytes(SIZE))
        case "link":
            os.link(there, memory / "other")
        case "symlink":
            (memory / "other").touch()
            os.symlink(memory / "other", there)
        case "fifo":
            os.mkfifo(there)
        case "directory":
            os.mkdir(there)
    before = os.lstat(there), os.listdir(memory)
    with open(there, "rb") if what == "in use" else nullcontext() as file:
        if file is not None:
            lock_image(file.fileno(), read_only=True)
        with pytest.raises(UserError, match=f"cannot create {there}: File exists"):
            create_empty(paths, SIZE, 1)
    assert (os.lstat(there), os.listdir(memory)) == before
    assert not os.path.exists(new)


def test_what_is_taken_for_new_is_given_back_as_it_was(memory: Path) -> None:
    """When a later image cannot be made."""
    empty, hole, taken = paths = named(memory, 3)
    Path(empty).touch()
    Path(hole).touch()
    os.truncate(hole, SIZE)
    Path(taken).write_bytes(b"x")
    with pytest.raises(UserError, match="File exists"):
        create_empty(paths, SIZE, 1)
    assert [os.path.getsize(path) for path in paths] == [0, SIZE, 1]
    Path(taken).unlink()
    create_empty(paths, SIZE, 1)
    assert [os.path.getsize(path) for path in paths] == [SIZE] * 3


def test_two_paths_to_one_new_image_are_refused(memory: Path) -> None:
    (memory / "link").symlink_to(memory)
    for other in ("a.img", "link/a.img"):
        with pytest.raises(UserError, match="are the same file"):
            create_empty([str(memory / "a.img"), str(memory / other)], SIZE, 1)
        assert os.listdir(memory) == ["link"]


# Who may read what


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_new_images_have_the_mode_asked_for_whatever_the_umask(memory: Path, umask: int) -> None:
    source = str(memory / "source")
    Path(source).write_bytes(bytes(SIZE))
    os.chmod(source, 0o644)
    before = os.umask(umask)
    try:
        create_empty(named(memory / "private", 2), SIZE, 1)
        create_empty(named(memory / "shared", 2), SIZE, 1, 0o664)
        create_from(source, named(memory / "copy", 1), 1, lambda *_: None)
    finally:
        os.umask(before)
    expected = {"private": 0o600, "shared": 0o664, "copy": 0o600}
    for directory, mode in expected.items():
        for path in named(memory / directory, 2 if directory != "copy" else 1):
            assert (mode_of(path), mode_of(path_for(path))) == (mode, mode)
    assert (mode_of(source), mode_of(path_for(source))) == (0o644, 0o644)


def test_a_sidecar_is_for_whom_its_image_is_for(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root adopts the images of others. Where the sidecar cannot have their group, the group that
    it has gets no more than the others.
    """
    a, b = paths = named(memory, 2)
    create_empty(paths, SIZE, 1)
    for path in paths:
        os.unlink(path_for(path))
        os.chown(path, 7, 8)
        os.chmod(path, 0o660)
    keep_one(a, paths)
    for path in paths:
        status = os.stat(path_for(path))
        assert (status.st_uid, status.st_gid, mode_of(path_for(path))) == (7, 8, 0o660)

    def fail(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", fail)
    for mode, expected in ((0o660, 0o600), (0o664, 0o644)):
        for path in paths:
            os.unlink(path_for(path))
            os.chmod(path, mode)
        keep_one(a, paths)
        assert (os.stat(path_for(b)).st_gid, mode_of(path_for(b))) == (os.getegid(), expected)


@pytest.mark.parametrize("standing", Standing)
def test_a_copy_has_failed_once_the_files_of_what_is_not_written_are_closed(
    standing: Standing,
) -> None:
    """A suspect replica among them: a resync of it that never began would be awaited for ever."""
    for image in (None, cast("Storage", object())):
        replica = Replica(1, "/b.img", image, 8.0)
        replica.standing = standing
        failed = image is None and standing not in (Standing.CURRENT, Standing.RESYNCING)
        assert _failed(replica) is failed


@pytest.mark.parametrize("count", [6, 7, 14, 32])
def test_a_new_set_has_whole_sidecars_however_many_they_are(memory: Path, count: int) -> None:
    paths = [str(memory / f"{number}.img") for number in range(count)]
    create_empty(paths, SIZE, 1)
    for path in paths:
        sidecar = decode(Path(path_for(path)).read_bytes())
        assert sidecar.damage == ()
        assert not any(any(plane) for plane in sidecar.map.planes)
