"""Scrubs of a mounted set: rot is found with its place and who is to blame, and nothing else is."""

import errno
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.command import quorumfs_in_background, wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.sets import BLOCK, MIB, SetMount, create, named, opened, same
from support.sidecars import decode

from quorumfs.decisions.record import path_for
from quorumfs.decisions.scrub import ScrubRecord

SIZE = 64 * MIB
EVERYWHERE = range(0, SIZE, 4 * MIB)
BAD = b"\xba" * BLOCK


def recorded(image: Path) -> ScrubRecord:
    """What the sidecar of *image* says of scrubs."""
    return decode(Path(path_for(str(image))).read_bytes()).scrub


@contextmanager
def filled(tmp_path: Path, count: int = 3, options: str = "") -> Iterator[SetMount]:
    """A mount of a new set that holds something nearly everywhere."""
    images = create(named(tmp_path, count), SIZE)
    with SetMount(images, tmp_path, options) as disk:
        with opened(disk.file) as fd:
            for at in EVERYWHERE:
                os.pwrite(fd, os.urandom(MIB), at)
            os.fsync(fd)
        yield disk


def rot(image: Path, at: int) -> None:
    """Something else writes into an image."""
    with image.open("r+b") as file:
        file.seek(at)
        file.write(BAD)
        file.flush()
        os.fsync(file.fileno())


def scrub(disk: SetMount, *options: str, exit_code: int = 0) -> dict[str, Any]:
    """What a scrub that is waited for finds."""
    done = quorumfs("scrub", disk.mountpoint, "--wait", "--json", *options, check=False)
    assert done.returncode == exit_code, done.stderr
    last: dict[str, Any] = json.loads(done.stdout)
    return last


def found(last: dict[str, Any]) -> dict[str, int]:
    """The counts that are not 0."""
    names = ("mismatches", "repaired", "unreadable", "undecided", "unrepaired")
    return {name: last[name] for name in names if last[name]}


def test_three_rotten_blocks_among_three_replicas(tmp_path: Path) -> None:
    """57, 58: each is told with place and blame, left, then repaired, and gone."""
    places = [4 * MIB + 5 * BLOCK, 20 * MIB, 41 * MIB - BLOCK]
    with filled(tmp_path) as disk:
        images = list(disk.replicas)
        for image, at in zip(images, places, strict=True):
            rot(image, at)
        last = scrub(disk, exit_code=1)
        assert found(last) == {"mismatches": 3, "unrepaired": 3}
        told = [(place["replica"], place["offset"], place["length"]) for place in last["places"]]
        expected = [(str(image), at, BLOCK) for image, at in zip(images, places, strict=True)]
        assert sorted(told) == sorted(expected)
        assert {place["blame"] for place in last["places"]} == {"majority"}
        events = disk.wait_for_events("MISMATCH_FOUND", lambda events: len(events) == 3)
        assert sorted((one["replica"], one["offset"]) for one in events) == sorted(
            (str(image), at) for image, at in zip(images, places, strict=True)
        )
        assert [disk.replica(image)["errors"]["mismatch"] for image in images] == [1, 1, 1]
        status = quorumfs("status", disk.mountpoint, check=False)
        assert status.returncode == 1
        assert "3 blocks" in status.stdout
        assert f"quorumfs scrub --repair {disk.mountpoint}" in status.stdout
        assert not same(images)
        assert found(scrub(disk, "--repair")) == {"mismatches": 3, "repaired": 3}
        disk.wait_for_events("MISMATCH_REPAIRED", lambda events: len(events) == 3)
        assert found(scrub(disk)) == {}
        disk.wait_healthy()
        assert [one["mismatches"] for one in disk.events("SCRUB_FINISHED")] == [3, 3, 0]
        assert same(images)


