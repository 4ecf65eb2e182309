"""The replicas' files opened: which ones are used, and which are left as they are."""

import errno
import gc
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import trio
from support.claims import claim
from support.closing import close
from trio.testing import MockClock

from quorumfs.decisions.claim import Claim
from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.model import Standing
from quorumfs.decisions.record import path_for
from quorumfs.disk.events import EventLog
from quorumfs.errors import UserError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.mount import reopening, storages
from quorumfs.mount.creating import create_empty
from quorumfs.mount.keeping import keep_one
from quorumfs.mount.reopening import Reopener
from quorumfs.mount.replicaset import open_replica_set
from quorumfs.mount.storages import sidecar_storage
from quorumfs.options.parsing import parse_options
from quorumfs.repair.rejoin import ForeignError, Returned
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.filesystems import Locality, locality
from quorumfs.replica.images import Image, open_again, open_set
from quorumfs.replica.replica import Replica
from quorumfs.replica.sidecarfile import holder, sign
from quorumfs.replica.storage import Kind, Operation

SIZE = 1 << 20
OPTIONS = parse_options([], 2)
HANGS_S = 60.0
"""After so long (seconds) a test that would hang fails instead."""


def make_set(directory: Path, count: int) -> list[str]:
    """The paths of a new set's images."""
    directory.mkdir(exist_ok=True)
    paths = [str(directory / f"{letter}.img") for letter in "abc"[:count]]
    create_empty(paths, SIZE, None)
    return paths


@pytest.mark.parametrize("where", Locality)
def test_a_sidecar_is_waited_for_only_where_there_is_no_device(
    where: Locality, tmp_path: Path
) -> None:
    """Its own place counts: the image may be a mount point itself."""

    async def run() -> None:
        (path,) = make_set(tmp_path, 1)
        image = open_again(path)
        assert image.sidecar_fd is not None
        assert image.sidecar_locality is locality(image.sidecar_fd)
        sidecar = sidecar_storage(replace(image, sidecar_locality=where), 0)
        told: list[Operation] = []
        sidecar.submit(Operation(Kind.WRITE, 0, 4, b"new!"), lambda one, *_: told.append(one))
        assert bool(told) is (where is Locality.MEMORY)
        with trio.fail_after(HANGS_S):
            while not told:
                await trio.lowlevel.checkpoint()
        await close(sidecar)
        os.close(image.fd)

    trio.run(run)


def test_the_map_of_the_ledger_is_the_only_one(tmp_path: Path) -> None:
    """That of each sidecar was needed to decide: of a large disk it takes many megabytes."""

    async def run() -> None:
        paths = make_set(tmp_path, 3)
        replica_set = open_replica_set(paths, None, OPTIONS)
        disk, _ = replica_set.make_disk(OPTIONS, EventLog("disk", lambda _: None))
        assert isinstance(disk.metadata, Sidecars)
        (only,) = (one for one in maps() if not any(one is other for other in before))
        assert only is disk.metadata.ledger.map
        assert replica_set.longer_than(1)
        await disk.close()

    def maps() -> list[DirtyMap]:
        return [one for one in gc.get_objects() if isinstance(one, DirtyMap)]

    gc.collect()
    before = maps()  # which other tests left
    trio.run(run)


@pytest.mark.parametrize("size", [4096, 1, 0])
def test_an_image_cut_to_nothing_is_not_used(size: int, tmp_path: Path) -> None:
    """Scenario 38: as one cut to a block is; two of three are enough."""
    paths = make_set(tmp_path, 3)
    os.truncate(paths[0], size)
    replica_set = open_replica_set(paths, None, parse_options([], 3))
    for image in replica_set.images:
        image.close()
    assert replica_set.plan is not None
    members = replica_set.plan.members
    assert [member.state for member in members] == [
        Standing.MISSING,
        Standing.CURRENT,
        Standing.CURRENT,
    ]
    assert f"truncated to {size} bytes" in str(members[0].reason)


def test_an_empty_image_of_no_set_is_refused(tmp_path: Path) -> None:
    """Also beside members: nobody says that it ever was one."""
    paths = make_set(tmp_path, 2)
    (tmp_path / "new.img").touch()
    for others in ([], paths):
        given = [*others, str(tmp_path / "new.img")]
        with pytest.raises(UserError, match=r"new\.img is empty"):
            open_replica_set(given, None, parse_options([], len(given)))


@asynccontextmanager
async def _ejected(directory: Path) -> AsyncGenerator[tuple[Reopener, Replica]]:
    """The second replica of a set of two, its files closed, and what opens them again."""
    paths = make_set(directory, 2)
    replica_set = open_replica_set(paths, None, OPTIONS)
    disk, _ = replica_set.make_disk(OPTIONS, EventLog("", lambda _: None))
    assert isinstance(disk.metadata, Sidecars)
    first, second = disk.replicas
    await second.close()
    yield Reopener(disk.metadata, lambda: OPTIONS.replica_timeout_s, replica_io="buffered"), second
    await first.close()


