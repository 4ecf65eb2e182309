"""Who is current, on record: how one record follows another. Sans I/O.

A record is valid when all that are current in it have it: it is *prepared* on all of them first,
then *committed* (`quorumfs.decisions.sidecar`). Whoever cannot take it is ejected, and another
record that says so follows, as long as enough are left. A replica that is being brought back gets
each record last: without the others it must not have what makes it seem one of them.

`Records.commit` decides, and does nothing: it yields what is to be done, and is sent what became of
it. So every failure at every step can be tried.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from quorumfs.decisions.model import Plan
from quorumfs.decisions.record import Phase, Record, RoleState
from quorumfs.decisions.voting import voted_error
from quorumfs.replica.replica import Replica


class Write(NamedTuple):
    """Write *record* to the sidecars of *holders*; the answer maps who failed to the error."""

    record: Record
    phase: Phase
    holders: Sequence[Replica]


class Eject(NamedTuple):
    """Make *gone* stale, in memory; the answer is the members that are left."""

    gone: Sequence[Replica]
    reason: str


class GiveUp(NamedTuple):
    """Resync *target* no more; there is no answer."""

    target: Replica
    reason: str


Effect = Write | Eject | GiveUp


class Records:
    """The record of a set, and those of which some replicas may hold a part."""

    def __init__(self, plan: Plan, *, threshold: int, identity: int) -> None:
        """*identity*: of this mount; each record says who wrote it."""
        self.record = plan.record
        """The latest that is valid on all replicas that are current in it."""
        self.quorum = plan.quorum
        """Fewer members than this start no generation of their own."""
        self.changing = False
        """The next record is to say that this mount may change the disk."""
        self.threshold = threshold
        """How many replicas must have taken what is acknowledged."""
        self._identity = identity
        self._sequence = max(plan.sequence_seen, plan.record.sequence)
        self._certain = True
        """No replica may hold a later record: no commit was begun since that did not end well."""
        self._tried: set[tuple[object, ...]] = set()
        """The keys of records after the present one that were begun."""
        self._passed = list(plan.prepared)
        """Generations that were begun, until a valid record names them."""
        self._passed_mounts = plan.prepared_mounts

    def saw(self, sequences: Iterable[int]) -> None:
        """Note the numbers of records that are in a sidecar: ours must seem later."""
        self._sequence = max(self._sequence, *sequences)

    @property
    def keys(self) -> set[tuple[object, ...]]:
        """Of the record, and of those after it that a replica may hold."""
        return {self.record.key, *self._tried}

    @property
    def entered(self) -> bool:
        """Whether the record says that this mount may change the disk."""
        latest = self.record.lineage[0]
        return latest.identity == self._identity and latest.changed

    def names_only(self, members: Sequence[Replica]) -> bool:
        """Whether a replica can be taken for current, by the sidecars, only if it is a member."""
        return self._certain and not self._passed and not self._left(members)

    def _left(self, members: Sequence[Replica]) -> list[int]:
        """The slots that are current in the record, and none of *members*."""
        slots = {replica.slot for replica in members}
        roles = enumerate(self.record.roles)
        return [s for s, role in roles if role.state is RoleState.CURRENT and s not in slots]

    def composed(
        self, members: Sequence[Replica], *, clean: bool, resyncing: Replica | None
    ) -> Record:
        """The next record: a new generation if somebody is ejected (R3: once for all)."""
        record, left = self.record, self._left(members)
        enough = len(members) >= self.quorum
        if (left or self._passed) and enough:
            for slot in left:  # from the last record on that it got
                record = record.with_role(slot, state=RoleState.STALE)
            record = record.minted(self._passed)
            left = []
        self._sequence += 1
        threshold = self.threshold if enough else record.threshold  # too few may not change it
        record = replace(record, sequence=self._sequence, clean=clean, threshold=threshold)
        acknowledging = not left and len(members) >= self.threshold
        record = record.entered(
            self._identity,
            changed=self.changing and acknowledging,
            passed=self._passed_mounts,
        )
        current = {replica.slot: replica.path for replica in members if replica.slot is not None}
        record = record.with_state(current, RoleState.CURRENT)
        if resyncing is not None and resyncing.slot is not None:
            record = record.with_state([resyncing.slot], RoleState.RESYNCING)
        for slot, path in current.items():
            record = record.with_role(slot, path=path)
        return record

    def commit(
        self,
        members: Sequence[Replica],
        *,
        clean: bool,
        resyncing: Replica | None,
        joining: Replica | None,
        enough_without: Callable[[Sequence[Replica]], bool],
    ) -> Generator[Effect, Any, None]:
        """Make a record of *members* valid on all of them.

        *resyncing*: a replica that the record says this of, and that gets it too. *joining*: the
        one of *members* that is not current in the present record. *enough_without*: whether some
        of the members can be ejected.

        Raises `OSError` if too few would be left, or *resyncing* failed.
        """
        failure: OSError | None = None
        while True:
            record = self.composed(members, clean=clean, resyncing=resyncing)
            # From here on, and also if this is cancelled, replicas may hold a part of it.
            self._certain = False
            self._tried.add(record.key)
            if record.generation != self.record.generation:
                self._passed.append(record.generation)
            first = [one for one in members if one is not joining]
            last = [resyncing] if resyncing else [one for one in members if one is joining]
            failed: Mapping[Replica, OSError] = {}
            for phase, holders in (
                (Phase.PREPARED, [*first, *last]),
                (Phase.COMMITTED, first),
                (Phase.COMMITTED, last),
            ):
                failed = yield Write(record, phase, holders)
                if failed:
                    break
            else:
                self._go_by(record, members)
                if failure is not None:
                    raise failure
                return
            if resyncing is not None and resyncing in failed:
                failure = failed[resyncing]
                yield GiveUp(resyncing, f"its sidecar: {failure.strerror}")
                resyncing = None
            gone = [one for one in members if one in failed]
            if failure is not None and not gone:
                raise failure
            # One that is still joining may fail as well: then nobody would be left.
            only_joining = all(one in gone or one is joining for one in members)
            if only_joining or not enough_without(gone):
                raise voted_error(failed.values())
            members = yield Eject(gone, f"its sidecar: {failed[gone[0]].strerror}")

    def _go_by(self, record: Record, members: Sequence[Replica]) -> None:
        """*record* is valid on all *members*."""
        self.record = record
        self._tried.clear()
        self._certain = True
        # One that was ejected may have committed a generation that failed elsewhere.
        self._passed = [passed for passed in self._passed if passed not in record.history]
        if self.names_only(members):
            self.quorum = self.threshold