def test_no_false_alarm_under_full_write_load(tmp_path: Path) -> None:
    """86, P8: several writers, small and large, overlapping, and scrubs one after the other."""
    with filled(tmp_path) as disk:
        over = threading.Event()

        def write_on(number: int) -> None:
            dice = random.Random(number)
            with opened(disk.file, os.O_RDWR) as fd:
                while not over.is_set():
                    length = dice.choice((512, BLOCK, 3 * BLOCK, 256 << 10))
                    at = dice.randrange((SIZE - length) // 512) * 512
                    os.pwrite(fd, dice.randbytes(length), at)
                    if dice.random() < 0.02:
                        os.fsync(fd)

        writers = [threading.Thread(target=write_on, args=(number,)) for number in range(4)]
        for writer in writers:
            writer.start()
        try:
            for _ in range(3):
                assert found(scrub(disk, "--repair")) == {}
        finally:
            over.set()
            for writer in writers:
                writer.join()
        assert not disk.events("MISMATCH_FOUND")
        assert {replica["errors"]["mismatch"] for replica in disk.status()["replicas"]} == {0}
        with opened(disk.file) as fd:
            os.fsync(fd)
        assert same(list(disk.replicas))


def test_the_last_good_copy_of_a_place_is_not_taken_out(tmp_path: Path) -> None:
    """P7: what a scrub found to be wrong in all others, and left, is right nowhere else."""
    at = 8 * MIB + BLOCK
    with filled(tmp_path, 3) as disk:
        disk.expected_errors = ["MISMATCH_FOUND"]
        images = list(disk.replicas)
        rot(images[0], at)
        assert found(scrub(disk, exit_code=1)) == {"mismatches": 1, "unrepaired": 1}
        quorumfs("set", disk.mountpoint, "vote-threshold=1")
        quorumfs("remove", disk.mountpoint, images[1])
        for verb in ("remove", "offline"):
            done = quorumfs(verb, disk.mountpoint, images[2], check=False)
            assert done.returncode == 1
            assert f"the only replica with good data at byte {at}" in done.stderr
        assert len(disk.status()["replicas"]) == 2


def test_two_that_differ_need_the_operator_also_after_a_mount(tmp_path: Path) -> None:
    """57: with two replicas nobody is blamed, and nothing is overwritten."""
    at = 8 * MIB + BLOCK
    with filled(tmp_path, 2) as disk:
        disk.expected_errors = ["MISMATCH_FOUND"]
        images = list(disk.replicas)
        rot(images[1], at)
        last = scrub(disk, "--repair", exit_code=1)
        assert found(last) == {"mismatches": 1, "undecided": 1, "unrepaired": 1}
        status = disk.status()
        assert status["state"] == "needs-operator"
        assert status["undecided"] == [{"offset": at, "length": BLOCK}]
        assert not same(images)
    with SetMount(images, tmp_path) as disk:
        status = disk.status()
        assert status["state"] == "needs-operator"
        assert status["undecided_bytes"] == BLOCK
        assert status["last_scrub"]["undecided"] == 1
        assert status["last_scrub"]["places"] == []


def test_an_administrator_decides_beside_the_guest(tmp_path: Path) -> None:
    """Of two places first one, then all there are; a place that is not listed is left alone."""
    places = [8 * MIB + BLOCK, 12 * MIB]
    with filled(tmp_path, 2) as disk:
        disk.expected_errors = ["MISMATCH_FOUND"]
        images = list(disk.replicas)
        with opened(disk.file) as fd:
            before = os.pread(fd, SIZE, 0)
        rot(images[1], places[0])
        rot(images[0], places[1])
        assert found(scrub(disk, exit_code=1))["undecided"] == 2
        advice = quorumfs("status", disk.mountpoint, check=False)
        assert advice.returncode == 3
        assert f"quorumfs resolve --keep REPLICA {disk.mountpoint}" in advice.stdout
        for wrong in (["--range=64M:4K"], ["--range=x"], ["--dry-run"]):
            done = quorumfs("resolve", "--keep", "a.img", disk.mountpoint, *wrong, check=False)
            assert done.returncode == 4, done.stderr
        done = quorumfs(
            "resolve", "--keep", images[0], disk.mountpoint, f"--range={places[0]}:4K", "--json"
        )
        told = json.loads(done.stdout)
        assert (told["decided"], told["left"], told["written"]) == (BLOCK, 0, BLOCK)
        assert disk.status()["undecided"] == [{"offset": places[1], "length": BLOCK}]
        assert "4096 bytes" in quorumfs("resolve", "--keep", "b.img", disk.mountpoint).stdout
        assert "nothing" in quorumfs("resolve", "--keep", "b.img", disk.mountpoint).stdout
        disk.wait_healthy()
        with opened(disk.file) as fd:
            assert os.pread(fd, SIZE, 0) == before
            os.fsync(fd)
        assert same(images)


def test_a_sector_that_one_cannot_be_read_at_is_rewritten(tmp_path: Path) -> None:
    """That is why people scrub: nobody has read it since it went bad."""
    with FaultFS(tmp_path) as store:
        images = create([*named(tmp_path, 2), store.path("c.img")], SIZE)
        with SetMount(images, tmp_path) as disk:
            with opened(disk.file) as fd:
                os.pwrite(fd, os.urandom(MIB), 0)
                os.fsync(fd)
            store.inject("c.img", "read", start=5 * BLOCK, end=6 * BLOCK, errno=errno.EIO)
            last = scrub(disk, exit_code=1)
            assert last["unreadable"] == 1
            assert last["places"][0]["replica"] == str(images[2])
            assert last["places"][0]["blame"] == "unreadable"
            before = disk.replica(images[2])["copied_bytes"]
            assert before == BLOCK  # it was written, and still cannot be read
            store.clear("c.img")
            assert found(scrub(disk)) == {}
        assert same([*images[:2], store.backing("c.img")])


def test_it_goes_on_where_it_was_after_a_kill(tmp_path: Path) -> None:
    """Its position and what it found are on record at most every 30 s, and at its pause."""
    with filled(tmp_path) as disk:
        images = list(disk.replicas)
        rot(images[0], 0)
        quorumfs("scrub", disk.mountpoint, "--limit", "8M")
        half = disk.wait(lambda status: status["scrub"]["done_bytes"] > 24 * MIB, "a third of it")
        assert half["scrub"]["mismatches"] == 1
        assert half["scrub"]["limit_bytes_per_s"] == 8 * MIB
        quorumfs("scrub", disk.mountpoint, "--pause")
        paused = disk.wait(lambda status: status["scrub"]["paused"], "the pause")["scrub"]
        wait_until(lambda: recorded(images[0]).paused, "the pause on record")
        done = disk.status()["scrub"]["done_bytes"]
        assert paused["done_bytes"] <= done < SIZE
        disk.kill()
    with SetMount(images, tmp_path) as disk:
        status = disk.status()["scrub"]
        assert (status["paused"], status["mismatches"], status["number"]) == (True, 1, 1)
        assert 0 < status["done_bytes"] <= done
        assert (
            f"scrub: {100 * status['done_bytes'] // SIZE} %"
            in quorumfs("status", disk.mountpoint, check=False).stdout
        )
        quorumfs("scrub", disk.mountpoint, "--resume")
        disk.wait(lambda status: status["scrub"] is None, "the end of the scrub")
        last = disk.status()["last_scrub"]
        assert found(last) == {"mismatches": 1, "unrepaired": 1}
        assert last["number"] == 1
    with SetMount(images, tmp_path) as disk:
        assert found(disk.status()["last_scrub"]) == {"mismatches": 1, "unrepaired": 1}
        assert found(scrub(disk)) == {}  # after the kill a majority decided there
        disk.wait_healthy()


def test_it_is_begun_once_stopped_and_left_alone(tmp_path: Path) -> None:
    with filled(tmp_path) as disk:
        begun = json.loads(quorumfs("scrub", disk.mountpoint, "--limit=1M", "--json").stdout)
        assert (begun["number"], begun["begun"]) == (1, True)
        again = quorumfs("scrub", disk.mountpoint)
        assert "is under way already" in again.stdout
        refused = quorumfs("scrub", disk.mountpoint, "--repair", check=False)
        assert refused.returncode == 1
        assert "--stop" in refused.stderr
        waiting = quorumfs_in_background("scrub", disk.mountpoint, "--wait")
        assert waiting.stderr is not None
        assert "is under way already" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        _, told = waiting.communicate(timeout=30)
        assert waiting.returncode == 130
        assert "goes on in the daemon" in told
        assert disk.status()["scrub"] is not None
        quorumfs("scrub", disk.mountpoint, "--stop")
        disk.wait(lambda status: status["scrub"] is None, "the end")
        assert disk.status()["last_scrub"]["stopped"]
        assert quorumfs("scrub", disk.mountpoint, "--pause", check=False).returncode == 1


def test_an_unmount_does_not_wait_for_it(tmp_path: Path) -> None:
    with filled(tmp_path) as disk:
        quorumfs("scrub", disk.mountpoint, "--limit=64K")
        disk.wait(lambda status: status["scrub"]["done_bytes"] > 0, "some of it")
        began = time.monotonic()
        subprocess.run(["umount", disk.mountpoint], check=True)
        wait_until(lambda: "unmounted" in disk.log()[-1]["message"], "the end of the daemon")
        assert time.monotonic() - began < 5.0


def test_one_begins_by_itself(tmp_path: Path) -> None:
    """Once, as the last one ended just before; and with rewrite-corrupted it repairs."""
    images = create(named(tmp_path, 3), SIZE)
    with SetMount(images, tmp_path) as disk, opened(disk.file) as fd:
        os.pwrite(fd, os.urandom(MIB), 0)
        os.fsync(fd)
    rot(images[2], BLOCK)
    images[2].touch()
    with SetMount(images, tmp_path, "scrub-every=30d,rewrite-corrupted,resync-rate=100M") as disk:
        last = disk.wait(lambda status: status["last_scrub"], "a scrub")["last_scrub"]
        assert last["unrepaired"] == 0
        status = disk.status()
        assert status["scrub"] is None
        assert status["next_scrub"] > last["ended"]
        assert "next scrub: " in quorumfs("status", disk.mountpoint).stdout
    with SetMount(images, tmp_path, "scrub-every=30d") as disk:
        status = disk.status()
        assert (status["scrub"], status["last_scrub"]["number"]) == (None, 1)
        assert status["next_scrub"] > last["ended"]


def test_it_needs_a_mount_for_writing(tmp_path: Path) -> None:
    images = create(named(tmp_path, 2), SIZE)
    with SetMount(images, tmp_path, "ro") as disk:
        done = quorumfs("scrub", disk.mountpoint, check=False)
        assert done.returncode == 1
        assert "needs a set with sidecars" in done.stderr
