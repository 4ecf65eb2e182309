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


def usage(pid: int) -> Usage:
    """What the process has used so far; CPU time counts in clock ticks (10 ms)."""
    # The command's name, in parentheses, may hold anything.
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    memory = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return Usage(
        user_s=int(times[11]) / _TICKS_PER_S,
        system_s=int(times[12]) / _TICKS_PER_S,
        resident_bytes=int(memory["VmRSS"][0]) * 1024,
        peak_bytes=int(memory["VmHWM"][0]) * 1024,
    )


def forget_peak(pid: int) -> None:
    """Let the peak of resident memory begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
