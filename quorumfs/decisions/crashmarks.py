"""What the marks of chunks that were being written say of the members after a crash. Pure."""

from collections.abc import Iterator, Mapping

from quorumfs.decisions.dirtymap import ALL_OUT_OF_SYNC, INTENT, UNVERIFIED, DirtyMap, out_of_sync


def marked_by_others(maps: Mapping[int, DirtyMap], empty: DirtyMap) -> Iterator[tuple[int, range]]:
    """By slot: chunks that others alone have marks of.

    *maps* are those of the members, *empty* is a map of the whole disk. A change begins when all
    members have its mark. So either no change had begun, and all hold the same; or one without the
    mark is some seconds older than the others, and lacks what they were given (R15). Which of the
    two cannot be told: where members differ, one without the mark is the last to be believed, and
    it has its vote (P9). Where a member is known to have lost something, nothing is made of that;
    nor where images were never compared, for a comparison decides there; nor is an unreadable page
    a mark, or none.
    """
    marked, lost = empty, sum(map(out_of_sync, maps))
    for own in maps.values():
        marked.join(own.read_as(0, mark=0))
    for slot, own in maps.items():
        known = own.read_as(0)
        for run in marked.runs(INTENT, longest=len(marked)):
            for unmarked in known.runs_without(INTENT, run):
                for compared in marked.runs_without(UNVERIFIED, unmarked):
                    if not marked.any(lost, compared):
                        yield slot, compared


def add_where_unmarked(disk_map: DirtyMap, bits: int) -> None:
    """Set *bits* where nothing is on record: what was being written is made equal anyway."""
    start = 0
    for marked in list(disk_map.runs(INTENT | ALL_OUT_OF_SYNC, longest=len(disk_map))):
        disk_map.add(bits, range(start, marked.start))
        start = marked.stop
    disk_map.add(bits, range(start, len(disk_map)))
