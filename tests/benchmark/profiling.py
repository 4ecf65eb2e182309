"""Where our daemon's time goes during one row."""

import json
import os
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmark import processes, table
from benchmark.alternation import Entrant, Run, disks, place, run_once
from benchmark.contenders import Family, Quorumfs, Space
from benchmark.rows import Row

TOP = 25
"""Lines of each table."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What was sampled, and what the kernel counted meanwhile."""

    row: Row
    plain: Run
    """The same row just before, without the sampler: what that costs."""
    run: Run
    stacks: Mapping[str, tuple[int, float]]
    """Samples, and CPU seconds, by folded stack of the main thread (outermost first)."""
    threads: Mapping[str, processes.Times]
    """CPU time of the main thread, and of all others together."""

    @property
    def requests(self) -> float:
        return self.run.moved_bytes / self.row.block_size


def measure(directory: Path, row: Row, family: Family, size: int, seconds: float) -> Profile:
    """Run *row* twice on quorumfs, and sample it the second time."""
    with tempfile.TemporaryDirectory(prefix="quorumfs-benchmark-") as name:
        output = Path(name) / "samples"
        sampler = Path(__file__).with_name("sampler.py")
        ours = Quorumfs("ours", launcher=(str(sampler), str(output)))
        entrant = Entrant(ours, family, Space(size))
        where = place(directory)
        with disks(directory, [entrant]) as (disk,):
            daemon = disk.pid
            assert daemon is not None
            plain = run_once(disk, entrant, row, seconds, where, 1)
            disk.settle()
            before = processes.thread_times(daemon)
            os.kill(daemon, signal.SIGUSR2)
            run = run_once(disk, entrant, row, seconds, where, 2)
            os.kill(daemon, signal.SIGUSR2)
            stacks = _read(output)
            after = processes.thread_times(daemon)
    return Profile(row, plain, run, stacks, _by_role(daemon, before, after))


def _read(output: Path) -> dict[str, tuple[int, float]]:
    deadline = time.monotonic() + 60
    while not output.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the daemon did not write its samples")
        time.sleep(0.05)
    return {stack: (seen[0], seen[1]) for stack, seen in json.loads(output.read_text()).items()}


def _by_role(
    daemon: int, before: Mapping[int, processes.Times], after: Mapping[int, processes.Times]
) -> dict[str, processes.Times]:
    """Threads that ended meanwhile are not counted: quorumfs keeps its own."""
    none = processes.Times(0.0, 0.0)
    used = {
        thread: processes.Times(
            times.user_s - before.get(thread, none).user_s,
            times.system_s - before.get(thread, none).system_s,
        )
        for thread, times in after.items()
    }
    others = [times for thread, times in used.items() if thread != daemon]
    return {
        "main thread": used[daemon],
        f"{len(others)} others": processes.Times(
            sum(times.user_s for times in others), sum(times.system_s for times in others)
        ),
    }


def report(profile: Profile) -> list[str]:
    """Tables: threads, functions by themselves, functions with what they call, lines."""
    requests = profile.requests
    slower = profile.run.iops / profile.plain.iops
    lines = [
        f"{profile.row.name}, {profile.run.family}, {profile.run.place}: "
        f"{profile.run.iops:.0f} operations/s, {slower:.2f} of the speed without sampling",
        "",
    ]
    lines += table.lines(
        ["CPU µs a request", "user", "system"],
        [
            [who, f"{1e6 * times.user_s / requests:.1f}", f"{1e6 * times.system_s / requests:.1f}"]
            for who, times in profile.threads.items()
        ],
    )
    ways: dict[str, Callable[[str], list[str]]] = {
        "main thread, by function": lambda stack: [_function(stack.split(";")[-1])],
        "main thread, by function with all it calls": lambda stack: sorted(
            set(map(_function, stack.split(";")))
        ),
        "main thread, by line": lambda stack: [stack.split(";")[-1]],
    }
    for title, names in ways.items():
        lines += ["", *_table(title, profile, names)]
    return lines


def _function(place: str) -> str:
    return place.rpartition(":")[0]


def _table(title: str, profile: Profile, names: Callable[[str], list[str]]) -> list[str]:
    counts: Counter[str] = Counter()
    cpu: defaultdict[str, float] = defaultdict(float)
    for stack, (count, cpu_s) in profile.stacks.items():
        for name in names(stack):
            counts[name] += count
            cpu[name] += cpu_s
    samples = sum(count for count, _ in profile.stacks.values())
    total_cpu_s = sum(cpu_s for _, cpu_s in profile.stacks.values())
    telling = [(name, count) for name, count in counts.most_common() if count < samples]
    rows = [
        [
            name,
            f"{100 * count / samples:.1f}",
            f"{100 * cpu[name] / total_cpu_s:.1f}",
            f"{1e6 * cpu[name] / profile.requests:.2f}",
        ]
        for name, count in telling[:TOP]
    ]
    return table.lines([title, "time %", "CPU %", "CPU µs a request"], rows)


def folded(profile: Profile) -> str:
    """The samples in the format that flame graphs are drawn from."""
    return "".join(f"{stack} {count}\n" for stack, (count, _) in profile.stacks.items())
