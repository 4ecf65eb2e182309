"""Replicas used without each other, and replicas whose others are missing: nothing is guessed.

P6: what cannot be known is refused, with the reason and the command to run, and nothing is
written before the operator has decided.
"""

import os
import shutil
from pathlib import Path

import pytest
from support.mounting import quorumfs
from support.sets import (
    CHUNK,
    EXTENT,
    SetMount,
    create,
    examine,
    named,
    read,
    refused,
    same,
    seen,
    with_sidecars,
    write,
)

SIZE = 2 * EXTENT
LONE = "degraded,vote-threshold=1"


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """A set of two, in use until now: all blocks hold b"0"."""
    images = create(named(tmp_path, 2), SIZE)
    with SetMount(images, tmp_path) as disk:
        for chunk in range(0, 512, 32):
            write(disk, b"0", chunk)
    return images


def part(images: list[Path], directory: Path, chunks: tuple[int, int] = (32, 64)) -> list[str]:
    """Let each of two be used without the other; returns their generations."""
    generations = []
    for image, chunk, letter in zip(images, chunks, (b"a", b"b"), strict=True):
        with SetMount([image], directory, LONE) as disk:
            write(disk, letter, chunk)
            generations.append(disk.status()["generation"])
    return generations


def test_a_split_brain_is_refused(pair: list[Path], tmp_path: Path) -> None:
    """Exit code 3, both histories, the command to run; nothing written, whatever the order."""
    generations = part(pair, tmp_path)
    for paths in pair, pair[::-1]:
        for options in "", "degraded", "ro", "vote-threshold=1":
            line = refused(paths, tmp_path, 3, options)
            assert "split brain" in line
            assert "quorumfs resolve" in line
            for word in [*generations, *map(str, pair)]:
                assert word in line
    assert examine(*pair)["assembly"]["rule"] == "split brain"
    for image in pair:  # each alone is still what it was
        with SetMount([image], tmp_path, LONE) as disk:
            assert disk.states() == ["current", "missing"]


@pytest.mark.parametrize("keep", [0, 1])
def test_the_one_to_keep_is_kept(keep: int, pair: list[Path], tmp_path: Path) -> None:
    """A dry run writes nothing; then only what either side wrote is copied, in this direction."""
    part(pair, tmp_path)
    before = seen(with_sidecars(pair))
    said = quorumfs("resolve", "--dry-run", "--keep", pair[keep], *pair).stdout
    assert f"{pair[keep]} would be kept" in said
    assert f"{pair[1 - keep]} would be overwritten" in said
    assert seen(with_sidecars(pair)) == before
    images = seen(pair)
    quorumfs("resolve", "--keep", pair[keep], *pair)
    assert seen(pair) == images
    with SetMount(pair, tmp_path) as disk:
        expected = (b"a", b"0") if keep == 0 else (b"0", b"b")
        assert (read(disk, 32), read(disk, 64)) == expected
        status = disk.wait_healthy()
        assert (read(disk, 32), read(disk, 64)) == expected
        assert status["replicas"][1 - keep]["copied_bytes"] <= 2 * CHUNK
        assert status["replicas"][keep]["copied_bytes"] == 0
    assert same(pair)
    with SetMount(pair, tmp_path) as disk:
        assert disk.status()["state"] == "healthy"


def test_a_resolution_may_be_made_twice(pair: list[Path], tmp_path: Path) -> None:
    """The operator changes their mind before the next mount."""
    part(pair, tmp_path)
    quorumfs("resolve", "--keep", pair[0], *pair)
    quorumfs("resolve", "--keep", pair[1], *pair)
    with SetMount(pair, tmp_path) as disk:
        assert (read(disk, 32), read(disk, 64)) == (b"0", b"b")
        disk.wait_healthy()
    assert same(pair)


