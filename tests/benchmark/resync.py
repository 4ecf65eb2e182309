"""A full copy by ``create --source`` beside ``cp``, and ``cp`` that is made durable as ours is."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark import table
from benchmark.alternation import place

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy, timed."""

    place: str
    way: str
    round_number: int
    bytes_per_s: float


def _by_cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--reflink=never", source, target], check=True)


def _by_cp_and_fsync(source: Path, target: Path) -> None:
    _by_cp(source, target)
    subprocess.run(["sync", target], check=True)


def _by_resync(source: Path, target: Path) -> None:
    create = [sys.executable, "-m", "quorumfs", "create", "--vote-threshold", "1"]
    subprocess.run(
        [*create, "--source", source, source, target], check=True, stdout=subprocess.DEVNULL
    )


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "cp": _by_cp,
    "cp + fsync": _by_cp_and_fsync,
    "resync": _by_resync,
}


def measure(directory: Path, size: int, rounds: int) -> Iterator[Copy]:
    """Each way in turn, to a new file each time, with nothing left to write from before."""
    with tempfile.TemporaryDirectory(prefix="quorumfs-benchmark-", dir=directory) as name:
        source, target = Path(name) / "source.img", Path(name) / "target.img"
        with source.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        for number in range(1, rounds + 1):
            for way, copy in WAYS.items():
                subprocess.run(["sync", "--file-system", name], check=True)
                began = time.monotonic()
                copy(source, target)
                took_s = time.monotonic() - began
                for left in (target, *Path(name).glob("*.quorumfs")):
                    left.unlink()
                yield Copy(place(directory), way, number, size / took_s)


def report(copies: Sequence[Copy]) -> list[str]:
    """A table of medians."""
    medians = {
        way: statistics.median(copy.bytes_per_s for copy in copies if copy.way == way)
        for way in WAYS
    }
    rows = [
        [way, f"{median / MIB:.0f}", *(f"{median / medians[base]:.2f}" for base in list(WAYS)[:2])]
        for way, median in medians.items()
    ]
    return table.lines(["full copy", "MiB/s", "to cp", "to cp + fsync"], rows)
