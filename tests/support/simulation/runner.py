"""One seed, one history: the real runtime on the simulated world, and the oracle beside it.

A history is some lives of the daemon with guests at work and faults of all kinds, ended by a kill,
a power cut or an unmount; and then faults stop. What must hold:

* a guest never sees what the oracle excludes, and every request ends;
* a mount is refused only where the replicas at hand cannot tell who is right;
* after the faults all replicas become current and byte-identical by themselves, and after an
  unmount the next mount finds nothing to do;
* the daemon neither dies nor logs an error.

A careless operator (some seeds have one) mounts what is there with ``-o degraded``. That may lose
what only absent replicas hold: the oracle is told to accept what is on those at hand instead, and
two such sides are a split brain, which is then resolved.
"""

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from operator import or_
from unittest import mock

import trio

from quorumfs import dirtymap, zeroing
from quorumfs import sidecar as sidecar_module
from quorumfs.assembly import (
    AssemblyRefusedError,
    Plan,
    State,
    assemble,
    new_record,
)
from quorumfs.claim import Claim, Tenure
from quorumfs.control.events import Event, EventLog
from quorumfs.dirtymap import ALL_LACK, INTENT, UNVERIFIED, DirtyMap, lacks
from quorumfs.disk import Disk
from quorumfs.errors import UserError
from quorumfs.metadata import epochs as epochs_module
from quorumfs.metadata import intents as intents_module
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.mirror import Mirror
from quorumfs.patterns import Fifo, Quorum
from quorumfs.repair import work as work_module
from quorumfs.repair.comeback import ForeignError, Returned
from quorumfs.repair.repairs import Repairs
from quorumfs.replica import Replica
from quorumfs.resolution import Resolution, resolve
from quorumfs.sidecar import (
    MAP_OFFSET,
    PAGE,
    SLOT_OFFSETS,
    FormatError,
    Record,
    RoleState,
    Sidecar,
    decode,
)
from quorumfs.storage import CHANGES, Kind
from support.simulation.fate import TIMEOUT_S, Fate, Mounted, crash_in_a_commit, drawn_weather
from support.simulation.guest import KIB, REQUEST_MAX_S, BrokenError, Crowd, Guest
from support.simulation.harness import run_seeded
from support.simulation.media import SECTOR, SimulatedFile
from support.simulation.oracle import Oracle, ViolationError
from support.simulation.storage import CALM, DaemonKilledError
from support.simulation.world import Life, ReplicaBackup, SimulatedReplica, World

CONVERGE_MAX_S = 400.0
"""After the faults: a replica is tried again within a minute, what hangs is given up before."""

LATE_MAX_S = 60.0
"""How long what was asked for before faults stop may still take."""

_CLAIM = b"quorumfs"
"""How what is no change of a set begins: that nobody has it open any more."""

QUIET_S = 100.0
"""How long a mount that has nothing to do is watched doing nothing."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large things are: a disk of many chunks, extents, pieces and batches, yet small."""

    size: int
    chunk_size: int
    extent: int
    piece: int
    batch: int
    chunk_set_max: int
    misses_max: int

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The real code with its constants at this scale."""
        with ExitStack() as stack:
            for module, name, value in (
                (dirtymap, "EXTENT", self.extent),
                (sidecar_module, "CHUNK_MIN", self.chunk_size),
                (work_module, "PIECE", self.piece),
                (work_module, "LARGE_UNIT", 2 * self.piece),
                (work_module, "BATCH", self.batch),
                (epochs_module, "CHUNKS_MAX", self.chunk_set_max),
                (intents_module, "MISSES_MAX", self.misses_max),
                (zeroing, "STEP_MAX", 2 * self.piece),
                (zeroing, "LEAST", self.piece // 2),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield


SCALES = (
    Scale(32 * 16 * KIB, 16 * KIB, 64 * KIB, 32 * KIB, 128 * KIB, 65_536, 256),
    Scale(20 * 16 * KIB + 5 * SECTOR, 16 * KIB, 16 * KIB, 16 * KIB, 64 * KIB, 8, 2),
    Scale(9 * KIB * 256, SECTOR, 16 * KIB, 64 * KIB, 256 * KIB, 64, 8),  # two pages of map
)


class Origin(Enum):
    """How the set came to be."""

    CREATED = "created"
    ADOPTED = "adopted"
    """By the first mount of raw images, which are then compared."""
    COPIED = "copied"
    """From one raw image over all others, whatever they hold."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same in all lives of a history."""

    replicas: int
    threshold: int
    scale: Scale
    fifo: bool
    rewrite_corrupted: bool
    zero_kind: Kind | None
    origin: Origin
    filled: bool
    """With data at first; else with zeros."""
    lives: int
    careless: bool
    """The operator mounts what is there."""
    local: bool = True
    """Images are copied from one to another in one operation, where that is allowed."""
    passing: bool = False
    """No store has lasting inode numbers: its images are known while it is mounted."""
    claims: bool = False
    """Each mount says that it has the set, and looks whether it still has."""

    @classmethod
    def drawn(cls, dice: random.Random) -> "Setup":
        """Any setup; the useful ones more often."""
        replicas = dice.choice((2, 2, 3, 3, 3, 4))
        thresholds = {2: (1, 1, 1, 2), 3: (1, 1, 2, 2, 2, 3), 4: (1, 2, 2, 3, 3, 4)}[replicas]
        return cls(
            replicas=replicas,
            threshold=dice.choice(thresholds),
            scale=dice.choice((SCALES[0], SCALES[0], *SCALES)),
            fifo=dice.random() < 0.5,
            rewrite_corrupted=dice.random() < 0.3,
            zero_kind=dice.choice((None, Kind.ZERO, Kind.DISCARD)),
            origin=dice.choice((*[Origin.CREATED] * 6, *[Origin.ADOPTED] * 3, Origin.COPIED)),
            filled=dice.random() < 0.3,
            lives=dice.randrange(1, 7),
            careless=dice.random() < 0.2,
            local=dice.random() < 0.7,
            passing=dice.random() < 0.2,
            claims=dice.random() < 0.5,
        )


