"""Histories of the whole runtime on simulated storage: what no unit test would think of.

``python -m support.simulation --help`` (in ``tests/``) runs more of them, and shows one.
"""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import xxhash
from support.simulation.runner import live_through, replay_command

SEEDS = range(90)


def outcome(seed: int) -> tuple[int, str | None, int, int]:
    """The seed, what was broken, and how much was done."""
    result = live_through(seed)
    return seed, result.violation, result.acknowledged, result.checked


def test_no_promise_is_broken() -> None:
    workers = os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        outcomes = list(pool.map(outcome, SEEDS, chunksize=4))
    failures = [
        f"seed {seed}: {violation}\n    {replay_command(seed)}"
        for seed, violation, _, _ in outcomes
        if violation is not None
    ]
    assert not failures, f"{len(failures)} of {len(SEEDS)} failed\n" + "\n".join(failures)
    acknowledged = sum(count for _, _, count, _ in outcomes)
    checked = sum(count for _, _, _, count in outcomes)
    assert acknowledged > 50 * len(SEEDS), "too few writes succeed to prove anything"
    assert checked > 500 * len(SEEDS), "too few reads succeed to prove anything"


@pytest.mark.parametrize("seed", [0, 3, 5, 11])
def test_a_seed_is_one_history(seed: int) -> None:
    first = live_through(seed)
    assert first.lives > 1
    assert live_through(seed).trace == first.trace


def test_a_seed_is_the_same_history_in_every_process() -> None:
    """Whatever the interpreter makes of the order of sets."""
    tests = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "support.simulation", "--replay", "3"]
    traces = set()
    for hash_seed in ("0", "1", "2"):
        replayed = subprocess.run(
            command,
            cwd=tests,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            check=False,
        )
        traces.add(xxhash.xxh3_128_hexdigest(replayed.stdout))
    assert len(traces) == 1
