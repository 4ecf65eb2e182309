"""Lineage: whose data descends from whose. A pure decision.

Generations say who is current. They cannot say that two sets went apart of which one is a copy of
the other, sidecars and all: both are used, and each takes itself for what it was. So the first
record of every mount enters a random number, its *identity*, ahead of those of earlier mounts,
and it is on record that a mount may change the disk before it does. Hence, of two records:

* they parted in the latest mount that both name; or before, if they name no common one;
* a record *adds* to another one if a mount that it names since may have changed the disk, or if
  the common mount went on in its lineage after it had ended in the other's: sequence numbers tell;
* if each adds to the other, both were used without the other: split brain. If one does, the
  other is behind. If none does, their data may differ in what was made equal since, and nothing
  that was acknowledged is lost with one of them.

Older mounts than are remembered are forgotten: then a replica whose latest one they are has
nothing in common with the others, unless its role names it.
"""

from dataclasses import dataclass

from quorumfs.decisions.record import Record


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a record and another one parted."""

    mount: int
    """The latest that both name."""
    own: int
    """Its place in the lineage of the record: how many came since."""
    other: int
    """Its place in the lineage of the other record."""
    went_on: bool
    """The mount went on for the record when it had ended for the other."""


def parting(record: Record, other: Record, left_with: int | None = None) -> Parting | None:
    """Where *record* and *other* parted; None if they name no common mount.

    *left_with*: a mount that *other* remembers, too, of the replica that holds *record*.
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
