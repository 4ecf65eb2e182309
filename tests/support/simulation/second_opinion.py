"""A second opinion on a set, from its sidecars and from what the simulation knows of it.

It says whether a mount had to be refused, who holds all that was acknowledged, and what may be
harmed without a loss that nobody has promised to survive.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import zip_longest
from operator import or_

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Plan, Standing
from quorumfs.decisions.record import RoleState, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from support.simulation.fate import Mounted
from support.simulation.oracle import BrokenError
from support.simulation.setup import Origin
from support.simulation.state import SetState


class SecondOpinion:
    """Judgments of the set of one history."""

    def __init__(self, state: SetState) -> None:
        self._state = state
        self._setup = state.setup
        self._world = state.world

    @property
    def sound(self) -> set[int]:
        """Replicas that hold all that was acknowledged, and say so; none if that is not sure."""
        state, known = self._state, self._state.known()
        if state.forked or not known or any(sidecar.prepared for sidecar in known.values()):
            return set()
        # One that was harmed may since have become the only one that holds everything.
        latest = max((sidecar.record for sidecar in known.values()), key=lambda r: r.sequence)
        return {
            index
            for index, sidecar in known.items()
            if sidecar.record == latest
            and sidecar.own_state is RoleState.CURRENT
            and index not in state.harmed
            and not _lacks_any(sidecar)
        }

    @property
    def keepable(self) -> list[int]:
        """Whom to keep without a loss: who is current, or, before anything was written, who holds
        what the set began with. Nobody while one is away that others might go on with."""
        state = self._state
        if any(not self._world.replicas[index].reachable for index in self._state.everyone):
            return []
        kept = state.to_keep or self.sound
        raw = self._setup.origin is Origin.ADOPTED and not self._world.lives
        if raw and not state.resolved and not state.to_keep:
            kept = set(state.everyone) - state.harmed
        return sorted(kept & state.reachable(state.everyone))

    @property
    def at_risk(self) -> bool:
        """Whether something is wrong that a daemon has not caused and may not know of."""
        return self._state.forked or any(
            self._world.is_short(index) or self._world.replicas[index].image.dropped
            for index in self._state.everyone
        )

    def fault_to_come(self, mounted: Mounted) -> bool:
        """Whether a fault is planned, for an administrator's order, that a request may meet when
        no member can be spared any more: the threshold was raised, or a replica taken out."""
        planned = any(self._world.replicas[i].image_faults.planned for i in mounted.members)
        return planned and len(mounted.members) <= mounted.sidecars.ledger.least

    def may_harm(self, index: int) -> bool:
        """Whether all that a replica holds is elsewhere, and nothing else is wrong."""
        if (
            self._setup.careless
            or self._state.harmed - {index}
            or any(self._state.ordering.values())
        ):
            return False
        others = self.sound - {index}
        return bool(others) and not any(
            file.dropped or not self._world.replicas[other].reachable
            for other in others
            for file in self._world.replicas[other].files
        )

    def is_ejected(self, index: int) -> bool:
        """Whether it is on record that a replica is not current."""
        known = self._state.known()
        own = known.pop(index, None)
        if own is None or not known or any(sidecar.prepared for sidecar in known.values()):
            return False
        latest = max((sidecar.record for sidecar in known.values()), key=lambda r: r.sequence)
        slot = latest.slot_of(own.replica_id)
        return slot is not None and latest.roles[slot].state is not RoleState.CURRENT

    def _is_unfinished(self, sidecar: Sidecar) -> bool:
        """Whether a sidecar is of a replica that was being filled, and of an older record."""
        latest = max(one.record.sequence for one in self._state.known().values())
        return sidecar.own_state is RoleState.RESYNCING and sidecar.record.sequence < latest

    def _was_lengthened(self, index: int, sidecar: Sidecar) -> bool:
        """Whether a daemon died when it had made an image longer, and its sidecar not said so yet:
        then the image looks changed."""
        known = sidecar.identity
        return bool(known.mtime_ns) and self._world.replicas[index].image.size > known.size

    def believes_an_image_alone(self, index: int) -> bool:
        """Whether a mount, which misses too many without it, believes an image that nothing proves
        to be the one of its sidecar."""
        sidecar = self._state.known().get(index)
        vouched = sidecar is not None and bool(sidecar.identity.mtime_ns)
        few = len(self.sound - {index}) < max(self._state.thresholds)
        return self._setup.passing and few and not vouched

    def all_is_here(self, order: Sequence[int]) -> bool:
        """Whether a mount refused because of those that were harmed loses nothing."""
        sound = self.sound
        return bool(self._state.harmed) and bool(sound) and sound <= self._state.reachable(order)

    def repairable(self, error: AssemblyRefusedError) -> bool:
        """Whether the operator is told to resolve, and can without a loss."""
        state = self._state
        told = {"stranger", "split brain", "only stale", "unreadable", "no quorum"}
        strangers = len(state.known()) < state.count
        wanted = error.rule in told or bool(state.to_keep) or strangers
        return wanted and not state.forked and bool(self.keepable)

    def can_recover(self, mounted: Mounted) -> bool:
        """Whether everything must become good in this life, once faults stop."""
        return (
            set(mounted.order) == set(self._state.everyone)
            and not self._state.forked
            and not mounted.repairs.differing
            and all(replica.standing is not Standing.FOREIGN for replica in mounted.disk.replicas)
            and len(self._state.known()) == self._state.count
        )

    def require_reason(
        self,
        error: AssemblyRefusedError,
        order: Sequence[int],
        *,
        degraded: bool,
        threshold: int | None,
    ) -> None:
        """Raise if these replicas need not have been refused."""
        state = self._state
        here, count = state.reachable(order) - state.harmed, state.count
        strangers = set(state.everyone) - state.known().keys()
        here -= strangers
        # The first sidecar of a replica whose addition was cut off tells nothing of the set.
        here -= {index for index, one in state.known().items() if self._is_unfinished(one)}
        here -= {index for index, one in state.known().items() if self._was_lengthened(index, one)}
        # Closed on a medium that failed then, beside a sidecar that lies elsewhere: nothing tells
        # its image from an older one.
        closed = {index for index, one in state.known().items() if one.record.clean}
        here -= {index for index in closed if not state.known()[index].identity.mtime_ns}
        if state.half_resolved:  # who was not told of the resolution yet looks put back
            latest = max((one.record for one in state.known().values()), key=lambda r: r.sequence)
            here -= {i for i, one in state.known().items() if one.record.key != latest.key}
        usable = here - state.taken_out()
        needed = max(state.thresholds | {threshold or 0})
        sure = len(here) == count
        if not state.few:
            sure |= len(here) > count - min(state.thresholds) and len(usable) >= needed
        if state.last is not None and not state.forked:
            record, _ = state.last
            by_slot = {record.slot_of(s.replica_id): index for index, s in state.known().items()}
            roles = enumerate(record.roles)
            current = {by_slot.get(s) for s, r in roles if r.state is RoleState.CURRENT}
            sure |= current <= here and len(usable) >= needed
        match error.rule:
            case "split brain":
                justified = state.forked or state.half_resolved or bool(state.harmed)
            case "stranger" | "unreadable":
                justified = bool(strangers & set(order))
            case "no quorum":
                justified = len(usable) < needed
            case "threshold":
                counts = [len(one.record.slots) for one in state.known().values()]
                justified = max(state.thresholds | {threshold or 0}) > min(counts)
            case "too few to lower":
                lower = threshold is not None and threshold < max(state.thresholds)
                justified = lower and not degraded
            case "may be newer":
                lost = self._lost_by_all(here)
                justified = not degraded and (not sure or bool(state.to_keep) or lost)
            case "only stale":
                justified = not sure or bool(state.to_keep)
            case "unusable":
                justified = not here
            case "adopt":
                justified = not here  # nothing to be seen of a set
            case _:
                justified = False
        if not justified:
            raise BrokenError(f"mount of {order} refused without need: {error.rule}: {error}")

    def require_ordered(self, order: Sequence[int], plan: Plan) -> None:
        """Raise if a mount takes a replica for anything but what an administrator made of it."""
        paths = {plan.record.roles[slot].path for slot in plan.record.slots}
        for index, made in self._state.ordered.items():
            path, removed = self._world.replicas[index].path, made is RoleState.REMOVED
            if removed is (path in paths) and not self._state.forked:
                raise BrokenError(f"{path} was made {made.name}, and the set has {sorted(paths)}")
        for index, member in zip(order, plan.members, strict=True):
            wanted = self._state.ordered.get(index)
            if wanted is None or member.slot is None or self._state.forked:
                continue
            if (wanted is RoleState.OFFLINE) is not (member.state is Standing.OFFLINE):
                raise BrokenError(
                    f"{member.path} was made {wanted.name}, and is {member.state.value}"
                )

    def _lost_by_all(self, here: set[int]) -> bool:
        """Whether it is on record that none of these could flush some chunk, and all stayed.

        One that was being filled is no source, whatever it has got by then.
        """
        known = [
            sidecar
            for index, sidecar in self._state.known().items()
            if index in here and sidecar.own_state is not RoleState.RESYNCING
        ]
        bits = sum(out_of_sync(sidecar.slot) for sidecar in known)
        # Whoever was away when the disk grew has a shorter map.
        states = zip_longest(*(sidecar.map.planes[0] for sidecar in known), fillvalue=0)
        return any(reduce(or_, chunk) & bits == bits for chunk in states)


def _lacks_any(sidecar: Sidecar) -> bool:
    """Whether a replica lost something, by its own sidecar, which others may still hold."""
    slot = sidecar.record.slot_of(sidecar.replica_id)
    return slot is not None and bool(sidecar.map.count(out_of_sync(slot)))
