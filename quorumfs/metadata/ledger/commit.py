"""The record of the members: how a record follows its predecessor. Sans I/O.

A record is valid when all replicas current in the record hold it: the record is *prepared* on all
of them first, then *committed* (`quorumfs.decisions.sidecar`). A member that fails is ejected by a
further record, as long as enough members are left. A replica that is resyncing or joining gets
each record last: a record on this replica alone would make it look like a member.

`Records.commit` decides and does no I/O: the generator yields effects, and is sent their outcomes.
So tests can try every failure at every step.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from quorumfs.decisions.model import Plan
from quorumfs.decisions.record import Phase, Record, Role, RoleState, Sidecar
from quorumfs.decisions.voting import voted_error
from quorumfs.replica.replica import Replica


class Write(NamedTuple):
    """Write *record* to the sidecars of *holders*; the answer maps failed replicas to errors."""

    record: Record
    phase: Phase
    holders: Sequence[Replica]


class Eject(NamedTuple):
    """Make *gone* stale, in memory; the answer is the remaining members."""

    gone: Sequence[Replica]
    reason: str


class GiveUp(NamedTuple):
    """End the resync of *target*; there is no answer."""

    target: Replica
    reason: str


Effect = Write | Eject | GiveUp


class Order(NamedTuple):
    """What an administrator has made of a replica, for the records to say."""

    state: RoleState
    role: Role | None = None
    """Its role, if that does not follow from the one in the present record: that of a new replica,
    and of one that went offline without the record that its role names."""
    at: int = 0
    """When it was removed, in seconds since 1970."""
    gets_last_record: bool = False
    """The replica itself gets the first record that follows the order. If it comes back with an
    earlier one, it is an older copy (R15)."""

    def applied(self, role: Role) -> Role:
        """*role* as ordered."""
        if self.state is RoleState.REMOVED:
            return replace(role, state=self.state, mount=self.at)
        return replace(role, state=self.state)


class Records:
    """The record of a set, and later records that may exist on some replicas."""

    def __init__(self, plan: Plan, *, threshold: int, identity: int) -> None:
        """*identity*: the number of this mount, named in each of its records."""
        self.record = plan.record
        """The latest valid record, held by all replicas current in the record."""
        self.quorum = plan.quorum
        """The least number of members that may start a new generation."""
        self.changing = False
        """The next record is to say: this mount may change the disk."""
        self.threshold = threshold
        """The number of replicas that must take a write before its acknowledgement."""
        self.next_threshold: int | None = None
        """What the next record is to say of that, and what is in force once it is valid; None: the
        same as now."""
        self.orders: dict[int, Order] = {}
        """By slot: orders that no valid record follows yet."""
        self.size = plan.record.size
        """Bytes of the disk by the next record: all members must have images as long, and map
        pages for as many."""
        self._identity = identity
        self._sequence = max(plan.sequence_seen, plan.record.sequence)
        self._begun: int | None = None
        """The number of the first record that this mount has tried to make valid, if no later one
        of another mount was seen since; None: there is none."""
        self._certain = True
        """False while an unfinished commit may have left a later record on some replica."""
        self._tried: set[tuple[object, ...]] = set()
        """The keys of all records begun after the present record."""
        self._passed = list(plan.prepared)
        """Generations begun by unfinished commits, until a valid record names them."""
        self._passed_mounts = plan.prepared_mounts

    def saw(self, sequences: Iterable[int]) -> None:
        """Note sequence numbers found in a sidecar: the next record gets a higher number."""
        latest = max(sequences)
        if latest > self._sequence:
            self._sequence, self._begun = latest, None

    @property
    def keys(self) -> set[tuple[object, ...]]:
        """The keys of the record and of all later records that a replica may hold."""
        return {self.record.key, *self._tried}

    def is_unfinished(self, sidecar: Sidecar) -> bool:
        """Whether *sidecar* has a record of this mount that is not valid yet, and may never be."""
        return any(one.key in self._tried for one in (sidecar.record, sidecar.prepared) if one)

    @property
    def entered(self) -> bool:
        """Whether this mount may change the disk, by the record."""
        latest = self.record.lineage[0]
        return latest.identity == self._identity and latest.changed

    def is_offline(self, slot: int) -> bool:
        """Whether the replica with *slot* is offline by the administrator's last order."""
        return self._last_state(slot) is RoleState.OFFLINE

    def is_removed(self, slot: int) -> bool:
        """Whether the replica with *slot* is removed by the administrator's last order."""
        return self._last_state(slot) is RoleState.REMOVED

    def _last_state(self, slot: int) -> RoleState:
        order = self.orders.get(slot)
        return self.record.roles[slot].state if order is None else order.state

    def names_only(self, members: Sequence[Replica]) -> bool:
        """Whether only *members* can be taken for current by a reader of any sidecar."""
        return self._certain and not self._passed and not self._left(members)

    def _left(self, members: Sequence[Replica]) -> list[int]:
        """The slots current in the record, without those of *members*."""
        slots = {replica.slot for replica in members}
        roles = enumerate(self.record.roles)
        return [s for s, role in roles if role.state is RoleState.CURRENT and s not in slots]

    def next_recorded_threshold(self, members: Sequence[Replica]) -> int:
        """The threshold that the next record names if these are the *members*: too few do not
        change it."""
        if len(members) < self.quorum:
            return self.record.threshold
        return self.next_threshold or self.threshold

    def composed(
        self, members: Sequence[Replica], *, clean: bool, resyncing: Replica | None
    ) -> Record:
        """The next record, with one new generation if any replica is ejected (R3)."""
        record, left = self.record, self._left(members)
        enough = len(members) >= self.quorum
        if (left or self._passed) and enough:
            for slot in left:  # the role keeps the last record of its replica
                record = record.with_role(slot, state=RoleState.STALE)
            record = record.minted(self._passed)
            left = []
        threshold = self.next_recorded_threshold(members)
        if not left:
            record = self._as_ordered(record, threshold)
        self._sequence += 1
        if self._begun is None:
            self._begun = self._sequence
        record = replace(
            record, sequence=self._sequence, clean=clean, threshold=threshold, size=self.size
        )
        acknowledging = not left and len(members) >= self.threshold
        record = record.entered(
            self._identity,
            self._begun,
            changed=self.changing and acknowledging,
            passed=self._passed_mounts,
        )
        current = {replica.slot: replica.path for replica in members if replica.slot is not None}
        record = record.with_state(current, RoleState.CURRENT)
        if not left:
            holders = [slot for slot, order in self.orders.items() if order.gets_last_record]
            record = record.with_state(holders, RoleState.OFFLINE)
        if resyncing is not None and resyncing.slot is not None:
            record = record.with_state([resyncing.slot], RoleState.RESYNCING)
        for slot, path in current.items():
            record = record.with_role(slot, path=path)
        return record

    def _as_ordered(self, record: Record, threshold: int) -> Record:
        """*record* with all orders followed, but for a removal that would leave fewer replicas than
        the *threshold* that it is to name. No replica that the orders name is current."""
        for slot, order in self.orders.items():
            removal = order.state is RoleState.REMOVED and slot in record.slots
            if removal and len(record.slots) <= threshold:
                continue
            role = order.role or order.applied(record.roles[slot])
            record = record.with_new_role(slot, role)
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

        *resyncing*: a replica recorded as resyncing, which gets the record too. *joining*: the
        member not current in the present record. *enough_without*: whether given members can be
        ejected. Raises `OSError` if too few members would be left, or if *resyncing* failed.
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
            # A replica still joining may fail as well, and then no member would be left.
            only_joining = all(one in gone or one is joining for one in members)
            if only_joining or not enough_without(gone):
                raise voted_error(failed.values())
            members = yield Eject(gone, f"its sidecar: {failed[gone[0]].strerror}")

    def _go_by(self, record: Record, members: Sequence[Replica]) -> None:
        """Take over *record*, valid on all *members*."""
        self.record = record
        if record.threshold == self.next_threshold:
            self.threshold = record.threshold
        states = dict(enumerate(role.state for role in record.roles))
        self.orders = {
            slot: order for slot, order in self.orders.items() if states.get(slot) != order.state
        }
        self._tried.clear()
        self._certain = True
        # An ejected replica may have committed a generation that failed on other replicas.
        self._passed = [passed for passed in self._passed if passed not in record.history]
        if self.names_only(members):
            self.quorum = self.threshold
