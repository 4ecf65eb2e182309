"""One seed, one history: the real runtime on the simulated world, and the oracle beside it.

A history is some lives of the daemon with guests at work and faults of all kinds, ended by a kill,
a power cut or an unmount; and then faults stop. What must hold:

* a guest never sees what the oracle excludes, and every request ends;
* a mount is refused only where the replicas at hand cannot tell who is right;
* after the faults all replicas become current and byte-identical by themselves, and after an
  unmount the next mount finds nothing to do;
* the daemon neither dies nor logs an error.
"""

import random
from dataclasses import dataclass
from enum import Enum

import trio

from quorumfs.decisions.model import Plan
from support.simulation.administrator import Administrator
from support.simulation.downtime import Downtime
from support.simulation.errorlog import ErrorLog
from support.simulation.fate import Fate, Mounted, crash_in_a_commit, drawn_weather
from support.simulation.final_checks import FinalChecks
from support.simulation.guest import Crowd
from support.simulation.harness import run_seeded
from support.simulation.mounting import Mounting, RefusedError
from support.simulation.operator import Operator
from support.simulation.oracle import BrokenError, Oracle, ViolationError
from support.simulation.second_opinion import SecondOpinion
from support.simulation.setup import Setup, create_set
from support.simulation.state import SetState
from support.simulation.storage import CALM, DaemonKilledError
from support.simulation.workload import Workload
from support.simulation.world import World

LATE_MAX_S = 60.0
"""How long what was asked for before faults stop may still take."""


