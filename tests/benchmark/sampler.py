"""Runs quorumfs with a profiler in it: ``sampler.py OUTPUT ARGUMENT...``.

SIGUSR2 begins to sample, a second one ends it and writes OUTPUT. A timer interrupts the main
thread every two milliseconds of real time, and what it was doing is noted, together with the CPU
time it has used since the last time. So both are seen: where it computes, and what it waits for:
for the kernel's next request, or for the interpreter while another thread has it. Nothing is
traced: a tracer would cost more than most calls that it measures.

Python looks for signals where a function begins, and where a call in C has returned. A sample at
the beginning of a function tells of what ran before it: C code that calls Python (pyfuse3's loop),
or the caller. It is noted as such.

Other threads are not sampled: they do system calls, and the kernel counts what these cost.
"""

import dis
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import CodeType, FrameType

INTERVAL_S = 0.002

_RESUME = dis.opmap["RESUME"]

Stack = tuple[tuple[CodeType, int, int], ...]
"""Code, line and offset of the instruction, innermost first."""


class Sampler:
    """Counts stacks of the main thread."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._counts: dict[Stack, int] = {}
        self._cpu_s: dict[Stack, float] = {}
        self._is_running = False
        self._used_s = 0.0

    def install(self) -> None:
        """Wait for SIGUSR2; survives a fork."""
        signal.signal(signal.SIGUSR2, self._toggle)
        signal.signal(signal.SIGALRM, self._sample)
        for signum in (signal.SIGUSR2, signal.SIGALRM):
            signal.siginterrupt(signum, False)

    def _toggle(self, signum: int, frame: FrameType | None) -> None:
        self._is_running = not self._is_running
        interval_s = INTERVAL_S if self._is_running else 0
        signal.setitimer(signal.ITIMER_REAL, interval_s, interval_s)
        if self._is_running:
            self._used_s = time.thread_time()
        else:
            self._write()

    def _sample(self, signum: int, frame: FrameType | None) -> None:
        frames = []
        while frame is not None:
            frames.append((frame.f_code, frame.f_lineno, frame.f_lasti))
            frame = frame.f_back
        stack = tuple(frames)
        used_s = time.thread_time()
        self._counts[stack] = self._counts.get(stack, 0) + 1
        self._cpu_s[stack] = self._cpu_s.get(stack, 0) + used_s - self._used_s
        self._used_s = used_s

    def _write(self) -> None:
        stacks: dict[str, tuple[int, float]] = {}
        for stack, count in self._counts.items():
            code, _, offset = stack[0]
            names = [_name(code, line) for code, line, _ in reversed(stack)]
            if code.co_code[offset] == _RESUME:
                names[-1] = f"before {names[-1]}"
            name = ";".join(names)
            counted, cpu_s = stacks.get(name, (0, 0.0))
            stacks[name] = (counted + count, cpu_s + self._cpu_s[stack])
        unfinished = self._output.with_suffix(".new")
        unfinished.write_text(json.dumps(stacks))
        unfinished.rename(self._output)


def _name(code: CodeType, line: int) -> str:
    """``package.module.function:line``."""
    file = code.co_filename
    roots = [root for root in map(os.path.abspath, sys.path) if file.startswith(f"{root}/")]
    module = file.removeprefix(max(roots, key=len, default="")).removesuffix(".py").strip("/")
    return f"{module.replace('/', '.')}.{code.co_qualname}:{line}"


def main() -> None:
    """Become the command, sampled."""
    Sampler(Path(sys.argv.pop(1))).install()
    sys.path[0] = str(Path.cwd())  # as `python -m quorumfs` does
    from quorumfs.cli import main as quorumfs

    quorumfs()


if __name__ == "__main__":
    main()
