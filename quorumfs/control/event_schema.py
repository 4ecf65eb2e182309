"""The JSON Schema of events: of the log with ``--log-json``, and of ``quorumfs events --json``.

Members may be added to an event, and events to this table; none is ever renamed.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from quorumfs.control import schema
from quorumfs.control.status import SCHEMA, Status
from quorumfs.decisions.scrub import Counts

LEFT_OUT = "LEFT_OUT"
"""What ``quorumfs events`` says where the daemon has forgotten events that were not fetched."""

Members = Mapping[str, schema.Hint]

_SECTORS: Members = {"sector-num": int, "sectors-count": int}
_RANGE: Members = {"offset": int, "length": int}

MEMBERS: Mapping[str, Members] = MappingProxyType(
    {
        "QUORUM_REPORT_BAD": {"type": str, "node-name": str, "error": str, **_SECTORS},
        "QUORUM_FAILURE": {"reference": str, **_SECTORS},
        "BLKVERIFY_DIFFERENCE": {"reference": str, "offset": int},
        "REPLICA_STATE_CHANGED": {"replica": str, "old": str, "new": str},
        "REPLICA_SLOW": {"replica": str, "operation": str, "p50_us": int, "times": int},
        "FENCED": {"reference": str, "host": str, "pid": int, "since": str},
        "MISMATCH_FOUND": {"reference": str, **_RANGE, "replica": str | None, "blame": str},
        "MISMATCH_REPAIRED": {"replica": str, **_RANGE},
        "DATA_UNREADABLE": {"reference": str, **_SECTORS},
        "SCRUB_STARTED": {"reference": str, "bytes": int, "repair": bool},
        "SCRUB_FINISHED": {
            "reference": str,
            **dict.fromkeys((field.name for field in fields(Counts)), int),
            "seconds": int,
            "stopped": bool,
        },
        "RESYNC_STARTED": {"replica": str, "bytes": int},
        "RESYNC_FINISHED": {"replica": str, "bytes": int, "error": str | None},
        "ERRORS_CLEARED": {"replica": str, "errors": int},
        LEFT_OUT: {"count": int},
    }
)
"""By name: what an event has beside its name and time."""

OPTIONAL: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "QUORUM_REPORT_BAD": frozenset({"error"}),
        "MISMATCH_FOUND": frozenset({"replica", "blame"}),  # of a scrub
    }
)
"""By name: members that are not always there."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of one event."""
    status = schema.json_schema(Status)
    status["properties"] |= _head("STATUS") | {"schema": {"const": SCHEMA}}
    status["required"] += ["event", "time", "schema"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One event of a mount, as the log and quorumfs events --json show it",
        "anyOf": [*(_event(name, members) for name, members in MEMBERS.items()), status],
    }


def _event(name: str, members: Members) -> dict[str, Any]:
    optional = OPTIONAL.get(name, frozenset())
    properties = {member: schema.json_schema(hint) for member, hint in members.items()}
    properties["dropped"] = schema.json_schema(int)
    required = ["event", "time", *(member for member in members if member not in optional)]
    return {"type": "object", "properties": _head(name) | properties, "required": required}


def _head(name: str) -> dict[str, Any]:
    return {"event": {"const": name}, "time": {"type": "string"}}
