"""``on-event``: a program of the administrator that is run for each event, as mdadm runs one.

It is called as ``PROGRAM EVENT MOUNTPOINT [REPLICA]`` with the event as JSON at its standard input,
one run after the other, in the order of the events. Nothing that serves the guest waits for it.
"""

import logging
import os
import select
import signal
from contextlib import suppress
from queue import Full, Queue
from threading import Thread

from quorumfs.control.logs import JsonFormatter
from quorumfs.disk.events import Event

log = logging.getLogger(__name__)

QUEUED_MAX = 256
"""Events that may wait for the program; further ones are left out, which is logged."""

PATIENCE_S = 60.0
"""How long (seconds) one run may take before it is killed."""

END_S = 5.0
"""How long (seconds) the end of the mount waits for the runs that are due."""

_HANDLED = (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)
"""Signals that the daemon handles otherwise than a program expects."""


class Hook(logging.Handler):
    """Runs the program for each event that goes to the log, in a thread of its own."""

    def __init__(self, mountpoint: str, program: str | None) -> None:
        """*program*: None: none is run."""
        super().__init__()
        self.program = program
        """May change at any time."""
        self._mountpoint = mountpoint
        self._as_json = JsonFormatter()
        self._waiting: Queue[tuple[str, Event, bytes] | None] = Queue(QUEUED_MAX)
        self._left_out = 0
        self._thread: Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        event: Event | None = getattr(record, "event", None)
        if self.program is None or event is None:
            return
        try:
            self._waiting.put_nowait((self.program, event, self._as_json.format(record).encode()))
        except Full:
            self._left_out += 1
            return
        except Exception:  # nothing that tells an event may fail for it
            self.handleError(record)
            return
        if self._thread is None:
            # A daemon thread: a program that hangs must not keep the process alive.
            self._thread = Thread(target=self._run, name="on-event", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Let the runs that are due end, for a while, and begin no other."""
        self.program = None
        if self._thread is not None:
            with suppress(Full):
                self._waiting.put(None, timeout=END_S)
            self._thread.join(END_S)
        super().close()

    def _run(self) -> None:
        while (due := self._waiting.get()) is not None:
            program, event, told = due
            try:
                self._call(program, event, told)
            except OSError as error:
                log.warning("on-event: cannot run %s: %s", program, error.strerror)
            except Exception:  # the next event is to be told all the same
                log.exception("internal error: %s was not run for %s", program, event.name)
            left_out, self._left_out = self._left_out, 0
            if left_out:
                log.warning("on-event: %s is too slow: %d events left out", program, left_out)

    def _call(self, program: str, event: Event, told: bytes) -> None:
        """Run *program* for *event*, to its end. Raises `OSError` if that is impossible."""
        about = event.members.get("replica") or event.members.get("node-name")
        arguments = [program, event.name, self._mountpoint, *([str(about)] if about else [])]
        with open(os.memfd_create("event"), "w+b", buffering=0) as given:
            given.write(told + b"\n")
            given.seek(0)
            process = os.posix_spawn(
                program,
                arguments,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, given.fileno(), 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=_HANDLED,
            )
        in_time = _ended_within(process, PATIENCE_S)
        if not in_time:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if not in_time:
            log.warning("on-event: %s did not end in %g s: killed", program, PATIENCE_S)
        elif code:
            how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
            log.warning("on-event: %s for %s: %s", program, event.name, how)


def _ended_within(process: int, seconds: float) -> bool:
    """Wait until *process*, a child, has ended, for so long at most; whether it has."""
    descriptor = os.pidfd_open(process)
    try:
        ends = select.poll()  # whatever the number of the descriptor
        ends.register(descriptor, select.POLLIN)
        return bool(ends.poll(1000 * seconds))
    finally:
        os.close(descriptor)
