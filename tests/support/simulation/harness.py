"""Runs trio so that nothing but the seed decides what happens."""

import os
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar
from unittest import mock

import trio
import trio._core._run as trio_run  # there is no public way to seed its scheduler
from trio.testing import MockClock

T = TypeVar("T")


def run_seeded(seed: int | str, main: Callable[..., Awaitable[T]], *args: object) -> T:
    """`trio.run` in no time, with the order of tasks and `os.urandom` from *seed*.

    Each seed is one order in which runnable tasks may run. What stays outside: the order of sets
    of strings, bytes and enum members, which is the interpreter's; set PYTHONHASHSEED to replay.
    """
    dice = random.Random(f"{seed}/urandom")
    scheduler = trio_run._r
    before = scheduler.getstate()
    scheduler.seed(f"{seed}/scheduler")
    try:
        with (
            mock.patch.object(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True),
            mock.patch.object(os, "urandom", dice.randbytes),
        ):
            return trio.run(main, *args, clock=MockClock(autojump_threshold=0))
    finally:
        scheduler.setstate(before)
