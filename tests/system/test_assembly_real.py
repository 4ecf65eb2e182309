"""What a mount makes of the files it finds: foreign, copied, put back, cut off, damaged, raw.

P6 with real files and the real command. The decision itself is tested in tests/unit.
"""

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import one_line
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
    filled,
    named,
    opened,
    read,
    refused,
    same,
    seen,
    sidecar,
    tmpfs,
    with_sidecars,
    write,
)
from support.sparse import allocated

SIZE = 4 * MIB
PAGE = 4096


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """A set of two with data."""
    images = create(named(tmp_path, 2), SIZE)
    with SetMount(images, tmp_path) as disk:
        for chunk in range(0, 64, 8):
            write(disk, b"d", chunk)
    return images


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A set of three with data."""
    images = create(named(tmp_path, 3), SIZE)
    with SetMount(images, tmp_path) as disk:
        for chunk in range(0, 64, 8):
            write(disk, b"d", chunk)
    return images


def copy(path: Path, to: Path) -> None:
    """An image and what is beside it, with their times, as ``cp -a`` does."""
    subprocess.run(["cp", "-a", path, to], check=True)
    subprocess.run(["cp", "-a", sidecar(path), sidecar(to)], check=True)


# Not one set


def test_replicas_of_two_sets(pair: list[Path], tmp_path: Path) -> None:
    """26: both ids are shown."""
    other = create([tmp_path / "other.img"], SIZE)
    line = refused([pair[0], *other], tmp_path)
    sets = {examine(path)["replicas"][0]["set"] for path in (pair[0], *other)}
    assert len(sets) == 2
    assert all(each in line for each in sets)


def test_a_raw_image_beside_a_member(pair: list[Path], tmp_path: Path) -> None:
    """27: never overwritten and never a source, unless the operator says so."""
    raw = tmp_path / "raw.img"
    raw.write_bytes(os.urandom(SIZE))
    line = refused([*pair, raw], tmp_path)
    assert str(raw) in line
    assert "resolve --keep" in line
    assert "has no sidecar" in line
    refused([raw, pair[0]], tmp_path, options="degraded")
    quorumfs("resolve", "--keep", pair[0], *pair, raw)
    with SetMount([*pair, raw], tmp_path) as disk:
        assert read(disk) == b"d"
        disk.wait_healthy()
    assert same([*pair, raw])


def test_a_copy_of_a_replica_with_its_sidecar(pair: list[Path], tmp_path: Path) -> None:
    """32: the same replica twice is refused, and it is said what to do."""
    copied = tmp_path / "copy.img"
    copy(pair[0], copied)
    line = refused([pair[0], copied], tmp_path)
    assert str(pair[0]) in line
    assert str(copied) in line
    refused([*pair, copied], tmp_path)


@pytest.mark.parametrize("way", ["twice", "symlink", "hardlink", "relative", "bind mount"])
def test_the_same_file_twice(way: str, pair: list[Path], tmp_path: Path) -> None:
    """29: by whatever path."""
    other = tmp_path / "other.img"
    if way == "twice":
        other = pair[0]
    elif way == "symlink":
        other.symlink_to(pair[0])
    elif way == "hardlink":
        other.hardlink_to(pair[0])
        sidecar(other).hardlink_to(sidecar(pair[0]))
    elif way == "relative":
        other = tmp_path / ".." / tmp_path.name / pair[0].name
    if way != "bind mount":
        assert "the same file" in refused([pair[0], other], tmp_path)
        return
    shown = tmp_path / "shown"
    shown.mkdir()
    subprocess.run(["mount", "--bind", tmp_path, shown], check=True)
    try:
        refused([pair[0], shown / pair[0].name], tmp_path)
    finally:
        subprocess.run(["umount", shown], check=True)


# Files that changed


def test_one_put_back_from_a_backup(three: list[Path], tmp_path: Path) -> None:
    """34: an older image with its own older sidecar is known for one, compared and repaired."""
    backup = tmp_path / "backup.img"
    copy(three[1], backup)
    with SetMount(three, tmp_path) as disk:
        write(disk, b"n", 8)
    copy(backup, three[1])
    with SetMount(three, tmp_path) as disk:
        assert disk.replica(three[1])["state"] != "current" or same(three)
        assert read(disk, 8) == b"n"
        disk.wait_healthy()
        assert disk.replica(three[1])["copied_bytes"] <= CHUNK
    assert same(three)


def test_one_of_two_put_back_from_a_backup(pair: list[Path], tmp_path: Path) -> None:
    """34: whichever is first on the command line, the later one is the source."""
    backup = tmp_path / "backup.img"
    copy(pair[0], backup)
    with SetMount(pair, tmp_path) as disk:
        write(disk, b"n", 8)
    copy(backup, pair[0])
    for options in "", "read-pattern=fifo,vote-threshold=1":
        with SetMount(pair, tmp_path, options) as disk:
            disk.wait_healthy()  # until then there may be too few for a vote
            assert read(disk, 8) == b"n"
    assert same(pair)


def test_the_image_alone_put_back(pair: list[Path], tmp_path: Path) -> None:
    """34: `cp` over the image, its sidecar left: not believed, compared in full."""
    old = pair[0].read_bytes()
    with SetMount(pair, tmp_path) as disk:
        write(disk, b"n", 8)
    pair[0].write_bytes(old)
    with SetMount(pair, tmp_path) as disk:
        disk.wait_healthy()  # until then there are too few for a vote
        assert read(disk, 8) == b"n"
        assert disk.replica(pair[0])["copied_bytes"] <= CHUNK
        assert disk.replica(pair[1])["copied_bytes"] == 0
    assert same(pair)


def test_a_guest_booted_on_one_image(pair: list[Path], tmp_path: Path) -> None:
    """35: what somebody else wrote to an image is found and overwritten from the members."""
    qemu_io = ["qemu-io", "-f", "raw", "-c", "write -P 0x77 1M 64k", str(pair[0])]
    with SetMount(pair, tmp_path):
        held = subprocess.run(qemu_io, capture_output=True, text=True, check=False)
        assert "lock" in held.stderr + held.stdout
    subprocess.run(qemu_io, capture_output=True, check=True)
    (first, _) = examine(*pair)["assembly"]["members"]
    assert first["state"] == "suspect"
    with SetMount(pair, tmp_path) as disk:
        disk.wait_healthy()  # until then there are too few for a vote
        with opened(disk.file) as fd:
            assert os.pread(fd, BLOCK, MIB) != b"\x77" * BLOCK
        assert BLOCK <= disk.replica(pair[0])["copied_bytes"] <= CHUNK
    assert same(pair)


def test_a_truncated_image(pair: list[Path], tmp_path: Path) -> None:
    """38: not used as it is; given its length back it is compared, never believed."""
    os.truncate(pair[0], SIZE // 2)
    line = refused(pair, tmp_path)
    assert "truncated" in line or str(pair[0]) in line
    with SetMount(pair, tmp_path, "degraded,vote-threshold=1") as disk:
        assert read(disk, 56) == b"d"
        part = disk.replica(pair[0])
        assert part["state"] == "missing"
        assert "truncated" in part["reason"]
        write(disk, b"n", 16)
        os.truncate(pair[0], SIZE)
        disk.wait_healthy()
        assert read(disk, 56) == b"d"
    assert same(pair)


def test_all_moved_together(pair: list[Path], tmp_path: Path) -> None:
    """A set copied to another disk is usable, and compared."""
    moved = named(tmp_path / "moved", 2)
    moved[0].parent.mkdir()
    for path, to in zip(pair, moved, strict=True):
        shutil.copyfile(path, to)
        shutil.copyfile(sidecar(path), sidecar(to))
    with SetMount(moved, tmp_path) as disk:
        assert read(disk) == b"d"
        assert disk.wait_healthy()["replicas"][1]["copied_bytes"] == 0
    with SetMount(moved, tmp_path) as disk:
        assert disk.status()["state"] == "healthy"


# Sidecars


def test_a_lost_sidecar(pair: list[Path], tmp_path: Path) -> None:
    """36: the image is no source any more; with a word it becomes a member again."""
    sidecar(pair[0]).unlink()
    line = refused(pair, tmp_path)
    assert f"resolve --keep {pair[1]}" in line
    quorumfs("resolve", "--keep", pair[1], *pair)
    with SetMount(pair, tmp_path) as disk:
        disk.wait_healthy()
        assert read(disk) == b"d"
    assert same(pair)


def test_a_later_format(pair: list[Path], tmp_path: Path) -> None:
    """44: refused, and left as it is."""
    with sidecar(pair[1]).open("r+b") as file:
        for slot in 0, PAGE:
            file.seek(slot + 8)
            file.write(b"\x63")
    assert "99" in refused(pair, tmp_path)
    assert "99" in refused(pair, tmp_path, options="degraded,vote-threshold=1")


def test_both_slots_destroyed(three: list[Path], tmp_path: Path) -> None:
    """10: no source, and with enough others no reason to refuse; nothing is written to it."""
    with sidecar(three[0]).open("r+b") as file:
        file.write(bytes(2 * PAGE))
    before = seen(with_sidecars(three[:1]))
    with SetMount(three, tmp_path) as disk:
        assert disk.replica(three[0])["state"] == "foreign"
        assert read(disk) == b"d"
        write(disk, b"n", 8)
        assert disk.status()["state"] == "needs-operator"
        assert quorumfs("status", disk.mountpoint, check=False).returncode == 3
    assert seen(with_sidecars(three[:1])) == before
    sidecar(three[0]).unlink()
    quorumfs("resolve", "--keep", three[1], *three)
    with SetMount(three, tmp_path) as disk:
        disk.wait_healthy()
    assert same(three)


def test_both_slots_of_one_of_two_destroyed(pair: list[Path], tmp_path: Path) -> None:
    """10: what is left may be behind, so that needs a word."""
    with sidecar(pair[0]).open("r+b") as file:
        file.write(bytes(2 * PAGE))
    assert "-o degraded" in refused(pair, tmp_path)


@pytest.mark.parametrize(("slot", "torn"), [(0, 512), (1, 512), (0, 3584)])
def test_a_torn_slot(slot: int, torn: int, pair: list[Path], tmp_path: Path) -> None:
    """9: the other one is used, with a warning; never a reason to copy all or to refuse."""
    with sidecar(pair[0]).open("r+b") as file:
        file.seek(slot * PAGE + torn)
        file.write(os.urandom(PAGE - torn))
    with SetMount(pair, tmp_path) as disk:
        assert read(disk) == b"d"
        status = disk.wait_healthy()
        assert sum(part["copied_bytes"] for part in status["replicas"]) <= SIZE
        assert any("slot" in record.get("message", "") for record in disk.log()) or torn >= 2048
    assert same(pair)


def test_a_torn_map(pair: list[Path], tmp_path: Path) -> None:
    """11: every chunk may differ then: all is compared, and no difference is left."""
    with sidecar(pair[0]).open("r+b") as file:
        file.seek(3 * PAGE)
        file.write(os.urandom(PAGE))
    with opened(pair[1], os.O_RDWR) as fd:  # which a wrong "clean" would leave
        times = os.fstat(fd)
        os.pwrite(fd, b"?", 40 * CHUNK)
        os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
    with SetMount(pair, tmp_path) as disk:
        disk.wait_healthy()
    assert same(pair)


def test_a_sidecar_cut_off(pair: list[Path], tmp_path: Path) -> None:
    """11: as if it were torn."""
    os.truncate(sidecar(pair[0]), 3 * PAGE)
    with SetMount(pair, tmp_path) as disk:
        assert read(disk) == b"d"
        disk.wait_healthy()
        write(disk, b"n")
    assert same(pair)
    with SetMount(pair, tmp_path) as disk:
        assert disk.status()["state"] == "healthy"


def test_a_sidecar_that_cannot_be_written_at_the_mount(tmp_path: Path) -> None:
    """41, 43: that replica is ejected or refused in one line; nothing crashes."""
    with FaultFS(tmp_path) as faulty:
        images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, "--vote-threshold=1")
        faulty.inject("b.img.quorumfs", "write", errno=errno.EIO)
        with SetMount(images, tmp_path) as disk:
            write(disk, b"n")
            assert disk.replica(images[1])["state"] != "current"
            faulty.clear()
            disk.wait_healthy()
        assert same([images[0], faulty.backing("b.img")])


def test_no_space_for_a_first_sidecar(make_images: MakeImages, tmp_path: Path) -> None:
    """43: nothing can be adopted where no sidecar can be made; none is left of the others."""
    images = make_images(1)
    with tmpfs(tmp_path / "other", MIB * 4) as other:
        shown = other / "b.img"
        shown.write_bytes(bytes(1 << 20))
        with filled(other):
            line = refused([images[0], shown], tmp_path)
        assert str(sidecar(shown)) in line
        assert not sidecar(images[0]).exists()
        assert not sidecar(shown).exists()


def test_a_create_without_space_leaves_nothing(tmp_path: Path) -> None:
    """The first replica's files are gone again too."""
    with tmpfs(tmp_path / "small", 64 << 10) as small:
        done = quorumfs("create", "--size", "1T", tmp_path / "a.img", small / "b.img", check=False)
        assert "No space" in one_line(done, 1)
        assert os.listdir(small) == []
    assert not (tmp_path / "a.img").exists()
    assert not sidecar(tmp_path / "a.img").exists()


