"""What ``quorumfs wait`` waits for: whether a status is so, or cannot become so by itself. Pure."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from quorumfs.control.advice import describe
from quorumfs.control.human import human_bytes
from quorumfs.control.status import DiskState, ReplicaStatus, Status
from quorumfs.decisions.model import Standing
from quorumfs.decisions.names import only
from quorumfs.errors import ExitCode, UsageError, UserError

CLEAN, CURRENT = "clean", "current:"

GOALS = ", ".join([*(state.value for state in DiskState), CLEAN, f"{CURRENT}REPLICA"])
"""All that can be waited for, in words."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Something to wait for."""

    text: str
    """In words: what the disk, or a replica, is to be."""
    is_reached: Callable[[Status], bool]
    """Whether it is so."""
    operator: Callable[[Status], str | None] = lambda _: None
    """Why it becomes so by no waiting, but by what a person does; None: it may."""

    def require_hope(self, status: Status) -> None:
        """Raise `UserError`, with the exit code of the cause, if waiting is of no use."""
        if status.fenced is not None:
            raise UserError(describe(status)[0], exit_code=ExitCode.UNUSABLE)
        if why := self.operator(status):
            raise UserError(why, exit_code=ExitCode.NEEDS_OPERATOR)

    def missed(self, status: Status) -> str:
        """What is instead, in a sentence."""
        why = describe(status) or _left(status)
        told = f": {why[0]}" if why else ""
        return f"{self.text} is not reached: {status.mountpoint} is {status.state.value}{told}"


def goal(name: str) -> Goal:
    """What *name* of `GOALS` means; a replica is a path, file name or id. Raises `UsageError`."""
    if name == CLEAN:
        return Goal(CLEAN, _is_clean, _of_disk)
    if name.startswith(CURRENT):
        replica = name.removeprefix(CURRENT)
        return Goal(
            f"{replica} current",
            lambda status: find(status, replica).current,
            lambda status: _of_replica(status, find(status, replica)),
        )
    states = {state.value: state for state in DiskState}
    if name not in states:
        raise UsageError(f"--for: got {name!r}, allowed: {GOALS}")
    state = states[name]
    operator = _of_disk if state is DiskState.HEALTHY else lambda _: None
    return Goal(name, lambda status: status.state is state, operator)


def _to_come(status: Status) -> list[ReplicaStatus]:
    """The replicas that a resync brings up to date, or may: while resyncs are paused, a missing
    replica is not looked for."""
    return [
        replica
        for replica in status.replicas
        if replica.coming or (status.resync_paused and replica.standing is Standing.MISSING)
    ]


def _until_resumed(status: Status) -> str | None:
    """Why no replica is brought up to date by itself."""
    paths = [replica.path for replica in _to_come(status)]
    if not status.resync_paused or status.resync is not None or not paths:
        return None
    wait = "waits" if len(paths) == 1 else "wait"
    return f"resyncs are paused, and {' and '.join(paths)} {wait}: quorumfs resync --resume"


RESYNCED = Goal(
    "the end of the resync",
    lambda status: status.resync is None and not _to_come(status),
    _until_resumed,
)
"""Nothing is at work, and what can be brought up to date is."""


def find(status: Status, name: str) -> ReplicaStatus:
    """The replica that the user calls *name*. Raises `UsageError`."""
    found = only(
        name,
        [one for one in status.replicas if one.path == name],
        [one for one in status.replicas if os.path.basename(one.path) == name],
        [one for one in status.replicas if one.replica_id == name],
    )
    if found is not None:
        return found
    paths = ", ".join(replica.path for replica in status.replicas)
    raise UsageError(f"{name} is not one of the replicas of {status.mountpoint}: {paths}")


def _is_clean(status: Status) -> bool:
    return (
        status.state is DiskState.HEALTHY
        and status.resync is None
        and not any(replica.out_of_sync_bytes for replica in status.replicas)
    )


def _left(status: Status) -> list[str]:
    """What is still to be done on a healthy disk."""
    lacking = sum(replica.out_of_sync_bytes for replica in status.replicas)
    lines = [f"{human_bytes(lacking)} are out of sync"] if lacking else []
    return lines + ([f"a {status.resync.kind.value} is at work"] if status.resync else [])


def _of_disk(status: Status) -> str | None:
    """Why a disk does not become healthy by itself."""
    for replica in status.replicas:
        if (why := _of_replica(status, replica)) is not None:
            return why
    return describe(status)[0] if status.state is DiskState.NEEDS_OPERATOR else None


def _of_replica(status: Status, replica: ReplicaStatus) -> str | None:
    """Why a replica does not become current by itself."""
    if replica.needs_operator or replica.standing is Standing.OFFLINE:
        lines = (line for line in describe(status) if line.startswith(replica.path))
        return next(lines, f"{replica.path} is {replica.state}")
    return _until_resumed(status) if replica in _to_come(status) else None