def test_a_split_of_three(tmp_path: Path) -> None:
    """One against two: refused all the same; those that hold the same are kept together."""
    images = create(named(tmp_path, 3), SIZE)
    with SetMount(images, tmp_path) as disk:
        write(disk, b"0", 0)
    with SetMount(images[:1], tmp_path, LONE) as disk:
        write(disk, b"a", 32)
    with SetMount(images[1:], tmp_path) as disk:
        write(disk, b"b", 64)
    refused(images, tmp_path, 3)
    said = quorumfs("resolve", "--keep", images[1], *images).stdout
    assert f"{images[2]} is kept" in said
    with SetMount(images, tmp_path) as disk:
        assert (read(disk, 32), read(disk, 64)) == (b"\0", b"b")
        disk.wait_healthy()
    assert same(images)


def test_no_split_where_one_side_wrote_nothing(pair: list[Path], tmp_path: Path) -> None:
    """23: opened and closed again, without a write, is no other history."""
    with SetMount(pair[:1], tmp_path, LONE) as disk:
        write(disk, b"a", 32)
    with SetMount(pair[1:], tmp_path, LONE) as disk:
        assert read(disk, 32) == b"0"
    with SetMount(pair, tmp_path) as disk:
        assert read(disk, 32) == b"a"
        status = disk.wait_healthy()
        assert status["replicas"][1]["copied_bytes"] <= CHUNK
    assert same(pair)


def test_the_same_write_on_both_sides_is_a_split(pair: list[Path], tmp_path: Path) -> None:
    """Nothing is concluded from equal bytes."""
    for image in pair:
        with SetMount([image], tmp_path, LONE) as disk:
            write(disk, b"s", 32)
    refused(pair, tmp_path, 3)


# A set that was copied, images and sidecars