async def _close(returned: Returned) -> None:
    await close(returned.image)
    await close(returned.sidecar)


def _sidecar(path: str) -> bytes:
    return Path(path_for(path)).read_bytes()


def _who_uses(path: str) -> str:
    fd = os.open(path_for(path), os.O_RDONLY)
    try:
        return holder(fd)
    finally:
        os.close(fd)


def test_reopening_does_not_touch_a_member_of_another_set(tmp_path: Path) -> None:
    """It is in the place of ours: a path may be mounted over, or given to another one."""
    theirs = make_set(tmp_path / "theirs", 2)[0]
    os.truncate(path_for(theirs), os.path.getsize(path_for(theirs)) - 1)  # nor is it lengthened
    before = _sidecar(theirs)

    async def story() -> None:
        async with _ejected(tmp_path / "ours") as (reopener, replica):
            os.replace(theirs, replica.path)
            os.replace(path_for(theirs), path_for(replica.path))
            await _close(await reopener.reopen(replica))
            assert _sidecar(replica.path) == before

    trio.run(story)


def test_reopening_one_of_ours_says_who_uses_it(tmp_path: Path) -> None:
    """And gives its sidecar the length back that it is written to in place."""

    async def story() -> None:
        async with _ejected(tmp_path) as (reopener, replica):
            whole = len(_sidecar(replica.path))
            os.truncate(path_for(replica.path), whole - 1)
            assert not _who_uses(replica.path)
            await _close(await reopener.reopen(replica))
            assert f"pid {os.getpid()} on " in _who_uses(replica.path)
            assert len(_sidecar(replica.path)) == whole

    trio.run(story)


def test_reopening_does_not_touch_what_another_mount_has(tmp_path: Path) -> None:
    """Until that has ended, or released it."""

    async def story() -> None:
        async with _ejected(tmp_path) as (reopener, replica):
            _leave(replica.path, claim())
            before = _sidecar(replica.path)
            with pytest.raises(ForeignError, match="in use by pid 4711 on nas1"):
                await reopener.reopen(replica)
            assert _sidecar(replica.path) == before
            _leave(replica.path, claim().release())
            await _close(await reopener.reopen(replica))
            assert f"pid {os.getpid()} on " in _who_uses(replica.path)

    trio.run(story)


def _leave(path: str, one: Claim) -> None:
    fd = os.open(path_for(path), os.O_RDWR)
    sign(fd, one)
    os.close(fd)


def test_reopening_one_cut_to_nothing_finds_it_so(tmp_path: Path) -> None:
    """Else nobody would know that it lacks everything, if it is given its length back."""

    async def story() -> None:
        async with _ejected(tmp_path) as (reopener, replica):
            os.truncate(replica.path, 0)
            returned = await reopener.reopen(replica)
            assert returned.found.image is not None
            assert returned.found.image.size == 0
            await _close(returned)

    trio.run(story)


class _Opening:
    """Has somebody give up waiting after the files were opened, and before that is known."""

    def __init__(self, give_up: Callable[[], None], *, late: bool) -> None:
        """*late*: the thread goes on when that has been noticed; else it ends before."""
        self.may_end = Event()
        self._give_up = give_up
        self._late = late
        self._ended = Event()
        self._token = trio.lowlevel.current_trio_token()
        self._run_sync = trio.to_thread.run_sync

    async def run_sync(
        self, open_files: Callable[[], None], *, abandon_on_cancel: bool = False
    ) -> None:
        def run() -> None:
            try:
                open_files()
            finally:
                self._ended.set()

        await self._run_sync(run, abandon_on_cancel=abandon_on_cancel)

    def open_again(self, path: str, directory: str | None, *, replica_io: str) -> Image:
        image = open_again(path, directory, replica_io=replica_io)
        self._token.run_sync_soon(self._in_the_loop)
        assert self.may_end.wait(HANGS_S)
        return image

    def _in_the_loop(self) -> None:
        self._give_up()
        if not self._late:  # nothing else happens in the loop until the thread has ended
            self.may_end.set()
            self.wait()

    def wait(self) -> None:
        """Until the thread has ended."""
        assert self._ended.wait(HANGS_S)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("cancelled", [False, True], ids=["timeout", "cancelled"])
