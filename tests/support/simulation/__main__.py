"""Many histories on all cores; see ``--help``."""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count

import pytest

from support.simulation.mutations import MUTATIONS
from support.simulation.runner import BAD_ENDS, Result, live_through, replay_command


def outcome(seed: int) -> Result:
    """The history of *seed*, without its trace unless it failed: it is sent between processes."""
    result = live_through(seed)
    trace = result.trace[-1:] if result.violation is None else result.trace
    return Result(seed, result.violation, trace, result.acknowledged, result.checked, result.lives)


def run_many(seeds: Iterator[int], deadline: float | None) -> int:
    """Live through *seeds* until *deadline* (monotonic); how many failed."""
    failed = done = acknowledged = 0
    workers = os.cpu_count() or 1
    began = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        while deadline is None or time.monotonic() < deadline:
            batch = [seed for _, seed in zip(range(16 * workers), seeds, strict=False)]
            if not batch:
                break
            for result in pool.map(outcome, batch):
                done += 1
                acknowledged += result.acknowledged
                if result.violation is not None:
                    failed += 1
                    print(f"seed {result.seed}: {result.violation}")
                    print(f"    {replay_command(result.seed)}", flush=True)
    took_s = time.monotonic() - began
    print(f"{done} histories in {took_s:.0f} s, {acknowledged} writes: {failed} failed")
    return failed


def first_hit(seeds: Sequence[int], name: str) -> tuple[str, Result | None]:
    """A mutation, and the first of *seeds* whose history breaks a promise with it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        MUTATIONS[name](monkeypatch)
        for seed in seeds:
            result = live_through(seed)
            if result.violation is not None and result.violation.startswith(BAD_ENDS):
                return name, result
    return name, None


def run_mutations(seeds: Sequence[int]) -> int:
    """Show for each mutation which seed hits it first; how many none does."""
    missed = 0
    width = max(map(len, MUTATIONS))
    with ProcessPoolExecutor(os.cpu_count() or 1) as pool:
        for name, result in pool.map(partial(first_hit, seeds), MUTATIONS):
            if result is None:
                missed += 1
                print(f"{name:{width}}  not hit", flush=True)
            else:
                print(f"{name:{width}}  seed {result.seed}: {result.violation}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} hit by {len(seeds)} seeds")
    return missed


def seeds_of(text: str) -> range:
    """The seeds of ``A-B``, both included, or of ``A``."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulate lives of a replicated disk.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seeds", type=seeds_of, metavar="A-B", help="the histories of these seeds")
    what.add_argument("--hours", type=float, help="as many as fit into this time")
    what.add_argument("--replay", type=int, metavar="SEED", help="one, with its trace")
    parser.add_argument("--first", type=int, default=None, help="the first seed of --hours")
    parser.add_argument(
        "--mutations",
        action="store_true",
        help="break one rule of order after the other, and show for each the first of --seeds that "
        "notices",
    )
    arguments = parser.parse_args()
    if arguments.mutations:
        if arguments.seeds is None:
            parser.error("--mutations needs --seeds")
        return int(run_mutations(arguments.seeds) > 0)
    if arguments.replay is not None:
        result = live_through(arguments.replay)
        print("\n".join(result.trace))
        print(result.violation or "no promise was broken")
        return int(result.violation is not None)
    if arguments.seeds is not None:
        return int(run_many(iter(arguments.seeds), None) > 0)
    start = time.time_ns() // 1_000_000 if arguments.first is None else arguments.first
    deadline = time.monotonic() + 3600 * arguments.hours
    return int(run_many(count(start), deadline) > 0)


if __name__ == "__main__":
    sys.exit(main())
