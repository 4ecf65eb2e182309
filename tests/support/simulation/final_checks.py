"""The end of a history: faults stop, and everything must become good and stay so."""

import random
from contextlib import suppress

import trio

from quorumfs.decisions.dirtymap import INTENT, DirtyMap, out_of_sync
from quorumfs.decisions.record import Record, RoleState
from quorumfs.decisions.scrub import Counts
from quorumfs.repair.scrub import MEMBERS_MIN
from quorumfs.replica.storage import CHANGES
from support.sidecars import decode
from support.simulation.administrator import Administrator, RefusedOrderError
from support.simulation.errorlog import ErrorLog
from support.simulation.fate import Fate, Mounted
from support.simulation.mounting import Mounting
from support.simulation.operator import Operator
from support.simulation.oracle import BrokenError
from support.simulation.second_opinion import SecondOpinion
from support.simulation.state import SetState
from support.simulation.workload import Workload

CONVERGE_MAX_S = 400.0
"""After the faults: a replica is tried again within a minute, what hangs is given up before."""

QUIET_S = 100.0
"""How long a mount that has nothing to do is watched doing nothing."""

_CLAIM = b"quorumfs"
"""How what is no change of a set begins: that nobody has it open any more."""


class FinalChecks:
    """What must hold for the set of one history once faults have stopped."""

    def __init__(
        self,
        state: SetState,
        opinion: SecondOpinion,
        operator: Operator,
        mounting: Mounting,
        workload: Workload,
        errors: ErrorLog,
        dice: random.Random,
    ) -> None:
        self._state = state
        self._world = state.world
        self._opinion = opinion
        self._operator = operator
        self._mounting = mounting
        self._workload = workload
        self._errors = errors
        self._dice = dice

    async def run(self) -> None:
        """Stop all faults, and raise unless everything becomes good."""
        state, world, dice = self._state, self._world, self._dice
        world.calm()
        order = self._drawn_order()
        plan = self._operator.assemble_in_the_end(order)
        self._opinion.require_ordered(order, plan)
        async with world.boot() as life:
            mounted = await self._mounting.mount(life, order, plan)
            crowd = self._workload.crowd()
            crowd.nothing_fails = self._workload.nothing_fails(mounted)
            fate = self._workload.fate(life, mounted, crowd)
            await self._workload.run(mounted, crowd, fate, trio.sleep_forever, 5.0)
            administrator = Administrator(life, mounted, state, dice)
            await self.converge(mounted, fate, administrator)
            await self._end_scrubs(mounted)
            await self._mounting.unmount(mounted, must_succeed=True)
        state.harmed.clear()
        state.unmounted()
        self._check_healthy()
        # Marks that a daemon killed in its unmount had cleared come back, if nobody wrote since.
        synced = mounted.sidecars.ledger.record.sequence != plan.record.sequence
        if synced and dice.random() < 0.5:
            state.power_cut()
        await self._remount_untouched()
        self._check_healthy()
        self._errors.require_none()

    async def converge(self, mounted: Mounted, fate: Fate, administrator: Administrator) -> None:
        """Wait until everything is good; there is a limit for how long that may take.

        What an administrator took out is taken in again.
        """
        began = trio.current_time()
        limit = mounted.repairs.limit
        at_most_s = CONVERGE_MAX_S
        if limit is not None:
            at_most_s += 2 * self._state.count * mounted.disk.size / limit
        await fate.write_something()  # else nobody could notice what is wrong
        while not (fate.extend_noticed() and mounted.converged):
            if trio.current_time() - began > at_most_s:
                raise BrokenError(f"not healthy {at_most_s:g} s after the faults: {mounted}")
            with suppress(RefusedOrderError):  # perhaps too few are current to have it on record
                await administrator.complete()
            await trio.sleep(1.0)
            await fate.write_if_short()
        self._world.note(f"healthy {trio.current_time() - began:.0f} s after the faults")

    async def _end_scrubs(self, mounted: Mounted) -> None:
        """A scrub that is under way ends, and one of what is healthy finds nothing."""
        scrub = mounted.repairs.scrub
        if self._state.count < MEMBERS_MIN:
            scrub.end(stopped=True)  # there is nothing to compare with
            return
        scrub.limit = None
        scrub.pause(paused=False)
        for _ in range(2):
            scrub.begin(repair=False)
            began = trio.current_time()
            while scrub.current is not None:
                if trio.current_time() - began > CONVERGE_MAX_S:
                    raise BrokenError(f"no end of a scrub in {CONVERGE_MAX_S:g} s: {mounted}")
                await trio.sleep(0.1)
        if scrub.last.counts != Counts() or scrub.inspection.undecided:
            raise BrokenError(f"a scrub of a healthy set found {scrub.last}")

    def _drawn_order(self) -> list[int]:
        order = list(self._state.everyone)
        self._dice.shuffle(order)
        return order

    def _check_healthy(self) -> None:
        """Everything is the same everywhere, and on record as such."""
        world = self._world
        everyone = [world.replicas[index] for index in self._state.everyone]
        images = [one.image.cache for one in everyone]
        self._state.oracle.check_images(images, [one.path for one in everyone])
        records = set()
        for one in everyone:
            assert one.sidecar is not None
            sidecar = decode(one.sidecar.whole)
            records.add((sidecar.record.generation, sidecar.record.sequence))
            record = sidecar.record
            states = {record.roles[slot].state for slot in record.slots}
            marks = self._marked_data(sidecar.map, record)
            if states != {RoleState.CURRENT} or marks or not sidecar.record.clean:
                raise BrokenError(
                    f"{one.path} after an unmount in order: {marks} chunks marked, "
                    f"clean: {sidecar.record.clean}, roles {sidecar.record.roles}"
                )
        if len(records) > 1:
            raise BrokenError("the sidecars hold different records after an unmount in order")

    def _marked_data(self, disk_map: DirtyMap, record: Record) -> int:
        """How many chunks with data are marked: where all have a hole a mark does not matter."""
        images = [self._world.replicas[index].image.cache for index in self._state.everyone]
        bits = sum(out_of_sync(slot) for slot in record.slots)
        return sum(
            image.seek(start, data=True) < end
            for run in disk_map.runs(INTENT | bits)
            for start, end in [disk_map.bounds(run.start)]
            for image in images
        )

    async def _remount_untouched(self) -> None:
        """The next mount of a healthy set has nothing to do."""
        order = self._drawn_order()
        plan = self._operator.assemble(order)
        if plan.rule != "clean: closed in order":
            raise BrokenError(f"remounted by the rule: {plan.rule}")
        async with self._world.boot() as life:
            mounted = await self._mounting.mount(life, order, plan)
            storages = [storage for index in order for storage in life.storages(index)]
            await trio.sleep(QUIET_S)
            await self._mounting.unmount(mounted, must_succeed=True)
            changed = [
                op
                for storage in storages
                for op in storage.log
                if op.kind in CHANGES and op.data[:8] != _CLAIM
            ]
            if changed:
                raise BrokenError(f"a mount that had nothing to do wrote: {len(changed)} times")
        self._state.unmounted()
