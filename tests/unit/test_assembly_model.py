"""A set with a known truth, through everything that may happen to it: assembly is never wrong.

The model keeps the content of each chunk of each replica as a number, *durable* and *visible*
(written and maybe not flushed), next to real sidecars. A session does what the runtime does, in
its order, and may be cut off between any two steps. What must hold whenever replicas are mounted:

* each current one holds what was flushed, unless the operator accepted that it may not;
* where two current ones differ, the map says so; where another differs from a current one, the
  map says that it lacks something;
* if more than N - threshold replicas are there that never were put back or changed from outside,
  and nobody went on with ``degraded``, there is a plan: no human is needed.

What cannot be seen is not asked for: with too few untouched replicas to know, one that was rolled
back together with its sidecar and all its times is not recognised, and what only replicas held
that were overwritten since is gone.
"""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import INTENT, UNKNOWN, UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.model import Found, Plan, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import Identity, Record, RoleState, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sameimage import image_changed

CHUNK = 64 << 10
CHUNKS = 3
SIZE = CHUNKS * CHUNK
EVERYTHING = range(CHUNKS)


class CrashError(Exception):
    """The machine stops here."""


class FailedError(Exception):
    """A request fails: too few replicas are left."""


@dataclass
class Replica:
    """A replica's files, and what the model knows about them."""

    slot: int
    path: str
    sidecar: Sidecar
    image: Identity
    durable: list[int]
    visible: list[int]
    backups: list[tuple[list[int], Sidecar, Identity]] = field(default_factory=list)
    touched: bool = False
    """Put back or changed from outside since it was last made current."""
    unseen: bool = False
    """And nothing about its image shows it."""

    def backup(self) -> None:
        self.backups.append((list(self.durable), copied(self.sidecar), self.image))


def copied(sidecar: Sidecar) -> Sidecar:
    return replace(sidecar, map=sidecar.map.copy())


