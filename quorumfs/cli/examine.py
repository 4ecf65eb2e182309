"""``quorumfs examine``: what the sidecars say, offline.

Reads only, and takes no lock: what a daemon has in use may be looked at too.
"""

import errno
import json
import os
import shutil
import stat
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import click

from quorumfs.cli.command import Verb
from quorumfs.cli.completion import FilePath
from quorumfs.cli.needed import option_of_devices
from quorumfs.cli.output import forget_stdout, printable
from quorumfs.control.human import human_bytes
from quorumfs.decisions.assembly import (
    AssemblyRefusedError,
    assemble,
    image_changed,
    image_unproven,
    written_after_crash,
)
from quorumfs.decisions.claim import Claim, ClaimState, FoundClaim, claim_state, in_the_way
from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.model import Found, Plan
from quorumfs.decisions.record import (
    SUFFIX,
    UNKNOWN_IDENTITY,
    Identity,
    Record,
    RoleState,
    Sidecar,
    path_for,
)
from quorumfs.decisions.sidecar import FormatError, UnknownVersionError
from quorumfs.errors import ExitCode, UserError
from quorumfs.mount.daemon import in_child_process
from quorumfs.replica.answers import PATIENCE_S, Answer, UnansweredError, ask_all
from quorumfs.replica.claimant import claim_of_this_mount, runs
from quorumfs.replica.claiming import MOUNT
from quorumfs.replica.devices import content_identity, device_of, is_device
from quorumfs.replica.filesystems import close
from quorumfs.replica.images import lasting_identity, passing_identity
from quorumfs.replica.ofdlock import could_lock
from quorumfs.replica.places import place_for
from quorumfs.replica.sidecarfile import holder, misplaced, open_regular, read_claim, read_sidecar

SCHEMA = 1

READS_MAX = 3
"""Attempts at a sidecar that looks damaged while a daemon writes to it."""

FACTS_AT = 15
"""Columns before the facts."""

