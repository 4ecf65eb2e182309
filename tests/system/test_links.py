"""Replicas given through symbolic links: what a set remembers lies beside the image itself."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.command import one_line
from support.mounting import quorumfs
from support.sets import (
    MIB,
    SetMount,
    create,
    examine,
    named,
    read,
    refused,
    same,
    sidecar,
    write,
)

pytestmark = pytest.mark.usefixtures("mountpoint")  # what is not refused is taken away again

FIFO = "read-pattern=fifo,vote-threshold=1"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where the images are."""
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def images(store: Path) -> list[Path]:
    """Two raw ones."""
    for path in (paths := named(store, 2)):
        path.touch()
        os.truncate(path, 4 * MIB)
    return paths


@pytest.fixture
def links(tmp_path: Path, images: Sequence[Path]) -> list[Path]:
    """One to each, in another directory."""
    (tmp_path / "links").mkdir()
    for link, image in zip(paths := named(tmp_path / "links", 2), images, strict=True):
        link.symlink_to(os.path.relpath(image, link.parent))
    return paths


def test_an_ejected_replica_through_a_link_is_known_by_its_real_path(
    images: list[Path], links: list[Path], tmp_path: Path
) -> None:
    """No stale read: what one name's mount has on record the other name's mount knows."""
    with SetMount(links, tmp_path, FIFO):
        pass
    links[1].rename(links[1].with_suffix(".away"))
    with SetMount(links, tmp_path, f"{FIFO},degraded") as disk:
        assert disk.states() == ["current", "missing"]
        write(disk, b"n")
    with SetMount(images[::-1], tmp_path, FIFO) as disk:
        assert read(disk) == b"n"
        disk.wait_healthy()
    assert same(images)
    assert sorted(os.listdir(links[0].parent)) == ["a.img", "b.away"]


def test_a_set_made_by_real_paths_is_known_through_links(
    store: Path, tmp_path: Path, links: list[Path], images: list[Path]
) -> None:
    """`examine` and `resolve` go by the same rule as `mount`."""
    for path in images:
        path.unlink()
    create(images)
    before = examine(*images)["replicas"]
    through = examine(*links)["replicas"]
    assert [part["id"] for part in through] == [part["id"] for part in before]
    assert [part["sidecar"] for part in through] == [str(sidecar(path)) for path in images]
    quorumfs("resolve", "--keep", links[1], *links)
    with SetMount(images, tmp_path) as disk:
        disk.wait_healthy()
    assert sorted(os.listdir(store)) == ["a.img", "a.img.quorumfs", "b.img", "b.img.quorumfs"]


def test_a_link_does_not_hide_that_an_image_is_a_member(
    images: list[Path], links: list[Path], tmp_path: Path
) -> None:
    """It is neither overwritten nor written to without its metadata."""
    for path in images:
        path.unlink()
    create(images)
    other = tmp_path / "other.img"
    other.write_bytes(os.urandom(4 * MIB))
    before = images[1].read_bytes()
    done = quorumfs("create", "--source", other, links[1], check=False)
    assert "is a member of a set" in one_line(done, 1)
    assert images[1].read_bytes() == before
    assert "is a member of a set" in refused(links, tmp_path, options="metadata=none")


def test_an_image_with_other_names_is_not_overwritten(images: list[Path], tmp_path: Path) -> None:
    """Its sidecar may lie beside another one."""
    images[1].unlink()
    create(images[1:])
    other = tmp_path / "other.img"
    other.hardlink_to(images[1])
    before = images[1].stat()
    done = quorumfs("create", "--source", images[0], other, check=False)
    assert f"{other} has other names" in one_line(done, 1)
    assert images[1].stat().st_mtime_ns == before.st_mtime_ns
    assert not sidecar(images[0]).exists()


def test_a_sidecar_beside_the_link_is_not_ignored(
    images: list[Path], links: list[Path], tmp_path: Path
) -> None:
    """Earlier versions left it there; moved as the line says, the set is what it was."""
    for path in images:
        path.unlink()
    create(images)
    with SetMount(images, tmp_path) as disk:
        write(disk, b"o")
    strays = [Path(f"{link}.quorumfs") for link in links]
    for image, stray in zip(images, strays, strict=True):
        sidecar(image).rename(stray)
    line = refused(links, tmp_path)
    assert f"{strays[0]} lies beside a symbolic link" in line
    assert f"move it to {sidecar(images[0])}" in line
    assert refused(links, tmp_path, options="metadata=none") == line
    assert examine(*links)["assembly"]["refusal"] in line
    done = quorumfs("create", "--source", images[0], links[1], check=False)
    assert str(strays[1]) in one_line(done, 1)
    for image, stray in zip(images, strays, strict=True):
        stray.rename(sidecar(image))
    with SetMount(links, tmp_path) as disk:
        assert read(disk) == b"o"
        assert disk.states() == ["current", "current"]


def test_a_sidecar_that_is_a_link_stays_one(images: list[Path], tmp_path: Path) -> None:
    """What it leads to is rewritten; while that is away the image is not one without a sidecar."""
    for path in images:
        path.unlink()
    create(images)
    memory = tmp_path / "memory"
    shutil.move(sidecar(images[0]), memory)
    sidecar(images[0]).symlink_to(memory)
    quorumfs("resolve", "--keep", images[0], *images)
    assert sidecar(images[0]).is_symlink()
    with SetMount(images, tmp_path) as disk:
        disk.wait_healthy()
    away = memory.rename(tmp_path / "away")
    sidecar(images[1]).unlink()
    line = refused(images, tmp_path, exit_code=2)
    assert "a symbolic link to nothing" in line
    assert "a symbolic link to nothing" in examine(*images)["assembly"]["refusal"]
    assert "is a member" in refused(images, tmp_path, options="metadata=none")
    done = quorumfs("create", "--source", images[1], images[0], check=False)
    assert "is a member of a set" in one_line(done, 1)
    assert away.exists()


def test_a_link_in_the_mount_point_is_refused(images: list[Path], tmp_path: Path) -> None:
    """The mount would hide it, and with it the way back to a replica that was away."""
    link = tmp_path / "mnt" / "a.img"
    link.symlink_to(images[0])
    assert f"{link} is inside the mount point" in refused([link], tmp_path)


@pytest.mark.parametrize("where", ["moved", "a stranger", "the other replica"])
def test_a_link_changed_while_mounted_leads_back_to_the_same_replica_only(
    images: list[Path], links: list[Path], tmp_path: Path, where: str
) -> None:
    """What was ejected is opened by the path given, wherever that leads by then."""
    stranger = tmp_path / "stranger.img"
    stranger.write_bytes(content := os.urandom(4 * MIB))
    with SetMount(links, tmp_path, FIFO):
        pass
    gone = images[1].with_suffix(".moved")
    images[1].rename(gone)
    sidecar(images[1]).rename(sidecar(gone))
    with SetMount(links, tmp_path, f"{FIFO},degraded") as disk:
        assert disk.replica(links[1])["state"] == "missing"
        write(disk, b"n")
        links[1].unlink()
        links[1].symlink_to({"moved": gone, "a stranger": stranger}.get(where, images[0]))
        if where == "moved":
            disk.wait_healthy()
        else:
            why = "there is no" if where == "a stranger" else "in use"
            disk.wait(lambda status: why in status["replicas"][1]["reason"], why)
            assert disk.states()[0] == "current"
    assert stranger.read_bytes() == content
    assert same([images[0], gone]) == (where == "moved")
