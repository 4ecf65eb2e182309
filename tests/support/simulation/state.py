"""What the simulation knows of one set across the lives of its daemon.

The daemon knows none of this. The operator acts on it, the second opinion judges by it, and the
oracle is told of what happened between two lives.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from quorumfs.decisions.model import Plan, Standing
from quorumfs.decisions.record import Record, RoleState, Sidecar
from support.simulation.fate import Mounted
from support.simulation.media import Content
from support.simulation.oracle import BrokenError, Oracle
from support.simulation.setup import Origin, Setup
from support.simulation.world import ReplicaBackup, World


@dataclass(slots=True)
class SetState:
    """A set of replicas as the simulation, and no daemon, sees it."""

    setup: Setup
    world: World
    oracle: Oracle
    thresholds: set[int] = field(init=False)
    """All that a record may have: it is lowered with consent, or by as many as it was."""
    _everyone: list[int] = field(init=False)
    few: bool = field(init=False)
    """Perhaps fewer than the threshold are current on record: others do not make up for them."""
    forked: bool = False
    """Somebody consented to a loss, and since then not all replicas have been one set."""
    last: tuple[Record, set[int]] | None = None
    """After an unmount in order: what was on record, and who was there; None after a crash."""
    cuts_seen: int = 0
    """How many power cuts the oracle was told of."""
    backups: list[dict[int, ReplicaBackup]] = field(default_factory=list)
    """Of all replicas that were reachable, between lives, oldest first."""
    harmed: set[int] = field(default_factory=set)
    """Replicas that do not hold what they should, behind the back of all daemons, and that
    have not been brought up to date since."""
    to_keep: set[int] = field(default_factory=set)
    """Making a set, or resolving, was cut off: whom to keep when it is done again."""
    half_resolved: bool = False
    """Resolving was cut off when some sidecars were written: they, and the others, are each a
    set."""
    kept: set[int] = field(default_factory=set)
    """Who was kept the last time, until all have seen it."""
    resolved: bool = False
    """Somebody was kept, once."""
    parted: set[int] = field(default_factory=set)
    """Replicas that were not named when a side was kept: they may be of another side for ever."""
    ordered: dict[int, RoleState] = field(default_factory=dict)
    """What the administrator's last order made of a replica: OFFLINE, REMOVED, or STALE when it was
    added or taken in again. Nothing of a replica of which that is not certain."""
    size_sure: int = field(init=False)
    """Bytes that the disk has at least, for that was answered, or somebody wrote to it since."""
    removed: set[int] = field(default_factory=set)
    """Replicas that were removed from the set for good."""
    copies: dict[int, Content] = field(default_factory=dict)
    """Replicas that left as a whole: what they held then."""
    orders: Counter[int] = field(default_factory=Counter)
    """Orders so far, of each replica."""
    ordering: Counter[int] = field(default_factory=Counter)
    """Orders under way, of each replica."""

    def __post_init__(self) -> None:
        self.thresholds = {self.setup.threshold}
        self.few = self.setup.origin is Origin.COPIED
        self.size_sure = self.setup.scale.size
        self._everyone = list(range(self.setup.replicas))

    @property
    def everyone(self) -> list[int]:
        """The indices of all replicas of the set, by the latest record on any sidecar."""
        known = [one for i, one in self._sidecars().items() if i not in self.removed]
        known = [one for one in known if one.record.slot_of(one.replica_id) is not None]
        if known:
            latest = max(
                (one.record for one in known),
                key=lambda record: (
                    sum(one.record.generation in record.history for one in known),
                    record.sequence,
                ),
            )
            paths = {latest.roles[slot].path for slot in latest.slots}
            replicas = enumerate(self.world.replicas)
            self._everyone = [index for index, one in replicas if one.path in paths]
        return self._everyone

    @property
    def count(self) -> int:
        """How many replicas the set has."""
        return len(self.everyone)

    @property
    def closed_well(self) -> bool:
        """Whether the last life ended with an unmount in order."""
        return self.last is not None

    def reachable(self, order: Sequence[int]) -> set[int]:
        """Those that can be used: there, and long enough."""
        return {
            index
            for index in order
            if self.world.replicas[index].reachable and not self.world.is_short(index)
        }

    def known(self) -> dict[int, Sidecar]:
        """All sidecars of the set that can be read."""
        everyone = self.everyone
        return {index: one for index, one in self._sidecars().items() if index in everyone}

    def _sidecars(self) -> dict[int, Sidecar]:
        known = ((i, self.world.known_sidecar(i)) for i in range(len(self.world.replicas)))
        return {index: sidecar for index, sidecar in known if sidecar is not None}

    def taken_out(self) -> set[int]:
        """Those that an administrator took out, by any sidecar."""
        known = self.known()
        records = [r for one in known.values() for r in (one.record, one.prepared) if r is not None]
        return {
            index
            for index, one in known.items()
            for record in records
            if (slot := record.slot_of(one.replica_id)) is not None
            and record.roles[slot].state is RoleState.OFFLINE
        }

    def sized(self, size: int) -> None:
        """A mount shows a disk of *size* bytes. Raises `BrokenError` if that cannot be."""
        if size < self.size_sure and not self.forked:
            raise BrokenError(f"a disk that had grown to {self.size_sure} bytes has {size}")
        self.world.size = size
        self.oracle.resize(size)

    def forget_orders(self) -> None:
        """It is not certain any more what was ordered: the set was made anew, or goes on without
        those who know."""
        self.ordered.clear()
        self.copies.clear()

    def note_thresholds(self, mounted: Mounted) -> None:
        """What the next mount may find on record: no lower one that too few hold."""
        known = self.known()
        sure = len(known) == self.count and not self.harmed
        least = min(self.thresholds)
        if mounted.converged:
            self.thresholds = {mounted.sidecars.ledger.record.threshold}
        holders = Counter(
            threshold
            for sidecar in known.values()
            for threshold in {one.threshold for one in (sidecar.record, sidecar.prepared) if one}
        )
        for threshold, count in holders.items():
            if threshold >= least or count >= least or not sure:
                self.thresholds.add(threshold)

    def accept_loss(self, order: Sequence[int], plan: Plan) -> None:
        """Go on with what is here; what only others hold may be gone."""
        self.world.note(f"what only others than {order} hold is given up")
        members = [
            i for i, m in zip(order, plan.members, strict=True) if m.state is Standing.CURRENT
        ]
        self.oracle.forget_reads()
        self.oracle.resize(plan.record.size)  # what is here may have grown apart from the others
        self.forget_orders()
        for index in members:
            image = self.world.replicas[index].image
            self.oracle.allow([image.cache, image.durable])
        self.thresholds.add(plan.threshold)

    def life_ended(self, *, lost_cache: bool = False) -> None:
        """Tell the oracle how a life of the daemon ended.

        *lost_cache*: a replica lost what was not synced, while the daemon went on.
        """
        if self.closed_well:
            self.unmounted()
        elif self.world.power_cuts > self.cuts_seen or lost_cache:
            self.oracle.power_cut()
        else:
            self.oracle.killed()
        self.cuts_seen = self.world.power_cuts
        self.ordering.clear()

    def unmounted(self) -> None:
        """Tell the oracle of an unmount in order."""
        self.oracle.killed()  # closes what a guest left open; there is nothing
        assert self.cuts_seen == self.world.power_cuts

    def power_cut(self) -> None:
        """Power is cut while no daemon runs."""
        self.world.power_cut()
        self.cuts_seen = self.world.power_cuts
        self.oracle.power_cut()
