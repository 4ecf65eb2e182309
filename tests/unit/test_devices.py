"""What tells block devices apart, and what follows from it; without a device."""

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.native import gate_library

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.devices import (
    ENDS,
    FIRST_PARTITION,
    NAME_MAX,
    REGION,
    SAMPLE,
    SPREAD,
    file_name,
    number_of,
    samples,
    stable_name,
)
from quorumfs.decisions.dirtymap import UNVERIFIED, DirtyMap
from quorumfs.decisions.latency import Durations
from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import REGIONS, Identity, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sameimage import image_changed, image_unproven
from quorumfs.errors import UserError
from quorumfs.fastpath.native import Gate, Request, RequestKind
from quorumfs.replica import devices
from quorumfs.replica.filesystems import Locality
from quorumfs.replica.lastregions import LastRegions
from quorumfs.replica.lengthening import FIRST, Steps
from quorumfs.replica.places import place_for, require_directory

SIZE = 64 << 20


# Names


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"dm/uuid": "LVM-abc", "dm/name": "vg-lv"}, "dm-LVM-abc"),
        ({"dm/name": "plain"}, "dm-name-plain"),
        ({"loop/backing_file": "/srv/a", "loop/offset": "0"}, "loop-/srv/a"),
        ({"loop/backing_file": "/a", "loop/offset": "8", "loop/sizelimit": "9"}, "loop-/a-8-9"),
        ({"md/uuid": "1-2"}, "md-1-2"),
        ({"wwid": "eui.00a0"}, "wwid-eui.00a0"),
        ({"wwid": "eui.0000", "device/wwid": "naa.5"}, "wwid-naa.5"),
        ({"serial": "vdisk7"}, "serial-vdisk7"),
        ({"device/cid": "15b"}, "cid-15b"),
        (
            {"../device/wwid": "naa.5", "partition": "2", "start": "2048"},
            "wwid-naa.5-part2-at-2048",
        ),
        ({"partition": "1", "start": "8"}, None),
        ({"size": "8", "pid": "7"}, None),  # a network block device tells nothing
    ],
)
def test_a_device_is_named_by_what_stays_with_it(
    facts: Mapping[str, str], name: str | None
) -> None:
    assert stable_name(lambda attribute: facts.get(attribute, "")) == name


@given(st.text(max_size=300), st.text(max_size=300))
def test_two_devices_never_have_one_sidecar(one: str, other: str) -> None:
    """And its name is that of a file, whatever a device is called."""
    names = [file_name(one), file_name(other)]
    assert (one == other) == (names[0] == names[1])
    for name in names:
        assert "/" not in name
        assert "\0" not in name
        assert len(os.fsencode(name)) <= NAME_MAX
    assert (number_of(one) == number_of(other)) == (one == other)
    assert 0 < number_of(one) < 1 << 63


@given(st.integers(1, 1 << 50))
def test_a_fingerprint_looks_at_both_ends_and_between(size: int) -> None:
    pieces = list(samples(size))
    assert pieces[0][0] == 0
    assert sum(pieces[-1]) == size
    assert len(pieces) <= 3 * ENDS + SPREAD
    assert all(0 < length <= SAMPLE for _, length in pieces)
    assert all(sum(one) <= other[0] for one, other in pairwise(pieces))
    assert (FIRST_PARTITION in dict(pieces)) == (size > FIRST_PARTITION)
    if size > SPREAD * ENDS * SAMPLE:
        between = [place for place, _ in pieces if size // 4 < place < 3 * size // 4]
        assert len(between) >= SPREAD // 2 - 1


# Places


def test_a_device_has_no_place_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"/dev/x is a block device, .* sidecars=DIR, .* --sidecars"
    ):
        require_directory("/dev/x", None)
    monkeypatch.setattr("quorumfs.replica.places.is_device", lambda _: True)
    with pytest.raises(UserError, match="is a block device"):
        place_for("/dev/x", None)