class LifeKind(Enum):
    """What happens in a life."""

    WEATHER = "faults as they come"
    PLANS = "faults that are planned"
    CALM = "no faults"


class _Errors(logging.Handler):
    """What the daemon logs goes to the trace; an error is remembered."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.found: list[str] = []
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._world.note(f"log {record.levelname}: {text}")
        if record.levelno >= logging.ERROR:
            self.found.append(text)


class RefusedError(Exception):
    """A mount that was assembled is not used."""

    def __init__(self, mounted: Mounted) -> None:
        super().__init__("what it was told cannot be put on record")
        self.mounted = mounted


class History:
    """What follows from one seed."""

    def __init__(self, seed: int, setup: Setup | None = None) -> None:
        dice = random.Random(f"{seed}/setup")
        self.seed = seed
        self.setup = setup or Setup.drawn(dice)
        size = self.setup.scale.size
        self.world = World(seed, self.setup.replicas, size)
        for replica in self.world.replicas:
            replica.local = self.setup.local
            replica.instance = 1 if self.setup.passing else None
        initial = dice.randbytes(size) if self.setup.filled else None
        self.oracle = Oracle(size, initial)
        self._dice = self.world.dice_for("history")
        self._asking = self.world.dice_for("threshold")
        self.errors = _Errors(self.world)
        self._initial = initial
        self._thresholds = {self.setup.threshold}
        """All that a record may have: it is lowered with consent, or by as many as it was."""
        self._forked = False
        """Somebody consented to a loss, and since then not all replicas have been one set."""
        self._last: tuple[Record, set[int]] | None = None
        """After an unmount in order: what was on record, and who was there; None after a crash."""
        self._cuts_seen = 0
        self._backups: list[dict[int, ReplicaBackup]] = []
        """Of all replicas that were reachable, between lives, oldest first."""
        self._harmed: set[int] = set()
        """Replicas that do not hold what they should, behind the back of all daemons, and that
        have not been brought up to date since."""
        self._to_keep: set[int] = set()
        """Making a set, or resolving, was cut off: whom to keep when it is done again."""
        self._half_resolved = False
        """It was cut off when some sidecars were written: they, and the others, are each a set."""
        self._kept: set[int] = set()
        """Who was kept the last time, until all have seen it."""
        self._resolved = False
        """Somebody was kept, once."""
        self._few = self.setup.origin is Origin.COPIED
        """Perhaps fewer than the threshold are current on record: others do not make up for them"""
        self._guests = 0

    async def run(self) -> None:
        """Live it; raises if a promise is broken."""
        logger = logging.getLogger("quorumfs")
        level, propagate = logger.level, logger.propagate
        logger.addHandler(self.errors)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        try:
            with self.setup.scale.applied():
                await self._run()
        finally:
            logger.removeHandler(self.errors)
            logger.setLevel(level)
            logger.propagate = propagate

    async def _run(self) -> None:
        self.world.note(f"setup {self.setup}")
        self._create()
        for _ in range(self.setup.lives):
            await self._live()
            self._between_lives()
        await self._end()

    # The set

    def _create(self) -> None:
        """A new set, as ``create`` or the first mount of raw images makes it."""
        setup, world = self.setup, self.world
        if self._initial is not None:
            for one in world.replicas:
                self._fill(one.image, self._initial)
        dice = world.dice_for("set")
        record = new_record(
            [one.path for one in world.replicas],
            setup.scale.size,
            setup.threshold,
            chunk_size=setup.scale.chunk_size,
            random_bytes=dice.randbytes,
        )
        disk_map = DirtyMap(record.size, record.chunk_size)
        everything = range(len(disk_map))
        order = list(range(setup.replicas))
        if setup.origin is Origin.ADOPTED:
            disk_map.add(UNVERIFIED, everything)
        elif setup.origin is Origin.COPIED:
            # As resolve() does it for raw images, in its order: the source comes last.
            order = [*order[1:], 0]
            record = record.with_state(order[:-1], RoleState.RESYNCING)
            for index in order[:-1]:
                self._fill(world.replicas[index].image, dice.randbytes(setup.scale.size))
                disk_map.add(lacks(index), everything)
        if setup.origin is not Origin.CREATED and setup.lives and dice.random() < 0.3:
            order = order[: dice.randrange(1, setup.replicas)]  # and there it was killed
            world.note(f"killed when only {order} had sidecars")
            if setup.origin is Origin.COPIED:
                self._to_keep = {0}
        for index in order:
            identity = world.replicas[index].identity
            replica_id = record.roles[index].replica_id
            world.create_sidecar(index, Sidecar(replica_id, record, disk_map, identity))

    def _fill(self, image: SimulatedFile, content: bytes) -> None:
        image.restore(image.backup())
        for one in (image.cache, image.durable):
            one.write(0, content)

    def _assemble(self, order: Sequence[int], *, degraded: bool, threshold: int | None) -> Plan:
        found = self.world.found(order)
        plan = assemble(found, degraded=degraded, threshold=threshold)
        states = [f"{member.path} {member.state.value}" for member in plan.members]
        self.world.note(f"assembled, {plan.rule}: {', '.join(states)}")
        return plan

    def _choose(self) -> tuple[list[int], Plan] | None:
        """Find replicas that can be mounted; None if there are none this time."""
        dice, everyone = self._dice, list(range(self.setup.replicas))
        order = everyone.copy()
        dice.shuffle(order)
        if dice.random() < 0.4:
            order = order[: dice.randrange(1, len(order) + 1)]
        if self._kept and not self._reachable(order) & self._kept:
            order = everyone  # the others cannot know that somebody was preferred to them
            if not self._reachable(order) & self._kept:
                return None
        if self._to_keep or (self._harmed and not self._reachable(order) & self._sound):
            # Who was put back, with nobody here who could tell, is beyond any promise.
            order = everyone
            dice.shuffle(order)
            if self._to_keep and self._reachable(order) != set(order):
                return None
            if self._to_keep and dice.random() < 0.5:
                self._keep(cut_off=dice.random() < 0.3)
                return None
            if self._harmed and not self._reachable(order) & self._sound:
                return None
        threshold = None
        if len(self._thresholds) > 1 and dice.random() < 0.5:
            threshold = dice.choice(sorted(self._thresholds))
        elif self._asking.random() < 0.15:
            threshold = self._asking.randrange(1, self.setup.replicas + 1)
        for degraded in (False, True):
            try:
                return order, self._assemble(order, degraded=degraded, threshold=threshold)
            except AssemblyRefusedError as error:
                self.world.note(f"mount of {order} refused, {degraded=}: {error.rule}: {error}")
                self._require_reason(error, order, degraded=degraded, threshold=threshold)
                if self._repairable(error) and dice.random() < 0.7:
                    self._keep(cut_off=dice.random() < 0.3)
                    return None
                if self._all_is_here(order):
                    continue
                if not self.setup.careless or dice.random() < 0.5:
                    return None
                usable = len(self._reachable(order))
                if error.rule == "no quorum" and usable:
                    threshold = usable
        return None

    def _reachable(self, order: Sequence[int]) -> set[int]:
        """Those that can be used: there, and long enough."""
        return {
            index
            for index in order
            if self.world.replicas[index].reachable
            and self.world.replicas[index].image.size >= self.world.size
        }

    def _known(self) -> dict[int, Sidecar]:
        """All sidecars that can be read."""
        known = {}
        for index, one in enumerate(self.world.replicas):
            if one.sidecar is not None:
                with suppress(FormatError):
                    known[index] = decode(one.sidecar.whole)
        return known

    @property
    def _sound(self) -> set[int]:
        """Replicas that hold all that was acknowledged, and say so; none if that is not sure."""
        known = self._known()
        if self._forked or not known or any(sidecar.prepared for sidecar in known.values()):
            return set()
        # One that was harmed may since have become the only one that holds everything.
        latest = max((sidecar.record for sidecar in known.values()), key=lambda r: r.sequence)
        return {
            index
            for index, sidecar in known.items()
            if sidecar.record == latest
            and sidecar.own_state is RoleState.CURRENT
            and index not in self._harmed
        }

    def _may_harm(self, index: int) -> bool:
        """Whether all that a replica holds is elsewhere, and nothing else is wrong."""
        if self.setup.careless or self._harmed - {index}:
            return False
        others = self._sound - {index}
        return bool(others) and not any(
            file.dropped or not self.world.replicas[other].reachable
            for other in others
            for file in self.world.replicas[other].files
        )

    def _is_left_behind(self, index: int) -> bool:
        """Whether it is on record that a replica is not current."""
        known = self._known()
        own = known.pop(index, None)
        if own is None or not known or any(sidecar.prepared for sidecar in known.values()):
            return False
        latest = max((sidecar.record for sidecar in known.values()), key=lambda r: r.sequence)
        slot = latest.slot_of(own.replica_id)
        return slot is not None and latest.roles[slot].state is not RoleState.CURRENT

    def _all_is_here(self, order: Sequence[int]) -> bool:
        """Whether a mount refused because of those that were harmed loses nothing."""
        return bool(self._harmed) and bool(self._sound) and self._sound <= self._reachable(order)

    def _repairable(self, error: AssemblyRefusedError) -> bool:
        """Whether the operator is told to resolve, and can without a loss."""
        told = {"stranger", "split brain", "only stale", "unreadable", "no quorum"}
        strangers = len(self._known()) < self.setup.replicas
        wanted = error.rule in told or bool(self._to_keep) or strangers
        return wanted and not self._forked and bool(self._keepable)

    @property
    def _keepable(self) -> list[int]:
        """Whom to keep without a loss: who is current, or, before anything was written, who holds
        what the set began with. Nobody while one is away that others might go on with."""
        if any(not one.reachable for one in self.world.replicas):
            return []
        kept = self._to_keep or self._sound
        raw = self.setup.origin is Origin.ADOPTED and not self.world.lives
        if raw and not self._resolved and not self._to_keep:
            kept = set(range(self.setup.replicas)) - self._harmed
        return sorted(kept & self._reachable(range(self.setup.replicas)))

    def _keep(self, *, cut_off: bool) -> None:
        """The operator says whose data to keep, of all that are there; nothing is lost by it.

        *cut_off*: it is killed before all sidecars are written.
        """
        world, dice = self.world, self._dice
        order = [index for index, one in enumerate(world.replicas) if one.reachable]
        dice.shuffle(order)
        keep = dice.choice(self._keepable)
        path = world.replicas[keep].path
        try:
            resolution = self._decide(order, path)
        except AssemblyRefusedError as error:
            world.note(f"resolve --keep {keep} refused: {error}")
            for index in set(order) - {keep}:  # as the messages say
                world.replicas[index].sidecar = None
            self._extend_all()
            resolution = self._decide(order, path)
        by_path = {one.path: index for index, one in enumerate(world.replicas)}
        writes = list(resolution.sidecars.items())
        self._to_keep = {by_path[path] for path in resolution.kept}
        if cut_off:
            writes = writes[: dice.randrange(len(writes))]
            self._half_resolved |= bool(writes)
        else:
            self._half_resolved = False
            self._to_keep = set()
        world.note(f"resolved: keep {resolution.kept}, {cut_off=}")
        for path, sidecar in writes:
            world.create_sidecar(by_path[path], sidecar)
        self._last = None
        self._resolved = True
        self._thresholds.add(self.setup.threshold)  # perhaps it is another set now
        self._kept = {by_path[path] for path in resolution.kept}
        self._backups.clear()  # perhaps it is another set now
        self._few |= len(resolution.kept) < self.setup.replicas

    def _decide(self, order: Sequence[int], keep: str) -> Resolution:
        return resolve(self.world.found(order), keep, threshold=self.setup.threshold)

    def _require_reason(
        self,
        error: AssemblyRefusedError,
        order: Sequence[int],
        *,
        degraded: bool,
        threshold: int | None,
    ) -> None:
        """Raise if these replicas need not have been refused."""
        here, count = self._reachable(order) - self._harmed, self.setup.replicas
        strangers = set(range(count)) - self._known().keys()
        here -= strangers
        needed = max(self._thresholds | {threshold or 0})
        sure = len(here) == count
        if not self._few:
            sure |= len(here) > count - min(self._thresholds) and len(here) >= needed
        if self._last is not None and not self._forked:
            record, _ = self._last
            by_slot = {record.slot_of(s.replica_id): index for index, s in self._known().items()}
            roles = enumerate(record.roles)
            current = {by_slot.get(s) for s, r in roles if r.state is RoleState.CURRENT}
            sure |= current <= here and len(here) >= needed
        match error.rule:
            case "split brain":
                justified = self._forked or self._half_resolved or bool(self._harmed)
            case "stranger" | "unreadable":
                justified = bool(strangers & set(order))
            case "no quorum":
                justified = len(here) < needed
            case "too few to lower":
                lower = threshold is not None and threshold < max(self._thresholds)
                justified = lower and not degraded
            case "may be newer":
                lost = self._lost_by_all(here)
                justified = not degraded and (not sure or bool(self._to_keep) or lost)
            case "only stale":
                justified = not sure or bool(self._to_keep)
            case "unusable":
                justified = not here
            case "adopt":
                justified = not here  # nothing to be seen of a set
            case _:
                justified = False
        if not justified:
            raise BrokenError(f"mount of {order} refused without need: {error.rule}: {error}")

    def _lost_by_all(self, here: set[int]) -> bool:
        """Whether it is on record that none of these could flush some chunk, and all stayed."""
        known = [sidecar for index, sidecar in self._known().items() if index in here]
        bits = sum(lacks(sidecar.slot) for sidecar in known)
        states = zip(*(sidecar.map.states for sidecar in known), strict=True)
        return any(reduce(or_, chunk) & bits == bits for chunk in states)

    async def _mount(
        self, life: Life, order: list[int], plan: Plan, limit: int | None = None
    ) -> Mounted:
        """What `quorumfs.replicaset.ReplicaSet.make_disk` makes, on simulated storages.

        Raises `RefusedError` if what it was told cannot be put on record.
        """
        world, setup = self.world, self.setup
        found = world.found(order)
        replicas = []
        for number, (index, member) in enumerate(zip(order, plan.members, strict=True)):
            path = world.replicas[index].path
            if member.state in (State.FOREIGN, State.MISSING):
                replicas.append(Replica(number, path, None, TIMEOUT_S))
                continue
            image = life.image(index, plan.record.size)
            replicas.append(Replica(number, path, image, TIMEOUT_S, sidecar=life.sidecar(index)))
        threshold = plan.threshold
        tenure = self._claim(life, order, plan) if setup.claims else None
        sidecars = Sidecars(replicas, plan, found, threshold=threshold, tenure=tenure)
        mirror = Mirror(
            replicas,
            plan.record.size,
            sidecars,
            threshold=threshold,
            pattern=Fifo() if setup.fifo else Quorum(threshold),
            search_s=TIMEOUT_S,
            events=EventLog("disk", self._tell),
        )
        present = {
            replica: one
            for replica, one in zip(replicas, found, strict=True)
            if replica.role is not State.CURRENT and replica.attached
        }

        async def reopen(replica: Replica) -> Returned:
            index = order[replica.index]
            await trio.sleep(0.01)
            (one,) = world.found([index])
            if one.image is None or one.sidecar is None:
                raise UserError(one.problem or "there is no sidecar")
            if not all(storage.closed for storage in life.storages(index)):
                raise BrokenError(f"{one.path} is opened anew while it is open: in use by itself")
            if tenure is not None and tenure.mine is not None and sidecars.fenced is None:
                claim = world.claim(index)
                if claim is not None and tenure.lost_to(claim) and not claim.released:
                    raise ForeignError(f"in use by {claim}")
                world.sign(index, tenure.mine)
            return Returned(one, life.image(index, mirror.size), life.sidecar(index))

        outvoted = setup.rewrite_corrupted
        repairs = Repairs(mirror, sidecars, reopen, present=present, limit=limit, outvoted=outvoted)
        disk = Disk(mirror, repairs, zero_kind=setup.zero_kind)
        mounted = Mounted(order, plan, disk, sidecars, repairs)
        life.nursery.start_soon(disk.run)
        try:
            await sidecars.record_options()
        except OSError as error:
            self.world.note(f"mount refused: {error.strerror}")
            raise RefusedError(mounted) from None
        life.nursery.start_soon(repairs.run)
        return mounted

    def _claim(self, life: Life, order: Sequence[int], plan: Plan) -> Tenure:
        """What `quorumfs.claiming` does: all earlier mounts have ended, or were taken over from."""
        world = self.world
        known = (world.claim(index) for index in range(self.setup.replicas))
        over = frozenset(claim.mount for claim in known if claim is not None)
        host = f"host {life.number}"
        mine = Claim(life.number, host, host, host, 1, 1, host, "just now")
        for index, member in zip(order, plan.members, strict=True):
            if member.state not in (State.FOREIGN, State.MISSING):
                world.sign(index, mine)
        return Tenure(mine, over)

    def _tell(self, event: Event) -> None:
        self.world.note(f"event {event.name}: {event.text}")
        if event.name == "DATA_UNREADABLE":
            start, count = (event.members[name] for name in ("sector-num", "sectors-count"))
            self.oracle.unreadable(start * SECTOR, count * SECTOR)
        if event.name == "RESYNC_FINISHED" and event.members["error"] is None:
            for index, one in enumerate(self.world.replicas):
                if one.path == event.members["replica"] and one.image.size >= self.world.size:
                    self._harmed.discard(index)  # whatever it was, it was replaced

    async def _unmount(self, mounted: Mounted, *, must_succeed: bool = False) -> None:
        """Close in order, as at the end of `quorumfs.mounting`; the guests have gone.

        *must_succeed*: faults are over; what they cost is first told by one flush (R13).
        """
        if must_succeed:
            try:
                await mounted.disk.flush()
            except OSError:
                self.oracle.flush_failed()
        if mounted.sidecars.fenced is not None:
            raise BrokenError("it was fenced by nobody")
        flushing = self.oracle.begin_flush()
        self.world.note("unmount")
        with trio.move_on_after(REQUEST_MAX_S) as scope:
            await mounted.repairs.stop()
            try:
                await mounted.disk.close()
            except OSError as error:
                self.world.note(f"unmount failed: {error.strerror}")
                self.oracle.flush_failed()
                if must_succeed:
                    raise BrokenError(f"unmount failed without a fault: {error}") from error
            else:
                self.world.note("unmounted")
                self.oracle.flushed(flushing)
                self._last = mounted.sidecars.ledger.record, set(mounted.order)
        if scope.cancelled_caught:
            raise BrokenError("an unmount did not end")

    # A life

    async def _live(self) -> None:
        dice, world = self._dice, self.world
        kind = dice.choice((*[LifeKind.WEATHER] * 4, *[LifeKind.PLANS] * 5, LifeKind.CALM))
        for one in world.replicas:
            one.image_faults.weather = one.sidecar_faults.weather = CALM
            if kind is LifeKind.WEATHER:
                one.image_faults.weather = drawn_weather(dice)
                one.sidecar_faults.weather = dice.choice(
                    (one.image_faults.weather, one.image_faults.weather, CALM, drawn_weather(dice))
                )
            for file in one.files:
                file.space = None
        if (chosen := self._choose()) is None or chosen[1].adopted:
            return  # nobody makes a set of some raw images by mistake
        order, plan = chosen
        consented = plan.rule.startswith("degraded") and not self._all_is_here(order)
        if consented or (self._forked and len(self._reachable(order)) < self.setup.replicas):
            self._accept_loss(order, plan)
        self._forked |= consented
        self._last = None
        self._to_keep = set()
        mounted, fate = await self._serve(order, plan, kind)
        self._check_log()
        if self._closed_well:
            self._note_cuts()
        else:
            self._crashed(fate.lost_cache)
            if not mounted.converged:
                self._make_new(fate.unrecorded & self._harmed)
        uncommitted = mounted.sidecars.ledger.record.sequence == plan.record.sequence
        latest = mounted.sidecars.ledger.record.lineage[0]
        changed = latest.changed and latest != plan.record.lineage[0]
        on_record = self._closed_well and changed  # who only reads parts from nobody
        if (consented and uncommitted) or (self._forked and not on_record):
            self.oracle.forget_reads()  # perhaps nothing says that this mount ever was
        self._note_thresholds(mounted)
        if mounted.converged:
            self._forked = self._few = False
            self._kept = set()
            self._harmed -= self._reachable(order)

    def _note_thresholds(self, mounted: Mounted) -> None:
        """What the next mount may find on record: no lower one that too few hold."""
        known = self._known()
        sure = len(known) == self.setup.replicas and not self._harmed
        least = min(self._thresholds)
        if mounted.converged:
            self._thresholds = {mounted.sidecars.ledger.record.threshold}
        holders = Counter(
            threshold
            for sidecar in known.values()
            for threshold in {one.threshold for one in (sidecar.record, sidecar.prepared) if one}
        )
        for threshold, count in holders.items():
            if threshold >= least or count >= least or not sure:
                self._thresholds.add(threshold)

    async def _serve(self, order: list[int], plan: Plan, kind: "LifeKind") -> tuple[Mounted, Fate]:
        """Mount, be used, and end somehow."""
        dice, world = self._dice, self.world
        limit = None if dice.random() < 0.7 else int(self.setup.scale.size / dice.uniform(5, 60))
        async with world.boot() as life:
            crowd = Crowd(think_s=10 ** dice.uniform(-2, 1))
            try:
                mounted = await self._mount(life, order, plan, limit)
            except RefusedError as error:
                return error.mounted, self._fate(life, error.mounted, crowd)
            fate = self._fate(life, mounted, crowd)
            crash = dice.choice(
                ("step", "step", "commit", "time", "unmount", "unmount", None, None, None, None)
            )
            power = dice.random() < 0.5
            if kind is LifeKind.PLANS and crash in ("step", "time"):
                crash = None  # they have ends of their own
            if crash == "step":
                life.crash_at(int(10 ** dice.uniform(0, 3.7)), power=power)
            if crash == "commit":
                crash_in_a_commit(life, mounted, dice, power=power, ejection=dice.random() < 0.5)
            duration_s = 10 ** dice.uniform(-1, 2.2)
            if kind is LifeKind.PLANS:
                duration_s = 10 ** dice.uniform(1.5, 2.6)
                await self._be_used(mounted, crowd, fate, fate.follow_plans, duration_s)
            elif kind is LifeKind.CALM:
                crowd.nothing_fails = lambda: mounted.enough and not self._at_risk
                await self._be_used(mounted, crowd, fate, trio.sleep_forever, duration_s)
                crowd.nothing_fails = Crowd().nothing_fails
            else:
                await self._be_used(mounted, crowd, fate, fate.strike, duration_s)
            if mounted.repairs.differing and not self._forked:
                raise BrokenError(f"adopted images are said to differ: {mounted.repairs.differing}")
            if crash is None and dice.random() < 0.5 and self._can_recover(mounted):
                world.calm()
                await trio.sleep(LATE_MAX_S)
                await self._be_used(mounted, crowd, fate, trio.sleep_forever, 5.0)
                await self._converge(mounted, fate)
                await self._unmount(mounted, must_succeed=True)
                return mounted, fate
            if crash == "time":
                world.power_cut() if power else world.kill()
                await trio.lowlevel.checkpoint()
            if crash == "unmount":
                life.watch = None
                life.crash_at(life.steps + int(10 ** dice.uniform(0, 1.7)), power=power)
            await self._unmount(mounted)
        return mounted, fate

    def _fate(self, life: Life, mounted: Mounted, crowd: Crowd) -> Fate:
        self._guests += 1
        guest = Guest(self.oracle, life, mounted.disk, self._guests, crowd)
        fate = Fate(life, mounted, crowd, guest, self._may_harm, self._is_left_behind)
        fate.harmed = self._harmed  # it adds to them
        return fate

    @property
    def _at_risk(self) -> bool:
        """Whether something is wrong that a daemon has not caused and may not know of."""
        return self._forked or any(
            one.image.size < self.world.size or one.image.dropped for one in self.world.replicas
        )

    def _can_recover(self, mounted: Mounted) -> bool:
        """Whether everything must become good in this life, once faults stop."""
        return (
            len(mounted.order) == self.setup.replicas
            and not self._forked
            and not mounted.repairs.differing
            and all(replica.role is not State.FOREIGN for replica in mounted.disk.replicas)
            and len(self._known()) == self.setup.replicas
        )

    def _make_new(self, indices: Iterable[int]) -> None:
        """The operator does not trust these replicas: each is to become a member anew."""
        for index in indices:
            self.world.note(f"the sidecar of replica {index} is removed")
            self.world.replicas[index].sidecar = None

    @property
    def _closed_well(self) -> bool:
        """Whether the last life ended with an unmount in order."""
        return self._last is not None

    def _accept_loss(self, order: Sequence[int], plan: Plan) -> None:
        """Go on with what is here; what only others hold may be gone."""
        self.world.note(f"what only others than {order} hold is given up")
        members = [i for i, m in zip(order, plan.members, strict=True) if m.state is State.CURRENT]
        self.oracle.forget_reads()
        for index in members:
            image = self.world.replicas[index].image
            self.oracle.allow([image.cache, image.durable])
        self._thresholds.add(plan.threshold)

    def _crashed(self, lost_cache: bool) -> None:
        """Tell the oracle how the life ended."""
        if self.world.power_cuts > self._cuts_seen or lost_cache:
            self.oracle.power_cut()
        else:
            self.oracle.killed()
        self._cuts_seen = self.world.power_cuts

    def _note_cuts(self) -> None:
        self.oracle.killed()  # closes what a guest left open; there is nothing
        assert self._cuts_seen == self.world.power_cuts

    def _check_log(self) -> None:
        if self.errors.found:
            raise BrokenError(f"logged an error: {self.errors.found[0]}")

    async def _be_used(
        self,
        mounted: Mounted,
        crowd: Crowd,
        fate: Fate,
        happens: Callable[[], Awaitable[None]],
        duration_s: float,
    ) -> None:
        """Guests at work while something *happens*; all have ended afterwards."""
        crowd.stopping = False
        crowd.requests = 0
        life = fate.life
        async with trio.open_nursery() as nursery:
            for _ in range(self._dice.randrange(1, 5)):
                self._guests += 1
                guest = Guest(self.oracle, life, mounted.disk, self._guests, crowd)
                nursery.start_soon(guest.run)
            with trio.move_on_after(duration_s):
                await happens()
            await fate.requests_ended()
            crowd.stopping = True

    def _between_lives(self) -> None:
        dice, world = self._dice, self.world
        for index, one in enumerate(world.replicas):
            if not one.reachable and dice.random() < 0.7:
                world.attach(index)
            elif one.reachable and dice.random() < 0.1:
                loses = dice.random() < 0.3
                loses |= any(file.dropped for file in one.files)
                world.detach(index, lose_cache=loses)
                if loses:
                    self.oracle.power_cut()
        if dice.random() < 0.1:
            world.power_cut()
            self._cuts_seen = world.power_cuts
            self.oracle.power_cut()
        if dice.random() < (0.05 if self._closed_well else 0.2):
            self._rot()
        if dice.random() < 0.15:
            self._harm()
        if dice.random() < 0.04 and not self.setup.careless and self._keepable:
            self._keep(cut_off=dice.random() < 0.5)
        if dice.random() < 0.5:
            self._backups.append(
                {i: world.backup(i) for i, one in enumerate(world.replicas) if one.reachable}
            )

    def _rot(self) -> None:
        """The medium of a sidecar is bad: pages of the map, or one of two equal slots."""
        dice = self._dice
        chosen = [dice.choice(self.world.replicas)]
        garbage = dice.randbytes(SECTOR)
        if dice.random() < 0.7:
            for one in self.world.replicas if dice.random() < 0.5 else chosen:
                self._rot_map(one, garbage)
            return
        sidecar = chosen[0].sidecar
        if sidecar is None:
            return
        offset = dice.choice(SLOT_OFFSETS)
        whole = sidecar.whole
        with suppress(FormatError):
            records = [decode(whole[:at] + garbage + whole[at + SECTOR :]) for at in SLOT_OFFSETS]
            if records[0].record == records[1].record:  # else a commit was cut off
                self.world.note(f"the slot at {offset} of {sidecar.name} rots")
                sidecar.rot(offset, garbage)

    def _rot_map(self, replica: SimulatedReplica, garbage: bytes) -> None:
        if replica.sidecar is None:
            return
        for page in range(MAP_OFFSET // PAGE, replica.sidecar.size // PAGE):
            if self._dice.random() < 0.8:
                self.world.note(f"page {page} of {replica.sidecar.name} rots")
                at = page * PAGE + self._dice.randrange(8) * SECTOR
                replica.sidecar.rot(at, garbage)

    def _harm(self) -> None:
        """A replica is not any more what it was, and all it held is elsewhere."""
        dice, world = self._dice, self.world
        index = dice.randrange(self.setup.replicas)
        one = world.replicas[index]
        if not self._may_harm(index) or one.sidecar is None or self._to_keep:
            return
        backups = [backup[index] for backup in self._backups if index in backup]
        match dice.randrange(6):
            case 0 | 1 if backups:
                world.roll_back(index, dice.choice(backups))
            case 2 if backups:
                image = dice.random() < 0.7
                sidecar = not image or dice.random() < 0.7
                world.restore(index, dice.choice(backups), image=image, sidecar=sidecar)
            case 3 | 4:
                size = dice.randrange(world.size // SECTOR) * SECTOR
                world.note(f"{one.path} truncated to {size} bytes")
                one.image.truncate(size)
                if (known := self._known().get(index)) and known.identity.mtime_ns:
                    world.note(f"{one.path} extended")
                    one.image.truncate(world.size)
            case 5:
                world.note(f"both slots of {one.sidecar.name} rot")
                for offset in SLOT_OFFSETS:
                    one.sidecar.rot(offset, dice.randbytes(SECTOR))
            case _:
                return
        self._harmed.add(index)

    # Afterwards

    async def _end(self) -> None:
        """Faults stop: everything must become good, and stay so."""
        world, oracle = self.world, self.oracle
        world.calm()
        order = list(range(self.setup.replicas))
        self._dice.shuffle(order)
        plan = self._assemble_in_the_end(order)
        async with world.boot() as life:
            mounted = await self._mount(life, order, plan)
            crowd = Crowd(think_s=10 ** self._dice.uniform(-2, 1))
            crowd.nothing_fails = lambda: mounted.enough and not self._at_risk
            fate = self._fate(life, mounted, crowd)
            await self._be_used(mounted, crowd, fate, trio.sleep_forever, 5.0)
            await self._converge(mounted, fate)
            await self._unmount(mounted, must_succeed=True)
        self._harmed.clear()
        self._note_cuts()
        self._check_healthy()
        # Marks that a daemon killed in its unmount had cleared come back, if nobody wrote since.
        synced = mounted.sidecars.ledger.record.sequence != plan.record.sequence
        if synced and self._dice.random() < 0.5:
            world.power_cut()
            self._cuts_seen = world.power_cuts
            oracle.power_cut()
        await self._remount_untouched()
        self._check_healthy()
        self._check_log()

    def _assemble_in_the_end(self, order: list[int]) -> Plan:
        """The operator does what it takes to have all replicas mounted."""
        try:
            if not self._to_keep and len(self._known()) < self.setup.replicas:
                self._prefer_current(order, self._assemble(order, degraded=False, threshold=None))
            if self._to_keep:
                self._keep(cut_off=False)
            return self._assemble(order, degraded=False, threshold=None)
        except AssemblyRefusedError as error:
            self.world.note(f"mount of {order} refused: {error.rule}: {error}")
            self._require_reason(error, order, degraded=False, threshold=None)
            if self._repairable(error):
                self._keep(cut_off=False)
                self._extend_all()
            elif len(self._known()) < self.setup.replicas and not self._forked:
                known = [index for index in order if index in self._known()]
                plan = self._assemble(known, degraded=True, threshold=len(known))
                self._prefer_current(known, plan)
                self._keep(cut_off=False)
            elif self._harmed and not self._forked:
                usable = len(self._reachable(order))
                threshold = usable if error.rule == "no quorum" else None
                return self._assemble(order, degraded=True, threshold=threshold)
            else:
                self._resolve(order)
        return self._assemble(order, degraded=False, threshold=None)

    def _prefer_current(self, order: Sequence[int], plan: Plan) -> None:
        pairs = zip(order, plan.members, strict=True)
        self._to_keep = {i for i, m in pairs if m.state is State.CURRENT} - self._harmed

    def _extend_all(self) -> None:
        """Give every image its length back: what it lacks is on record."""
        for one in self.world.replicas:
            if one.image.size < self.world.size:
                self.world.note(f"{one.path} extended")
                one.image.truncate(self.world.size)

    async def _converge(self, mounted: Mounted, fate: Fate) -> None:
        """Wait until everything is good; there is a limit for how long that may take."""
        began = trio.current_time()
        limit = mounted.repairs.limit
        at_most_s = CONVERGE_MAX_S
        if limit is not None:
            at_most_s += 2 * self.setup.replicas * mounted.disk.size / limit
        await fate.write_something()  # else nobody could notice what is wrong
        while not (fate.extend_noticed() and mounted.converged):
            if trio.current_time() - began > at_most_s:
                raise BrokenError(f"not healthy {at_most_s:g} s after the faults: {mounted}")
            await trio.sleep(1.0)
            await fate.write_if_short()
        self.world.note(f"healthy {trio.current_time() - began:.0f} s after the faults")

    def _resolve(self, order: Sequence[int]) -> None:
        """The operator chooses a side of a split brain."""
        found = self.world.found(order)
        disks = [  # a mixture of two times is refused beside a whole one
            one.path for one in found if one.sidecar and one.sidecar.own_state is RoleState.CURRENT
        ]
        resolution = resolve(found, self._dice.choice(disks or [one.path for one in found]))
        self.world.note(f"resolved: keep {resolution.kept}")
        by_path = {one.path: index for index, one in enumerate(self.world.replicas)}
        kept = [self.world.replicas[by_path[path]].image for path in resolution.kept]
        self.oracle.forget_reads()
        for image in kept:
            self.oracle.allow([image.cache, image.durable])
        for path, sidecar in resolution.sidecars.items():
            self.world.create_sidecar(by_path[path], sidecar)

    def _check_healthy(self) -> None:
        """Everything is the same everywhere, and on record as such."""
        world = self.world
        self.oracle.check_images(world.contents(), [one.path for one in world.replicas])
        records = set()
        for one in world.replicas:
            assert one.sidecar is not None
            sidecar = decode(one.sidecar.whole)
            records.add((sidecar.record.generation, sidecar.record.sequence))
            states = {role.state for role in sidecar.record.roles}
            marks = self._marked_data(sidecar.map)
            if states != {RoleState.CURRENT} or marks or not sidecar.record.clean:
                raise BrokenError(
                    f"{one.path} after an unmount in order: {marks} chunks marked, "
                    f"clean: {sidecar.record.clean}, roles {sidecar.record.roles}"
                )
        if len(records) > 1:
            raise BrokenError("the sidecars hold different records after an unmount in order")

    def _marked_data(self, disk_map: DirtyMap) -> int:
        """How many chunks with data are marked: where all have a hole a mark does not matter."""
        images = [one.image.cache for one in self.world.replicas]
        return sum(
            image.seek(start, data=True) < end
            for run in disk_map.runs(INTENT | ALL_LACK)
            for start, end in [disk_map.bounds(run.start)]
            for image in images
        )

    async def _remount_untouched(self) -> None:
        """The next mount of a healthy set has nothing to do."""
        world = self.world
        order = list(range(self.setup.replicas))
        self._dice.shuffle(order)
        plan = self._assemble(order, degraded=False, threshold=None)
        if plan.rule != "clean: closed in order":
            raise BrokenError(f"remounted by the rule: {plan.rule}")
        async with world.boot() as life:
            mounted = await self._mount(life, order, plan)
            storages = [storage for index in order for storage in life.storages(index)]
            await trio.sleep(QUIET_S)
            await self._unmount(mounted, must_succeed=True)
            changed = [
                op
                for storage in storages
                for op in storage.log
                if op.kind in CHANGES and op.data[:8] != _CLAIM
            ]
            if changed:
                raise BrokenError(f"a mount that had nothing to do wrote: {len(changed)} times")
        self._note_cuts()


@dataclass(frozen=True, slots=True)
class Result:
    """How a history ended."""

    seed: int
    violation: str | None
    """Which promise was broken; None: none was."""
    trace: list[str]
    acknowledged: int
    """Writes."""
    checked: int
    """Sectors read."""
    lives: int


BAD_ENDS = ("ViolationError", "BrokenError")
"""How a violation begins that is a broken promise, and not an error in this code."""


def live_through(seed: int, setup: Setup | None = None) -> Result:
    """The history of *seed*."""
    history = History(seed, setup)
    violation = None
    try:
        run_seeded(seed, history.run)
    except* DaemonKilledError:
        raise
    except* Exception as group:
        violation = _first(group)
    world, oracle = history.world, history.oracle
    return Result(seed, violation, world.trace, oracle.acknowledged, oracle.checked, world.lives)


def _first(error: BaseException) -> str:
    """The first of perhaps several errors, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ViolationError | BrokenError):
        return f"{type(error).__name__}: {error}"
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else "?"
    return f"{type(error).__name__} at {where}: {error}"


def replay_command(seed: int) -> str:
    """What shows the trace of *seed*, from the top of the repository."""
    return f"cd tests && PYTHONHASHSEED=0 python -m support.simulation --replay {seed}"
