"""``quorumfs examine`` on sidecars as mounts leave them: everything told, nothing changed."""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeImages
from support.claims import claim
from support.faultfs import FaultFS
from support.mounting import QUORUMFS, quorumfs

from quorumfs.decisions.dirtymap import CHUNK_MIN, INTENT, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import (
    Identity,
    Phase,
    Record,
    RoleState,
    Sidecar,
    identity_of,
    path_for,
)
from quorumfs.decisions.sidecar import MAP_OFFSET, PAGE, encode_slot
from quorumfs.replica.sidecarfile import open_sidecar, replace_sidecar, sign

SIZE = 10 * CHUNK_MIN + 4096
"""The last chunk is a short one."""


class Set:
    """Replicas of one set with their sidecars, in whatever condition a test wants."""

    def __init__(self, paths: Sequence[Path], threshold: int = 1) -> None:
        self.paths = list(paths)
        self.record = new_record([str(path) for path in paths], SIZE, threshold)

    def write(
        self,
        index: int,
        record: Record | None = None,
        disk_map: DirtyMap | None = None,
        **changes: Any,
    ) -> None:
        """The sidecar of one replica; that of a set closed in order, but for *changes*."""
        record = record or self.record
        sidecar = Sidecar(
            self.record.roles[index].replica_id,
            record,
            disk_map or DirtyMap(SIZE, record.chunk_size),
            identity_of(self.paths[index].stat()),
        )
        replace_sidecar(str(self.paths[index]), replace(sidecar, **changes))

    def write_all(self, record: Record | None = None) -> None:
        for index in range(len(self.paths)):
            self.write(index, record)


@pytest.fixture
def pair(make_images: MakeImages) -> Set:
    return Set(make_images(2, SIZE))


def examine(*paths: str | Path, exit_code: int = 0) -> dict[str, Any]:
    """The JSON, after a look at the text, which must come with the same exit code."""
    text = quorumfs("examine", *paths, check=False)
    assert (text.returncode, text.stderr) == (exit_code, "")
    done = quorumfs("examine", "--json", *paths, check=False)
    assert (done.returncode, done.stderr) == (exit_code, "")
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def text_of(*paths: str | Path) -> str:
    return " ".join(quorumfs("examine", *paths, check=False).stdout.split())


def marked(chunks: int, count: int) -> dict[str, int]:
    return {"chunks": chunks, "bytes": count}


def test_everything_in_a_sidecar_is_told(pair: Set) -> None:
    a, b = pair.paths
    record = replace(pair.record.minted(), sequence=7).with_role(1, state=RoleState.STALE)
    disk_map = DirtyMap(SIZE, CHUNK_MIN)
    disk_map.add(INTENT, range(3))
    disk_map.add(UNVERIFIED, range(1))
    disk_map.add(out_of_sync(1), range(9, 11))  # the last one is short
    pair.write(0, record, disk_map)
    content = examine(a)
    assert content["schema"] == 1
    assert content["assembly"] is None
    (replica,) = content["replicas"]
    identity = identity_of(a.stat())
    recorded = {
        "inode": identity.inode,
        "size": SIZE,
        "mtime_ns": identity.mtime_ns,
        "ctime_ns": identity.ctime_ns,
    }
    assert replica == {
        "path": str(a),
        "sidecar": f"{a}.quorumfs",
        "problem": None,
        "image": {
            "problem": None,
            "now": recorded,
            "recorded": recorded,
            "changed": False,
            "device": False,
        },
        "in_use": False,
        "holder": None,
        "claim": None,
        "id": record.roles[0].replica_id.hex(),
        "slot": 0,
        "state": "current",
        "set": record.set_id.hex(),
        "generation": f"{record.generation:016x}",
        "ancestors": [f"{pair.record.generation:016x}"],
        "mounts": [],
        "sequence": 7,
        "clean": True,
        "vote_threshold": 1,
        "size": SIZE,
        "chunk_size": CHUNK_MIN,
        "roles": [
            {
                "slot": slot,
                "id": role.replica_id.hex(),
                "state": state,
                "generation": f"{pair.record.generation:016x}",
                "sequence": role.sequence,
                "mount": f"{role.mount:016x}",
                "path": str(path),
            }
            for slot, (role, state, path) in enumerate(
                zip(record.roles, ["current", "stale"], [a, b], strict=True)
            )
        ],
        "map": {
            "chunks": 11,
            "intent": marked(3, 3 * CHUNK_MIN),
            "unverified": marked(1, CHUNK_MIN),
            "lacking": [
                {"slot": 0, "path": str(a), **marked(0, 0)},
                {"slot": 1, "path": str(b), **marked(2, CHUNK_MIN + 4096)},
            ],
        },
        "prepared": None,
        "damage": [],
    }
    text = text_of(a)
    for fact in (
        f"generation: {record.generation:016x}, sequence 7, closed in order",
        f"ancestors: {pair.record.generation:016x}",
        "map: 3 chunks, 192.0 KiB, may differ",
        f"map: 2 chunks, 68.0 KiB, lacked by {b}",
        f"slot 1: stale since generation {pair.record.generation:016x}: {b}",
        "as it was when the set was closed",
    ):
        assert fact in text