def test_create_takes_nothing_that_exists(pair: list[Path], tmp_path: Path) -> None:
    """Neither an image nor a stray sidecar."""
    before = seen(with_sidecars(pair))
    new = tmp_path / "c.img"
    done = quorumfs("create", "--size", "4M", new, pair[0], check=False)
    assert str(pair[0]) in one_line(done, 1)
    assert not new.exists()
    assert seen(with_sidecars(pair)) == before


def test_a_stray_sidecar_is_not_overwritten(pair: list[Path], tmp_path: Path) -> None:
    """An image may only be away: what is on record of it stays."""
    pair[0].rename(tmp_path / "away.img")
    before = sidecar(pair[0]).read_bytes()
    done = quorumfs("create", "--size", "4M", pair[0], tmp_path / "c.img", check=False)
    assert done.returncode != 0
    assert sidecar(pair[0]).read_bytes() == before


# In good order


def test_a_clean_remount_copies_nothing(pair: list[Path], tmp_path: Path) -> None:
    """12: the same generation, nothing read of the images, nothing written to them."""
    before = seen(pair)
    with SetMount(pair, tmp_path) as disk:
        generation = disk.status()["generation"]
        status = disk.wait_healthy()
    for part in status["replicas"]:
        assert (part["copied_bytes"], part["reads"], part["writes"]) == (0, 0, 0)
    assert seen(pair) == before
    assert examine(*pair)["assembly"]["intent"]["bytes"] == 0
    with SetMount(pair, tmp_path) as disk:
        write(disk, b"n")
        assert disk.status()["generation"] == generation
    with SetMount(pair, tmp_path) as disk:
        status = disk.status()
        assert (status["generation"], status["state"]) == (generation, "healthy")


