"""What an administrator calls the replicas of a mount: by path, by file name, or by id."""

import os

from quorumfs.decisions.names import only
from quorumfs.decisions.record import Record, Role
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError
from quorumfs.replica.replica import Replica


def named(disk: Disk, name: str) -> Replica:
    """The replica of *disk* that is called *name*. Raises `UsageError`."""
    if (replica := find(disk, name)) is not None:
        return replica
    paths = ", ".join(replica.path for replica in disk.replicas)
    raise UsageError(f"{name} is no replica of this mount: its replicas are {paths}")


def find(disk: Disk, name: str, *, but: str | None = None) -> Replica | None:
    """As `named`; None if there is none. Raises `UsageError` if several are called so.

    *but*: the path of one that is not meant, unless *name* is its path.
    """

    def has_id(replica: Replica) -> bool:
        replica_id = disk.metadata.report(replica).replica_id
        return replica_id is not None and replica_id.hex() == name

    return only(
        name,
        [one for one in disk.replicas if one.path == name],
        [one for one in disk.replicas if os.path.basename(one.path) == name and one.path != but],
        [one for one in disk.replicas if has_id(one)],
    )


def absent(disk: Disk, record: Record, name: str) -> int | None:
    """The slot, in the *record* of its set, of a replica called *name* that the mount of *disk* was
    not given; None if there is none. Raises `UsageError` if several are called so."""
    given = {one.slot for one in disk.replicas}
    left = [record.roles[slot] for slot in record.slots if slot not in given]
    role = only(
        name,
        [one for one in left if one.path == name],
        [one for one in left if is_called(one, name)],
    )
    return None if role is None else record.slot_of(role.replica_id)


def is_called(role: Role, name: str) -> bool:
    """Whether *name* is the path, the file name or the id of the replica with *role*."""
    return name in (role.path, os.path.basename(role.path), role.replica_id.hex())
