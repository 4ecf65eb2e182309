"""A picture of a whole disk: where each replica is out of sync, and what a scrub has passed.

The disk is cut into cells of equal length; one character tells of each.
"""

from dataclasses import dataclass
from typing import Annotated

from quorumfs.control import schema

CELLS_MAX = 1024

IN_SYNC, PARTLY, OUT_OF_SYNC = ".+#"
"""Of a cell: no chunk, some chunks, all chunks are out of sync; or were passed by a scrub."""

Cells = Annotated[str, schema.Text(CELLS_MAX, f"[{IN_SYNC}{PARTLY}{OUT_OF_SYNC}]*")]


@dataclass(frozen=True, slots=True)
class ReplicaMap:
    """One replica of the disk."""

    path: str
    cells: Cells


@dataclass(frozen=True, slots=True)
class DiskMap:
    """What there is to draw of one disk."""

    replicas: tuple[ReplicaMap, ...] = ()
    """Those of the set. None if nothing is on record, without sidecars."""
    scrubbed: Cells | None = None
    """What the scrub that is under way has passed; None: none is."""