def test_nobody_touched_a_set_on_a_fuse_file_system(tmp_path: Path) -> None:
    """Its times and inode numbers move by themselves; that is no reason to suspect an image."""
    with FaultFS(tmp_path) as faulty:
        images = create([faulty.path("a.img"), faulty.path("b.img")], SIZE)
        for letter in b"n", b"o", b"p":
            with SetMount(images, tmp_path) as disk:
                assert disk.states() == ["current", "current"]
                assert disk.status()["state"] == "healthy"
                write(disk, letter)
                assert not any("changed" in record.get("message", "") for record in disk.log())


def test_a_large_set_is_ready_at_once(tmp_path: Path) -> None:
    """16 TiB, sparse: a mount takes not a second longer than that of a small set, and a resync
    keeps it sparse."""
    with tmpfs(tmp_path / "memory", 256 * MIB) as memory:
        images = create(named(memory, 2), 16 << 40, "--vote-threshold=1")
        small = create(named(tmp_path, 2), SIZE)
        seconds_small, seconds_large = [], []
        for number in range(3):
            began = time.monotonic()
            with SetMount(small, tmp_path):
                seconds_small.append(time.monotonic() - began)
            began = time.monotonic()
            with SetMount(images, tmp_path) as disk:
                seconds_large.append(time.monotonic() - began)
                write(disk, b"x", number << 24)
                assert disk.status()["state"] == "healthy"
        assert min(seconds_large) < min(seconds_small) + 1
        with SetMount(images[:1], tmp_path, "degraded") as disk:
            write(disk, b"y", 15 << 24)
        with SetMount(images, tmp_path) as disk:
            disk.wait_healthy()
            assert disk.replica(images[1])["copied_bytes"] == BLOCK
        assert allocated(images[0]) == allocated(images[1])
        with opened(images[1], os.O_RDONLY) as fd:
            assert os.pread(fd, BLOCK, 15 << 40) == b"y" * BLOCK


