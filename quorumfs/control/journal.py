"""Remembers the last events of a mount, for who asks over its control socket what happened.

An event has the form that it has in the log: it is taken from the same record by the same
formatters. Nothing here needs the loop that serves the guest.
"""

import logging
from collections import deque
from collections.abc import Mapping
from threading import Lock
from typing import Any

from quorumfs.control.logs import READABLE, JsonFormatter, ReadableFormatter
from quorumfs.control.recent import Recent, Told
from quorumfs.control.schema import Value, dump
from quorumfs.errors import UsageError

EVENTS_MAX = 1000
"""Events that are remembered."""

BYTES_MAX = 1 << 20
"""Bytes of all events that are remembered, as far as there is more than one."""

ANSWER_BYTES = 256 << 10
"""Bytes of events in an answer, at most, if there is more than one."""


class Journal(logging.Handler):
    """Remembers the last events that go to the log, of the daemon *pid*."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self._pid = pid
        self._as_json = JsonFormatter()
        self._as_text = ReadableFormatter(READABLE)
        self._events: deque[Told] = deque()
        self._size = 0
        self.last = 0
        """The number of the last event."""
        self._guard = Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Remember the event in *record*."""
        try:
            told = self._as_json.format(record), self._as_text.format(record)
        except Exception:
            self.handleError(record)
            return
        with self._guard:
            self.last += 1
            self._events.append(Told(self.last, *told))
            self._size += self._events[-1].size
            while len(self._events) > EVENTS_MAX or (
                self._size > BYTES_MAX and len(self._events) > 1
            ):
                self._size -= self._events.popleft().size

    def since(self, request: Mapping[str, Any]) -> Value:
        """The answer to the command: the first events after the number ``after``, as many as an
        answer holds; without one, the number of the last event. Raises `UsageError`.
        """
        after = request.get("after")
        if after is not None and (type(after) is not int or after < 0):
            raise UsageError("'after' is to be the number of an event")
        with self._guard:
            if after is None or after > self.last:
                return dump(Recent(self._pid, self.last))
            first = self._events[0].number if self._events else self.last + 1
            events: list[Told] = []
            size = 0
            for told in self._events:
                if told.number > after:
                    size += told.size
                    if events and size > ANSWER_BYTES:
                        break
                    events.append(told)
        last = events[-1].number if events else self.last
        return dump(Recent(self._pid, last, max(0, first - after - 1), tuple(events)))
