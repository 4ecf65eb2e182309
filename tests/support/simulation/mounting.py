"""One mount of a simulated set: the real runtime put together on simulated storages, and its end.

It follows `quorumfs.mount.replicaset.ReplicaSet.make_disk`, `quorumfs.replica.claiming` and the end
of `quorumfs.mount.life`.
"""

from collections.abc import Sequence
from functools import partial

import trio

from quorumfs.decisions.claim import Claim, Tenure
from quorumfs.decisions.model import Plan
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import Event, EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.errors import UserError
from quorumfs.live.settings import Settings
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.options.table import MountOptions
from quorumfs.repair.rejoin import ForeignError, Returned
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica
from support.simulation.fastpath import FastDisk
from support.simulation.fate import TIMEOUT_S, Mounted
from support.simulation.guest import REQUEST_MAX_S
from support.simulation.invariants import broken_invariants
from support.simulation.media import SECTOR
from support.simulation.oracle import BrokenError
from support.simulation.state import SetState
from support.simulation.storage import SimulatedStorage
from support.simulation.world import Life


class RefusedError(Exception):
    """A mount that was assembled is not used."""

    def __init__(self, mounted: Mounted) -> None:
        super().__init__("what it was told cannot be put on record")
        self.mounted = mounted


class Opener:
    """Opens the files of one life's replicas again."""

    def __init__(self, life: Life, sidecars: Sidecars, tenure: Tenure | None) -> None:
        self._life = life
        self._sidecars = sidecars
        self._tenure = tenure

    async def reopen(self, replica: Replica) -> Returned:
        life, sidecars, tenure = self._life, self._sidecars, self._tenure
        world = life.world
        index = world.index_of(replica.path)
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
        return Returned(one, life.image(index, sidecars.ledger.map.size), life.sidecar(index))

    async def is_lost(self, replica: Replica) -> bool:
        await trio.sleep(0.01)
        world, image = self._life.world, replica.image
        there = world.replicas[world.index_of(replica.path)].reachable
        return there and isinstance(image, SimulatedStorage) and bool(image.broken)


class Mounting:
    """How the set of one history is mounted and unmounted."""

    def __init__(self, state: SetState) -> None:
        self._state = state
        self._world = state.world

    async def mount(
        self, life: Life, order: list[int], plan: Plan, limit: int | None = None
    ) -> Mounted:
        """What `quorumfs.mount.replicaset.ReplicaSet.make_disk` makes, on simulated storages.

        *limit*: of a resync, in bytes a second. Raises `RefusedError` if what it was told cannot
        be put on record.
        """
        world, setup = self._world, self._state.setup
        self._state.sized(plan.record.size)
        found = world.found(order)
        replicas = []
        for number, (index, member) in enumerate(zip(order, plan.members, strict=True)):
            path = world.replicas[index].path
            if not member.state.is_ours:
                replicas.append(Replica(number, path, None, TIMEOUT_S))
                continue
            image = life.image(index, plan.record.size)
            replicas.append(Replica(number, path, image, TIMEOUT_S, sidecar=life.sidecar(index)))
        threshold = plan.threshold
        tenure = self.claim(life, order, plan) if setup.claims else None
        sidecars = Sidecars(replicas, plan, found, threshold=threshold, tenure=tenure)
        life.broken_invariants = partial(broken_invariants, sidecars.ledger)
        mirror = Mirror(
            plan.record.size,
            sidecars,
            pattern=setup.pattern(threshold),
            search_s=TIMEOUT_S,
            events=EventLog("disk", self.heard),
        )
        for replica in replicas:
            replica.behind_max_s = setup.behind_max_s
        mirror.read_order.write_mostly = frozenset(r.path for r in replicas[: setup.mostly])
        present = {
            replica: one
            for replica, one in zip(replicas, found, strict=True)
            if not replica.standing.is_member and replica.attached
        }

        opener, outvoted = Opener(life, sidecars, tenure), setup.rewrite_corrupted
        repairs = Repairs(mirror, sidecars, opener, present=present, limit=limit, outvoted=outvoted)
        disk = Disk(mirror, repairs, zero_kind=setup.zero_kind)
        if setup.fast:
            disk = FastDisk(mirror, repairs, life, setup.fast, setup.zero_kind)
        options = MountOptions(
            "quorum",
            threshold,
            rewrite_corrupted=setup.rewrite_corrupted,
            replica_timeout_s=TIMEOUT_S,
            resync_rate=limit,
            write_ack="all" if setup.behind_max_s is None else "threshold",
            behind_max_s=setup.behind_max_s or 0.1,
        )
        settings = Settings(
            disk, repairs, options, lambda new, _: setup.pattern(new.vote_threshold)
        )
        mounted = Mounted(world.index_of, plan, disk, sidecars, repairs, settings)
        life.nursery.start_soon(disk.run)
        try:
            await sidecars.record_options()
        except OSError as error:
            world.note(f"mount refused: {error.strerror}")
            raise RefusedError(mounted) from None
        life.nursery.start_soon(repairs.run)
        return mounted

    def claim(self, life: Life, order: Sequence[int], plan: Plan) -> Tenure:
        """What `quorumfs.replica.claiming` does: all earlier mounts have ended, or were taken over
        from.
        """
        world = self._world
        known = (world.claim(index) for index in self._state.everyone)
        over = frozenset(claim.mount for claim in known if claim is not None)
        host = f"host {life.number}"
        mine = Claim(life.number, host, host, host, 1, 1, host, "just now")
        for index, member in zip(order, plan.members, strict=True):
            if member.state.is_ours:
                world.sign(index, mine)
        return Tenure(mine, over)

    def heard(self, event: Event) -> None:
        """Take note of what the daemon tells of itself."""
        world, state = self._world, self._state
        world.note(f"event {event.name}: {event.text}")
        if event.name == "DATA_UNREADABLE":
            start, count = (event.members[name] for name in ("sector-num", "sectors-count"))
            state.oracle.unreadable(start * SECTOR, count * SECTOR)
        if event.name == "RESYNC_FINISHED" and event.members["error"] is None:
            for index, one in enumerate(world.replicas):
                if one.path == event.members["replica"] and not world.is_short(index):
                    state.harmed.discard(index)  # whatever it was, it was replaced

    async def unmount(self, mounted: Mounted, *, must_succeed: bool = False) -> None:
        """Close in order, as at the end of `quorumfs.mount.life`; the guests have gone.

        *must_succeed*: faults are over; what they cost is first told by one flush (R13).
        """
        world, oracle = self._world, self._state.oracle
        if must_succeed:
            try:
                await mounted.disk.flush()
            except OSError:
                oracle.flush_failed()
        if mounted.sidecars.fenced is not None:
            raise BrokenError("it was fenced by nobody")
        flushing = oracle.begin_flush()
        world.note("unmount")
        with trio.move_on_after(REQUEST_MAX_S) as scope:
            await mounted.repairs.stop()
            try:
                await mounted.disk.close()
            except OSError as error:
                world.note(f"unmount failed: {error.strerror}")
                oracle.flush_failed()
                if must_succeed:
                    raise BrokenError(f"unmount failed without a fault: {error}") from error
            else:
                world.note("unmounted")
                oracle.flushed(flushing)
                self._state.last = mounted.sidecars.ledger.record, set(mounted.order)
        if scope.cancelled_caught:
            raise BrokenError("an unmount did not end")