class LifeKind(Enum):
    """What happens in a life."""

    WEATHER = "faults as they come"
    PLANS = "faults that are planned"
    CALM = "no faults"


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
        self._initial = dice.randbytes(size) if self.setup.filled else None
        self._dice = self.world.dice_for("history")
        self.errors = ErrorLog(self.world)
        self.state = SetState(self.setup, self.world, Oracle(size, self._initial))
        self.opinion = SecondOpinion(self.state)
        self.operator = Operator(self.state, self.opinion, self._dice)
        self.mounting = Mounting(self.state)
        self.workload = Workload(self.state, self.opinion, self._dice)
        self._downtime = Downtime(self.state, self.opinion, self.operator, self._dice)
        self.final_checks = FinalChecks(
            self.state,
            self.opinion,
            self.operator,
            self.mounting,
            self.workload,
            self.errors,
            self._dice,
        )

    @property
    def oracle(self) -> Oracle:
        """What the guests of this set may see."""
        return self.state.oracle

    async def run(self) -> None:
        """Live it; raises if a promise is broken."""
        with self.errors.attached(), self.setup.scale.applied():
            await self._run()

    async def _run(self) -> None:
        self.world.note(f"setup {self.setup}")
        self._create()
        for _ in range(self.setup.lives):
            await self._live()
            self._downtime.pass_by()
        await self.final_checks.run()

    def _create(self) -> None:
        if create_set(self.setup, self.world, self._initial):
            self.state.to_keep = {0}

    async def _live(self) -> None:
        """One life of the daemon, and what it ejects."""
        state, opinion = self.state, self.opinion
        kind = self._draw_kind()
        if (chosen := self.operator.choose()) is None or chosen[1].adopted:
            return  # nobody makes a set of some raw images by mistake
        order, plan = chosen
        consented = plan.rule.startswith("degraded") and not opinion.all_is_here(order)
        if consented or (state.forked and len(state.reachable(order)) < state.count):
            state.accept_loss(order, plan)
        state.forked |= consented
        opinion.require_ordered(order, plan)
        state.last = None
        state.to_keep = set()
        mounted, fate = await self._serve(order, plan, kind)
        self.errors.require_none()
        state.life_ended(lost_cache=fate.lost_cache)
        if not state.closed_well and not mounted.converged:
            self.operator.make_new(fate.unrecorded & state.harmed)
        uncommitted = mounted.sidecars.ledger.record.sequence == plan.record.sequence
        latest = mounted.sidecars.ledger.record.lineage[0]
        changed = latest.changed and latest != plan.record.lineage[0]
        on_record = state.closed_well and changed  # who only reads parts from nobody
        if (consented and uncommitted) or (state.forked and not on_record):
            state.oracle.forget_reads()  # perhaps nothing says that this mount ever was
        if mounted.sidecars.ledger.in_use or state.closed_well:
            state.size_sure = mounted.sidecars.ledger.record.size
        state.note_thresholds(mounted)
        if mounted.converged:
            state.forked = state.few = False
            state.kept = set()
            state.harmed -= state.reachable(order)

    def _draw_kind(self) -> LifeKind:
        """Draw what happens in the next life, and begin with the weather of that."""
        dice = self._dice
        kind = dice.choice((*[LifeKind.WEATHER] * 4, *[LifeKind.PLANS] * 5, LifeKind.CALM))
        for one in self.world.replicas:
            one.image_faults.weather = one.sidecar_faults.weather = CALM
            if kind is LifeKind.WEATHER:
                one.image_faults.weather = drawn_weather(dice)
                one.sidecar_faults.weather = dice.choice(
                    (one.image_faults.weather, one.image_faults.weather, CALM, drawn_weather(dice))
                )
            for file in one.files:
                file.space = None
        return kind

    async def _serve(self, order: list[int], plan: Plan, kind: LifeKind) -> tuple[Mounted, Fate]:
        """Mount, be used, and end somehow."""
        dice, world, workload = self._dice, self.world, self.workload
        limit = None if dice.random() < 0.7 else int(self.setup.scale.size / dice.uniform(5, 60))
        async with world.boot() as life:
            crowd = workload.crowd()
            try:
                mounted = await self.mounting.mount(life, order, plan, limit)
            except RefusedError as error:
                return error.mounted, workload.fate(life, error.mounted, crowd)
            fate = workload.fate(life, mounted, crowd)
            orders = world.dice_for(f"orders {life.number}")
            administrator = Administrator(life, mounted, self.state, orders)
            life.nursery.start_soon(administrator.work)
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
                await workload.run(mounted, crowd, fate, fate.follow_plans, duration_s)
            elif kind is LifeKind.CALM:
                crowd.nothing_fails = workload.nothing_fails(mounted)
                await workload.run(mounted, crowd, fate, trio.sleep_forever, duration_s)
                crowd.nothing_fails = Crowd().nothing_fails
            else:
                await workload.run(mounted, crowd, fate, fate.strike, duration_s)
            if (differing := _differing(mounted)) and not self.state.forked:
                raise BrokenError(f"adopted images are said to differ: chunks {differing}")
            self._require_no_false_alarm(mounted, fate)
            if crash is None and dice.random() < 0.5 and self.opinion.can_recover(mounted):
                world.calm()
                await trio.sleep(LATE_MAX_S)
                await administrator.stop()
                await workload.run(mounted, crowd, fate, trio.sleep_forever, 5.0)
                await self.final_checks.converge(mounted, fate, administrator)
                await self.mounting.unmount(mounted, must_succeed=True)
                return mounted, fate
            if crash == "time":
                world.power_cut() if power else world.kill()
                await trio.lowlevel.checkpoint()
            if crash == "unmount":
                life.watch = None
                life.crash_at(life.steps + int(10 ** dice.uniform(0, 1.7)), power=power)
            await administrator.stop()
            await self.mounting.unmount(mounted)
        return mounted, fate

    def _require_no_false_alarm(self, mounted: Mounted, fate: Fate) -> None:
        """Raise if a scrub found a mismatch where nothing can have rotted (P8)."""
        state, scrub = self.state, mounted.repairs.scrub
        harmed = state.forked or state.harmed or fate.harmed or fate.lost_cache
        current = () if scrub.current is None else scrub.current.findings.finds
        wrong = [find for find in (*scrub.last.finds, *current) if find.blame != "unreadable"]
        if wrong and not harmed:
            raise BrokenError(f"a scrub is said to have found {wrong[0]}")


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
        violation = in_one_line(group)
    world, oracle = history.world, history.oracle
    return Result(seed, violation, world.trace, oracle.acknowledged, oracle.checked, world.lives)


def in_one_line(error: BaseException) -> str:
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


def _differing(mounted: Mounted) -> list[int]:
    """The chunks that are said to differ since the images were adopted. A write that failed where
    they were never compared may have made a difference, of which nobody can tell the same."""
    ledger = mounted.sidecars.ledger
    chunks = [one for start, end in mounted.repairs.differing for one in range(start, end)]
    return [one for one in chunks if not ledger.agreement.torn.overlaps(*ledger.map.bounds(one))]
