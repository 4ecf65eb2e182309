"""What a status means, in sentences: what happened to a disk, and what to do next."""

from types import MappingProxyType

from quorumfs.control.human import human_bytes, human_time
from quorumfs.control.status import (
    HANGS,
    DiskState,
    ReplicaStatus,
    Status,
    Trouble,
    Waiting,
)
from quorumfs.decisions.model import RepairKind
from quorumfs.decisions.quoting import quoted
from quorumfs.decisions.standing import Standing

_NO_SPACE = ("ENOSPC", "EDQUOT")


def describe(status: Status) -> list[str]:
    """What happened and what to do next, a sentence or two a line; of a healthy disk only which
    replicas are slow."""
    if status.state is DiskState.HEALTHY:
        return _slow(status)
    if status.fenced is not None:
        return [
            f"fenced: the set was taken over by {status.fenced}: nothing is read or written here "
            "any more, what was written within the last seconds may be lost: quorumfs umount "
            f"{_quoted(status.mountpoint)}, and use the disk there"
        ]
    lines = []
    if status.state is DiskState.NO_QUORUM:
        lines.append(_no_quorum(status))
    if status.standstill_s is not None and not any(map(_hanging, status.replicas)):
        lines.append(
            f"no request has been served for {human_time(status.standstill_s)}: the daemon is "
            "busy, or the host keeps it from going on: look at the host's load, memory and disks"
        )
    lines += [_advice(status, replica) for replica in status.replicas if _advised(replica)]
    if status.unreadable:
        lines.append(_unreadable(status))
    if status.undecided_bytes:
        lines.append(
            f"the replicas differ in {human_bytes(status.undecided_bytes)}, and nothing tells "
            "which one is right: choose whose data to keep there: quorumfs resolve --keep REPLICA "
            f"{_quoted(status.mountpoint)}"
        )
    if left := _left_by_scrub(status):
        lines.append(
            f"a scrub found a replica to be wrong in {left} blocks, which were left as they were: "
            f"quorumfs scrub --repair {_quoted(status.mountpoint)}"
        )
    if status.resync is None:
        if len(lines) == 0:
            lines.append(
                "replicas may differ, and a read-only mount changes nothing: mount without -o ro"
                if status.read_only
                else "replicas may differ in what was last written: they are compared by themselves"
            )
    elif status.resync.kind is RepairKind.VERIFY:
        lines.append("the replicas are compared for the first time; nothing to do")
    elif status.resync.kind is RepairKind.SETTLE:
        lines.append(
            "the set was not closed in order, or a request failed: what may differ is made equal"
            + ("" if any(map(_advised, status.replicas)) else "; nothing to do")
        )
    return lines + _slow(status)


def _slow(status: Status) -> list[str]:
    """Which replicas take much longer than others, and what that costs."""
    lines = []
    for replica in status.replicas:
        for one in replica.slow if replica.current else ():
            costs = (
                f"a vote waits for it: quorumfs set {_quoted(status.mountpoint)} "
                f"write-mostly={_quoted(replica.path)}"
                if one.operation == "read"
                else f"every {one.operation} waits for it: look at its disk, or the network to it"
            )
            lines.append(
                f"{replica.path}: half of its {one.operation}s take {one.p50_us / 1000:.3g} ms and "
                f"more, {one.times} times as long as those of the fastest other replica; {costs}"
            )
    return lines


def _left_by_scrub(status: Status) -> int:
    """Blocks that a scrub found wrong and left, but for those that a person must decide."""
    scrubs = [one for one in (status.scrub, status.last_scrub) if one is not None]
    return max((one.unrepaired - one.undecided for one in scrubs), default=0)


def _unreadable(status: Status) -> str:
    first, *others = status.unreadable
    more = f", and {len(others)} more places, see --json" if others else ""
    disk = _quoted(f"{status.mountpoint}/disk.img")
    return (
        f"{first.length} bytes at {first.offset} can be read on no replica{more} (one that was "
        "away may have them as they were before). Reads there fail until the place is written "
        "anew: restore the file in the guest. To give up what was there: dd if=/dev/zero "
        f"of={disk} bs={first.length} seek={first.offset} oflag=seek_bytes count=1 conv=notrunc"
    )


def _no_quorum(status: Status) -> str:
    usable = sum(replica.usable for replica in status.replicas)
    coming = [replica.path for replica in status.replicas if replica.coming]
    until = "enough are"
    if coming and usable + len(coming) >= status.vote_threshold and not status.read_only:
        until = f"the resync of {' and '.join(coming)} ends"
    return (
        f"{usable} of {len(status.replicas)} replicas are current and usable, and vote-threshold="
        f"{status.vote_threshold} needs as many: requests fail or wait until {until}"
    )


def awaited(status: Status, seconds: int) -> dict[str, str]:
    """Who has not answered for so many *seconds*: by path, what happened and what to do.

    For who waits until all that was asked has an answer.
    """
    lines = {}
    for replica in status.replicas:
        if _hanging(replica):
            lines[replica.path] = _advice(status, replica)
        elif replica.waiting is not None and replica.waiting.seconds >= seconds:
            lines[replica.path] = f"{replica.path}: {no_answer(replica.waiting)}; {_LOOK}"
    return lines


def no_answer(waiting: Waiting) -> str:
    """What is not answered, for a reader."""
    return f"no answer to a {waiting.operation} for {human_time(waiting.seconds)}"


def _hanging(replica: ReplicaStatus) -> bool:
    return replica.trouble == Trouble.HANGING.value


_LOOK = "look at its disk, or the network to it, if that lasts"


def _advised(replica: ReplicaStatus) -> bool:
    """Whether there is something to say of a replica."""
    return not replica.current or replica.reason is not None