def test_no_device_is_in_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its node is: a flush of it must not be left out."""
    monkeypatch.setattr(devices, "_attribute", lambda _, name: "/f" if "backing" in name else "")
    for where in Locality:
        monkeypatch.setattr(devices, "locality", lambda _, where=where: where)
        expected = Locality.ELSEWHERE if where is Locality.ELSEWHERE else Locality.HERE
        assert devices.locality_of_device(os.makedev(7, 0)) is expected


def test_what_is_no_device_is_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("places")
    assert not devices.is_device(str(directory))
    assert not devices.is_device(str(directory / "absent"))
    assert place_for(str(directory / "a.img"), None) == str(directory / "a.img.quorumfs")
    assert not stat.S_ISBLK(os.stat(directory).st_mode)


# What a sidecar says of a device


HERE = 7
"""The number of an attachment."""


def device(known: Identity, now: Identity, attachment: int = HERE, number: int = 0) -> Found:
    """One of two devices of a set, whose sidecar has *known* on record."""
    record = new_record(["/dev/a", "/dev/b"], SIZE, 1, random_bytes=lambda n: bytes([n]) * n)
    roles = [replace(role, replica_id=bytes([i]) * 16) for i, role in enumerate(record.roles)]
    record = replace(record, roles=tuple(roles))
    sidecar = Sidecar(roles[number].replica_id, record, DirtyMap(SIZE, record.chunk_size), known)
    path = record.roles[number].path
    return Found(path, now, sidecar, None, attachment, f"/side{number}", device=True)


CLOSED = Identity(3, SIZE, 1234)
IN_USE = Identity(HERE, SIZE)


@pytest.mark.parametrize(
    ("now", "changed"),
    [
        (CLOSED, False),
        (replace(CLOSED, size=2 * SIZE), False),  # it was made longer
        (replace(CLOSED, size=SIZE - 512), True),
        (replace(CLOSED, mtime_ns=1235), True),
        (replace(CLOSED, inode=4), True),
    ],
)
def test_a_device_that_was_closed_is_told_by_identity_and_fingerprint(
    now: Identity, changed: bool
) -> None:
    """Wherever it is attached by now."""
    assert image_changed(device(CLOSED, now)) is changed
    assert image_changed(device(CLOSED, now, attachment=8)) is changed
    assert not image_unproven(device(CLOSED, now, attachment=8))


@pytest.mark.parametrize(
    ("known", "attachment", "unproven"),
    [
        (IN_USE, HERE, False),
        (IN_USE, HERE + 1, True),
        (IN_USE, 0, True),
        (Identity(), HERE, True),
    ],
)
def test_a_device_that_was_in_use_is_told_by_its_attachment(
    known: Identity, attachment: int, unproven: bool
) -> None:
    found = device(known, CLOSED, attachment)
    assert image_unproven(found) is unproven
    assert not image_changed(found)


NAMELESS = Identity(0, SIZE, 1234)


def test_a_fingerprint_alone_proves_nothing() -> None:
    """But it may tell that there is something else."""
    assert image_unproven(device(NAMELESS, NAMELESS, 0))
    assert not image_changed(device(NAMELESS, NAMELESS, 0))
    assert image_changed(device(NAMELESS, replace(NAMELESS, mtime_ns=1), 0))


def test_nameless_devices_alone_are_believed_and_compared() -> None:
    """One whose fingerprint is another's is not; nor is any of them beside one that has a name."""
    other = replace(NAMELESS, mtime_ns=1)
    both = [device(NAMELESS, NAMELESS, 0), device(NAMELESS, NAMELESS, 0, number=1)]
    plan = assemble(both)
    assert [member.state for member in plan.members] == [Standing.CURRENT] * 2
    assert plan.map.is_all(UNVERIFIED)
    assert any("comparing" in note for note in plan.notes)
    plan = assemble([device(NAMELESS, other, 0), both[1]])
    assert [member.state for member in plan.members] == [Standing.SUSPECT, Standing.CURRENT]
    plan = assemble([device(CLOSED, CLOSED), both[1]])
    assert [member.state for member in plan.members] == [Standing.CURRENT, Standing.SUSPECT]
    assert not plan.map.count(UNVERIFIED)


def test_a_fingerprint_is_of_what_the_disk_takes(tmp_path: Path) -> None:
    """A file may stand in: only the kernel's facts differ."""
    path = tmp_path / "disk"
    path.write_bytes(b"a" * (1 << 20) + b"b" * 7)
    facts = devices.Device((7, 0), None, 3, HERE, 512)
    with path.open("r+b") as file:
        first = devices.content_identity(file.fileno(), facts)
        assert first == Identity(3, (1 << 20) + 7, first.mtime_ns)
        assert 0 < first.mtime_ns < 1 << 63
        file.write(b"b")
        file.flush()
        assert devices.content_identity(file.fileno(), facts) != first
        short = devices.content_identity(file.fileno(), facts, over=1 << 20)
        os.pwrite(file.fileno(), b"c", 1 << 20)
        assert devices.content_identity(file.fileno(), facts, over=1 << 20) == short


