"""The refusal to use replicas together as they are, and its sentences. Pure."""

import errno
import os
from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Found
from quorumfs.decisions.quoting import joined, quoted
from quorumfs.decisions.record import Identity, Record, Role, RoleState, Sidecar
from quorumfs.errors import ExitCode, UserError


class AssemblyRefusedError(UserError):
    """The replicas cannot be used together as they are; the message says what to do."""

    def __init__(self, rule: str, text: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(text)
        self.rule = rule
        self.exit_code = exit_code


def side_of_split(path: str, sidecar: Sidecar) -> str:
    """What one side of a split brain did without the other, as far as its *sidecar* tells."""
    record = sidecar.record
    history = " < ".join(f"{generation:016x}" for generation in record.history[:4])
    mounts = " < ".join(f"{mount.identity:016x}" for mount in record.mounts[:4])
    used = f", in use by the mounts {mounts}" if mounts else ""
    written = sum(
        sidecar.map.count(out_of_sync(slot))
        for slot, role in enumerate(record.roles)
        if role.state is not RoleState.CURRENT
    )
    without = f", {written} chunks written without the other" if written else ""
    return f"{path}: history {history}{used}{without}"


def account(one: Found, problem: str, resolve: str | None = None) -> str:
    """What is wrong at a path, and what to do; *resolve*: how to do without the data there."""
    unreadable = one.image is not None and one.sidecar is None
    what = f"the sidecar of {one.path} cannot be read" if unreadable else one.path
    what = f"{what} ({problem})" if unreadable else f"{what}: {problem}"
    if problem.endswith(os.strerror(errno.EACCES)):
        return f"{what}: let this user read and write it (chmod, chown)"
    if unreadable:
        return f"{what}: put a good one back" + (f", or {resolve}" if resolve else "")
    if one.image and one.sidecar:
        if one.device:
            return f"{what}: make it as long again (with lvextend or the like)"
        if one.sidecar.identity.mtime_ns:  # else its empty end would not be noticed
            size = one.sidecar.record.size
            return f"{what}: give it its length back: truncate -s {size} {quoted(one.path)}"
        return f"{what}: put the whole image back"
    if problem == os.strerror(errno.ENOENT):
        return f"{what}: bring it back, or name it where it is"
    return f"{what}: mend that"


def resolve_command(option: str, keep: str, paths: Sequence[str]) -> str:
    """The command that makes the replicas at *paths* copies of the one at *keep*."""
    return f"quorumfs resolve {option} {joined([keep, *paths])}"


def giving_up(slots: Collection[int]) -> str:
    """How a message begins to advise a mount without the replicas with *slots*."""
    if not slots:
        return "To go on without: "
    return f"If that is impossible, give up what only {it_or_they(slots)} may hold: "


def it_or_they(slots: Collection[int]) -> str:
    return "it" if len(slots) == 1 else "they"


def names_of(roles: Sequence[Role]) -> str:
    """The paths of replicas, for people; the id of a replica whose path is not on record."""
    return ", ".join(role.path or role.replica_id.hex() for role in roles) or "none"


def why_without_place(record: Record, sidecar: Sidecar) -> str:
    """Why the replica of *sidecar*, of the same set, has no place in *record*, and what to do."""
    add = "to make it a replica again, run: quorumfs add --overwrite"
    if (slot := record.place_of(sidecar.replica_id)) is None:
        return f"it is no replica of the set any more, or never became one; {add}"
    return f"it was removed from the set on {_date(record.roles[slot].mount)}; {add}"


def _date(seconds: int) -> str:
    """A time (seconds since 1970) for people; any number can be in a sidecar."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d at %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "an unknown date"


def truncated(image: Identity, size: int) -> str:
    """Why an *image* shorter than the disk of *size* bytes cannot be used."""
    return f"the image was truncated to {image.size} bytes, the disk has {size}"
