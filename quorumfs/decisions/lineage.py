"""Lineage: which replica's data descends from which. A pure decision.

Generations say which replicas are current. They cannot tell a set from a copy of the set, sidecars
and all, once both are used. So the first record of every mount enters a random number, the mount's
*identity*, ahead of the identities of earlier mounts, and the record says that a mount may change
the disk before the mount does. Hence, of two records:

* the records parted in the latest mount that both name; or before, if they share none;
* a record *adds* to the other if a mount named since may have changed the disk, or if the common
  mount went on in its lineage after ending in the other's, by the sequence numbers;
* if each record adds to the other, each side was used without the other: split brain. If one adds,
  the other is behind. If none adds, the data may differ where replicas were made equal since, and
  no acknowledged write is lost with either.

Only so many mounts are remembered. A replica whose latest mount was forgotten has nothing in common
with the others, unless its role names that mount.
"""

from dataclasses import dataclass

from quorumfs.decisions.record import Record


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a record and another one parted."""

    mount: int
    """The latest mount that both name."""
    own: int
    """The mount's place in the lineage of the record: how many mounts came since."""
    other: int
    """The mount's place in the lineage of the other record."""
    went_on: bool
    """The mount went on for the record when it had ended for the other."""


def parting(record: Record, other: Record, left_with: int | None = None) -> Parting | None:
    """Where *record* and *other* parted; None if they name no common mount.

    *left_with*: the last mount that *other* knows of the replica that holds *record*.
    """
    places = {mount.identity: place for place, mount in enumerate(other.lineage)}
    if left_with is not None:
        places.setdefault(left_with, len(places))
    for own, mount in enumerate(record.lineage):
        place = places.get(mount.identity)
        if place is not None:
            last = record.lineage[own - 1].first - 1 if own else record.sequence
            ended = other.lineage[place - 1].first if place else 0
            return Parting(mount.identity, own, place, 0 < ended <= last)
    return None


def adds(record: Record, other: Record, left_with: int | None = None) -> bool:
    """Whether *record* knows of changes that *other* lacks; *left_with* as for `parting`."""
    at = parting(record, other, left_with)
    if at is None:
        return any(mount.changed for mount in record.lineage)
    went_on = at.went_on and record.lineage[at.own].changed
    return went_on or any(mount.changed for mount in record.lineage[: at.own])
