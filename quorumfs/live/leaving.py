"""Whether a replica may leave the set: what must be left without it."""

from quorumfs.errors import UserError
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.repair.inspection import alone_right_at
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica


def require_count(ledger: Ledger, slot: int) -> None:
    """Raise `UserError` if the vote threshold needs the replica with *slot*, once all others
    that were not taken out are current: else the set could never be used again."""
    records, threshold = ledger.records, ledger.threshold
    slots = [one for one in ledger.record.slots if one != slot]
    left = sum(not records.is_offline(one) and not records.is_removed(one) for one in slots)
    recorded = records.next_recorded_threshold(ledger.members)
    if threshold <= left < recorded:
        raise UserError(
            f"the set would have {left} replicas in use, and vote-threshold={recorded} is on "
            f"record until {ledger.least} replicas are current: wait for that"
        )
    if left < threshold:
        raise UserError(
            f"the set would have {left} replicas in use, and vote-threshold={threshold} needs "
            "as many: add another one first, or lower vote-threshold"
        )


def require_spare(ledger: Ledger, repairs: Repairs, replica: Replica) -> None:
    """Raise `UserError` if the set cannot do without *replica*."""
    if not replica.standing.is_member:
        return
    if ledger.enough_without([replica]):
        others = [one.path for one in ledger.members if one is not replica]
        found = alone_right_at(replica.path, repairs.scrub.finds, others)
        if found is not None:
            raise UserError(
                f"{replica.path} stays in use: by the last scrub it is the only replica with "
                f"good data at byte {found.offset}. Repair the others with quorumfs scrub "
                "--repair; if that was done, confirm it with quorumfs scrub"
            )
        return
    left = [one.path for one in ledger.members if one is not replica]
    if len(left) < ledger.least:
        raise UserError(
            f"{replica.path} stays in use: without it {len(left)} current replicas would be "
            f"left ({', '.join(left) or 'none'}), and vote-threshold={ledger.least} needs as "
            "many. Bring another replica back first, or lower vote-threshold"
        )
    raise UserError(
        f"{replica.path} stays in use: it alone holds some of the data; wait until the others "
        "have been given it"
    )