def test_the_path_of_a_sidecar_will_do(pair: Set) -> None:
    pair.write_all()
    (replica,) = examine(path_for(str(pair.paths[0])))["replicas"]
    assert replica["path"] == str(pair.paths[0])


def test_nothing_is_changed_by_looking(pair: Set) -> None:
    """Neither contents nor times, and no file comes or goes."""
    pair.write_all()

    def seen() -> object:
        directory = pair.paths[0].parent
        return {
            path.name: (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ctime_ns)
            for path in directory.iterdir()
        }

    before = seen()
    examine(*pair.paths)
    assert seen() == before


def test_what_is_in_use_may_be_looked_at(pair: Set) -> None:
    """Under the exclusive lock of a daemon; who holds it is told."""
    pair.write_all(replace(pair.record, clean=False))
    fd = open_sidecar(path_for(str(pair.paths[0])), read_only=False)
    assert fd is not None
    sign(fd, claim(pid=4711, host="nas1"))
    try:
        first, second = examine(*pair.paths)["replicas"]
        text = text_of(pair.paths[0])
    finally:
        os.close(fd)
    who = "pid 4711 on nas1 since 2026-01-02 00:00:00 UTC"
    assert (first["in_use"], first["holder"]) == (True, who)
    assert (second["in_use"], second["holder"]) == (False, None)
    assert f"in use: {who}" in text
    assert ", open" in text
    assert first["claim"]["standing"] == "elsewhere"
    assert second["claim"] is None
    # Now by no lock that is seen here.
    assert f"in use: {who}, perhaps" in text_of(pair.paths[0])
    refusal = examine(*pair.paths, exit_code=1)["assembly"]["refusal"]
    assert f"{pair.paths[0]} is in use by {who}" in refusal


def test_a_crash_is_no_failure_of_the_command(pair: Set) -> None:
    pair.write_all(replace(pair.record, clean=False))
    content = examine(*pair.paths)
    assert [replica["clean"] for replica in content["replicas"]] == [False, False]
    assert content["assembly"]["rule"] == "crash: not closed in order"
    assert "not closed in order" in text_of(*pair.paths)


def test_a_clean_pair_is_assembled(pair: Set) -> None:
    pair.write_all()
    assembly = examine(*pair.paths)["assembly"]
    assert assembly["refusal"] is None
    assert assembly["rule"] == "clean: closed in order"
    assert assembly["generation"] == f"{pair.record.generation:016x}"
    assert [(member["path"], member["state"]) for member in assembly["members"]] == [
        (str(path), "current") for path in pair.paths
    ]
    assert "mounted together: rule: clean: closed in order" in text_of(*pair.paths)


def test_an_ejected_replica_and_what_it_will_get(pair: Set) -> None:
    """Only what was written since, in chunks."""
    pair.write(1)
    record = replace(pair.record.with_state([1], RoleState.STALE).minted(), sequence=2)
    record = record.with_state([0], RoleState.CURRENT)
    disk_map = DirtyMap(SIZE, CHUNK_MIN)
    disk_map.add(out_of_sync(1), range(2))
    pair.write(0, record, disk_map)
    _, stale = examine(*pair.paths)["assembly"]["members"]
    assert (stale["state"], stale["compare"]) == ("stale", False)
    assert stale["lacking"] == marked(2, 2 * CHUNK_MIN)
    assert "a resync copies at most 128.0 KiB" in text_of(*pair.paths)