_UPDATED = "it is brought up to date by itself"
_AGAIN = f"then {_UPDATED}"

ADVICE = MappingProxyType(
    {
        Standing.STALE: "it is brought up to date by itself as soon as that is possible",
        Standing.RESYNCING: "it is being given what it lacks; nothing to do",
        Standing.SUSPECT: "it is compared in full and repaired by itself; nothing to do",
        Standing.MISSING: "bring it back, and name it in quorumfs mount if it was left out; "
        + _AGAIN,
        Standing.OFFLINE: "take it in again when that is wanted: quorumfs online",
        Standing.FOREIGN: "leave it out",
    }
)
"""What to do about a replica that is not current, where nothing more is known of it. If a person
must decide, the command that makes it a copy of another follows."""


def _advice(status: Status, replica: ReplicaStatus) -> str:
    """What became of one replica that is not in order, and what to do about it."""
    error = replica.last_error
    if replica.current or _hanging(replica):
        when = ""
        if error is not None and replica.trouble in (Trouble.FULL.value, Trouble.FAILING.value):
            when = f" ({human_time(error.seconds_ago)} ago)"
        return f"{replica.path}: {replica.reason}{when}; {_way_out(status, replica)}"
    advice = "see the log" if replica.standing is None else ADVICE[replica.standing]
    if status.resync_paused and replica.standing is not None and replica.standing.is_retried:
        advice = (
            "resyncs are paused: it is looked for, and brought up to date, after quorumfs resync "
            f"--resume {_quoted(status.mountpoint)}"
        )
    happened = f"{replica.path} is {replica.state}"
    reasons = [replica.reason] if replica.reason else []
    if error is not None:
        reasons.append(f"{error.what} {human_time(error.seconds_ago)} ago: {error.text}")
    if reasons:
        happened += f" ({'; '.join(reasons)})"
    if replica.needs_operator:
        if status.read_only:
            current = (one.path for one in status.replicas if one.current)
            keep = next(map(quoted, current), "REPLICA")
            return f"{happened} and is not touched: {advice}, or {_resolve(status, keep)}"
        names = _quoted(status.mountpoint, replica.path)
        return (
            f"{happened} and is not touched: {advice}, or give up what it holds: quorumfs add "
            f"--overwrite {names}"
        )
    if status.metadata == "none":
        return (
            f"{happened}: it is not used where it lacks something, which nobody remembers after "
            f"unmounting: quorumfs umount {_quoted(status.mountpoint)}, then copy a current "
            "replica over it"
        )
    if status.read_only:
        return f"{happened}: a read-only mount brings nothing up to date: mount without -o ro"
    if "truncated" in (replica.reason or ""):
        return f"{happened}: {_lengthen(status, replica)}; {_AGAIN}"
    if replica.standing is Standing.STALE and error is not None and error.errno in _NO_SPACE:
        return f"{happened}: make space there; {_AGAIN}"
    if replica.standing is Standing.MISSING and replica.reason == HANGS:
        busy = ""
        if replica.store is not None:
            busy = (
                f"; to unmount its file system before: umount -l {_quoted(replica.store)}, for "
                "what is in flight keeps it busy"
            )
        look = "look at its disk, or the network to it"
        return f"{happened}: {look}; when it answers, {_UPDATED}{busy}"
    return f"{happened}: {advice}"


def _way_out(status: Status, replica: ReplicaStatus) -> str:
    """What to do about a replica that is current, and not in order."""
    remembered = status.metadata != "none" and not status.read_only
    umount = f"quorumfs umount {_quoted(status.mountpoint)}"
    match replica.trouble:
        case Trouble.TRUNCATED.value:
            return f"{_lengthen(status, replica)}; {umount}; quorumfs mount …"
        case Trouble.GONE.value:
            again = "it is used again by itself" if remembered else f"{umount}, and mount again"
            return f"bring its file system back, then {again}"
        case Trouble.FULL.value:
            return "make space there" + ("; the rest is done by itself" if remembered else "")
        case Trouble.FAILING.value:
            return (
                f"look at its disk, and at the log; to go on without it, {umount}, and mount "
                + (
                    "the others with a lower vote-threshold and -o degraded"
                    if status.metadata != "none"
                    else "the others with a lower vote-threshold"
                )
            )
        case Trouble.UNDURABLE.value:
            return (
                "it may have lost writes, and is trusted again where the guest writes anew; to "
                f"replace it now, {umount}, and copy a good replica over it"
            )
        case Trouble.LOST.value:
            if not remembered:
                return "a read-only mount brings nothing up to date: mount without -o ro"
            return "it is given that again by itself; if it stays so, look at its disk"
        case Trouble.HANGING.value:
            return "thaw it (fsfreeze -u), or look at its disk"
        case Trouble.SLOW.value:
            return _LOOK
        case Trouble.ASTRAY.value | None:  # older daemons told only of these
            return (
                "it gets every write until it is unmounted, and is not found after that: "
                "put it back there if it was renamed"
            )
    return "see the log"


def _lengthen(status: Status, replica: ReplicaStatus) -> str:
    """How a replica gets the length of the disk again. No file system has a file in /dev."""
    if replica.path.startswith("/dev/"):
        return f"make the device {status.size} bytes long again, as with lvextend"
    return f"put its length back: truncate -s {status.size} {_quoted(replica.path)}"


def _resolve(status: Status, keep: str) -> str:
    paths = _quoted(*(replica.path for replica in status.replicas))
    umount = f"quorumfs umount {_quoted(status.mountpoint)}"
    return f"{umount} && quorumfs resolve --keep {keep} {paths}"


def _quoted(*paths: str) -> str:
    """Paths for a shell."""
    return " ".join(map(quoted, paths))
