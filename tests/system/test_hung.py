"""Replicas whose file system does not answer while a command looks for them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from support.command import PATIENCE_S, one_line, processes_of, quorumfs_in_background, wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.sets import (
    Ext4,
    SetMount,
    create,
    named,
    opened,
    same,
    seen,
    sidecar,
    with_sidecars,
    write,
)

pytestmark = pytest.mark.usefixtures("mountpoint")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaultFS]:
    """A file system of its own, that can be frozen."""
    with FaultFS(tmp_path) as store:
        yield store


@pytest.mark.parametrize("hangs", ["image", "sidecar"])
def test_a_mount_goes_on_without_who_does_not_answer(
    hangs: str, store: FaultFS, tmp_path: Path
) -> None:
    """Where the others suffice; and it comes back by itself, when its store does.

    A sidecar hangs when its image is locked already: the attempt that was given up must give the
    lock back.
    """
    images = named(tmp_path, 2)
    images.append(store.path("c.img") if hangs == "image" else tmp_path / "c.img")
    create(images)
    if hangs == "sidecar":
        store.backing("c.quorumfs").write_bytes(sidecar(images[2]).read_bytes())
        sidecar(images[2]).unlink()
        sidecar(images[2]).symlink_to(store.path("c.quorumfs"))
        sidecar(images[2]).stat()  # the kernel has greeted the server
    store.stop()
    with SetMount(images, tmp_path, "replica-timeout=2s") as disk:
        assert disk.states() == ["current", "current", "missing"]
        assert "its file system d" in disk.replica(images[2])["reason"]
        (told,) = [r["message"] for r in disk.log() if "is missing" in r.get("message", "")]
        assert told == f"{images[2]} is missing: its file system did not answer for 4 s"
        write(disk, b"w")
        store.cont()
        disk.wait_healthy()
    assert same(images)


def test_a_set_that_rested_while_its_device_froze_goes_on(tmp_path: Path) -> None:
    """A local one, that was prompt until then: the first write has a mark to make, in a thread."""
    with Ext4(tmp_path) as device:
        images = create([device.mountpoint / "a.img", *named(tmp_path, 2)])
        with SetMount(images, tmp_path, "replica-timeout=2s") as disk:
            disk.wait_healthy()
            writer = Thread(target=write, args=(disk, b"w"))
            with device.frozen():
                writer.start()
                writer.join(PATIENCE_S)
                assert not writer.is_alive()
                assert disk.states() == ["missing", "current", "current"]
            disk.wait_healthy()
        assert same(images)


def test_options_change_while_a_replica_hangs(store: FaultFS, tmp_path: Path) -> None:
    """The requests that wait for it go on as they began."""
    images = create([*named(tmp_path, 1), store.path("b.img"), *named(tmp_path, 3)[2:]])
    with SetMount(images, tmp_path, "replica-timeout=60m") as disk:
        disk.wait_healthy()
        store.hang("b.img")
        writer = Thread(target=write, args=(disk, b"w"))
        writer.start()
        disk.wait(lambda status: status["replicas"][1]["in_flight"], "a write that hangs")
        quorumfs("set", disk.mountpoint, "read-pattern=fifo", "write-mostly=b.img")
        with opened(disk.file) as fd:
            os.pread(fd, 4096, disk.file.stat().st_size - 4096)
        assert disk.status()["read_pattern"] == "fifo"
        store.clear()
        writer.join(PATIENCE_S)
        assert not writer.is_alive()
        disk.wait_healthy()


def test_blkverify_is_asked_for_while_a_third_replica_is_made(
    store: FaultFS, tmp_path: Path
) -> None:
    """Of both the one that comes first counts."""
    with SetMount(create(named(tmp_path, 2)), tmp_path, "vote-threshold=2") as disk:
        disk.wait_healthy()
        store.hang("new.img")
        adding = quorumfs_in_background("add", disk.mountpoint, store.path("new.img"))
        wait_until(store.backing("new.img").exists, "the new image")
        quorumfs("set", disk.mountpoint, "blkverify=on")
        store.clear()
        _, told = adding.communicate(timeout=PATIENCE_S)
        assert "option blkverify compares two replicas" in str(told)
        assert len(disk.status()["replicas"]) == 2


def test_a_refused_mount_leaves_what_hangs_alone(
    store: FaultFS, tmp_path: Path, mountpoint: Path
) -> None:
    """A request that was taken keeps the daemon's process alive, but not the command, nor who
    reads what it says."""
    images = create([*named(tmp_path, 1), store.path("b.img")])
    hang(store, "b.img", reached=True)
    options = "replica-timeout=1s"
    line = one_line(quorumfs("mount", "-o", options, *images, mountpoint, check=False), 1)
    assert f"{images[1]}: its file system did not answer for 2 s" in line
    store.clear()
    wait_until(lambda: not processes_of(mountpoint), "the end of what was left behind")


@pytest.mark.parametrize("metadata", ["sidecar", "none"])
def test_a_mount_is_refused_with_who_does_not_answer(
    metadata: str, store: FaultFS, tmp_path: Path, mountpoint: Path
) -> None:
    """Where the others do not suffice: nothing is written, no process is left, and the set can be
    mounted once it answers."""
    images = create([*named(tmp_path, 1), store.path("b.img"), store.path("c.img")])
    if metadata == "none":
        for image in images:
            sidecar(image).unlink()
    files = with_sidecars(images) if metadata == "sidecar" else images
    before = seen(files)
    options = f"replica-timeout=1s,metadata={metadata}"
    store.stop()
    line = one_line(quorumfs("mount", "-o", options, *images, mountpoint, check=False), 1)
    told = [f"{image}: its file system did not answer for 2 s" in line for image in images]
    assert told == [False, True, metadata == "sidecar"]
    assert processes_of(mountpoint) == []
    store.cont()
    assert seen(files) == before
    quorumfs("mount", "-o", options, *images, mountpoint)
    quorumfs("umount", mountpoint)


def test_a_degraded_mount_needs_not_wait_longer(
    store: FaultFS, tmp_path: Path, mountpoint: Path
) -> None:
    """One of two: with the operator's word, as for any other that is missing."""
    images = create([*named(tmp_path, 1), store.path("b.img")])
    store.stop()
    options = "replica-timeout=1s,degraded,vote-threshold=1"
    quorumfs("mount", "-o", options, *images, mountpoint)
    quorumfs("umount", mountpoint)
    assert processes_of(mountpoint) == []


