"""The workload of a history: the guests of each life, and fate beside them."""

import random
from collections.abc import Awaitable, Callable

import trio

from support.simulation.fate import Fate, Mounted
from support.simulation.guest import Crowd, Guest
from support.simulation.second_opinion import SecondOpinion
from support.simulation.state import SetState
from support.simulation.world import Life


class Workload:
    """Who uses the disk of one history."""

    def __init__(self, state: SetState, opinion: SecondOpinion, dice: random.Random) -> None:
        self._state = state
        self._opinion = opinion
        self._dice = dice
        self._guests = 0

    def next_number(self) -> int:
        """The number of another guest."""
        self._guests += 1
        return self._guests

    def crowd(self) -> Crowd:
        """What the guests of another life go by."""
        return Crowd(think_s=10 ** self._dice.uniform(-2, 1))

    def fate(self, life: Life, mounted: Mounted, crowd: Crowd) -> Fate:
        """What may happen to the replicas in *life*."""
        opinion = self._opinion
        fate = Fate(
            life,
            mounted,
            crowd,
            self._guest(life, mounted, crowd),
            opinion.may_harm,
            opinion.is_ejected,
        )
        fate.harmed = self._state.harmed  # it adds to them
        return fate

    async def run(
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
        async with trio.open_nursery() as nursery:
            for _ in range(self._dice.randrange(1, 5)):
                nursery.start_soon(self._guest(fate.life, mounted, crowd).run)
            with trio.move_on_after(duration_s):
                await happens()
            await fate.requests_ended()
            crowd.stopping = True

    def nothing_fails(self, mounted: Mounted) -> Callable[[], bool]:
        """Tells, while there are no faults, whether a request has no reason to fail."""
        opinion = self._opinion
        return lambda: mounted.enough and not opinion.at_risk and not opinion.fault_to_come(mounted)

    def _guest(self, life: Life, mounted: Mounted, crowd: Crowd) -> Guest:
        return Guest(self._state.oracle, life, mounted.disk, self.next_number(), crowd)
