"""What a process has used, as /proc tells it."""

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all threads, ended ones too."""

    user_s: float
    system_s: float
    resident_bytes: int
    peak_bytes: int
    """The most that was resident since `forget_peak`."""


def usage(pid: int | None) -> Usage:
    """What the process has used so far; CPU time counts in clock ticks (10 ms).

    None: the kernel, of which this is unknown, and told as nothing.
    """
    if pid is None:
        return Usage(0.0, 0.0, 0, 0)
    times = _times(Path(f"/proc/{pid}"))
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    memory = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return Usage(
        user_s=times.user_s,
        system_s=times.system_s,
        resident_bytes=int(memory["VmRSS"][0]) * 1024,
        peak_bytes=int(memory["VmHWM"][0]) * 1024,
    )


def pss_bytes(pid: int) -> int:
    """What the process has in memory of its own, and its share of what it has with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu_s(pid: int) -> float:
    """The CPU time (seconds) of all threads that live, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def forget_peak(pid: int) -> None:
    """Let the peak of resident memory begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@dataclass(frozen=True, slots=True)
class Times:
    """CPU time of one thread, or of several."""

    user_s: float
    system_s: float


def thread_times(pid: int) -> dict[int, Times]:
    """By the id of each thread that lives; the main thread's is *pid*."""
    return {int(task.name): _times(task) for task in Path(f"/proc/{pid}/task").iterdir()}


def _times(directory: Path) -> Times:
    # The command's name, in parentheses, may hold anything.
    fields = (directory / "stat").read_text().rpartition(")")[2].split()
    return Times(int(fields[11]) / _TICKS_PER_S, int(fields[12]) / _TICKS_PER_S)
