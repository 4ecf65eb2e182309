"""The verbs: what can be asked of a running mount, by name."""

from quorumfs.disk.disk import Disk
from quorumfs.live.actions import Verb
from quorumfs.repair.repairs import Repairs


def verbs(disk: Disk, repairs: Repairs | None) -> dict[str, Verb]:
    """All verbs of a mount of *disk*; *repairs* is None where nothing is repaired."""
    return {}