@given(st.sets(st.integers(0, 5), max_size=REGIONS), st.integers(0, 5 * REGION))
def test_a_fingerprint_covers_the_regions_that_were_written_to_last(
    regions: set[int], changed: int
) -> None:
    """It tells a change of any of their bytes, on a disk that ends in the fifth."""
    size = 4 * REGION + 12345
    sampled = any(offset <= changed < offset + length for offset, length in samples(size))
    with TemporaryFile() as file:
        file.truncate(5 * REGION + 1)
        facts = devices.Device((7, 0), None, 3, HERE, 512)
        taken = partial(devices.content_identity, file.fileno(), facts, size, tuple(regions))
        first = taken()
        os.pwrite(file.fileno(), b"c", changed)
        covered = sampled or (changed < size and changed // REGION in regions)
        assert (taken() != first) == covered


LENGTHS = st.sampled_from((1, 512, REGION // 2, REGION, 3 * REGION, 40 * REGION))
WRITES = st.lists(st.tuples(st.booleans(), st.integers(0, 20 * REGION), LENGTHS), max_size=60)


@given(st.lists(st.integers(0, 20), unique=True, max_size=REGIONS), WRITES)
def test_the_regions_that_were_written_to_last_are_kept(
    before: list[int], writes: list[tuple[bool, int, int]]
) -> None:
    """C and Python note them in the same memory, the latest one first, each once."""
    gate, library = Gate(size=1 << 40, chunk_size=1 << 30, writers=2), gate_library()
    kept, durations, expected = LastRegions(before), Durations(), before[::-1]
    for place in gate.writer[:2]:
        place.durations = durations.address
    gate.writer[1].regions = kept.address
    for in_c, offset, length in writes:
        first, last = offset // REGION, (offset + length - 1) // REGION
        written = list(range(first, last + 1)) if last - first < REGIONS else [first, last]
        expected = [one for one in expected if one not in written] + written
        if in_c and length <= REGION:
            request = Request(RequestKind.WRITE, length, 1, 0, offset, None)
            library.gate_note(gate, request, None)
        else:
            kept.note(offset, length)
    assert list(kept) == expected[::-1][:REGIONS]
    assert list(LastRegions(kept)) == list(kept)


def test_one_changed_device_is_compared_and_the_other_believed() -> None:
    good, bad = device(CLOSED, CLOSED), device(CLOSED, replace(CLOSED, mtime_ns=1), number=1)
    plan = assemble([good, bad])
    assert [member.state for member in plan.members] == [Standing.CURRENT, Standing.SUSPECT]


def test_sidecars_that_are_copies_say_nothing_of_who_is_right() -> None:
    """The device that changed since may be the only one that went on."""
    good = replace(device(CLOSED, replace(CLOSED, mtime_ns=1)), copied=True)
    stale = replace(device(CLOSED, CLOSED, number=1), copied=True)
    for both in ([good, stale], [stale, good]):
        plan = assemble(both)
        assert [member.state for member in plan.members] == [Standing.CURRENT] * 2
        assert plan.map.is_all(UNVERIFIED)
    plan = assemble([good, replace(stale, copied=False)])
    assert [member.state for member in plan.members] == [Standing.SUSPECT, Standing.CURRENT]


def test_no_device_is_adopted() -> None:
    new = [Found("/dev/a", CLOSED, place="/side/a", device=True), Found("/b.img", CLOSED)]
    for found in (new, new[::-1], new[:1]):
        with pytest.raises(AssemblyRefusedError, match=r"there is no /side/a\..* quorumfs create"):
            assemble(found)
    assert assemble([Found("/a.img", CLOSED), Found("/b.img", CLOSED)]).adopted


def test_a_device_that_became_short_is_not_to_be_truncated() -> None:
    """What is said of it can be done to a device."""
    short = replace(CLOSED, size=SIZE - 512)
    both = [device(CLOSED, short), device(CLOSED, short, number=1)]
    with pytest.raises(AssemblyRefusedError, match="make it as long again") as refused:
        assemble(both)
    assert "truncate -s" not in str(refused.value)


# Growth


def test_steps_get_longer_while_they_are_quick() -> None:
    """As those of files are, which take no time."""
    steps, count = Steps(FIRST, 1 << 44), 0
    while steps.length:
        assert steps.at + steps.length <= steps.end
        steps.took(0.001)
        count += 1
    assert count < 24
    assert steps.at == steps.end


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.floats(0.3, 0.9), st.floats(1.1, 9))
def test_slow_steps_stay_short(start: int, more: int, even: float, slow: float) -> None:
    steps = Steps(start, start + more)
    steps.took(0.0)
    assert steps.length == min(2 * FIRST, steps.end - steps.at)
    steps.took(even)
    assert steps.length == min(2 * FIRST, steps.end - steps.at)
    steps.took(slow)
    steps.took(slow)
    assert steps.length == min(FIRST, steps.end - steps.at)