def test_examine_tells_who_does_not_answer(store: FaultFS, tmp_path: Path) -> None:
    """And shows the others; though the request was taken, and no signal ends it any more."""
    images = create([*named(tmp_path, 1), store.path("b.img")])
    hang(store, "b.img", reached=True)
    done = quorumfs("examine", *images, check=False)
    assert done.returncode == 1
    well, hung, together = done.stdout.split("\n\n")
    assert "state:       current" in well
    assert hung.count("its file system did not answer for 16 s") == 2
    assert "refused:" in together
    assert done.stderr.count("\n") == 1
    assert f"waiting for {images[1]}: its file system does not answer" in done.stderr


@pytest.mark.parametrize("reached", [False, True], ids=["frozen", "hangs"])
@pytest.mark.parametrize("command", [["examine"], ["resolve", "--keep", "{}"]])
def test_waiting_for_who_does_not_answer_can_be_interrupted(
    reached: bool, command: list[str], store: FaultFS, tmp_path: Path
) -> None:
    """Ctrl-C ends it while it waits, and nothing is written: then or later."""
    images = create([*named(tmp_path, 1), store.path("b.img")])
    before = seen(with_sidecars(images))
    hang(store, "b.img", reached=reached)
    process = quorumfs_in_background(*[part.format(images[0]) for part in command], *images)
    assert process.stderr
    assert f"waiting for {images[1]}" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)  # to the end of its output
    assert process.returncode == 130
    store.cont()
    store.clear()
    wait_until(lambda: not processes_of(store.path("b.img")), "the end of its child")
    assert seen(with_sidecars(images)) == before


def test_resolve_is_refused_where_one_does_not_answer(store: FaultFS, tmp_path: Path) -> None:
    """All replicas given are needed. Nothing is written, then or later, and the set is free."""
    images = create([*named(tmp_path, 1), store.path("b.img")])
    before = seen(with_sidecars(images))
    store.stop()
    done = quorumfs("resolve", "--keep", images[0], *images, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"quorumfs: cannot open {images[1]}: its file system did not answer for 16 s"
    )
    store.cont()
    assert seen(with_sidecars(images)) == before
    wait_until(lambda: not processes_of(images[1]), "the end of what was left behind")
    quorumfs("resolve", "--keep", images[0], *images)


def test_an_unmount_ends_though_a_flush_hangs(store: FaultFS, tmp_path: Path) -> None:
    """The flush was given up, the others are synced; only the process waits for the kernel."""
    images = create([*named(tmp_path, 2), store.path("c.img")])
    with SetMount(images, tmp_path, "replica-timeout=1s") as disk:
        write(disk, b"w")
        pid = disk.pid
        store.hang("c.img", "fsync")
        with opened(disk.file) as fd:
            os.pwrite(fd, b"x", 0)
            os.fsync(fd)
        disk.wait_for_state(images[2], "missing")
        done = quorumfs("umount", disk.mountpoint)
        told = f"pid {pid} has finished, but cannot end before the file system of {images[2]} ans"
        assert told in done.stderr
        store.clear()
    wait_until(lambda: not processes_of(disk.mountpoint), "the end of what was left behind")


def hang(store: FaultFS, name: str, *, reached: bool) -> None:
    """Have the store not answer: for it is frozen, or keeps what it was asked."""
    if reached:
        store.hang(name, "read")
        store.hang(f"{name}.quorumfs", "read")
    else:
        store.stop()
