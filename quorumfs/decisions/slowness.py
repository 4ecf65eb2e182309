"""Which replicas are much slower than the others, so that an operator should know. Pure."""

from collections.abc import Collection, Mapping
from typing import NamedTuple, TypeVar

SLOW_S = 0.002
"""No replica is slow whose median is below (seconds)."""

TIMES = 10
"""A replica is slow that takes this many times as long as the fastest other one, …"""

TIMES_STILL = 5
"""… and stays so until it takes less than so many times as long."""

T = TypeVar("T")


class Slow(NamedTuple):
    """How much slower a replica is than the fastest other one."""

    median_s: float
    times: float


def slow_ones(medians: Mapping[T, float], before: Collection[T]) -> dict[T, Slow]:
    """The slow ones of replicas with these *medians* (seconds); *before*: those that were slow."""
    found = {}
    for replica, median in medians.items():
        fastest = min((other for one, other in medians.items() if one != replica), default=0.0)
        times = median / fastest if fastest else 0.0
        if median >= SLOW_S and times >= (TIMES_STILL if replica in before else TIMES):
            found[replica] = Slow(median, times)
    return found