def test_comparing_a_large_sparse_set_takes_no_time_for_holes(tmp_path: Path) -> None:
    """16 TiB of which two images have 4 KiB, and one was touched: what is a hole needs no look."""
    with tmpfs(tmp_path / "memory", 256 * MIB) as memory:
        images = create(named(memory, 2), 16 << 40)
        with SetMount(images, tmp_path) as disk:
            write(disk, b"x", 15 << 24)
        os.utime(images[1])
        with SetMount(images, tmp_path) as disk:
            disk.wait_healthy()
            assert disk.replica(images[1])["copied_bytes"] == 0
        assert "is suspect" in disk.log_file.read_text()


@pytest.mark.parametrize("condition", ["clean", "crashed", "raw"])
def test_a_read_only_mount_writes_nothing(condition: str, tmp_path: Path) -> None:
    """42: neither data nor records, nor times; what may differ is read from one source."""
    if condition == "raw":
        images = named(tmp_path, 2)
        for path in images:
            path.write_bytes(b"r" * SIZE)
    else:
        images = create(named(tmp_path, 2), SIZE)
        with SetMount(images, tmp_path) as disk:
            write(disk, b"r")
            if condition == "crashed":
                disk.kill()
    if condition == "crashed":
        with opened(images[1], os.O_RDWR) as fd:
            os.pwrite(fd, b"s" * BLOCK, CHUNK)
    before = seen([path for path in with_sidecars(images) if path.exists()])
    for path in with_sidecars(images):
        if path.exists():
            path.chmod(0o444)
    for _ in range(2):
        with SetMount(images, tmp_path, "ro") as disk:
            assert read(disk) == b"r"
            if condition == "crashed":
                assert {read(disk, 1) for _ in range(50)} == {b"\0"}
                assert disk.status()["state"] == "degraded"
    assert seen([path for path in with_sidecars(images) if path.exists()]) == before


