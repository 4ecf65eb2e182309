"""The limiter: one a second of a kind, and nothing lost without a word."""

import json
import logging
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from quorumfs.control.logs import JsonFormatter, ReadableFormatter
from quorumfs.disk.events import Event, EventLog, RateLimiter
from quorumfs.replica.storage import Kind


def event(number: int) -> Event:
    return Event("E", {"number": number}, f"event {number}")


@given(st.lists(st.floats(0, 0.9), max_size=40))
def test_at_most_one_a_period_and_every_event_told_or_counted(gaps: list[float]) -> None:
    limiter = RateLimiter(period_s=1.0)
    now, told, offered = 0.0, list[tuple[float, Event]](), 0
    for gap in gaps:
        now += gap
        told += [(now, kept) for kept in limiter.due(now)]
        released = limiter.offer("key", event(offered), now)
        offered += 1
        if released:
            told.append((now, released))
    told += [(now + 2, kept) for kept in limiter.due(now + 2)]

    times = [at for at, _ in told]
    assert all(later - earlier >= 0.999 for earlier, later in pairwise(times))
    assert len(told) + sum(kept.dropped for _, kept in told) == offered
    if offered:
        assert told[0][1].members == {"number": 0}  # the first at once
        assert told[-1][1].members == {"number": offered - 1}  # the last in the end


def test_keys_do_not_limit_each_other() -> None:
    limiter = RateLimiter()
    assert limiter.offer("a", event(1), 0.0)
    assert limiter.offer("b", event(2), 0.0)
    assert limiter.offer("a", event(3), 0.0) is None


async def test_qemu_s_members_and_sectors(autojump_clock: object) -> None:
    told: list[Event] = []
    log = EventLog("/mnt", told.append)
    log.bad(Kind.READ, "/a.img", 511, 2)
    log.bad(Kind.WRITE, "/a.img", 4096, 4096, OSError(28, "No space left on device"))
    log.bad(Kind.SYNC, "/a.img", 0, 0, OSError(5, "Input/output error"))
    log.failure(1024, 512)
    assert [(event.name, event.members) for event in told] == [
        (
            "QUORUM_REPORT_BAD",
            {"type": "read", "node-name": "/a.img", "sector-num": 0, "sectors-count": 2},
        ),
        (
            "QUORUM_REPORT_BAD",
            {
                "type": "write",
                "node-name": "/a.img",
                "sector-num": 8,
                "sectors-count": 8,
                "error": "No space left on device",
            },
        ),
        (
            "QUORUM_REPORT_BAD",
            {
                "type": "flush",
                "node-name": "/a.img",
                "sector-num": 0,
                "sectors-count": 0,
                "error": "Input/output error",
            },
        ),
        ("QUORUM_FAILURE", {"reference": "/mnt", "sector-num": 2, "sectors-count": 1}),
    ]


async def test_what_is_held_back_is_told_at_the_end(autojump_clock: object) -> None:
    told: list[Event] = []
    log = EventLog("/mnt", told.append)
    for offset in range(5):
        log.failure(offset * 512, 512)
    log.close()
    assert [(e.members["sector-num"], e.dropped) for e in told] == [(0, 0), (4, 3)]


def test_a_record_is_one_json_object_or_one_readable_line() -> None:
    record = logging.LogRecord("quorumfs", logging.WARNING, "", 0, "text", (), None)
    record.event = Event("E", {"replica": "/a.img"}, "text", dropped=2)
    content = json.loads(JsonFormatter().format(record))
    assert content.pop("time").endswith("Z")
    assert content == {"event": "E", "replica": "/a.img", "dropped": 2}
    assert ReadableFormatter("%(message)s").format(record) == "text (2 more left out) [E]"