def test_an_image_changed_behind_its_sidecar_is_seen(pair: Set) -> None:
    pair.write_all()
    with pair.paths[1].open("r+b") as file:
        file.write(b"by somebody else")
    content = examine(*pair.paths)
    assert [replica["image"]["changed"] for replica in content["replicas"]] == [False, True]
    assert content["assembly"]["members"][1]["state"] == "suspect"
    text = text_of(*pair.paths)
    assert "CHANGED behind its sidecar" in text
    assert "a resync compares at most" in text


def test_without_an_identity_on_record_nothing_is_claimed(pair: Set) -> None:
    pair.write(0, replace(pair.record, clean=False), identity=Identity())
    (replica,) = examine(pair.paths[0])["replicas"]
    assert replica["image"]["changed"] is None
    assert replica["image"]["recorded"] is None


def test_a_split_brain_has_an_exit_code_of_its_own(pair: Set) -> None:
    """And both histories are shown."""
    records = [pair.record.minted().with_role(1 - slot, state=RoleState.STALE) for slot in (0, 1)]
    for index, record in enumerate(records):
        pair.write(index, record)
    assembly = examine(*pair.paths, exit_code=3)["assembly"]
    assert (assembly["rule"], assembly["exit_code"]) == ("split brain", 3)
    for record in records:
        assert f"{record.generation:016x}" in assembly["refusal"]
    assert "refused: split brain" in text_of(*pair.paths)


def test_replicas_of_two_sets_are_refused(make_images: MakeImages) -> None:
    paths = make_images(2, SIZE)
    for path in paths:
        Set([path]).write(0)
    assembly = examine(*paths, exit_code=1)["assembly"]
    assert assembly["rule"] == "foreign"
    for path in paths:
        assert len(examine(path)["replicas"]) == 1


def test_the_same_file_twice_is_refused(pair: Set) -> None:
    """By whatever path."""
    pair.write_all()
    link = pair.paths[0].parent / "link.img"
    link.symlink_to(pair.paths[0])
    assembly = examine(pair.paths[0], link, exit_code=1)["assembly"]
    assert assembly["rule"] == "same file"
    assert "are the same file" in assembly["refusal"]


def test_two_files_of_one_fuse_file_system_are_two(tmp_path: Path) -> None:
    """Though their inode numbers are not put on record: many number their files anew."""
    with FaultFS(tmp_path) as store:
        paths = [store.path("a.img"), store.path("b.img")]
        quorumfs("create", "--size", str(SIZE), *paths)
        assert examine(*paths)["assembly"]["refusal"] is None


def test_a_raw_image_has_no_sidecar(make_images: MakeImages) -> None:
    """Alone that is a failure; several would be adopted, which is told as well."""
    paths = make_images(2, SIZE)
    (replica,) = examine(paths[0], exit_code=1)["replicas"]
    assert replica["problem"] == "there is none"
    assert replica["image"]["now"]["size"] == SIZE
    assembly = examine(*paths, exit_code=1)["assembly"]
    assert assembly["rule"] == "adopt: no replica has a sidecar"
    assert assembly["unverified"]["bytes"] == SIZE


def test_a_missing_member_is_named_by_its_record(pair: Set) -> None:
    """Its sidecar alone is no replica: the image is what counts."""
    pair.write_all()
    pair.paths[1].unlink()
    content = examine(*pair.paths, exit_code=1)
    assert content["replicas"][1]["image"]["problem"] == "No such file or directory"
    assert content["replicas"][1]["generation"] == f"{pair.record.generation:016x}"
    assert content["assembly"]["rule"] == "may be newer"
    assert str(pair.paths[1]) in content["assembly"]["refusal"]


def test_a_prepared_record_is_shown(pair: Set) -> None:
    later = replace(pair.record.minted(), sequence=2).with_role(1, state=RoleState.STALE)
    pair.write_all()
    replica_id = pair.record.roles[0].replica_id
    with open(path_for(str(pair.paths[0])), "r+b") as file:
        file.write(encode_slot(later, replica_id, Identity(), Phase.PREPARED))
    (replica,) = examine(pair.paths[0])["replicas"]
    assert replica["generation"] == f"{pair.record.generation:016x}"
    assert replica["prepared"]["generation"] == f"{later.generation:016x}"
    assert replica["prepared"]["sequence"] == 2
    assert f"prepared: generation {later.generation:016x}, sequence 2 (current, stale)" in text_of(
        pair.paths[0]
    )


