"""The status of a set with sidecars, taken from its ledger without waiting."""

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.record import RoleState
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.protocol import AbsentReplica, ReplicaReport, SetReport
from quorumfs.replica.replica import Replica


def report_on(ledger: Ledger, replica: Replica) -> ReplicaReport:
    """The status of *replica*."""
    if replica.slot is None:
        return ReplicaReport(reason=replica.reason)
    lacking = ledger.map.lacking_bytes(replica.slot)
    return ReplicaReport(
        ledger.record.roles[replica.slot].replica_id,
        lacking,
        replica.reason,
        truncated=replica in ledger.content.truncated,
        lost=bool(lacking) or replica in ledger.content.unsafe,
    )


def report_on_set(ledger: Ledger) -> SetReport:
    """The status of the whole set."""
    record, given = ledger.record, {replica.slot for replica in ledger.replicas}
    return SetReport(
        "sidecar",
        record.set_id,
        record.generation,
        tuple(
            AbsentReplica(
                role.path,
                role.replica_id,
                ledger.map.lacking_bytes(slot),
                offline=role.state is RoleState.OFFLINE,
            )
            for slot, role in enumerate(record.roles)
            if slot in record.slots and slot not in given
        ),
        unequal=bool(ledger.agreement.divergent),
        unverified=bool(ledger.map.count(UNVERIFIED)),
    )
