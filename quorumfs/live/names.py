"""What an administrator calls the replicas of a mount: by path, by file name, or by id."""

import os

from quorumfs.decisions.record import Record
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError
from quorumfs.replica.replica import Replica


def named(disk: Disk, name: str) -> Replica:
    """The replica of *disk* that is called *name*. Raises `UsageError`."""
    if (replica := find(disk, name)) is not None:
        return replica
    paths = ", ".join(replica.path for replica in disk.replicas)
    raise UsageError(f"{name} is no replica of this mount: its replicas are {paths}")


def find(disk: Disk, name: str) -> Replica | None:
    """As `named`; None if there is none. Raises `UsageError` if several are called so."""

    def has_id(replica: Replica) -> bool:
        replica_id = disk.metadata.report(replica).replica_id
        return replica_id is not None and replica_id.hex() == name

    for matches in (
        [one for one in disk.replicas if one.path == name],
        [one for one in disk.replicas if os.path.basename(one.path) == name],
        [one for one in disk.replicas if has_id(one)],
    ):
        if len(matches) > 1:
            paths = ", ".join(one.path for one in matches)
            raise UsageError(f"{name} may be each of {paths}: give the whole path")
        if matches:
            return matches[0]
    return None


def absent(disk: Disk, record: Record, name: str) -> int | None:
    """The slot, in the *record* of its set, of a replica with this path or id that the mount of
    *disk* was not given; None if there is none."""
    given = {one.slot for one in disk.replicas}
    for slot in record.slots:
        role = record.roles[slot]
        if slot not in given and name in (role.path, role.replica_id.hex()):
            return slot
    return None