ANCESTORS_SHOWN = 4
"""And as many mounts, of up to 32 and 19; JSON has them all."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What there is at one path."""

    path: str
    place: str
    """Where its sidecar is, or should be."""
    image: Identity | None
    file: tuple[int, int] | None = None
    """Device and inode number of the image: the same for every path to the same file."""
    image_problem: str | None = None
    """Why there is no image that could be used."""
    refusal: str | None = None
    """Why no mount takes this path, whatever the others are."""
    sidecar: Sidecar | None = None
    sidecar_problem: str | None = None
    """Why there is no sidecar that could be read."""
    absent: bool = False
    """There is no sidecar at all."""
    in_use: bool = False
    """A quorumfs holds a lock on the sidecar."""
    holder: str = ""
    """Who says that the set is in use, or said it last."""
    instance: int | None = None
    """As in `Found`."""
    recorded_ns: int = 0
    """As in `Found`."""
    claim: Claim | None = None
    """The claim in the sidecar: which mount has the set, or had it last; None: there is none."""
    claim_state: ClaimState | None = None
    """What this host knows of that mount; None: there is no claim."""
    device: bool = False
    """It is a block device."""

    @property
    def open_elsewhere(self) -> bool:
        """Whether a mount that may be at work has it open, and by no lock that is seen here."""
        return not self.in_use and self.claim_state is not None and not self.claim_state.over

    @property
    def changed(self) -> bool | None:
        """Whether the image was changed behind its sidecar; None if that cannot be told."""
        if self.sidecar is None or self.image is None:
            return None
        if self.sidecar.identity == UNKNOWN_IDENTITY:
            return None
        found = self.found()
        if image_changed(found) or self.in_use:  # then the mount answers for it
            return image_changed(found)
        return image_unproven(found) or written_after_crash(found)

    def found(self) -> Found:
        """The same for `assemble`."""
        if self.image is None:
            return Found(self.path, None, None, self.image_problem)
        problem = None if self.absent else self.sidecar_problem
        return Found(
            self.path,
            self.image,
            self.sidecar,
            problem,
            self.instance,
            self.place,
            self.device,
            self.recorded_ns,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What a mount of all of them would do."""

    rule: str
    plan: Plan | None = None
    refusal: str | None = None
    exit_code: ExitCode = ExitCode.OK

    @property
    def unverified(self) -> dict[str, int]:
        """How much of adopted images was not found equal yet; nobody noted if it was compared."""
        return marked(self.plan.map, UNVERIFIED) if self.plan else {"chunks": 0, "bytes": 0}


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs examine /nas1/a.img /nas2/b.img", "Before a mount, or where it was refused."),
        ("quorumfs examine --json /nas1/a.img", "One sidecar, for a program."),
    ],
    exits={
        ExitCode.OK: "All sidecars were read, and a mount would take them.",
        ExitCode.FAILED: "A sidecar is absent or cannot be read, a mount of several would be "
        "refused, or they were adopted and not found equal yet.",
        ExitCode.NEEDS_OPERATOR: "A mount would need the operator: split brain.",
    },
    see=["mount", "resolve", "status"],
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@option_of_devices
@click.argument("replicas", type=FilePath(), nargs=-1, required=True, metavar="REPLICA...")
def examine(as_json: bool, sidecars: str | None, replicas: tuple[str, ...]) -> ExitCode:
    """Show what the sidecar of each REPLICA says, and what mounting them would do.

    Needs no daemon and changes nothing.
    """
    paths = [os.path.abspath(path) for path in replicas]
    all_examined = in_child_process(lambda: look_at_all(paths, directory=sidecars))
    decision = decide(all_examined) if len(all_examined) > 1 else None
    if as_json:
        content = {
            "schema": SCHEMA,
            "replicas": [replica_json(examined) for examined in all_examined],
            "assembly": decision and decision_json(decision),
        }
        text = json.dumps(content)
    else:
        blocks = ["\n".join(replica_text(examined)) for examined in all_examined]
        if decision is not None:
            blocks.append("\n".join(decision_text(decision)))
        text = "\n\n".join(blocks)
        if sys.stdout.isatty():
            text = folded(text, shutil.get_terminal_size().columns)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        forget_stdout()
    if decision is not None and decision.exit_code is ExitCode.NEEDS_OPERATOR:
        return ExitCode.NEEDS_OPERATOR
    unreadable = any(examined.sidecar is None for examined in all_examined)
    unsure = decision is not None and (decision.refusal or decision.unverified["bytes"])
    return ExitCode.FAILED if unreadable or unsure else ExitCode.OK


def folded(text: str, columns: int) -> str:
    """*text* for a terminal: what is too long goes on below where its line has its fact.

    Paths and names stay whole, so that they can be copied.
    """
    return "\n".join(
        textwrap.fill(
            line[FACTS_AT:],
            columns,
            initial_indent=line[:FACTS_AT],
            subsequent_indent=" " * FACTS_AT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        if line.startswith(" ")
        else line
        for line in text.split("\n")
    )


def look_at_all(
    paths: Sequence[str], patience_s: float = PATIENCE_S, directory: str | None = None
) -> list[Examined]:
    """`look_at` each of *paths*, all at once, for at most *patience_s* seconds."""
    once = dict.fromkeys(paths)
    answers = ask_all({path: partial(look_at, path, directory) for path in once}, patience_s)
    by_path = dict(zip(once, answers, strict=True))
    return [_answer(path, by_path[path]) for path in paths]


def _answer(path: str, answer: Answer[Examined]) -> Examined:
    try:
        return answer.result()
    except UnansweredError as error:
        why = error.strerror
        return Examined(path, path + SUFFIX, None, image_problem=why, sidecar_problem=why)


def look_at(path: str, directory: str | None = None) -> Examined:
    """Find out all there is to know of the replica at *path*; its sidecar's path will do too.

    *directory*: where the sidecars of block devices lie.
    """
    if path.endswith(SUFFIX) and not os.path.exists(path_for(path)):
        path = path.removesuffix(SUFFIX)
    try:
        place = place_for(path, directory)
    except UserError as error:
        why = str(error)
        return Examined(path, "", None, image_problem=why, refusal=why, sidecar_problem=why)
    except OSError as error:
        why = error.strerror or str(error)
        return Examined(path, "", None, image_problem=why, sidecar_problem=why)
    examined = _look_at_device(path, place) if is_device(path) else _look_at_image(path, place)
    try:
        fd = open_regular(place, os.O_RDONLY)
    except FileNotFoundError:
        return _without_sidecar(examined, place)
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    try:
        if examined.image is not None and not examined.device:
            when = os.fstat(fd).st_mtime_ns
            examined = replace(examined, instance=passing_identity(path, fd), recorded_ns=when)
        examined = _look_at_sidecar(examined, fd)
        known = examined.device and examined.sidecar is not None
        return _look_at_device(path, place, examined) if known else examined
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    finally:
        close(fd, place)


def _without_sidecar(examined: Examined, place: str) -> Examined:
    """Nothing can be opened at *place*, where its sidecar should be."""
    if os.path.islink(place):
        return replace(examined, sidecar_problem="a symbolic link to nothing")
    try:
        beside = examined.image is not None and not examined.device
        stray = misplaced(examined.path) if beside else None
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    if stray is not None:
        return replace(examined, sidecar_problem=stray, refusal=stray)
    return replace(examined, sidecar_problem="there is none", absent=True)


def _look_at_device(path: str, place: str, examined: Examined | None = None) -> Examined:
    """What there is at *path*, a block device; its fingerprint as the sidecar *examined* has it."""
    known = examined.sidecar.identity if examined and examined.sidecar else UNKNOWN_IDENTITY
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        why = error.strerror or str(error)
        return Examined(path, place, None, image_problem=why, device=True)
    try:
        device = device_of(fd)
        identity = content_identity(fd, device, known.size or None, known.places)
        file = (0, os.fstat(fd).st_rdev)
    except OSError as error:
        why = error.strerror or str(error)
        return Examined(path, place, None, image_problem=why, device=True)
    finally:
        close(fd, path)
    found = examined or Examined(path, place, None, device=True)
    return replace(found, image=identity, file=file, instance=device.attachment)


def _look_at_image(path: str, place: str) -> Examined:
    try:
        status = os.stat(path)
        identity = lasting_identity(path)
    except OSError as error:
        return Examined(path, place, None, image_problem=error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file or block device"
        refusal = f"{path} is {problem}"
        return Examined(path, place, None, image_problem=problem, refusal=refusal)
    return Examined(path, place, identity, (status.st_dev, status.st_ino))


def _look_at_sidecar(examined: Examined, fd: int) -> Examined:
    try:
        in_use = _is_locked(fd)
        examined = replace(examined, in_use=in_use, holder=holder(fd))
        if (claim := read_claim(fd)) is not None:
            known = claim_state(claim, claim_of_this_mount(), runs)
            examined = replace(examined, claim=claim, claim_state=known)
        sidecar = read_sidecar(fd)
        for _ in range(READS_MAX - 1):
            if not (in_use and sidecar.damage):
                break
            sidecar = read_sidecar(fd)  # a daemon may have been writing just there
    except UnknownVersionError as error:
        refusal = f"{examined.place}: {error}"
        return replace(examined, sidecar_problem=str(error), refusal=refusal)
    except FormatError as error:
        return replace(examined, sidecar_problem=str(error))
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    return replace(examined, sidecar=sidecar)


def _is_locked(fd: int) -> bool:
    try:
        return not could_lock(fd, 0, 0, exclusive=True)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS):
            return False  # this file system has no locks
        raise


def decide(all_examined: Sequence[Examined]) -> Decision:
    """What a mount without options would make of these."""
    places: dict[tuple[int, int], int] = {}
    for position, examined in enumerate(all_examined):
        if examined.refusal:
            return Decision("unusable", refusal=examined.refusal, exit_code=ExitCode.FAILED)
        if examined.file is not None:
            other = places.setdefault(examined.file, position)
            if other != position:
                text = f"{all_examined[other].path} and {examined.path} are the same file"
                return Decision("same file", refusal=text, exit_code=ExitCode.FAILED)
    claims = [
        FoundClaim(examined.path, examined.claim, examined.claim_state)
        for examined in all_examined
        if examined.claim is not None and examined.claim_state is not None and not examined.in_use
    ]
    if held := in_the_way(claims):
        return Decision("in use", refusal=held[0].in_words(MOUNT), exit_code=ExitCode.FAILED)
    try:
        plan = assemble([examined.found() for examined in all_examined])
    except AssemblyRefusedError as error:
        return Decision(error.rule, refusal=str(error), exit_code=error.exit_code)
    return Decision(plan.rule, plan)


# JSON


def replica_json(examined: Examined) -> dict[str, Any]:
    """One member of ``replicas``; what only a sidecar knows is missing where there is none."""
    content: dict[str, Any] = {
        "path": examined.path,
        "sidecar": examined.place,
        "problem": examined.sidecar_problem,
        "image": {
            "problem": examined.image_problem,
            "now": examined.image and asdict(examined.image),
            "recorded": None,
            "changed": examined.changed,
            "device": examined.device,
        },
        "in_use": examined.in_use,
        "holder": examined.holder or None,
        "claim": claim_json(examined),
    }
    sidecar = examined.sidecar
    if sidecar is None:
        return content
    if sidecar.identity != UNKNOWN_IDENTITY:
        content["image"]["recorded"] = asdict(sidecar.identity)
    return {
        **content,
        "id": sidecar.replica_id.hex(),
        "slot": sidecar.slot,
        "state": sidecar.own_state.name.lower(),
        **record_json(sidecar.record),
        "map": map_json(sidecar.map, sidecar.record),
        "prepared": sidecar.prepared and record_json(sidecar.prepared),
        "damage": list(sidecar.damage),
    }


def claim_json(examined: Examined) -> dict[str, Any] | None:
    """Who has it open, and what is known of that mount from here."""
    claim, known = examined.claim, examined.claim_state
    if claim is None or known is None:
        return None
    return {
        "mount": f"{claim.mount:016x}",
        "host": claim.host,
        "pid": claim.pid,
        "since": claim.since,
        "standing": known.value,
    }


def record_json(record: Record) -> dict[str, Any]:
    """A record, with the names that ``status --json`` has for the same things."""
    return {
        "set": record.set_id.hex(),
        "generation": f"{record.generation:016x}",
        "ancestors": [f"{generation:016x}" for generation in record.ancestors],
        "mounts": [
            {"id": f"{mount.identity:016x}", "first": mount.first, "changed": mount.changed}
            for mount in record.mounts
        ],
        "sequence": record.sequence,
        "clean": record.clean,
        "vote_threshold": record.threshold,
        "size": record.size,
        "chunk_size": record.chunk_size,
        "roles": [
            {
                "slot": slot,
                "id": role.replica_id.hex(),
                "state": role.state.name.lower(),
                "generation": f"{role.generation:016x}",
                "sequence": role.sequence,
                "mount": f"{role.mount:016x}",
                "path": role.path,
            }
            for slot, role in enumerate(record.roles)
        ],
    }


def map_json(disk_map: DirtyMap, record: Record) -> dict[str, Any]:
    """How much of the disk may differ, and how much each replica lacks; bytes at most."""
    return {
        "chunks": len(disk_map),
        "intent": marked(disk_map, INTENT),
        "unverified": marked(disk_map, UNVERIFIED),
        "lacking": [
            {"slot": slot, "path": role.path, **marked(disk_map, out_of_sync(slot))}
            for slot, role in enumerate(record.roles)
        ],
    }


def decision_json(decision: Decision) -> dict[str, Any]:
    """What a mount would do."""
    plan = decision.plan
    content: dict[str, Any] = {
        "rule": decision.rule,
        "refusal": decision.refusal,
        "exit_code": int(decision.exit_code),
    }
    if plan is None:
        return content
    return {
        **content,
        "generation": f"{plan.record.generation:016x}",
        "members": [
            {
                "path": member.path,
                "slot": member.slot,
                "state": member.state.value,
                "reason": member.reason,
                "lacking": None
                if member.slot is None
                else marked(plan.map, out_of_sync(member.slot)),
                "compare": member.compare,
            }
            for member in plan.members
        ],
        "intent": marked(plan.map, INTENT),
        "unverified": decision.unverified,
        "left_behind": list(plan.ejected),
        "notes": list(plan.notes),
    }


def marked(disk_map: DirtyMap, bits: int) -> dict[str, int]:
    """How many chunks have any of *bits*, and how many bytes of the disk they are."""
    chunks = disk_map.count(bits)
    count = chunks * disk_map.chunk_size
    last = len(disk_map) - 1
    if chunks and disk_map.any(bits, range(last, last + 1)):
        start, end = disk_map.bounds(last)
        count += end - start - disk_map.chunk_size
    return {"chunks": chunks, "bytes": count}


# Text


def replica_text(examined: Examined) -> Iterator[str]:
    """One replica, a fact a line."""
    yield f"{printable(examined.path)}:"
    if examined.image_problem:
        yield _line("image", examined.image_problem)
    if examined.in_use:
        yield _line(
            "in use", f"{examined.holder or 'by another quorumfs'}; it may change meanwhile"
        )
    elif examined.open_elsewhere:
        yield _line("in use", f"{examined.holder}, perhaps: it was not unmounted there")
    sidecar = examined.sidecar
    if sidecar is None:
        yield _line("sidecar", f"{examined.place}: {examined.sidecar_problem}")
        return
    record = sidecar.record
    yield _line("set", record.set_id.hex())
    yield _line("replica", f"{sidecar.replica_id.hex()}, slot {sidecar.slot}")
    yield _line("state", sidecar.own_state.name.lower())
    yield from _record_text(record, _how_closed(examined, record))
    yield _line("image", _image_text(examined, sidecar))
    yield from _map_text(sidecar.map, record)
    for slot, role in enumerate(record.roles):
        since = (
            "" if role.state is RoleState.CURRENT else f" since generation {role.generation:016x}"
        )
        own = ", this one" if slot == sidecar.slot else ""
        path = role.path or role.replica_id.hex()
        yield _line(f"slot {slot}", f"{role.state.name.lower()}{since}: {path}{own}")
    if prepared := sidecar.prepared:
        states = ", ".join(role.state.name.lower() for role in prepared.roles)
        yield _line(
            "prepared",
            f"generation {prepared.generation:016x}, sequence {prepared.sequence} ({states}): "
            "never committed here",
        )
    if not examined.in_use and not record.clean and examined.holder and not examined.open_elsewhere:
        yield _line("last used", examined.holder)
    for damage in sidecar.damage:
        yield _line("damage", damage)


def _record_text(record: Record, how_closed: str) -> Iterator[str]:
    yield _line("generation", f"{record.generation:016x}, sequence {record.sequence}, {how_closed}")
    if record.ancestors:
        shown = ", ".join(f"{each:016x}" for each in record.ancestors[:ANCESTORS_SHOWN])
        more = len(record.ancestors) - ANCESTORS_SHOWN
        yield _line("ancestors", shown + (f" and {more} more" if more > 0 else ""))
    if record.mounts:
        shown = ", ".join(
            f"{mount.identity:016x}{'' if mount.changed else ' (changed nothing)'}"
            for mount in record.mounts[:ANCESTORS_SHOWN]
        )
        more = len(record.mounts) - ANCESTORS_SHOWN
        yield _line("mounts", shown + (f" and {more} more" if more > 0 else ""))
    yield _line(
        "disk",
        f"{human_bytes(record.size)} ({record.size} bytes), chunks of "
        f"{human_bytes(record.chunk_size)}, vote-threshold {record.threshold}",
    )


def _how_closed(examined: Examined, record: Record) -> str:
    if record.clean:
        return "closed in order"
    return "open" if examined.in_use else "not closed in order"


def _image_text(examined: Examined, sidecar: Sidecar) -> str:
    if examined.image is None:
        return examined.image_problem or "none"
    size = examined.image.size
    longer = examined.device and size > sidecar.record.size  # as a device may be
    if size != sidecar.record.size and not longer:
        return f"{size} bytes, the disk has {sidecar.record.size}"
    if examined.changed is None:
        return "nothing on record to tell whether it was changed behind its sidecar"
    if examined.changed:
        return "CHANGED behind its sidecar: it will be compared in full"
    if examined.device and sidecar.identity.mtime_ns:
        return "a device, with the fingerprint that it had when the set was closed"
    if not sidecar.identity.mtime_ns:
        return "the same file and size as on record; times are recorded when the set is closed"
    return "as it was when the set was closed"


def _map_text(disk_map: DirtyMap, record: Record) -> Iterator[str]:
    facts = [
        (INTENT, "may differ"),
        (UNVERIFIED, "not found equal yet"),
        *(
            (out_of_sync(slot), f"lacked by {role.path or role.replica_id.hex()}")
            for slot, role in enumerate(record.roles)
        ),
    ]
    told = [
        f"{marked(disk_map, bits)['chunks']} chunks, {human_bytes(marked(disk_map, bits)['bytes'])}"
        f", {what}"
        for bits, what in facts
        if disk_map.count(bits)
    ]
    for text in told or ["clean"]:
        yield _line("map", text)


def decision_text(decision: Decision) -> Iterator[str]:
    """What a mount would do, a fact a line."""
    yield "mounted together:"
    if decision.plan is None:
        yield _line("refused", f"{decision.refusal} [{decision.rule}]")
        return
    plan = decision.plan
    yield _line("rule", decision.rule)
    for member in plan.members:
        text = member.state.value + (f" ({member.reason})" if member.reason else "")
        if member.slot is not None and (
            lacking := marked(plan.map, out_of_sync(member.slot))["bytes"]
        ):
            verb = "compares" if member.compare else "copies"
            text += f"; a resync {verb} at most {human_bytes(lacking)}"
        yield _line("member", f"{member.path}: {text}")
    for slot in plan.ejected:
        role = plan.record.roles[slot]
        yield _line("ejected", role.path or role.replica_id.hex())
    if count := marked(plan.map, INTENT)["bytes"]:
        yield _line("to settle", f"{human_bytes(count)}, may differ")
    if count := decision.unverified["bytes"]:
        yield _line(
            "to settle",
            f"{human_bytes(count)}, not found equal yet: a mount compares them, and its status "
            "tells whether they differ",
        )
    for note in plan.notes:
        yield _line("note", note)


def _line(name: str, text: str) -> str:
    return f"  {name + ':':<{FACTS_AT - 2}}{printable(text)}"