class Set:
    """All replicas, and the truth about them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.log: list[str] = []
        self.version = 0
        self.clock = 1
        count = random.randint(2, 4)
        self.thresholds = {random.randint(1, count)}
        """That of the last valid record, and of later ones that may have been cut short."""
        paths = [f"/{letter}.img" for letter in "abcd"[:count]]
        record = new_record(paths, SIZE, *self.thresholds, random_bytes=self.bytes)
        self.replicas = []
        for slot, path in enumerate(paths):
            image = Identity(slot + 1, SIZE, 1, 1)
            own = record.roles[slot].replica_id
            sidecar = Sidecar(own, record, DirtyMap(SIZE, CHUNK), image, spare_slot=1)
            self.replicas.append(Replica(slot, path, sidecar, image, [0] * CHUNKS, [0] * CHUNKS))
        self.allowed = [{0} for _ in EVERYTHING]
        """By chunk: what may be found there."""
        self.holders = set(range(count))
        """Who was current when a record was last committed, and was not overwritten since."""
        self.forked = False
        """The operator accepted a loss, and not all replicas know of it yet."""

    def bytes(self, count: int) -> bytes:
        return self.tick().to_bytes(count, "little")

    def new_version(self) -> int:
        self.version += 1
        return self.version

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def note(self, text: str) -> None:
        self.log.append(text)

    def demand(self, holds: bool, text: str) -> None:
        assert holds, "\n".join([*self.log, text])

    # What happens to files that are not in use

    def put_back(self, replica: Replica, *, unseen: bool) -> None:
        """An earlier state: by a backup program, or (*unseen*) by the storage below."""
        if not replica.backups:
            return
        data, sidecar, image = self.random.choice(replica.backups)
        replica.durable, replica.visible, replica.sidecar = list(data), list(data), copied(sidecar)
        now = self.tick()
        replica.image = image if unseen else Identity(100 + now, SIZE, image.mtime_ns, now)
        replica.touched, replica.unseen = True, unseen
        self.holders.discard(replica.slot)
        self.note(f"put back {replica.slot} unseen={unseen} {shown(replica)}")

    def change(self, replica: Replica) -> None:
        """Somebody writes to the image of a replica that was closed in order."""
        if not replica.sidecar.identity.mtime_ns:
            return
        replica.durable[self.random.randrange(CHUNKS)] = self.new_version()
        replica.visible = list(replica.durable)
        replica.image = replace(replica.image, mtime_ns=self.tick())
        replica.touched, replica.unseen = True, False
        self.holders.discard(replica.slot)
        self.note(f"changed {replica.slot}")

    # Mounting

    def mount(
        self, present: list[Replica], *, degraded: bool = False, threshold: int | None = None
    ) -> "Session | None":
        """A session, or None where it was refused; checks that this is right."""
        found = [Found(r.path, r.image, copied(r.sidecar)) for r in present]
        absent = [r for r in self.replicas if r not in present]
        found += [Found(r.path, None, problem="gone") for r in absent if self.random.random() < 0.3]
        self.note(
            f"mount {[shown(r) for r in present]} degraded={degraded} threshold={threshold} "
            f"truth: threshold={self.thresholds} holders={self.holders} allowed={self.allowed}"
        )
        untouched = sum(not replica.touched for replica in present)
        enough = untouched > len(self.replicas) - min(self.thresholds)
        try:
            plan = assemble(found, degraded=degraded, threshold=threshold, random_bytes=self.bytes)
        except AssemblyRefusedError as error:
            self.note(f"refused: {error.rule}: {error}")
            decidable = enough and len(present) >= max(self.thresholds) and not self.forked
            self.demand(not decidable or threshold is not None, "it could be decided")
            return None
        members = [(m.slot, m.state.value) for m in plan.members]
        self.note(f"plan: {plan.rule}: {members} {list(plan.map.planes[0])} left={plan.ejected}")
        consent = plan.rule.startswith("degraded")
        wrong = self._wrong(plan, present, consent=consent)
        if wrong and not enough:
            gone = not self.holders
            unseen = any(replica.unseen for replica in present)
            all_changed = all(image_changed(one) for one in found if one.sidecar)
            current = {m.slot for m in plan.members if m.state is Standing.CURRENT}
            other_side = self.forked and not current & self.holders
            if gone or unseen or all_changed or other_side:
                raise _UndecidableError
        self.demand(not wrong, wrong)
        current = {m.slot for m in plan.members if m.state is Standing.CURRENT}
        if not current & self.holders and any(replica.unseen for replica in present):
            raise _UndecidableError  # they go on from an older state, and cannot know
        for member in plan.members:
            replica = self.replicas[member.slot]  # type: ignore[index]
            if member.state is Standing.CURRENT and replica.unseen:
                for chunk in EVERYTHING:
                    if replica.durable[chunk] not in self.allowed[chunk]:
                        raise _UndecidableError
        return Session(self, plan, present, consent=consent)

    def _wrong(self, plan: Plan, present: list[Replica], *, consent: bool) -> str:
        """What is wrong with a plan; empty if it is right."""
        by_slot = {replica.slot: replica for replica in present}
        states = {m.slot: m.state for m in plan.members if m.slot in by_slot}
        if set(states) != set(by_slot):
            return f"nothing is said about some of {set(by_slot)}"
        current = [by_slot[slot] for slot in by_slot if states[slot] is Standing.CURRENT]
        others = [by_slot[slot] for slot in by_slot if states[slot] is not Standing.CURRENT]
        if not current:
            return "nobody is current"
        for chunk in EVERYTHING:
            facts = plan.map.planes[0][chunk]
            held = {replica.durable[chunk] for replica in current}
            # One rolled back by no more than what is marked is not recognised: the others know
            # that they differ, but not that it is the wrong one.
            sure = {r.durable[chunk] for r in current if not (r.unseen and facts & INTENT)}
            if not sure <= self.allowed[chunk] and not consent:
                return f"chunk {chunk} was lost: {held}, not {self.allowed[chunk]}"
            if len(held) > 1 and not facts & (INTENT | UNVERIFIED):
                return f"nobody knows that the current ones differ in chunk {chunk}"
            for other in others:
                if {other.durable[chunk]} != held and not facts & out_of_sync(other.slot):
                    return f"nobody knows that {other.slot} lacks something in chunk {chunk}"
        return ""

    def committed(self, record: Record, members: set[int]) -> None:
        """A record is valid: its current replicas are the set from now on."""
        current = {s for s, r in enumerate(record.roles) if r.state is RoleState.CURRENT}
        self.holders = current & (self.holders | members)
        for slot in members:
            self.replicas[slot].touched = self.replicas[slot].unseen = False
        if current == members:
            # A raised threshold may be held by fewer, who were all there were.
            self.thresholds = {record.threshold, min(record.threshold, len(members))}
        if len(members) == len(self.replicas):
            self.forked = False


class _UndecidableError(Exception):
    """Nothing more can be learned from this set."""


class Session:
    """The runtime while the set is mounted, with its order of steps."""

    def __init__(self, all_: Set, plan: Plan, present: list[Replica], *, consent: bool) -> None:
        self.set = all_
        self.random = all_.random
        self.consent = consent
        self.record = plan.record
        self.map = plan.map.copy()
        self.passed = list(plan.prepared)
        self.sequence = plan.sequence_seen
        self.threshold = plan.threshold
        self.quorum = plan.quorum
        by_slot = {replica.slot: replica for replica in present}
        self.members = [
            by_slot[m.slot]
            for m in plan.members
            if m.slot in by_slot and m.state is Standing.CURRENT
        ]
        self.stale = [replica for replica in present if replica not in self.members]
        self.targets: dict[int, set[int]] = {}
        """By slot: the chunks copied and not yet dropped from the map."""
        self.opened = self.dropped = False
        self.steps = self.random.choice([0, 10, 30, 80, 10_000]) or self.random.randint(1, 9)
        self.failures = self.random.choice([0, 0, 0.03, 0.2])

    # Faults

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise CrashError

    def fails(self) -> bool:
        return self.failures > 0 and self.random.random() < self.failures

    def crash(self) -> None:
        """Of what was not flushed any part may be lost."""
        for replica in self.set.replicas:
            for chunk in EVERYTHING:
                if self.random.random() < 0.5:
                    replica.durable[chunk] = replica.visible[chunk]
            replica.visible = list(replica.durable)
        self.set.note(f"crash {[shown(replica) for replica in self.set.replicas]}")

    # The sidecars

    def put_map(self, replicas: list[Replica]) -> None:
        """Write the map to sidecars; a torn page means that nothing is known."""
        for replica in replicas:
            try:
                self.step()
            except CrashError:
                if self.random.random() < 0.5:
                    replica.sidecar.map.planes[0][:] = bytes([UNKNOWN & 0xFF]) * CHUNKS
                raise
            replica.sidecar.map.planes[0][:] = self.map.planes[0]

    def put_slot(
        self, replica: Replica, record: Record, *, commit: bool, clean: bool = False
    ) -> None:
        self.step()
        if not commit:
            replica.sidecar = replace(replica.sidecar, prepared=record)
            return
        image = replica.image
        identity = image if clean else Identity(image.inode, image.size)
        replica.sidecar = replace(replica.sidecar, record=record, prepared=None, identity=identity)

    def out(self) -> list[int]:
        inside = {replica.slot for replica in self.members}
        return [slot for slot in range(len(self.record.roles)) if slot not in inside]

    def left(self) -> list[int]:
        roles = self.record.roles
        return [slot for slot in self.out() if roles[slot].state is RoleState.CURRENT]

    def commit(self, *, clean: bool = False, resyncing: Replica | None = None) -> None:
        """Two phases on all members; who fails is ejected by another record.

        Too few eject nobody: they acknowledge nothing either.
        """
        while True:
            self.sequence += 1
            record = self.record
            enough = len(self.members) >= self.quorum
            if self.left() and enough:
                record = record.with_state(self.left(), RoleState.STALE).minted(self.passed)
            threshold = self.threshold if enough else record.threshold
            record = replace(record, sequence=self.sequence, clean=clean, threshold=threshold)
            record = record.with_state([r.slot for r in self.members], RoleState.CURRENT)
            if resyncing:
                record = record.with_state([resyncing.slot], RoleState.RESYNCING)
            # Whoever sees a part of this commit cannot know that it was not all of it.
            self.set.thresholds.add(record.threshold)
            self.set.forked |= self.consent
            failed = self.write_record(record, clean=clean, resyncing=resyncing)
            if not failed:
                break
            if record.generation != self.record.generation:
                self.passed.append(record.generation)
            if resyncing in failed:
                raise FailedError
            self.drop(failed)
        self.record = record
        self.passed.clear()
        self.opened = True
        for chunk in EVERYTHING if self.consent else ():
            held = {r.durable[chunk] for r in self.members}
            held |= {r.visible[chunk] for r in self.members}
            self.set.allowed[chunk] = held if enough else self.set.allowed[chunk] | held
        self.consent = self.consent and not enough
        if enough:
            self.quorum = self.threshold
        self.set.committed(record, {replica.slot for replica in self.members})
        self.set.note(f"committed {shown_record(record)}")

    def write_record(
        self, record: Record, *, clean: bool, resyncing: Replica | None
    ) -> list[Replica]:
        for commit in (False, True):
            # The target last: nobody would miss it, if it alone had a record that is valid.
            order = self.random.sample(self.members, len(self.members))
            for replica in [*order, resyncing] if resyncing else order:
                if self.fails():
                    return [replica]
                self.put_slot(replica, record, commit=commit, clean=clean)
        return []

    def drop(self, failed: list[Replica]) -> None:
        """Current replicas become stale, in memory."""
        if len(self.members) - len(failed) < max(self.quorum, self.threshold):
            raise FailedError
        self.dropped = True
        for replica in failed:
            self.members.remove(replica)
            self.map.add_where(INTENT, out_of_sync(replica.slot))
            if self.random.random() < 0.5:
                self.stale.append(replica)  # it comes back at once
        self.set.note(f"failed {[replica.slot for replica in failed]}")

    def record_who_is_left(self) -> None:
        """Before anything is acknowledged (R3), if an attempt before this one failed too."""
        if self.dropped and not self.opened:
            self.open()
        elif self.opened and self.left():
            self.commit()
        if self.opened and self.left():
            raise FailedError

    def open(self) -> None:
        if not self.opened:
            self.put_map(self.members)  # before the record: it says what is lacking since
            self.commit()

    # Requests

    def write(self, chunk: int) -> None:
        if len(self.members) < max(self.quorum, self.threshold):
            return
        self.open()
        here = range(chunk, chunk + 1)
        if not self.map.planes[0][chunk] & INTENT or self.random.random() < 0.1:
            self.map.add(INTENT, here)
            self.put_map(self.members)
        for slot in self.out():
            if slot not in self.targets:
                self.map.add(out_of_sync(slot), here)
        self.set.note(f"write {chunk}")
        same = len({replica.visible[chunk] for replica in self.members}) == 1
        version = self.set.new_version()
        failed = []
        targets = [self.set.replicas[slot] for slot in self.targets]
        for replica in self.random.sample(self.members + targets, len(self.members + targets)):
            self.step()
            if self.fails():
                failed.append(replica)
                continue
            lacking = bool(self.map.planes[0][chunk] & out_of_sync(replica.slot))
            mixture = lacking and chunk not in self.targets.get(replica.slot, EVERYTHING)
            whole = same and not mixture
            replica.visible[chunk] = version if whole else self.set.new_version()
            replica.image = replace(replica.image, mtime_ns=self.set.tick())
            if not mixture:
                self.set.allowed[chunk].add(replica.visible[chunk])
        for replica in failed:
            if replica in targets:
                self.map.add(out_of_sync(replica.slot), here)
                self.drop_target(replica)
        gone = [replica for replica in failed if replica in self.members]
        if gone:
            self.drop(gone)
        self.record_who_is_left()

    def flush(self) -> None:
        failed = []
        for replica in self.members:
            self.step()
            if self.fails():
                failed.append(replica)
            else:
                replica.durable = list(replica.visible)
        if failed:
            self.drop(failed)
        self.record_who_is_left()
        for chunk in EVERYTHING if self.opened else ():
            self.set.allowed[chunk] = {replica.durable[chunk] for replica in self.members}
        self.set.note(f"flushed {self.set.allowed}")

    def repair(self, chunk: int) -> None:
        """Make the current replicas alike, from the first."""
        if len(self.members) < max(self.quorum, self.threshold):
            return
        self.open()
        for replica in self.members[1:]:
            self.step()
            replica.visible[chunk] = self.members[0].visible[chunk]
            replica.image = replace(replica.image, mtime_ns=self.set.tick())

    def settled(self) -> list[int]:
        return [
            c for c in EVERYTHING if len({tuple(r.durable[c : c + 1]) for r in self.members}) == 1
        ]

    def clear_marks(self) -> None:
        """R5: only when nobody is behind; synced, then a commit, then cleared."""
        if self.out():
            return
        self.open()
        self.flush()
        settled = self.settled()
        if self.out():
            return
        self.commit()
        if self.out():
            return
        lost = sum(out_of_sync(replica.slot) for replica in self.members)
        for chunk in settled:
            self.map.remove(INTENT | UNVERIFIED | lost, range(chunk, chunk + 1))
        self.put_map(self.members)
        self.set.note(f"cleared {settled}")

    def close(self) -> None:
        if not self.opened:
            return
        self.flush()
        settled = [] if self.out() else self.settled()
        self.commit(clean=True)
        if not self.out():
            for chunk in settled:
                self.map.remove(INTENT, range(chunk, chunk + 1))
        self.put_map(self.members)
        self.set.note(f"closed {[shown(replica) for replica in self.set.replicas]}")

    # Resync

    def start_resync(self, replica: Replica) -> None:
        self.open()
        if self.left() and len(self.members) >= self.quorum:
            self.commit()  # that it is behind is on record before it is a target
        self.put_map(self.members)  # all it lacks is on record before it is a mixture
        self.commit(resyncing=replica)
        self.stale.remove(replica)
        self.targets[replica.slot] = set()
        self.set.note(f"resync {replica.slot}")

    def copy(self, replica: Replica, chunk: int) -> None:
        self.step()
        if self.map.planes[0][chunk] & out_of_sync(replica.slot):
            replica.visible[chunk] = self.members[0].visible[chunk]
            replica.image = replace(replica.image, mtime_ns=self.set.tick())
            self.targets[replica.slot].add(chunk)

    def sync_target(self, replica: Replica) -> bool:
        self.step()
        if self.fails():
            self.drop_target(replica)
            return False
        replica.durable = list(replica.visible)
        return True

    def drop_target(self, replica: Replica) -> None:
        del self.targets[replica.slot]
        self.map.add_where(INTENT, out_of_sync(replica.slot))
        if self.random.random() < 0.5:
            self.stale.append(replica)

    def checkpoint(self, replica: Replica) -> None:
        """What was copied need not be copied again: synced, then a commit, then dropped."""
        copied_chunks = set(self.targets[replica.slot])
        if not copied_chunks or not self.sync_target(replica):
            return
        self.commit(resyncing=replica)
        for chunk in copied_chunks:
            self.map.remove(out_of_sync(replica.slot), range(chunk, chunk + 1))
        self.targets[replica.slot] = set()
        self.put_map(self.members)
        self.set.note(f"checkpoint {replica.slot} {copied_chunks}")

    def join(self) -> None:
        """Make all targets current that have everything."""
        ready = [
            self.set.replicas[slot]
            for slot, chunks in self.targets.items()
            if all(c in chunks or not self.map.planes[0][c] & out_of_sync(slot) for c in EVERYTHING)
        ]
        ready = [replica for replica in ready if self.sync_target(replica)]
        if not ready or len(self.members) + len(ready) < self.quorum:
            return
        before = self.map.copy()
        for replica in ready:
            self.map.remove(out_of_sync(replica.slot), EVERYTHING)
        self.put_map(ready)
        for replica in ready:
            del self.targets[replica.slot]
        self.members += ready
        try:
            self.commit()
        except FailedError:
            self.map = before
            self.members = [replica for replica in self.members if replica not in ready]
            raise
        self.put_map(self.members)

    # A life

    def act(self) -> None:
        actions = ["write"] * 4 + [
            "flush",
            "repair",
            "clear",
            "resync",
            "copy",
            "copy",
            "save",
            "join",
            "backup",
        ]
        action = self.random.choice(actions)
        chunk = self.random.randrange(CHUNKS)
        target = self.set.replicas[self.random.choice(list(self.targets))] if self.targets else None
        if action == "write":
            self.write(chunk)
        elif action == "flush":
            self.flush()
        elif action == "repair":
            self.repair(chunk)
        elif action == "clear":
            self.clear_marks()
        elif action == "resync" and self.stale:
            self.start_resync(self.random.choice(self.stale))
        elif action == "copy" and target:
            self.copy(target, chunk)
        elif action == "save" and target:
            self.checkpoint(target)
        elif action == "join":
            self.join()
        elif action == "backup":
            self.random.choice(self.set.replicas).backup()

    def run(self) -> None:
        try:
            for _ in range(self.random.randint(0, 12)):
                try:
                    self.act()
                except FailedError:
                    self.set.note("a request failed")
                    if self.random.random() < 0.5:
                        raise CrashError from None
            if self.random.random() < 0.3:
                raise CrashError
            self.close()
        except (CrashError, FailedError):
            self.crash()

    def heal(self) -> None:
        """Everything that can be repaired, without faults."""
        self.steps, self.failures = 10_000, 0
        while self.stale:
            replica = self.stale[0]
            self.start_resync(replica)
            for chunk in EVERYTHING:
                self.copy(replica, chunk)
        self.join()
        for chunk in EVERYTHING:
            self.repair(chunk)
        self.clear_marks()
        self.close()


def shown_record(record: Record) -> str:
    roles = "".join(
        f"{role.state.name[0]}({role.generation % 9973},{role.sequence})" for role in record.roles
    )
    history = ",".join(str(generation % 9973) for generation in record.history)
    return f"[{history}]#{record.sequence} {roles}"


def shown(replica: Replica) -> str:
    own = replica.sidecar
    prepared = f" prepared {shown_record(own.prepared)}" if own.prepared else ""
    return (
        f"{replica.slot}{'*' * replica.touched}: {replica.durable} map {list(own.map.planes[0])} "
        f"{shown_record(own.record)}{prepared}\n   "
    )


def live(random: Random) -> None:
    """One life of a set."""
    all_ = Set(random)
    for _ in range(random.randint(1, 8)):
        replica = random.choice(all_.replicas)
        event = random.choice(["mount"] * 12 + ["put back", "roll back", "change", "backup"])
        if event == "put back":
            all_.put_back(replica, unseen=False)
        elif event == "roll back":
            all_.put_back(replica, unseen=True)
        elif event == "change":
            all_.change(replica)
        elif event == "backup":
            replica.backup()
        else:
            count = random.randint(1, len(all_.replicas))
            present = random.sample(all_.replicas, random.choice([count, len(all_.replicas)]))
            asked = random.randint(1, len(all_.replicas)) if random.random() < 0.15 else None
            session = all_.mount(present, degraded=random.random() < 0.2, threshold=asked)
            if session:
                session.run()
    finish(all_)


def finish(all_: Set) -> None:
    """P3: with everybody back and no more faults, all replicas become alike by themselves."""
    session = all_.mount(all_.replicas)
    if not session:
        return
    session.heal()
    all_.note("healed")
    for chunk in EVERYTHING:
        held = {replica.durable[chunk] for replica in all_.replicas}
        all_.demand(len(held) == 1, f"chunk {chunk} is not alike: {held}")
    plan = assemble([Found(r.path, r.image, r.sidecar) for r in all_.replicas])
    all_.demand(all(m.state is Standing.CURRENT for m in plan.members), "somebody is still behind")
    all_.demand(not session.opened or not any(plan.map.planes[0]), "something is left to do")


@given(st.randoms(use_true_random=False))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_assembly_is_never_wrong_and_never_asks_without_need(random: Random) -> None:
    with suppress(_UndecidableError):
        live(random)