def test_a_second_mount_is_refused(pair: list[Path], tmp_path: Path) -> None:
    """90: of the same replicas; who has them is told."""
    other = tmp_path / "other"
    other.mkdir()
    with SetMount(pair, tmp_path) as disk:
        line = refused(pair, other)
        assert "in use" in line
        assert str(disk.pid) in line
        done = quorumfs("resolve", "--keep", pair[0], *pair, check=False)
        assert "in use" in one_line(done, 1)


# Adoption


def test_equal_images_are_adopted(make_images: MakeImages, tmp_path: Path) -> None:
    """Usable at once, compared in the background, healthy then; later mounts compare nothing."""
    images = make_images(2, EXTENT)
    for path in images:
        with path.open("r+b") as file:
            file.write(b"same" * CHUNK)
    before = {name: content for name, (content, _) in seen(images).items()}
    with SetMount(images, tmp_path) as disk:
        assert disk.wait_healthy()["replicas"][1]["copied_bytes"] == 0
    assert {name: content for name, (content, _) in seen(images).items()} == before
    with SetMount(images, tmp_path) as disk:
        status = disk.wait_healthy()
        assert all(part["reads"] == 0 for part in status["replicas"])


def test_different_images_need_the_operator(make_images: MakeImages, tmp_path: Path) -> None:
    """Two that differ: told, counted, nothing overwritten, not even when it is read; then kept."""
    images = make_images(2, EXTENT)
    for path, letter in zip(images, (b"a", b"b"), strict=True):
        with opened(path, os.O_RDWR) as fd:
            os.pwrite(fd, letter * BLOCK, 5 * CHUNK)
    before = {name: content for name, (content, _) in seen(images).items()}
    options = "read-pattern=fifo,vote-threshold=1"
    for _ in range(2):
        with SetMount(images, tmp_path, options) as disk:
            status = disk.wait(lambda s: s["state"] == "needs-operator", "the comparison's end")
            assert status["undecided_bytes"] == CHUNK
            done = quorumfs("status", disk.mountpoint, check=False)
            assert done.returncode == 3
            assert "quorumfs resolve --keep" in " ".join(done.stdout.split())
            assert read(disk, 5) == b"a"
    assert {name: content for name, (content, _) in seen(images).items()} == before
    done = quorumfs("examine", *images, check=False)
    assert done.returncode == 1, "it is not on record that they were compared there, and differ"
    assert "64.0 KiB, not found equal yet: a mount compares them" in " ".join(done.stdout.split())
    said = quorumfs("resolve", "--dry-run", "--keep", images[1], *images).stdout
    assert f"overwritten in up to {CHUNK} bytes: what was not found equal yet" in said
    quorumfs("resolve", "--keep", images[1], *images)
    assert quorumfs("examine", *images).returncode == 0
    with SetMount(images, tmp_path, options) as disk:
        assert read(disk, 5) == b"b"
        disk.wait_healthy()
        assert BLOCK <= disk.replica(images[0])["copied_bytes"] <= CHUNK
    assert same(images)
    assert examine(*images)["assembly"]["unverified"]["bytes"] == 0


