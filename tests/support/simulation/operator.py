"""The operator of the simulated set: who mounts what is there, consents to a loss, and resolves.

A careless operator (some seeds have one) mounts what is there with ``-o degraded``. That may lose
what only absent replicas hold: the oracle is told to accept what is on those at hand instead, and
two such sides are a split brain, which is then resolved.
"""

import random
from collections.abc import Iterable, Sequence

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.model import Plan, Standing
from quorumfs.decisions.record import RoleState
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.resolution import Resolution, resolve
from support.simulation.second_opinion import SecondOpinion
from support.simulation.state import SetState


class Operator:
    """Whoever mounts and resolves the set of one history."""

    def __init__(self, state: SetState, opinion: SecondOpinion, dice: random.Random) -> None:
        self._state = state
        self._setup = state.setup
        self._world = state.world
        self._opinion = opinion
        self._dice = dice
        self._asking = state.world.dice_for("threshold")

    def assemble(
        self, order: Sequence[int], *, degraded: bool = False, threshold: int | None = None
    ) -> Plan:
        """What a mount of these replicas is to begin with. Raises `AssemblyRefusedError`."""
        found = self._world.found(order)
        plan = assemble(found, degraded=degraded, threshold=threshold)
        states = [f"{member.path} {member.state.value}" for member in plan.members]
        self._world.note(f"assembled, {plan.rule}: {', '.join(states)}")
        return plan

    def choose(self) -> tuple[list[int], Plan] | None:
        """Find replicas that can be mounted; None if there are none this time."""
        state, opinion, dice = self._state, self._opinion, self._dice
        everyone = state.everyone
        order = everyone.copy()
        dice.shuffle(order)
        if dice.random() < 0.4:
            order = order[: dice.randrange(1, len(order) + 1)]
        if state.kept and not state.reachable(order) & state.kept:
            order = everyone  # the others cannot know that somebody was preferred to them
            if not state.reachable(order) & state.kept:
                return None
        if state.to_keep or (state.harmed and not state.reachable(order) & opinion.sound):
            # Who was put back, with nobody here who could tell, is beyond any promise.
            order = everyone
            dice.shuffle(order)
            if state.to_keep and state.reachable(order) != set(order):
                return None
            if state.to_keep and dice.random() < 0.5:
                self.keep(cut_off=dice.random() < 0.3)
                return None
            if state.harmed and not state.reachable(order) & opinion.sound:
                return None
        threshold = None
        if len(state.thresholds) > 1 and dice.random() < 0.5:
            threshold = dice.choice(sorted(state.thresholds))
        elif self._asking.random() < 0.15:
            threshold = self._asking.randrange(1, state.count + 1)
        for degraded in (False, True):
            try:
                return order, self.assemble(order, degraded=degraded, threshold=threshold)
            except AssemblyRefusedError as error:
                self._world.note(f"mount of {order} refused, {degraded=}: {error.rule}: {error}")
                opinion.require_reason(error, order, degraded=degraded, threshold=threshold)
                if opinion.repairable(error) and dice.random() < 0.7:
                    self.keep(cut_off=dice.random() < 0.3)
                    return None
                if opinion.all_is_here(order):
                    continue
                if not self._setup.careless or dice.random() < 0.5:
                    return None
                usable = len(state.reachable(order))
                if error.rule == "no quorum" and usable:
                    threshold = usable
        return None

    def assemble_in_the_end(self, order: list[int]) -> Plan:
        """Do what it takes to have all replicas mounted."""
        state, opinion = self._state, self._opinion
        try:
            if not state.to_keep and len(state.known()) < state.count:
                self._prefer_current(order, self.assemble(order))
            if state.to_keep:
                self.keep(cut_off=False)
            return self.assemble(order)
        except AssemblyRefusedError as error:
            self._world.note(f"mount of {order} refused: {error.rule}: {error}")
            opinion.require_reason(error, order, degraded=False, threshold=None)
            if opinion.repairable(error):
                self.keep(cut_off=False)
                self._extend_all()
            elif len(state.known()) < state.count and not state.forked:
                known = [index for index in order if index in state.known()]
                usable = len(set(known) - state.taken_out())
                plan = self.assemble(known, degraded=True, threshold=usable)
                self._prefer_current(known, plan)
                self.keep(cut_off=False)
            elif state.harmed and not state.forked:
                usable = len(state.reachable(order) - state.taken_out())
                threshold = usable if error.rule == "no quorum" else None
                return self.assemble(order, degraded=True, threshold=threshold)
            else:
                self._choose_a_side(order)
        return self.assemble(order)

    def keep(self, *, cut_off: bool) -> None:
        """Say whose data to keep, of all that are there; nothing is lost by it.

        *cut_off*: ``resolve`` is killed before all sidecars are written.
        """
        state, world, dice = self._state, self._world, self._dice
        order = [index for index in state.everyone if world.replicas[index].reachable]
        dice.shuffle(order)
        keep = dice.choice(self._opinion.keepable)
        path = world.replicas[keep].path
        try:
            resolution = self._resolve(order, path)
        except AssemblyRefusedError as error:
            world.note(f"resolve --keep {keep} refused: {error}")
            longest = max(world.length(index) for index in order)
            for index in set(order) - {keep}:  # as the messages say
                world.replicas[index].sidecar = None
            self._extend_all(longest)
            resolution = self._resolve(order, path)
        by_path = {one.path: index for index, one in enumerate(world.replicas)}
        writes = list(resolution.sidecars.items())
        state.to_keep = {by_path[path] for path in resolution.kept}
        if cut_off:
            writes = writes[: dice.randrange(len(writes))]
            state.half_resolved |= bool(writes)
        else:
            state.half_resolved = False
            state.to_keep = set()
        world.note(f"resolved: keep {resolution.kept}, {cut_off=}")
        state.forget_orders()
        for path, sidecar in writes:
            world.create_sidecar(by_path[path], sidecar)
        state.last = None
        state.resolved = True
        state.thresholds.add(self._setup.threshold)  # perhaps it is another set now
        state.kept = {by_path[path] for path in resolution.kept}
        state.backups.clear()  # perhaps it is another set now
        state.few |= len(resolution.kept) < state.count

    def make_new(self, indices: Iterable[int]) -> None:
        """Have each of these replicas, which nobody trusts, become a member anew."""
        for index in indices:
            self._world.note(f"the sidecar of replica {index} is removed")
            self._world.replicas[index].sidecar = None

    def _resolve(self, order: Sequence[int], keep: str) -> Resolution:
        return resolve(self._world.found(order), keep, threshold=self._setup.threshold)

    def _prefer_current(self, order: Sequence[int], plan: Plan) -> None:
        pairs = zip(order, plan.members, strict=True)
        current = {i for i, m in pairs if m.state is Standing.CURRENT}
        self._state.to_keep = current - self._state.harmed

    def _extend_all(self, length: int = 0) -> None:
        """Give every image its length back: what it lacks is on record.

        *length*: that of the disk (bytes), which those without a sidecar are to have.
        """
        for index in self._state.everyone:
            one = self._world.replicas[index]
            its_own = self._world.length(index)
            wanted = its_own if one.sidecar is not None else max(length, its_own)
            if one.image.size < wanted:
                self._world.note(f"{one.path} extended")
                one.image.truncate(wanted)

    def _choose_a_side(self, order: Sequence[int]) -> None:
        """Resolve a split brain."""
        world, oracle = self._world, self._state.oracle
        found = world.found(order)
        disks = [  # a mixture of two times is refused beside a whole one
            one.path for one in found if one.sidecar and one.sidecar.own_state is RoleState.CURRENT
        ]
        keep = self._dice.choice(disks or [one.path for one in found])
        try:
            resolution = resolve(found, keep)
        except AssemblyRefusedError as error:
            world.note(f"resolve --keep {keep} refused: {error}")
            longest = max(world.length(index) for index in order)
            for index in order:  # as the messages say
                if world.replicas[index].path != keep:
                    world.replicas[index].sidecar = None
            self._extend_all(longest)
            resolution = resolve(world.found(order), keep)
        world.note(f"resolved: keep {resolution.kept}")
        self._state.forget_orders()
        self._state.parted = (self._state.parted | set(self._state.everyone)) - set(order)
        by_path = {one.path: index for index, one in enumerate(world.replicas)}
        kept = [world.replicas[by_path[path]].image for path in resolution.kept]
        oracle.forget_reads()
        record = resolution.sidecars[resolution.kept[0]].record
        oracle.resize(record.size)  # the side may have grown apart from the other one
        for image in kept:
            oracle.allow([image.cache, image.durable])
        for path, sidecar in resolution.sidecars.items():
            world.create_sidecar(by_path[path], sidecar)
