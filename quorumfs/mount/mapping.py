"""What ``quorumfs top`` draws of a disk. Any thread may ask: the map is only read."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from quorumfs.control import schema
from quorumfs.control.diskmap import (
    CELLS_MAX,
    IN_SYNC,
    OUT_OF_SYNC,
    PARTLY,
    DiskMap,
    ReplicaMap,
)
from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.repairs import Repairs

ATTEMPTS = 5
"""How often to look beside a loop that changes what is looked at, until it succeeds."""


def picture(disk: Disk, repairs: Repairs | None, request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to ``{"command": "map", "cells": N}``. Raises `UsageError`."""
    cells = request.get("cells")
    if type(cells) is not int or not 1 <= cells <= CELLS_MAX:
        raise UsageError(f"'cells' is to be a number from 1 to {CELLS_MAX}")
    drawn = DiskMap()
    if isinstance(disk.metadata, Sidecars):
        for _ in range(ATTEMPTS):
            with suppress(RuntimeError, LookupError):  # it was changed in the middle of it
                drawn = _of_set(disk, disk.metadata, repairs, cells)
                break
    return schema.dump(drawn)  # type: ignore[no-any-return]


def _of_set(disk: Disk, metadata: Sidecars, repairs: Repairs | None, cells: int) -> DiskMap:
    known = metadata.ledger.map
    replicas = []
    for replica in disk.replicas:
        if replica.slot is not None:
            bits = out_of_sync(replica.slot)
            drawn = _drawn(len(known), cells, partial(known.any, bits), partial(known.all, bits))
            replicas.append(ReplicaMap(replica.path, drawn))
    scrubbed = None
    current = None if repairs is None else repairs.scrub.current
    if current is not None:
        passed = current.scrubbed
        scrubbed = _drawn(
            len(known),
            cells,
            lambda chunks: passed.overlaps(chunks.start, chunks.stop),
            lambda chunks: not any(True for _ in passed.outside(chunks.start, chunks.stop)),
        )
    return DiskMap(tuple(replicas), scrubbed)


def _drawn(
    chunks: int, cells: int, some: Callable[[range], bool], every: Callable[[range], bool]
) -> str:
    """One character for each cell: by whether *some* of its chunks have a property, or *every*
    one."""
    drawn = ""
    for cell in range(cells):
        start = chunks * cell // cells
        part = range(start, max(start + 1, chunks * (cell + 1) // cells))
        drawn += (OUT_OF_SYNC if every(part) else PARTLY) if some(part) else IN_SYNC
    return drawn
