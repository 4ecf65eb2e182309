"""What a daemon remembers of its events, what it answers, and how that is shown."""

import importlib
import inspect
import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import trio
from click.testing import CliRunner

from quorumfs.control import client, journal, logs, mounts, runtime, schema, server
from quorumfs.control.event_schema import LEFT_OUT, MEMBERS, OPTIONAL, json_schema
from quorumfs.control.journal import Journal
from quorumfs.control.recent import Recent, Told
from quorumfs.decisions.claim import Claim
from quorumfs.decisions.model import Standing
from quorumfs.decisions.scrub import Counts
from quorumfs.decisions.slowness import Slow
from quorumfs.disk.events import Event, EventLog
from quorumfs.errors import UsageError
from quorumfs.replica.storage import Kind

cli = importlib.import_module("quorumfs.cli.events")  # the name in the package is the command

PID = 4711


@contextmanager
def journal_of(*names: str) -> Iterator[Journal]:
    """A journal of what goes to the log from now on; first these events."""
    kept = Journal(PID)
    logs.events_log.addHandler(kept)
    try:
        for name in names:
            tell(name)
        yield kept
    finally:
        logs.events_log.removeHandler(kept)


def tell(name: str, **members: object) -> None:
    logs.tell(Event(name, members, f"{name} happened"))


def since(kept: Journal, after: int | None = 0) -> Recent:
    return schema.load(Recent, json.loads(json.dumps(kept.since({"after": after}))))


def names(recent: Recent) -> list[str]:
    return [json.loads(told.json)["event"] for told in recent.events]


# The journal


def test_events_are_told_in_order_from_the_number_asked_about() -> None:
    with journal_of("A", "B") as kept:
        assert since(kept, None) == Recent(PID, 2)
        assert names(since(kept)) == ["A", "B"]
        assert names(since(kept, 1)) == ["B"]
        assert since(kept, 2) == Recent(PID, 2)
        tell("C")
        assert [told.number for told in since(kept, 2).events] == [3]


def test_an_event_is_what_the_log_has() -> None:
    line = io.StringIO()
    handler = logging.StreamHandler(line)
    handler.setFormatter(logs.JsonFormatter())
    logs.events_log.addHandler(handler)
    try:
        with journal_of() as kept:
            logs.tell(Event("A", {"path": "/a\udcff\n"}, "it", dropped=3))
            assert since(kept).events[0].json == line.getvalue().rstrip("\n")
            assert "(3 more left out) [A]" in since(kept).events[0].text
    finally:
        logs.events_log.removeHandler(handler)


def test_what_is_forgotten_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVENTS_MAX", 3)
    with journal_of(*"ABCDEFG") as kept:
        assert (names(since(kept, 2)), since(kept, 2).forgotten) == (["E", "F", "G"], 2)
        assert (names(since(kept, 4)), since(kept, 4).forgotten) == (["E", "F", "G"], 0)


def test_a_journal_is_bounded_in_bytes_and_keeps_the_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "BYTES_MAX", 100)
    with journal_of("A", "B", "C") as kept:
        assert names(since(kept)) == ["C"]
        assert since(kept).forgotten == 2


def test_an_answer_is_bounded_and_the_rest_comes_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal, "ANSWER_BYTES", 100)
    with journal_of("A", "B") as kept:
        first = since(kept)
        assert (names(first), first.last, first.forgotten) == (["A"], 1, 0)
        assert names(since(kept, first.last)) == ["B"]


def test_a_number_that_is_yet_to_come_gets_the_last_one() -> None:
    """It is of a daemon before this one."""
    with journal_of("A") as kept:
        assert since(kept, 9) == Recent(PID, 1)


@pytest.mark.parametrize("after", [-1, "1", True, 1.5])
def test_what_is_no_number_is_refused(after: object) -> None:
    with pytest.raises(UsageError, match="number of an event"):
        Journal(PID).since({"after": after})


async def test_it_is_answered_over_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mount = mounts.Mount("/mnt/vdisk", mounts.FS_TYPE, os.geteuid())
    claim = runtime.claim(mount.mountpoint)
    with journal_of("A", "B") as kept:
        commands = {"events": kept.since}
        with server.serving(claim.path("sock"), commands):
            answer = await trio.to_thread.run_sync(client.events, mount, 1)
    claim.give_up()
    assert names(answer) == ["B"]


# The command


def test_each_event_is_shown_on_a_line_and_a_gap_with_its_count() -> None:
    recent = Recent(PID, 9, 7, (Told(8, '{"event": "A"}', "x\x1b[31m"),))
    said: list[str] = []
    cli.show(recent, said.append, as_json=True)
    gap, event = map(json.loads, said)
    assert (gap["event"], gap["count"], event) == (LEFT_OUT, 7, {"event": "A"})
    VALIDATOR.validate(gap)
    said.clear()
    cli.show(recent, said.append, as_json=False)
    assert said == ["7 events were left out", "x\\x1b[31m"]


# The schema

VALIDATOR = jsonschema.Draft202012Validator(json_schema())

CALLS: dict[str, Callable[[EventLog], None]] = {
    "bad": lambda log: log.bad(Kind.READ, "/a", 0, 512, OSError(5, "error")),
    "failure": lambda log: log.failure(0, 512),
    "difference": lambda log: log.difference(7),
    "state_changed": lambda log: log.state_changed("/a", Standing.CURRENT, Standing.STALE),
    "fenced": lambda log: log.fenced(Claim(1, "", "", "", 4, 0, "host", "2026-01-01")),
    "mismatch": lambda log: log.mismatch(0, 512, "/a"),
    "scrub_started": lambda log: log.scrub_started(512, repair=True),
    "scrub_finished": lambda log: log.scrub_finished(Counts(), 1, stopped=False),
    "differs": lambda log: log.differs(0, 512),
    "unreadable": lambda log: log.unreadable(0, 512),
    "resync_started": lambda log: log.resync_started("/a", 512),
    "resync_finished": lambda log: log.resync_finished("/a", 512, None),
    "errors_cleared": lambda log: log.errors_cleared("/a", 3),
    "slow": lambda log: log.slow("/a", "read", Slow(0.02, 40.0)),
    "repaired": lambda log: log.repaired("/a", 0, 512),
}
"""By method of `EventLog`: a call of it."""


def test_the_schema_is_printed() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    printed = CliRunner().invoke(cli.events, ["--json-schema"], standalone_mode=False)
    assert json.loads(printed.output) == json_schema()


async def test_every_event_is_as_the_schema_says() -> None:
    told: list[Event] = []
    log = EventLog("/mnt", told.append)
    for call in CALLS.values():
        call(log)
    assert {event.name for event in told} == set(MEMBERS) - {LEFT_OUT}
    for event in told:
        content: dict[str, Any] = {"event": event.name, "time": "now", **event.members}
        VALIDATOR.validate(content)
        left_out = OPTIONAL.get(event.name, frozenset())
        assert set(MEMBERS[event.name]) - left_out <= set(event.members) <= set(MEMBERS[event.name])
        first = next(iter(event.members))
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate({key: value for key, value in content.items() if key != first})


def test_no_event_is_forgotten_here() -> None:
    public = {name for name, _ in inspect.getmembers(EventLog, inspect.isfunction)}
    assert {name for name in public if not name.startswith("_")} - {"tick", "close"} == set(CALLS)
