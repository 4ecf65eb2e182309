"""``quorumfs examine``: what the sidecars say, offline."""

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from quorumfs.cli.command import Verb
from quorumfs.cli.completion import FilePath
from quorumfs.cli.needed import option_of_devices
from quorumfs.cli.output import forget_stdout, printable
from quorumfs.control.human import human_bytes
from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.record import (
    UNKNOWN_IDENTITY,
    Identity,
    Record,
    RoleState,
    Sidecar,
)
from quorumfs.errors import ExitCode
from quorumfs.mount.daemon import in_child_process
from quorumfs.mount.examination import Decision, Examined, decide, look_at_all, marked

SCHEMA = 1

FACTS_AT = 15
"""Columns before the facts."""

ANCESTORS_SHOWN = 4
"""And as many mounts, of up to 32 and 19; JSON has them all."""


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


# JSON


def replica_json(examined: Examined) -> dict[str, Any]:
    """One member of ``replicas``; what only a sidecar knows is missing where there is none."""
    content: dict[str, Any] = {
        "path": examined.path,
        "sidecar": examined.place,
        "problem": examined.sidecar_problem,
        "image": {
            "problem": examined.image_problem,
            "now": examined.image and identity_json(examined.image),
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
        content["image"]["recorded"] = identity_json(sidecar.identity)
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


def identity_json(identity: Identity) -> dict[str, Any]:
    """As of a stat; of a device the fingerprint is the mtime."""
    content = asdict(identity)
    del content["regions"]
    return content


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
