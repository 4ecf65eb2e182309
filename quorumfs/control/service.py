"""The service manager that started a mount, and what it is told: see sd_notify(3)."""

import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, Self, TypeVar

import trio

from quorumfs.control.advice import describe
from quorumfs.control.human import human_bytes
from quorumfs.control.reporter import Reporter
from quorumfs.control.status import DiskState, Status, Trouble

AGAIN_S = 0.1
"""How long (seconds) to wait before a message is sent again that could not be taken."""

ENOUGH_S = 1.0
"""How long (seconds) anything else waits for a message to be taken."""

LOOK_ANYWAY_S = 30.0
"""How long (seconds) a status line may last of a disk that nothing is told of."""

P = ParamSpec("P")
T = TypeVar("T")


class ServiceManager:
    """Takes messages, each of one or more lines ``NAME=VALUE``; where there is none, nothing is
    sent."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        """*address*: its socket, a path or, with ``@``, an abstract name; None if there is none.

        *watchdog_s*: how often (seconds) it wants to hear that the loop goes on, if it does.
        """
        self.watchdog_s = watchdog_s
        self._address = None
        self._channel: socket.socket | None = None
        if address is not None and address[:1] in ("/", "@"):  # no other kind is one of ours
            self._address = os.fsencode(address)
            if address[0] == "@":
                self._address = b"\0" + self._address[1:]
            self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._channel.setblocking(False)

    @classmethod
    def from_environment(cls) -> Self:
        """The one that the environment names, which no child process hears of from now on."""
        address = os.environ.pop("NOTIFY_SOCKET", None)
        watched = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        interval_us = os.environ.pop("WATCHDOG_USEC", "")
        watchdog_s = None
        if watched == str(os.getpid()) and interval_us.isascii() and interval_us.isdigit():
            watchdog_s = int(interval_us) / 1e6 or None
        return cls(address, watchdog_s)

    @property
    def listens(self) -> bool:
        """Whether there is one."""
        return self._channel is not None

    def tell(self, *lines: str) -> bool:
        """Send *lines* as one message, without waiting; False if it cannot be taken now."""
        if self._channel is None or self._address is None:
            return True
        message = "\n".join(lines).encode("utf-8", "backslashreplace")
        try:
            self._channel.sendto(message, self._address)
        except OSError:  # its queue is full, or it is started anew
            return False
        return True

    async def tell_surely(self, *lines: str) -> None:
        """Send *lines* as one message as soon as they are taken."""
        while True:
            if self.tell(*lines):
                return
            await trio.sleep(AGAIN_S)

    async def beat(self) -> None:
        """Show the watchdog that the loop goes on, until cancelled; to be run in it."""
        while self.listens and self.watchdog_s is not None:
            self.tell("WATCHDOG=1")
            await trio.sleep(self.watchdog_s / 2)

    def reloading(self, change: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        """*change*, of the configuration, with the manager told when it begins and ends."""

        async def told(*arguments: P.args, **named: P.kwargs) -> T:
            self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                return await change(*arguments, **named)
            finally:
                with trio.move_on_after(ENOUGH_S, shield=True):
                    await self.tell_surely("READY=1")

        return told

    def close(self) -> None:
        """Let go of the socket."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def status_line(status: Status) -> str:
    """*status* for the service manager: one line of printable characters."""
    usable = sum(replica.usable for replica in status.replicas)
    facts = [f"{usable} of {len(status.replicas)} replicas are current and usable"]
    if (resync := status.resync) is not None:
        done, total = human_bytes(resync.done_bytes), human_bytes(resync.total_bytes)
        facts.append(f"{resync.kind.value}: {done} of {total}")
    line = f"{status.state.value}: {'; '.join(facts + describe(status))}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class StatusLine:
    """Keeps the status line of a *manager* up to date, and speaks for a loop that a store holds.

    It is looked after in the thread of the control socket.
    """

    def __init__(
        self, manager: ServiceManager, reporter: Reporter, last_event: Callable[[], int]
    ) -> None:
        """*last_event*: the number of the last event. While none comes and the disk is healthy, its
        status is not taken."""
        self._manager = manager
        self._reporter = reporter
        self._last_event = last_event
        self._seen = -1
        """The last event when the status was last taken."""
        self._again_at = 0.0
        self._told = ""

    def watch(self) -> None:
        """Tell the manager what has changed.

        A loop that waits for a store that does not answer sends nothing to the watchdog. Killing
        the daemon would not help: no process ends in such a call, and the store is as it was.
        """
        if not self._manager.listens:
            return
        event, now = self._last_event(), time.monotonic()
        if event == self._seen and now < self._again_at and not self._reporter.stands_still:
            return
        status = self._reporter.latest()
        in_order = status.state is DiskState.HEALTHY and status.standstill_s is None
        if status.standstill_s is not None and any(
            replica.trouble == Trouble.HANGING.value for replica in status.replicas
        ):
            self._manager.tell("WATCHDOG=1")
        line = status_line(status)
        if line == self._told or self._manager.tell(f"STATUS={line}"):
            self._told, self._seen = line, event
            self._again_at = now + (LOOK_ANYWAY_S if in_order else 0.0)