@pytest.mark.parametrize(
    ("offset", "damage"),
    [(100, "slot 0: its checksum does not fit"), (MAP_OFFSET, "1 of 1 map pages")],
)
def test_damage_is_shown_and_what_is_left_is_used(pair: Set, offset: int, damage: str) -> None:
    """An unreadable map says that anything may differ, never that nothing does."""
    pair.write_all()
    with open(path_for(str(pair.paths[0])), "r+b") as file:
        file.seek(offset)
        file.write(b"damage")
    (replica,) = examine(pair.paths[0])["replicas"]
    assert replica["damage"] == [damage]
    assert replica["map"]["intent"]["chunks"] == (11 if offset == MAP_OFFSET else 0)
    assert f"damage: {damage}" in text_of(pair.paths[0])


@pytest.mark.parametrize("content", [b"", b"no sidecar", bytes(3 * PAGE), os.urandom(5 * PAGE)])
def test_what_is_no_sidecar_is_said_so(pair: Set, content: bytes) -> None:
    pair.write_all()
    Path(path_for(str(pair.paths[0]))).write_bytes(content)
    bad, good = examine(*pair.paths, exit_code=1)["replicas"]
    assert "slot 0" in bad["problem"]
    assert good["problem"] is None


def test_a_later_version_is_left_alone(pair: Set) -> None:
    """What a mount would refuse is refused here, whatever the others say."""
    pair.write_all()
    with open(path_for(str(pair.paths[0])), "r+b") as file:
        for slot in (0, PAGE):
            file.seek(slot + 8)
            file.write(b"\x63")
    content = examine(*pair.paths, exit_code=1)
    assert "format version 99" in content["replicas"][0]["problem"]
    assert "format version 99" in content["assembly"]["refusal"]


def test_what_is_no_file_is_no_reason_to_wait(tmp_path: Path) -> None:
    """A FIFO or a directory in the place of an image or its sidecar hangs nobody."""
    image, directory, absent = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    os.mkfifo(image)
    os.mkfifo(path_for(str(image)))
    directory.mkdir()
    Path(path_for(str(directory))).mkdir()
    first, second, third = examine(image, directory, absent, exit_code=1)["replicas"]
    for replica in (first, second):
        assert replica["image"]["problem"] == "not a regular file or block device"
        assert replica["problem"] == "not a regular file"
    assert third["image"]["problem"] == "No such file or directory"
    assert third["problem"] == "there is none"


def test_odd_paths_stay_on_their_line(tmp_path: Path) -> None:
    """Nothing in a path can look like a line of its own."""
    path = tmp_path / os.fsdecode(b"a\nset: forged\xff.img")
    with path.open("wb") as file:
        file.truncate(SIZE)
    Set([path]).write(0)
    (replica,) = examine(path)["replicas"]
    assert os.fsencode(replica["path"]) == os.fsencode(path)
    text = quorumfs("examine", path).stdout
    assert r"a\nset: forged\udcff.img" in text
    assert "\nset: forged" not in text


def test_at_least_one_replica_must_be_named() -> None:
    done = quorumfs("examine", check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("quorumfs: Missing argument")


def test_a_reader_that_stops_reading_is_no_failure(pair: Set) -> None:
    """As in ``quorumfs examine … | head -1``."""
    pair.write_all()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*QUORUMFS, "examine", *map(str, pair.paths)],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_on_a_narrow_terminal_facts_go_on_below_each_other(pair: Set) -> None:
    """In a pipe each fact is a line, whatever its length."""
    pair.write_all()
    piped = quorumfs("examine", *pair.paths).stdout
    ours, theirs = os.openpty()
    with (
        os.fdopen(ours, "rb", buffering=0) as terminal,
        subprocess.Popen(
            [*QUORUMFS, "examine", *pair.paths], stdout=theirs, env=os.environ | {"COLUMNS": "60"}
        ),
    ):
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the end of a terminal is an error
            while piece := terminal.read(4096):
                shown += piece
    text = shown.decode().replace("\r\n", "\n")
    assert text.split() == piped.split()
    lines = text.splitlines()
    assert max(map(len, piped.splitlines())) > 60
    assert all(len(line) <= 60 or len(line.split()) <= 2 for line in lines)  # but for a path
    assert all(re.match(r" {15}\S| {2}\S[^:]*: +\S|\S|$", line) for line in lines)
