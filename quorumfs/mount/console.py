"""What an operator sees of one mount and does to it: status, events, verbs, and who answers."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from quorumfs.control import server
from quorumfs.control.hook import Hook
from quorumfs.control.journal import Journal
from quorumfs.control.pulse import Pulse, Standstill
from quorumfs.control.reporter import Reporter
from quorumfs.control.service import ServiceManager, StatusLine
from quorumfs.control.status import Status
from quorumfs.decisions.sectors import unreachable
from quorumfs.disk.disk import Disk
from quorumfs.fastpath import native
from quorumfs.fuse import session, shim
from quorumfs.live.actions import Actions
from quorumfs.live.settings import Settings
from quorumfs.live.verbs import verbs
from quorumfs.mount import snapshot
from quorumfs.mount.mapping import picture
from quorumfs.mount.path_watch import PathWatch
from quorumfs.mount.replicaset import ReplicaSet, read_pattern
from quorumfs.options.table import MountOptions
from quorumfs.repair.repairs import Repairs


class Console:
    """The operator's side of one mount."""

    def __init__(
        self,
        mountpoint: str,
        options: MountOptions,
        replica_set: ReplicaSet,
        disk: Disk,
        repairs: Repairs | None,
        *,
        journal: Journal,
        hook: Hook,
        manager: ServiceManager,
    ) -> None:
        self._mountpoint = mountpoint
        self._replica_set = replica_set
        self._disk = disk
        self._repairs = repairs
        self._manager = manager
        self._slow = _why_slow(options)
        self.path_watch = PathWatch(lambda: disk.replicas, disk.mirror.rhythm)

        def run_for_events(program: str | None) -> None:
            hook.program = program

        def keep_sidecars_in(directory: str | None) -> None:
            replica_set.directory = directory

        self.settings = Settings(
            disk, repairs, options, read_pattern, run_for_events, keep_sidecars_in
        )
        self._reporter = Reporter(self.take, Pulse())
        named = verbs(disk, repairs, mountpoint, self.settings, session.announce_size)
        self.actions = Actions({**named, "set": manager.reloading(named["set"])})
        self._line = StatusLine(manager, self._reporter, lambda: journal.last)
        self._commands = {
            "status": self._reporter.status,
            "events": journal.since,
            "map": partial(picture, disk, repairs),
            **self.actions.commands(),
        }

    async def start(self, nursery: trio.Nursery, socket: Path) -> None:
        """Answer commands at *socket* from now on, in tasks of *nursery*."""
        nursery.start_soon(self.path_watch.run)
        await nursery.start(self.actions.run)
        serve = partial(
            server.serve, refresh=self._reporter.refresh, tick=self._tick, period_s=self._period_s
        )
        await nursery.start(serve, socket, self._commands)

    def notes(self) -> tuple[str, ...]:
        """What an operator should know of this mount, a sentence each."""
        size = self._disk.size
        longer = self._replica_set.longer_than(size)
        return tuple(filter(None, (shim.missing(), self._slow, unreachable(size), *longer)))

    def take(self, now: float, standstill: Standstill | None) -> Status:
        """The status at *now* (trio's clock, seconds); *standstill*: of trio's loop, if it does."""
        status = snapshot.take(
            self._mountpoint,
            self.settings.present,
            self._disk,
            self._repairs,
            self.notes(),
            self.path_watch.astray,
            now=now,
            standstill=standstill,
        )
        return replace(status, actions=self.actions.under_way)

    def take_now(self) -> Status:
        """The status now, asked for by a task of trio."""
        return self.take(trio.current_time(), None)

    def _tick(self) -> None:
        self._reporter.watch()
        self._line.watch()

    def _period_s(self) -> float:
        if self._reporter.stands_still:
            return server.TICK_S
        # Whoever speaks for a loop that stands still is heard in time.
        watchdog_s = self._manager.watchdog_s
        longest = math.inf if watchdog_s is None else watchdog_s / 4
        return min(self._disk.mirror.rhythm.period_s(server.TICK_S), longest)


def _why_slow(options: MountOptions) -> str | None:
    """Why there is no fast path, for the operator; None where there is one, or none is wanted."""
    if native.missing is None or not options.fast_path or not shim.in_use():
        return None  # what is missing without the shim is told already
    return f"no fast path ({native.missing}): small requests take several times as long"
