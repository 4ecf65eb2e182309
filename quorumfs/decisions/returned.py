"""A replica that comes back: what the latest record tracked of it. Pure decisions."""

from quorumfs.decisions.lineage import adds, parting
from quorumfs.decisions.model import Found, Member, Standing
from quorumfs.decisions.record import Record, RoleState, Sidecar
from quorumfs.decisions.refusal import truncated
from quorumfs.decisions.sameimage import image_changed, image_unproven

OFFLINE = "the administrator took it out: quorumfs online takes it in again"
"""Why a replica is offline."""
CHANGED = "the image was changed behind its sidecar"
UNPROVEN = "nothing shows that its store holds the same image as before"


def judge_returned(record: Record, slot: int, found: Found) -> Member:
    """The part of an ejected replica, *found* again, in a set whose latest record is *record*."""
    path, sidecar = found.path, found.sidecar
    if found.image is None or sidecar is None:
        reason = found.problem or "its sidecar is gone"
        return Member(
            path, slot, Standing.MISSING if found.image is None else Standing.FOREIGN, reason
        )
    if record.roles[slot].state is RoleState.OFFLINE:
        return Member(path, slot, Standing.OFFLINE, OFFLINE)
    if sidecar.record.disk != record.disk or record.slot_of(sidecar.replica_id) != slot:
        return Member(path, slot, Standing.FOREIGN, "another replica is in its place")
    if found.is_short(record.size):  # else, if the disk grew without it, it is to be lengthened
        return Member(path, slot, Standing.MISSING, truncated(found.image, sidecar.record.size))
    mixture = sidecar.own_state is RoleState.RESYNCING
    if adds(sidecar.record, record, record.roles[slot].last_mount) and not mixture:
        return Member(path, slot, Standing.FOREIGN, "split brain: it was used without the others")
    if image_changed(found):
        return Member(path, slot, Standing.SUSPECT, CHANGED, compare=True)
    if image_unproven(found):
        return Member(path, slot, Standing.SUSPECT, UNPROVEN, compare=True)
    return Member(path, slot, Standing.STALE, compare=not is_covered(record, slot, sidecar))


def covers(record: Record, slot: int, generation: int, sequence: int = 0) -> bool:
    """Whether *record* tracks all that the replica with *slot* lacks, if the last record that it
    held is the one with *generation* and *sequence*."""
    role = record.roles[slot]
    if generation == role.generation:
        return sequence >= role.sequence
    later = record.history
    if role.generation in later:  # else the role's is older than all that are remembered
        later = later[: later.index(role.generation)]
    return generation in later


def is_covered(record: Record, slot: int, sidecar: Sidecar) -> bool:
    held = [one for one in (sidecar.record, sidecar.prepared) if one]
    return any(_tracked(record, slot, one) for one in held)


def _tracked(record: Record, slot: int, own: Record) -> bool:
    """Whether *record* tracked all that the replica with *slot* lacks, if it holds *own*."""
    role = record.roles[slot]
    at = parting(own, record, role.last_mount)
    if at is None or at.went_on or adds(own, record, role.last_mount):
        return False
    if at.own == 0:
        return covers(record, slot, own.generation, own.sequence)
    # Mounted without the others, and not changed: the replica lacks what it lacked then.
    left = role.state is not RoleState.CURRENT and at.mount == role.last_mount
    whole = own.roles[slot].state is RoleState.CURRENT
    return left and whole and own.lineage[at.own - 1].first > role.sequence
