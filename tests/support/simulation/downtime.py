"""What happens to the replicas while no daemon runs.

They come and go, power is cut, sidecars rot, images are truncated or put back from backups.
"""

import random
from contextlib import suppress

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.record import RoleState
from quorumfs.decisions.sidecar import MAP_OFFSET, PAGE, SLOT_OFFSETS, FormatError
from support.sidecars import decode
from support.simulation.media import SECTOR
from support.simulation.operator import Operator
from support.simulation.second_opinion import SecondOpinion
from support.simulation.state import SetState
from support.simulation.world import SimulatedReplica


class Downtime:
    """The time between two lives of the daemon of one history."""

    def __init__(
        self, state: SetState, opinion: SecondOpinion, operator: Operator, dice: random.Random
    ) -> None:
        self._state = state
        self._world = state.world
        self._opinion = opinion
        self._operator = operator
        self._dice = dice

    def pass_by(self) -> None:
        """All that happens between two lives."""
        state, dice, world = self._state, self._dice, self._world
        for index, one in enumerate(world.replicas):
            if not one.reachable and dice.random() < 0.7:
                world.attach(index)
            elif one.reachable and dice.random() < 0.1:
                loses = dice.random() < 0.3
                loses |= any(file.dropped for file in one.files)
                world.detach(index, lose_cache=loses)
                if loses:
                    state.oracle.power_cut()
        if dice.random() < 0.1:
            state.power_cut()
        if dice.random() < (0.05 if state.closed_well else 0.2):
            self._rot()
        if dice.random() < 0.15:
            self._harm()
        if dice.random() < 0.04 and not state.setup.careless and self._opinion.keepable:
            self._operator.keep(cut_off=dice.random() < 0.5)
        if dice.random() < 0.5:
            state.backups.append(
                {i: world.backup(i) for i, one in enumerate(world.replicas) if one.reachable}
            )

    def _rot(self) -> None:
        """The medium of a sidecar is bad: pages of the map, or one of two equal slots."""
        dice, world = self._dice, self._world
        chosen = [dice.choice(world.replicas)]
        garbage = dice.randbytes(SECTOR)
        if dice.random() < 0.7:
            everywhere = dice.random() < 0.5 and not self._losses_on_record()
            for one in world.replicas if everywhere else chosen:
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
                world.note(f"the slot at {offset} of {sidecar.name} rots")
                sidecar.rot(offset, garbage)

    def _losses_on_record(self) -> bool:
        """Whether the maps alone know that a current replica lost what others hold."""
        for sidecar in self._state.known().values():
            roles = enumerate(sidecar.record.roles)
            current = [slot for slot, role in roles if role.state is RoleState.CURRENT]
            if any(sidecar.map.count(out_of_sync(slot)) for slot in current):
                return True
        return False

    def _rot_map(self, replica: SimulatedReplica, garbage: bytes) -> None:
        if replica.sidecar is None:
            return
        on_medium = min(replica.sidecar.size, replica.sidecar.durable.size)
        for page in range(MAP_OFFSET // PAGE, on_medium // PAGE):
            if self._dice.random() < 0.8:
                self._world.note(f"page {page} of {replica.sidecar.name} rots")
                at = page * PAGE + self._dice.randrange(8) * SECTOR
                replica.sidecar.rot(at, garbage)

    def _harm(self) -> None:
        """A replica loses what it held, and all of that is elsewhere."""
        state, dice, world = self._state, self._dice, self._world
        index = dice.choice(state.everyone)
        one = world.replicas[index]
        if not self._opinion.may_harm(index) or one.sidecar is None or state.to_keep:
            return
        backups = [backup[index] for backup in state.backups if index in backup]
        match dice.randrange(6):
            case 0 | 1 if backups:
                world.roll_back(index, dice.choice(backups))
            case 2 if backups:
                image = dice.random() < 0.7
                sidecar = not image or dice.random() < 0.7
                backup = dice.choice(backups)
                if not sidecar and self._opinion.believes_an_image_alone(index):
                    return
                world.restore(index, backup, image=image, sidecar=sidecar)
            case 3 | 4:
                length = world.length(index)
                size = dice.randrange(length // SECTOR) * SECTOR
                world.note(f"{one.path} truncated to {size} bytes")
                one.image.truncate(size)
                if (known := state.known().get(index)) and known.identity.mtime_ns:
                    world.note(f"{one.path} extended")
                    one.image.truncate(length)
            case 5:
                world.note(f"both slots of {one.sidecar.name} rot")
                for offset in SLOT_OFFSETS:
                    one.sidecar.rot(offset, dice.randbytes(SECTOR))
            case _:
                return
        state.harmed.add(index)
