"""What must hold of a ledger whenever anything else can run: checked all through each history."""

from collections.abc import Iterator

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.model import Standing
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.content import bit
from quorumfs.metadata.ledger.ledger import Ledger


def broken_invariants(ledger: Ledger) -> Iterator[str]:
    """The invariants of *ledger* that do not hold, in words."""
    known, content, agreement = ledger.map, ledger.content, ledger.agreement
    unsynced = {run for replica in ledger.members for run in ledger.epochs.unsynced(replica)}
    if not all(known.all(INTENT, run) for run in unsynced):
        yield "R5: what a member has not synced is not marked"
    resyncing = [one for one in ledger.replicas if one.standing is Standing.RESYNCING]
    if resyncing not in ([], [ledger.resyncing]):
        yield "R8: a replica is resyncing, and is not the target"
    if agreement or content:
        yield from _broken_where_members_differ(ledger)


def _broken_where_members_differ(ledger: Ledger) -> Iterator[str]:
    known, content, agreement = ledger.map, ledger.content, ledger.agreement
    everything = range(len(known))
    marked, unverified = (_chunks_with(ledger, bits) for bits in (INTENT, UNVERIFIED))
    remembered, lost = marked, RangeSet()
    for replica in ledger.replicas:
        if replica.slot is not None:  # who is ejected may be the one that differed
            remembered = remembered.union(_chunks_with(ledger, bit(replica)))
    for replica in ledger.members:
        lacked, risked = content.lacked(replica, everything), content.risked(replica)
        if replica not in content.truncated:
            lost = lost.union(lacked).union(risked)
        if _overlap(lacked, risked):
            yield f"{replica.path} lacks a chunk, and is the last that holds it"
    if not _inside(agreement.divergent, remembered):
        yield "R1: chunks may differ, and neither a mark nor an out-of-sync bit says so"
    if not _inside(lost, agreement.divergent.union(unverified)):
        yield "a chunk was lost, and nobody makes it good"
    if not _inside(agreement.inherited, agreement.divergent):
        yield "a chunk is INHERITED, and does not differ"
    if _overlap(agreement.divergent, unverified):
        yield "a chunk is DIVERGENT, and nobody may say what is right there"
    torn = (known.chunks(start, end - start) for start, end in agreement.torn)
    if not all(known.all(UNVERIFIED, chunks) for chunks in torn):
        yield "bytes are torn that were compared"
    if not {*content.lossy, *content.truncated, *content.pending} <= {*ledger.members}:
        yield "a replica that is not current is said to have lost something"


def _chunks_with(ledger: Ledger, bits: int) -> RangeSet:
    chunks = RangeSet()
    for run in ledger.map.runs(bits, longest=len(ledger.map)):
        chunks.add(run.start, run.stop)
    return chunks


def _inside(some: RangeSet, all_: RangeSet) -> bool:
    return not any(True for start, end in some for _ in all_.outside(start, end))


def _overlap(some: RangeSet, others: RangeSet) -> bool:
    return any(others.overlaps(start, end) for start, end in some)