def test_what_is_opened_when_nobody_waits_any_more_is_not_left_locked(
    cancelled: bool, late: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or the next attempt would find the replica in use, by ourselves, for ever."""
    clock = MockClock()

    async def story() -> None:
        async with _ejected(tmp_path) as (reopener, replica):
            with trio.CancelScope() as scope, monkeypatch.context() as patch:
                opening = _Opening(
                    scope.cancel if cancelled else lambda: clock.jump(OPTIONS.replica_timeout_s),
                    late=late,
                )
                patch.setattr(reopening, "open_again", opening.open_again)
                patch.setattr(trio.to_thread, "run_sync", opening.run_sync)
                with suppress(UserError):  # a timeout; or it was in time after all
                    await _close(await reopener.reopen(replica))
            assert scope.cancelled_caught == cancelled
            opening.may_end.set()
            opening.wait()
            await _close(await _reopened(reopener, replica))

    trio.run(story, clock=clock)


# Closing


class _Closes:
    """What is closed, and on which closing fails: `os.close`, for the time of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: str, error: int = errno.EIO) -> None:
        """Fails for files whose path contains *fail*; they are closed all the same."""
        self._close, self._fail, self._error = os.close, fail, error
        self.failed: list[str] = []
        monkeypatch.setattr(os, "close", self._do)

    def _do(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        self._close(fd)
        if self._fail in path:
            self.failed.append(path)
            raise OSError(self._error, os.strerror(self._error))


def _held_open(directory: Path) -> list[str]:
    """Files below *directory* that this process has open."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    places = [os.readlink(link) for link in links if os.path.islink(link)]
    return [place for place in places if place.startswith(str(directory))]


ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR]


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_of_one_that_is_in_use_it_is_said_so_whatever_closing_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    paths = make_set(tmp_path, 2)
    other = open_again(paths[1])
    closes = _Closes(monkeypatch, str(tmp_path), error)
    with pytest.raises(UserError, match=r"b\.img is in use by"):
        open_replica_set(paths, None, OPTIONS)
    assert len(closes.failed) == 3
    other.close()
    assert _held_open(tmp_path) == []


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_set_is_created_and_resolved_whatever_closing_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """What was synced before is durable."""
    closes = _Closes(monkeypatch, str(tmp_path), error)
    paths = make_set(tmp_path, 2)
    keep_one(paths[0], paths)
    assert closes.failed
    assert _held_open(tmp_path) == []
    open_again(paths[0]).close()


@pytest.mark.parametrize("which", ["a.img", ".quorumfs"])
def test_refused_by_a_stuck_close_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """The message comes first; who hangs is left to the end of the process."""
    paths = make_set(tmp_path, 2)
    other = open_again(paths[1])
    goes_on, close = Event(), os.close

    def hang(fd: int) -> None:
        hangs = os.readlink(f"/proc/self/fd/{fd}").endswith(which)
        close(fd)
        assert not hangs or goes_on.wait(HANGS_S)

    monkeypatch.setattr(os, "close", hang)
    with pytest.raises(UserError, match="in use"):
        open_set(paths, None, read_only=False, patience_s=0.5)
    goes_on.set()
    other.close()


@pytest.mark.parametrize("failing", [1, 2], ids=["image", "sidecar"])
def test_what_was_opened_again_and_cannot_be_used_is_closed(
    failing: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of it, and before the next attempt: in a thread, where it may hang."""

    async def story() -> None:
        async with _ejected(tmp_path) as (reopener, replica):
            made = 0

            def storage(*arguments: Any, **options: Any) -> FileStorage:
                nonlocal made
                made += 1
                if made == failing:
                    raise OSError(errno.EIO, "no status")
                return FileStorage(*arguments, **options)

            closing, goes_on = Event(), Event()
            close = Image.close

            def slowly(image: Image) -> None:
                closing.set()
                assert goes_on.wait(HANGS_S)
                close(image)

            with monkeypatch.context() as patch:
                patch.setattr(storages, "FileStorage", storage)
                patch.setattr(Image, "close", slowly)
                with pytest.raises(OSError, match="no status"):
                    await reopener.reopen(replica)
                assert closing.wait(HANGS_S)
                with pytest.raises(UserError, match="does not answer"):
                    await reopener.reopen(replica)
                goes_on.set()
            await _close(await _reopened(reopener, replica))

    trio.run(story)


async def _reopened(reopener: Reopener, replica: Replica) -> Returned:
    """As soon as the attempt before has ended."""
    deadline = time.monotonic() + HANGS_S
    while True:
        try:
            return await reopener.reopen(replica)
        except UserError:
            if time.monotonic() > deadline:
                raise
            await trio.lowlevel.checkpoint()


def test_one_whose_sidecar_is_gone_is_not_left_locked(tmp_path: Path) -> None:
    async def story() -> None:
        async with _ejected(tmp_path) as (reopener, replica):
            place = path_for(replica.path)
            os.rename(place, tmp_path / "away")
            with pytest.raises(UserError, match="there is no"):
                await reopener.reopen(replica)
            assert _held_open(tmp_path) == [
                name for name in _held_open(tmp_path) if "a.img" in name
            ]
            os.rename(tmp_path / "away", place)
            await _close(await reopener.reopen(replica))

    trio.run(story)