def test_a_strict_majority_repairs(make_images: MakeImages, tmp_path: Path) -> None:
    """Two of three agree, at different places: each is repaired from the others, and told."""
    images = make_images(3, EXTENT)
    for number, path in enumerate(images):
        with opened(path, os.O_RDWR) as fd:
            os.pwrite(fd, b"same" * 1024, 0)
            os.pwrite(fd, b"bad" * 100, (number + 1) * 20 * CHUNK)
    with SetMount(images, tmp_path) as disk:
        status = disk.wait_healthy()
        assert [part["copied_bytes"] for part in status["replicas"]] == [BLOCK] * 3
        assert len(disk.events("MISMATCH_REPAIRED")) == 3
    assert same(images)
    with opened(images[0], os.O_RDONLY) as fd:
        assert os.pread(fd, BLOCK, 20 * CHUNK) == bytes(BLOCK)


def test_three_that_all_differ(make_images: MakeImages, tmp_path: Path) -> None:
    """No majority, so nothing is overwritten (P4)."""
    images = make_images(3, SIZE)
    for number, path in enumerate(images):
        with opened(path, os.O_RDWR) as fd:
            os.pwrite(fd, bytes([number + 1]) * BLOCK, 0)
    before = {name: content for name, (content, _) in seen(images).items()}
    with SetMount(images, tmp_path) as disk:
        disk.wait(lambda s: s["state"] == "needs-operator", "the comparison's end")
    assert {name: content for name, (content, _) in seen(images).items()} == before


def test_a_write_decides_what_differed(make_images: MakeImages, tmp_path: Path) -> None:
    """Where the guest has written all of a chunk there is no difference any more."""
    images = make_images(2, SIZE)
    with opened(images[1], os.O_RDWR) as fd:
        os.pwrite(fd, b"b" * BLOCK, 5 * CHUNK)
    with SetMount(images, tmp_path) as disk:
        disk.wait(lambda s: s["state"] == "needs-operator", "the comparison's end")
        with opened(disk.file) as fd:
            os.pwrite(fd, b"n" * CHUNK, 5 * CHUNK)
    assert same(images)
    with SetMount(images, tmp_path) as disk:
        disk.wait_healthy()


def test_an_unreadable_place_is_no_difference(tmp_path: Path) -> None:
    """A read error while equal images are compared needs no decision: it is tried again."""
    with FaultFS(tmp_path) as faulty:
        images = [tmp_path / "a.img", faulty.path("b.img")]
        for path in images[0], faulty.backing("b.img"):
            path.write_bytes(bytes(SIZE))
        faulty.inject("b.img", "read", start=5 * CHUNK, end=6 * CHUNK, errno=errno.EIO, count=20)
        with SetMount(images, tmp_path, "read-pattern=fifo,vote-threshold=1") as disk:
            disk.wait_healthy()


def test_images_of_different_sizes(make_images: MakeImages, tmp_path: Path) -> None:
    """38: both sizes are told, and no sidecar is left."""
    images = make_images(2, SIZE)
    os.truncate(images[1], SIZE + 512)
    line = refused(images, tmp_path)
    assert str(SIZE) in line
    assert str(SIZE + 512) in line
    assert not any(sidecar(path).exists() for path in images)


def test_a_source_is_copied_over_the_others(tmp_path: Path) -> None:
    """28: ``create --source`` states the direction; it is done when the command is."""
    source, *others = named(tmp_path, 3)
    source.write_bytes(os.urandom(SIZE))
    others[0].write_bytes(os.urandom(SIZE))
    before = source.read_bytes()
    quorumfs("create", "--source", source, *others)
    assert same([source, *others])
    assert source.read_bytes() == before
    with SetMount([source, *others], tmp_path) as disk:
        status = disk.status()
        assert status["state"] == "healthy"
        assert all(part["reads"] == 0 for part in status["replicas"])