@pytest.fixture
def copies(pair: list[Path], tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """The set of `pair`, and a copy of it."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in with_sidecars(pair):
        shutil.copy2(path, directory / path.name)
    return pair, named(directory, 2)


def test_copies_that_were_used_are_not_mixed(
    copies: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    """Alike, each closed in order; and after the decision it is one history."""
    for paths, letter in zip(copies, (b"1", b"2"), strict=True):
        with SetMount(paths, tmp_path) as disk:
            write(disk, letter, 32)
    mixed = [copies[0][0], copies[1][1]]
    assert examine(*mixed)["assembly"]["exit_code"] == 3
    for options in "", "degraded", "ro":
        assert "split brain" in refused(mixed, tmp_path, 3, options)
        refused(mixed[::-1], tmp_path, 3, options)
    said = quorumfs("resolve", "--keep", mixed[1], *mixed).stdout
    assert "everything is compared" in said
    with SetMount(mixed, tmp_path) as disk:
        disk.wait_healthy()
        assert read(disk, 32) == b"2"
    assert same(mixed)
    with SetMount(copies[0][1:], tmp_path, LONE) as disk:  # what was not given is as it was
        assert read(disk, 32) == b"1"


def test_copies_that_were_only_read_still_are_one_set(
    copies: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    for paths in copies:
        with SetMount(paths, tmp_path) as disk:
            assert read(disk, 32) == b"0"
            disk.wait_healthy()
    mixed = [copies[0][0], copies[1][1]]
    with SetMount(mixed, tmp_path) as disk:
        assert disk.wait_healthy()["replicas"][1]["copied_bytes"] == 0
    assert same(mixed)


def test_one_mounted_alone_and_only_read_is_no_side(pair: list[Path], tmp_path: Path) -> None:
    """All mounts end with a kill; it gets what was written since it was ejected, no more."""
    with SetMount(pair, tmp_path) as disk:
        write(disk, b"1", 32)
        disk.kill()
    with SetMount(pair[1:], tmp_path, LONE) as disk:
        assert read(disk, 32) == b"1"
        disk.wait(lambda status: not status["resync"], "nothing to settle")
        disk.kill()
    with SetMount(pair[:1], tmp_path, LONE) as disk:
        write(disk, b"a", 32)
        disk.kill()
    with SetMount(pair, tmp_path) as disk:
        assert read(disk, 32) == b"a"
        status = disk.wait_healthy()
        assert status["replicas"][1]["copied_bytes"] <= EXTENT
    assert same(pair)


# Missing ones


def test_a_lone_replica_needs_the_operators_word(pair: list[Path], tmp_path: Path) -> None:
    """18: the one missing and the flag are named; with the flag it mounts, and is on record."""
    for options in "", "vote-threshold=1", "ro":
        line = refused(pair[:1], tmp_path, 1, options)
        assert str(pair[1]) in line
        assert "-o degraded" in line
    with SetMount(pair[:1], tmp_path, LONE) as disk:
        assert disk.status()["state"] == "degraded"
        write(disk, b"a", 32)
    with SetMount(pair[:1], tmp_path, "vote-threshold=1") as disk:  # 19: nobody asks again
        assert read(disk, 32) == b"a"
    with SetMount(pair, tmp_path) as disk:
        assert read(disk, 32) == b"a"
        status = disk.wait_healthy()
        assert status["replicas"][1]["copied_bytes"] <= CHUNK
    assert same(pair)


def test_without_a_write_the_word_is_needed_again(pair: list[Path], tmp_path: Path) -> None:
    """What was only read has decided nothing."""
    before = seen(with_sidecars(pair))
    with SetMount(pair[:1], tmp_path, LONE) as disk:
        assert read(disk, 32) == b"0"
    assert {name: content for name, (content, _) in seen(pair).items()} == {
        path.name: before[path.name][0] for path in pair
    }
    refused(pair[:1], tmp_path, 1, "vote-threshold=1")
    with SetMount(pair, tmp_path) as disk:
        assert disk.wait_healthy()["replicas"][1]["copied_bytes"] == 0


@pytest.mark.parametrize("options", ["", "vote-threshold=1", "degraded,vote-threshold=1", "ro"])
def test_only_the_stale_one(options: str, pair: list[Path], tmp_path: Path) -> None:
    """21: b knows that it was ejected, once it has met a."""
    with SetMount(pair, tmp_path, "vote-threshold=1") as disk:
        os.truncate(pair[1], CHUNK)
        write(disk, b"a", 32)
        os.truncate(pair[1], SIZE)
        disk.wait_for_state(pair[1], "resyncing", "current")
        disk.wait_healthy()
        write(disk, b"a", 96)
    # Now it is ejected with a record of that on itself: a resync that never ended.
    with SetMount(pair[:1], tmp_path, LONE) as disk:
        write(disk, b"A", 32)
    with SetMount(pair, tmp_path, "resync-rate=1K") as disk:
        disk.wait_for_state(pair[1], "resyncing")
        disk.kill()
    line = refused(pair[1:], tmp_path, 1, options)
    assert str(pair[0]) in line
    assert "Current in generation" in line


def test_the_newer_one_is_the_source_whatever_it_looks_like(
    pair: list[Path], tmp_path: Path
) -> None:
    """20: though the stale one comes first, and has the newer time."""
    with SetMount(pair[1:], tmp_path, LONE) as disk:
        write(disk, b"b", 32)
    with SetMount(pair, tmp_path, "read-pattern=fifo,vote-threshold=1") as disk:
        assert read(disk, 32) == b"b"
        disk.wait_healthy()
        assert read(disk, 32) == b"b"
    assert same(pair)


def test_one_of_three_is_not_enough_to_go_on(tmp_path: Path) -> None:
    """Two of three need no word; then the third alone is refused, or a split brain later."""
    images = create(named(tmp_path, 3), SIZE)
    with SetMount(images[:2], tmp_path) as disk:
        write(disk, b"1", 0)
    refused(images[2:], tmp_path, 1)
    refused(images[2:], tmp_path, 1, "vote-threshold=1")
    with SetMount(images, tmp_path) as disk:
        assert read(disk, 0) == b"1"
        disk.wait_healthy()
    assert same(images)
