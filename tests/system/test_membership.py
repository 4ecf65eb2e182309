"""Replicas taken out and in, added, removed and replaced, while a guest uses the disk."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.sets import (
    BLOCK,
    CHUNK,
    EXTENT,
    MIB,
    SetMount,
    create,
    examine,
    named,
    opened,
    refused,
    same,
    seen,
    sidecar,
)

SIZE = 32 * MIB
FIFO = "read-pattern=fifo"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return create(named(tmp_path, 2), SIZE, "--vote-threshold=1")


def verb(disk: SetMount, name: str, *arguments: str | Path) -> dict[str, object]:
    """What a verb answers that succeeds."""
    done = quorumfs(name, "--json", disk.mountpoint, *arguments)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def refusal(disk: SetMount, name: str, *arguments: str | Path, exit_code: int = 1) -> str:
    """Why a verb is refused, in one line."""
    done = quorumfs(name, disk.mountpoint, *arguments, check=False)
    assert done.returncode == exit_code, done
    assert done.stderr.count("\n") == 1
    return done.stderr


def write(disk: SetMount, data: bytes, chunk: int = 0) -> None:
    """A block that is durable."""
    with opened(disk.file) as fd:
        os.pwrite(fd, data * BLOCK, chunk * CHUNK)
        os.fsync(fd)


def paths_of(disk: SetMount) -> list[str]:
    """The replicas of the mount, in its order."""
    return [part["path"] for part in disk.status()["replicas"]]


class Writer:
    """Writes whole blocks of one number each, ever higher, in order, until told to stop."""

    def __init__(self, disk: SetMount) -> None:
        self._file = disk.file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.written = 0
        """The last number that was acknowledged everywhere."""
        self.error: OSError | None = None

    def _run(self) -> None:
        try:
            with opened(self._file, os.O_RDWR) as fd:
                while not self._stop.is_set():
                    number = self.written + 1
                    for place in range(4):
                        os.pwrite(fd, number.to_bytes(8, "little") * (BLOCK // 8), place * 8 * MIB)
                    self.written = number
        except OSError as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self.error is None

    @staticmethod
    def numbers(image: Path) -> list[int]:
        """What an image holds of it, in the order in which it is written."""
        with opened(image, os.O_RDONLY) as fd:
            return [
                int.from_bytes(os.pread(fd, 8, place * 8 * MIB), "little") for place in range(4)
            ]


# Offline, online


def test_an_offline_replica_is_a_copy_of_one_moment(tmp_path: Path, images: list[Path]) -> None:
    """Under load: of writes in order it holds the first, and none after one that it lacks."""
    with SetMount(images, tmp_path, FIFO) as disk, Writer(disk) as writer:
        while writer.written < 20:
            time.sleep(0.001)
        before = writer.written
        assert verb(disk, "offline", "b.img")["state"] == "offline"
        after = writer.written + 1
        numbers = Writer.numbers(images[1])
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] - numbers[-1] <= 1
        assert before <= numbers[-1] <= after
        content = seen(images[1:])
        goal = writer.written + 20
        while writer.written < goal:
            time.sleep(0.001)
        assert seen(images[1:]) == content
        verb(disk, "online", images[1])
        disk.wait_healthy()
    assert same(images)


def test_its_image_is_for_any_program_and_opens_in_qemu(tmp_path: Path, images: list[Path]) -> None:
    """Which takes locks, and found them taken before."""
    look = ["qemu-io", "-f", "raw", "-c", "read -P 0x61 0 4k", str(images[1])]
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        busy = subprocess.run(look, capture_output=True, text=True, check=False)
        assert "lock" in busy.stderr
        verb(disk, "offline", images[1])
        free = subprocess.run(look, capture_output=True, text=True, check=True)
        assert "verification failed" not in free.stdout


def test_it_stays_offline_at_later_mounts(tmp_path: Path, images: list[Path]) -> None:
    """Whoever else reads it then is not disturbed; and only what was written since is copied."""
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a", chunk=EXTENT // CHUNK)
        verb(disk, "offline", images[1])
        write(disk, b"b")
    content = seen([images[1], sidecar(images[1])])
    with SetMount(images, tmp_path, FIFO) as disk:
        assert disk.states() == ["current", "offline"]
        status = quorumfs("status", disk.mountpoint, check=False)
        assert status.returncode == 1
        assert f"{images[1]} is offline" in status.stdout
        assert "quorumfs online" in status.stdout
        write(disk, b"c", chunk=1)
        assert seen([images[1], sidecar(images[1])]) == content
        assert verb(disk, "online", images[1])["out_of_sync_bytes"] == 2 * CHUNK
        disk.wait_healthy()
        assert disk.replica(images[1])["copied_bytes"] == 2 * BLOCK
    assert same(images)


def test_a_mount_does_without_an_offline_replica_that_is_in_use_elsewhere(
    tmp_path: Path, images: list[Path]
) -> None:
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        verb(disk, "offline", images[1])
    images[1].rename(tmp_path / "away.img")
    with SetMount(images, tmp_path, FIFO) as disk:
        assert disk.states() == ["current", "offline"]
        write(disk, b"b")


def test_what_was_changed_while_it_was_offline_is_noticed(
    tmp_path: Path, images: list[Path]
) -> None:
    """A repair of its file system, say: then it is compared in full, and made equal."""
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        verb(disk, "offline", images[1])
        with opened(images[1], os.O_RDWR) as fd:
            os.pwrite(fd, b"x" * BLOCK, 20 * MIB)
        verb(disk, "online", images[1])
        disk.wait_healthy()
    assert same(images)


def test_the_last_replica_stays(tmp_path: Path, images: list[Path]) -> None:
    """And says how many are needed."""
    with SetMount(images, tmp_path, FIFO) as disk:
        verb(disk, "offline", images[1])
        text = refusal(disk, "offline", images[0])
        assert f"{images[0]} stays in use" in text
        assert "vote-threshold=1" in text
        assert "stays in use" in refusal(disk, "remove", images[0])
        write(disk, b"a")


def test_two_that_must_agree_stay(tmp_path: Path) -> None:
    images = create(named(tmp_path, 2), SIZE)
    with SetMount(images, tmp_path) as disk:
        assert "vote-threshold=2" in refusal(disk, "offline", images[0])
        assert "vote-threshold=2" in refusal(disk, "remove", images[0])
        assert disk.states() == ["current", "current"]


def test_who_is_unknown_is_told_who_there_is(tmp_path: Path, images: list[Path]) -> None:
    with SetMount(images, tmp_path, FIFO) as disk:
        for name in ("offline", "online", "remove"):
            text = refusal(disk, name, "nobody.img", exit_code=4)
            assert all(str(path) in text for path in images)


def test_verbs_need_sidecars_and_a_mount_for_writing(tmp_path: Path, images: list[Path]) -> None:
    with SetMount(images, tmp_path, f"{FIFO},ro") as disk:
        for name in ("offline", "online", "remove"):
            assert "mounted for writing" in refusal(disk, name, images[1])
        assert "mounted for writing" in refusal(disk, "add", tmp_path / "c.img")
    assert not (tmp_path / "c.img").exists()


@contextmanager
def one_elsewhere(tmp_path: Path, images: list[Path]) -> Iterator[tuple[SetMount, FaultFS]]:
    """A mount whose second replica is on a store that can fail."""
    (tmp_path / "store").mkdir()
    with FaultFS(tmp_path / "store") as store:
        there = create([images[0], store.path("z.img")], SIZE, "--vote-threshold=1")
        with SetMount(there, tmp_path, f"{FIFO},replica-timeout=1s") as disk:
            yield disk, store


def test_a_replica_that_hangs_can_be_removed(tmp_path: Path) -> None:
    """The guest waits once, the disk goes on, and it is said that its files are not closed yet."""
    with one_elsewhere(tmp_path, named(tmp_path, 1)) as (disk, store):
        write(disk, b"a")
        store.stop()
        write(disk, b"b")
        text = verb(disk, "remove", disk.replicas[1])["message"]
        assert "its files are closed when it does" in str(text)
        assert paths_of(disk) == [str(disk.replicas[0])]
        assert disk.status()["state"] == "healthy"
        store.cont()
        write(disk, b"c")


# Add, remove, replace


def test_two_become_three_and_the_first_is_removed(tmp_path: Path, images: list[Path]) -> None:
    """Under load; the order of reads follows at once."""
    third = tmp_path / "c.img"
    with SetMount(images, tmp_path, FIFO) as disk:
        with Writer(disk):
            assert verb(disk, "add", "--at=1", "--wait", third)["state"] == "current"
            assert paths_of(disk) == [str(third), *map(str, images)]
            text = verb(disk, "remove", images[0])["message"]
            assert f"{third} {images[1]}" in str(text)
        assert paths_of(disk) == [str(third), str(images[1])]
        read = disk.replica(third)["reads"]
        with opened(disk.file, os.O_RDONLY | os.O_DIRECT) as fd:
            os.pread(fd, BLOCK, 31 * MIB)
        assert disk.replica(third)["reads"] == read + 1
        assert disk.status()["state"] == "healthy"
    assert same([third, images[1]])
    with SetMount([third, images[1]], tmp_path, FIFO) as disk:
        assert disk.status()["state"] == "healthy"


def test_a_disk_dies_and_a_new_one_takes_its_place(tmp_path: Path) -> None:
    """The day that a mirror is bought for: the guest runs throughout."""
    (first,), new = named(tmp_path, 1), tmp_path / "new.img"
    with one_elsewhere(tmp_path, [first]) as (disk, store):
        with Writer(disk):
            store.inject("z.img", "any", errno=errno.EIO)
            store.inject("z.img.quorumfs", "any", errno=errno.EIO)
            disk.wait_for_state(disk.replicas[1], "stale", "missing")
            text = verb(disk, "replace", disk.replicas[1], new)["message"]
            assert f"{new} holds everything" in str(text)
        assert disk.status()["state"] == "healthy"
        assert paths_of(disk) == [str(first), str(new)]
    assert same([first, new])


def test_a_good_one_is_replaced_and_serves_until_then(tmp_path: Path, images: list[Path]) -> None:
    new = tmp_path / "new.img"
    with SetMount(images, tmp_path, f"{FIFO},resync-rate=10M") as disk:
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, os.urandom(24 * MIB), 0)
        replacing = threading.Thread(target=verb, args=(disk, "replace", images[0], new))
        replacing.start()
        disk.wait_for_state(new, "resyncing")
        assert disk.replica(images[0])["state"] == "current"
        assert paths_of(disk) == [str(new), *map(str, images)]
        replacing.join()
        assert paths_of(disk) == [str(new), str(images[1])]
        assert disk.replica(new)["bytes_read"] == 0, "a hole was compared"
        again = verb(disk, "replace", images[0], new)["message"]
        assert "was removed before" in str(again)
    assert same([new, images[1]])


def test_offline_says_that_a_replica_which_is_behind_is_no_backup(
    tmp_path: Path, images: list[Path]
) -> None:
    """Its image is a mixture of what it was and what the disk is."""
    with SetMount(images, tmp_path, FIFO) as disk:
        verb(disk, "offline", images[1])
        write(disk, b"b does not get this")
        verb(disk, "resync", "--pause")
        verb(disk, "online", images[1])
        done = quorumfs("offline", disk.mountpoint, images[1], check=False)
        assert done.returncode == 1
        assert f"{images[1]} is offline" in done.stdout
        assert "it is no copy of the disk, for it was not current" in done.stdout
        assert verb(disk, "offline", images[1])["out_of_sync_bytes"]
        verb(disk, "resync", "--resume")
        verb(disk, "online", images[1])
        disk.wait_healthy()
        assert verb(disk, "offline", images[1])["out_of_sync_bytes"] == 0


@pytest.mark.parametrize("removed_meanwhile", [False, True])
def test_one_with_the_same_file_name_takes_the_place(
    tmp_path: Path, images: list[Path], removed_meanwhile: bool
) -> None:
    """``replace b.img /srv/new/b.img`` is what man pages show; NEW is never what is removed."""
    (tmp_path / "new").mkdir()
    new = tmp_path / "new" / images[1].name
    with SetMount(images, tmp_path, f"{FIFO},resync-rate=10M") as disk:
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, os.urandom(16 * MIB), 0)
        arguments = (disk, "replace", images[1].name, new)
        replacing = threading.Thread(target=verb, args=arguments)
        replacing.start()
        disk.wait_for_state(new, "resyncing")
        if removed_meanwhile:
            verb(disk, "remove", images[1])
        replacing.join()
        for _ in range(2):
            assert paths_of(disk) == [str(images[0]), str(new)]
            assert f"{images[1]} was removed before" in str(verb(*arguments)["message"])
        assert "was removed before" in str(verb(disk, "remove", images[1])["message"])
        disk.wait_healthy()
    assert same([images[0], new])


def test_who_is_current_already_takes_nobodys_place(tmp_path: Path, images: list[Path]) -> None:
    """Else the set would have one copy less, which nobody asked for."""
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        for new in images:
            text = refusal(disk, "replace", images[0], new)
            assert f"{new} is a replica already" in text
            assert "quorumfs remove" in text
        assert disk.states() == ["current", "current"]
        assert paths_of(disk) == list(map(str, images))


def test_adopted_images_that_differ_are_no_copies(tmp_path: Path) -> None:
    """Nobody has said which one is right: neither is taken out as what the disk is."""
    images = named(tmp_path, 2)
    for number, path in enumerate(images):
        path.write_bytes(bytes([number]) * SIZE)
    with SetMount(images, tmp_path, f"{FIFO},vote-threshold=1") as disk:
        disk.wait(lambda status: status["state"] == "needs-operator", "a decision to be asked for")
        for name in ("offline", "remove"):
            told = refusal(disk, name, images[0], exit_code=3)
            assert "first run: quorumfs resolve --keep REPLICA" in told
        assert disk.states() == ["current", "current"]


def test_who_was_removed_is_said_when_and_comes_back_when_asked(
    tmp_path: Path, images: list[Path]
) -> None:
    """It is mounted neither alone nor with the others; with consent its content is given up."""
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        verb(disk, "remove", images[1])
        write(disk, b"b")
        assert "was removed before" in str(verb(disk, "remove", images[1])["message"])
    assert "it was removed from the set on 20" in refused(images[1:], tmp_path, 1, FIFO)
    with SetMount(images, tmp_path, FIFO) as disk:
        assert disk.states() == ["current", "foreign"]
        assert "removed from the set on 20" in disk.replica(images[1])["reason"]
        assert verb(disk, "add", "--overwrite", "--wait", images[1])["state"] == "current"
        assert paths_of(disk) == list(map(str, images))
        verb(disk, "remove", images[1])
    with SetMount(images[:1], tmp_path, FIFO) as disk:
        assert disk.status()["state"] == "healthy"
        text = refusal(disk, "add", images[1])
        assert "was a replica of this set" in text
        assert "--overwrite" in text
        assert verb(disk, "add", "--overwrite", "--wait", images[1])["state"] == "current"
    assert same(images)


def test_a_missing_replica_can_be_removed(tmp_path: Path) -> None:
    """One that the mount was not given, by the path where it was."""
    images = create(named(tmp_path, 3), SIZE)
    with SetMount(images, tmp_path) as disk:
        write(disk, b"a")
    with SetMount(images[:2], tmp_path) as disk:
        assert disk.status()["state"] == "degraded"
        verb(disk, "remove", images[2])
        assert disk.wait_healthy()["vote_threshold"] == 2
        text = refusal(disk, "remove", images[1])
        assert "vote-threshold=2" in text


def test_an_image_with_data_is_not_overwritten_unasked(tmp_path: Path, images: list[Path]) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"x" * SIZE)
    short = tmp_path / "short.img"
    short.write_bytes(b"x" * BLOCK)
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        assert "use --overwrite" in refusal(disk, "add", other)
        assert other.read_bytes() == b"x" * SIZE
        assert not sidecar(other).exists()
        assert f"truncate -s {SIZE}" in refusal(disk, "add", "--overwrite", short)
        assert "inside the mount point" in refusal(disk, "add", "--overwrite", disk.file)
        (tmp_path / "link.img").symlink_to(images[1])
        assert refusal(disk, "add", "--overwrite", tmp_path / "link.img")
        assert paths_of(disk) == list(map(str, images))
        verb(disk, "add", "--overwrite", "--wait", other)
    assert same([*images, other])


ALONE = f"{FIFO},degraded"


def part(tmp_path: Path, images: list[Path]) -> None:
    """Each was used without the other, once the set is mounted again."""
    with SetMount(images[1:], tmp_path, ALONE) as disk:
        write(disk, b"apart", chunk=3)


def lose_sidecar(_: Path, images: list[Path]) -> None:
    sidecar(images[1]).unlink()


def garble_sidecar(_: Path, images: list[Path]) -> None:
    sidecar(images[1]).write_bytes(b"x" * sidecar(images[1]).stat().st_size)


def take_sidecar_of_another_set(tmp_path: Path, images: list[Path]) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = create(named(tmp_path / "theirs", 2), SIZE)
    shutil.copy(sidecar(theirs[1]), sidecar(images[1]))


@pytest.mark.parametrize("spoil", [part, lose_sidecar, garble_sidecar, take_sidecar_of_another_set])
def test_one_that_cannot_be_used_is_made_anew_when_asked(
    tmp_path: Path, images: list[Path], spoil: Callable[[Path, list[Path]], None]
) -> None:
    """To add a replica of the set again does not say that it is one while it cannot be used."""
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
    spoil(tmp_path, images)
    held = images[1].read_bytes()
    with SetMount(images[:1], tmp_path, ALONE) as disk:
        write(disk, b"b", chunk=1)
        for _ in range(2):  # the mount has it from the first time on
            done = quorumfs("add", disk.mountpoint, images[1], check=False)
            assert "and missing" in done.stdout or "cannot be used" in done.stderr
            assert "use --overwrite" in done.stdout + done.stderr
        if disk.replica(images[1])["state"] == "foreign":
            shown = quorumfs("status", disk.mountpoint, check=False).stdout
            assert f"quorumfs add --overwrite {disk.mountpoint} {images[1]}" in shown
        assert images[1].read_bytes() == held
        assert verb(disk, "add", "--overwrite", "--wait", images[1])["state"] == "current"
        assert paths_of(disk) == list(map(str, images))
        write(disk, b"c", chunk=2)
    assert same(images)
    with SetMount(images, tmp_path, FIFO) as disk:
        assert disk.status()["state"] == "healthy"


@pytest.mark.parametrize("wait", [[], ["--wait"]])
def test_one_that_is_offline_stays_so_when_it_is_added(
    tmp_path: Path, images: list[Path], wait: list[str]
) -> None:
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        verb(disk, "offline", images[1])
    with SetMount(images[:1], tmp_path, FIFO) as disk:
        done = quorumfs("add", "--overwrite", *wait, disk.mountpoint, images[1], check=False)
        assert done.returncode == (1 if wait else 0)
        assert "quorumfs online" in done.stdout + done.stderr
        assert disk.states() == ["current", "offline"]
        verb(disk, "online", images[1])
        disk.wait_healthy()


def test_one_that_is_absent_is_added_again_as_missing(tmp_path: Path, images: list[Path]) -> None:
    away = tmp_path / "away.img"
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
    images[1].rename(away)
    with SetMount(images[:1], tmp_path, ALONE) as disk:
        message = str(verb(disk, "add", images[1])["message"])
        assert "missing" in message
        assert "No such file" in message
        away.rename(images[1])
        disk.wait_healthy()


def test_of_another_set(tmp_path: Path, images: list[Path]) -> None:
    """It is somebody's, until the operator gives it up."""
    (tmp_path / "theirs").mkdir()
    theirs = create(named(tmp_path / "theirs", 2), SIZE)
    with SetMount(images, tmp_path, FIFO) as disk:
        text = refusal(disk, "add", theirs[0])
        assert "is of set" in text
        assert "--overwrite" in text


