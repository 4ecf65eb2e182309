"""Options of a mount that change while the disk is in use."""

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mounting import quorumfs
from support.sets import BLOCK, MIB, SetMount, create, named, opened, same

SIZE = 16 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SetMount]:
    with SetMount(create(named(tmp_path, 3), SIZE), tmp_path) as mounted:
        yield mounted


def reads(disk: SetMount) -> list[int]:
    """How many reads each replica sees while a guest reads ten blocks."""
    before = [part["reads"] for part in disk.status()["replicas"]]
    with opened(disk.file) as fd, mmap.mmap(-1, BLOCK) as page:
        for at in range(10):
            os.preadv(fd, [page], at * BLOCK)
    after = [part["reads"] for part in disk.status()["replicas"]]
    return [late - early for early, late in zip(before, after, strict=True)]


def threshold_on_record(replica: Path) -> int:
    told = quorumfs("examine", "--json", replica, check=False).stdout
    threshold = json.loads(told)["replicas"][0]["vote_threshold"]
    assert isinstance(threshold, int)
    return threshold


def refusal(disk: SetMount, *options: str) -> str:
    """The line with which a change is refused; the options stay as they are."""
    before = disk.status()["options"]
    done = quorumfs("set", disk.mountpoint, *options, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert disk.status()["options"] == before
    return str(done.stderr)


def test_the_read_pattern_changes_which_replicas_are_read(disk: SetMount) -> None:
    """Also where C serves the reads, whose gate opens with the new pattern."""
    assert reads(disk) == [10, 10, 10]
    told = json.loads(quorumfs("set", "--json", disk.mountpoint, "read-pattern=fifo").stdout)
    assert told["changed"] == ["read-pattern=fifo"]
    assert reads(disk) == [10, 0, 0]
    quorumfs("set", disk.mountpoint, "read_pattern=quorum")
    assert reads(disk) == [10, 10, 10]


def test_remount_changes_what_differs_and_names_the_rest_for_nothing(disk: SetMount) -> None:
    options = "remount,read-pattern=fifo,vote-threshold=2,metadata=sidecar,rw,resync-rate=2M"
    told = quorumfs("mount", "-o", options, disk.mountpoint).stdout
    assert told == f"changed: read-pattern=fifo, resync-rate={2 * MIB}\n"
    assert disk.status()["read_pattern"] == "fifo"
    told = quorumfs("mount", "-o", options, disk.mountpoint).stdout
    assert told.startswith("nothing to change")


def test_all_options_change_or_none(disk: SetMount) -> None:
    for wrong, why in {
        "vote-threshold=4": "allowed: 1 to 3, the number of replicas",
        "uid=12345": "the kernel is told of it",
        "ro": "unmount, and mount again",
        "blkverify": "allowed: 2 replicas",
        "replica-timeout=0": "allowed: a time from 100ms",
        "no-such": "unknown option",
    }.items():
        assert why in refusal(disk, "resync-rate=2M", wrong)


def test_what_is_changed_is_in_force(disk: SetMount) -> None:
    changes = ["rewrite-corrupted=on", "replica-timeout=250ms", "scrub-every=30d"]
    quorumfs("set", disk.mountpoint, *changes)
    status = disk.status()
    assert {"rewrite-corrupted=on", "replica-timeout=0.25s"} < set(status["options"])
    assert status["next_scrub"] is not None or status["scrub"] is not None
    quorumfs("set", disk.mountpoint, "rewrite-corrupted=off", "scrub-every=off")
    assert disk.status()["next_scrub"] is None


def test_a_lower_threshold_is_in_force_and_on_record(disk: SetMount) -> None:
    """A guest goes on with one of three; and a daemon that was killed has told the set of it."""
    first, second, third = disk.replicas
    quorumfs("offline", disk.mountpoint, third)
    refused = quorumfs("offline", disk.mountpoint, second, check=False)
    assert "vote-threshold=2 needs as many" in refused.stderr
    told = quorumfs("set", disk.mountpoint, "vote-threshold=1").stdout
    assert told == "changed: vote-threshold=1\n"
    quorumfs("offline", disk.mountpoint, second)
    with opened(disk.file, os.O_RDWR) as fd:
        os.pwrite(fd, b"alone" * 100, 0)
        os.fsync(fd)
    assert threshold_on_record(first) == 1
    for name in (second, third):
        quorumfs("online", disk.mountpoint, name)
    disk.wait_healthy()


def test_a_higher_threshold_needs_as_many(disk: SetMount) -> None:
    quorumfs("set", disk.mountpoint, "vote-threshold=3")
    assert set(map(threshold_on_record, disk.replicas)) == {3}
    refused = quorumfs("remove", disk.mountpoint, disk.replicas[2], check=False)
    assert "vote-threshold=3 needs as many" in refused.stderr
    quorumfs("set", disk.mountpoint, "vote-threshold=2")
    quorumfs("offline", disk.mountpoint, disk.replicas[2])
    refused = quorumfs("set", disk.mountpoint, "vote-threshold=3", check=False)
    assert refused.returncode == 1
    assert "vote-threshold stays 2: too few replicas are current" in refused.stderr
    assert disk.status()["vote_threshold"] == 2


def test_the_mark_write_mostly_follows_the_replica(disk: SetMount, tmp_path: Path) -> None:
    """To the image that takes its place; and it is gone with the one that is removed."""
    first, second, third = disk.replicas
    quorumfs("set", disk.mountpoint, f"write-mostly={third.name}")
    new = tmp_path / "new.img"
    quorumfs("replace", disk.mountpoint, third, new)
    assert disk.replica(new)["write_mostly"]
    assert f"write-mostly={new}" in disk.status()["options"]
    quorumfs("remove", disk.mountpoint, new)
    assert "write-mostly=none" in disk.status()["options"]
    quorumfs("add", "--wait", "--overwrite", disk.mountpoint, new)
    assert not disk.replica(new)["write_mostly"]
    quorumfs("set", disk.mountpoint, f"write-mostly={new.name}")
    assert disk.replica(new)["write_mostly"]
    assert not any(disk.replica(one)["write_mostly"] for one in (first, second))


def test_a_third_replica_is_no_part_of_blkverify(tmp_path: Path) -> None:
    options = "blkverify,vote-threshold=2"
    with SetMount(create(named(tmp_path, 2), SIZE), tmp_path, options) as disk:
        refused = quorumfs("add", disk.mountpoint, tmp_path / "third.img", check=False)
        assert "option blkverify compares two replicas" in refused.stderr
        quorumfs("set", disk.mountpoint, "blkverify=off")
        quorumfs("add", "--wait", disk.mountpoint, tmp_path / "third.img")


def test_a_resync_is_limited_paused_and_goes_on(disk: SetMount) -> None:
    """A paused one hinders no flush, and what was copied is not copied again."""
    away = disk.replicas[2]
    quorumfs("offline", disk.mountpoint, away)
    with opened(disk.file, os.O_RDWR) as fd:
        os.pwrite(fd, os.urandom(8 * MIB), 0)
        os.fsync(fd)
        quorumfs("resync", "--limit", "1M", disk.mountpoint)
        quorumfs("online", disk.mountpoint, away)
        disk.wait(lambda status: (status["resync"] or {}).get("done_bytes"), "a resync at work")
        assert "resyncs are paused" in quorumfs("resync", "--pause", disk.mountpoint).stdout
        disk.wait(lambda status: status["resync"] is None, "the end of its work")
        quorumfs("resync", "--limit", "none", disk.mountpoint)
        os.pwrite(fd, os.urandom(MIB), 12 * MIB)
        os.fsync(fd)
        assert disk.status()["resync_paused"]
        assert disk.replica(away)["state"] != "current"
        assert "resync paused" in quorumfs("status", disk.mountpoint, check=False).stdout
        in_vain = quorumfs("resync", "--wait", disk.mountpoint, check=False)
        assert (in_vain.returncode, "--resume" in in_vain.stderr) == (3, True)
        told = quorumfs("resync", "--resume", "--wait", "--json", disk.mountpoint).stdout
        assert json.loads(told)["paused"] is False
        assert disk.replica(away)["state"] == "current"
        disk.wait_healthy()
    assert disk.replica(away)["copied_bytes"] == 9 * MIB
    quorumfs("umount", disk.mountpoint)
    assert same(list(disk.replicas))


def test_a_limit_that_is_lifted_counts_at_once(disk: SetMount) -> None:
    """Also where the old one would have a resync rest for hours."""
    away = disk.replicas[2]
    quorumfs("offline", disk.mountpoint, away)
    with opened(disk.file, os.O_RDWR) as fd:
        os.pwrite(fd, os.urandom(4 * MIB), 0)
        os.fsync(fd)
    quorumfs("set", disk.mountpoint, "resync-rate=100")
    quorumfs("online", disk.mountpoint, away)
    disk.wait(lambda status: (status["resync"] or {}).get("done_bytes"), "a resync at work")
    quorumfs("set", disk.mountpoint, "resync-rate=none")
    disk.wait_healthy()
