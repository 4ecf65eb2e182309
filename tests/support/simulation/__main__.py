"""Many histories on all cores; see ``--help``."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count

from support.simulation.runner import Result, live_through, replay_command


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


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulate lives of a replicated disk.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seeds", metavar="A-B", help="the histories of these seeds")
    what.add_argument("--hours", type=float, help="as many as fit into this time")
    what.add_argument("--replay", type=int, metavar="SEED", help="one, with its trace")
    parser.add_argument("--first", type=int, default=None, help="the first seed of --hours")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        result = live_through(arguments.replay)
        print("\n".join(result.trace))
        print(result.violation or "no promise was broken")
        return int(result.violation is not None)
    if arguments.seeds is not None:
        first, _, last = arguments.seeds.partition("-")
        return int(run_many(iter(range(int(first), int(last or first) + 1)), None) > 0)
    start = time.time_ns() // 1_000_000 if arguments.first is None else arguments.first
    deadline = time.monotonic() + 3600 * arguments.hours
    return int(run_many(count(start), deadline) > 0)


if __name__ == "__main__":
    sys.exit(main())