def test_a_small_set_takes_the_place_of_one_that_was_removed(tmp_path: Path) -> None:
    """Once all that are left know that the place is free; before, it becomes a larger set."""
    images = create(named(tmp_path, 6), 4 * MIB, "--vote-threshold=1")
    more = [tmp_path / f"more{number}.img" for number in range(2)]
    with SetMount(images, tmp_path, FIFO) as disk:
        write(disk, b"a")
        verb(disk, "remove", images[5])
        disk.wait_healthy()
        verb(disk, "add", "--wait", more[0])
    places = examine(more[0])["replicas"][0]["roles"]
    assert len(places) == 6
    images[5] = more[0]
    with SetMount(images, tmp_path, FIFO) as disk:
        assert disk.status()["state"] == "healthy"
        verb(disk, "remove", images[5])
        verb(disk, "offline", images[4])
        verb(disk, "add", "--wait", more[1])
        verb(disk, "online", images[4])
        disk.wait_healthy()
    places = examine(more[1])["replicas"][0]["roles"]
    assert [role["state"] for role in places[4:]] == ["current", "removed", "current"]
    assert same([*images[:5], more[1]])
    assert "it was removed from the set on" in refused(images[5:], tmp_path, 1, FIFO)


def test_a_backup_without_a_pause_is_a_recipe(tmp_path: Path, images: list[Path]) -> None:
    """As README says: offline, copy, online; only what changed is copied back."""
    backup = tmp_path / "backup.img"
    with SetMount(images, tmp_path, FIFO) as disk:
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, os.urandom(24 * MIB), 0)
        content = hashlib.sha256(disk.file.read_bytes()).digest()
        verb(disk, "offline", images[1])
        shutil.copyfile(images[1], backup)
        write(disk, b"n", chunk=3)
        verb(disk, "online", images[1])
        disk.wait_healthy()
        assert disk.replica(images[1])["copied_bytes"] <= CHUNK
    assert hashlib.sha256(backup.read_bytes()).digest() == content
    assert same(images)
