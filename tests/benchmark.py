"""Measure: ``python tests/benchmark.py --help``. Speeds are ratios within one run, never absolute.

Every row is run in turn for each contender, as often as asked; what is printed are medians, and
the ratio of each to the first contender. Needs fio, and for mounting root or fusermount3.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

QUORUMFS = [sys.executable, "-m", "quorumfs"]
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One fio job on ``disk.img``."""

    name: str
    fio: tuple[str, ...]


ROWS = [
    Row("randread 4k qd1", ("--rw=randread", "--bs=4k", "--iodepth=1")),
    Row("randread 4k qd32", ("--rw=randread", "--bs=4k", "--iodepth=32")),
    Row("randwrite 4k qd1", ("--rw=randwrite", "--bs=4k", "--iodepth=1")),
    Row("randwrite 4k qd32", ("--rw=randwrite", "--bs=4k", "--iodepth=32")),
    Row("randrw 64k qd8", ("--rw=randrw", "--bs=64k", "--iodepth=8")),
    Row("read 1M qd4", ("--rw=read", "--bs=1M", "--iodepth=4")),
    Row("write 1M qd4", ("--rw=write", "--bs=1M", "--iodepth=4")),
    Row("write 4k fsync 8", ("--rw=randwrite", "--bs=4k", "--iodepth=1", "--fsync=8")),
]


@dataclass(frozen=True)
class Contender:
    """A way to have the disk."""

    name: str
    replicas: int
    options: str


CONTENDERS = [
    Contender("fifo of 2, metadata=none", 2, "read-pattern=fifo,vote-threshold=1,metadata=none"),
    Contender("fifo of 2, sidecars", 2, "read-pattern=fifo,vote-threshold=1"),
    Contender("vote of 3, metadata=none", 3, "metadata=none"),
    Contender("vote of 3, sidecars", 3, "metadata=sidecar"),
]


def command(*arguments: object) -> None:
    """Run quorumfs; its failure ends the benchmark."""
    subprocess.run([*QUORUMFS, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def mounted(contender: Contender, directory: Path, size: int) -> Iterator[Path]:
    """``disk.img`` of a new set, filled with data."""
    images = [directory / f"{letter}.img" for letter in "abcdef"[: contender.replicas]]
    mountpoint = directory / "mnt"
    mountpoint.mkdir(exist_ok=True)
    if "metadata=none" in contender.options:
        for image in images:
            with image.open("wb") as file:
                file.truncate(size)
    else:
        command("create", "--size", size, *images)
    log = directory / "log"
    command("mount", "-o", contender.options, "--log-file", log, *images, mountpoint)
    try:
        disk = mountpoint / "disk.img"
        fio(disk, ("--rw=write", "--bs=1M", "--iodepth=4", f"--size={size}"), None)
        yield disk
    finally:
        command("umount", mountpoint)
        for image in images:
            image.unlink()
            Path(f"{image}.quorumfs").unlink(missing_ok=True)


def fio(disk: Path, arguments: Sequence[str], seconds: float | None) -> float:
    """Operations a second of one job."""
    timed = ["--time_based", f"--runtime={seconds}"] if seconds else []
    done = subprocess.run(
        ["fio", "--name=row", f"--filename={disk}", "--ioengine=io_uring", "--direct=1",
         "--output-format=json", "--randrepeat=0", *timed, *arguments],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    job = json.loads(done.stdout)["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


@dataclass
class Result:
    """The medians of one row."""

    row: str
    contender: str
    iops: float
    ratio: float
    runs: list[float]


def measure_metadata(directory: Path, size: int, rounds: int, seconds: float) -> list[Result]:
    """What the sidecars cost: each row with and without."""
    results = []
    for pair in (CONTENDERS[:2], CONTENDERS[2:]):
        runs: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for contender in pair:
                with mounted(contender, directory, size) as disk:
                    for row in ROWS:
                        speed = fio(disk, (*row.fio, f"--size={size}"), seconds)
                        runs.setdefault((row.name, contender.name), []).append(speed)
        for row in ROWS:
            base = statistics.median(runs[row.name, pair[0].name])
            for contender in pair:
                speeds = runs[row.name, contender.name]
                median = statistics.median(speeds)
                results.append(Result(row.name, contender.name, median, median / base, speeds))
    return results


def measure_resync(directory: Path, size: int, rounds: int) -> list[Result]:
    """A whole copy by ``create --source`` beside ``cp`` and ``sync`` of the same files."""
    source = directory / "source.img"
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    copy = directory / "copy.img"

    def by_cp() -> None:
        subprocess.run(["cp", source, copy], check=True)
        subprocess.run(["sync", copy], check=True)

    def by_resync() -> None:
        command("create", "--source", source, "--vote-threshold", 1, copy)

    ways: dict[str, Callable[[], None]] = {"cp": by_cp, "resync": by_resync}
    runs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            subprocess.run(["sync"], check=True)
            began = time.monotonic()
            way()
            runs[name].append(size / MIB / (time.monotonic() - began))
            for path in directory.glob("*.quorumfs"):
                path.unlink()
            copy.unlink()
    source.unlink()
    base = statistics.median(runs["cp"])
    return [
        Result("full copy, MiB/s", name, statistics.median(speeds),
               statistics.median(speeds) / base, speeds)
        for name, speeds in runs.items()
    ]  # fmt: skip


def main() -> None:
    """Measure what is asked for, print a table, and save it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["metadata", "resync"])
    parser.add_argument("--directory", type=Path, help="where the replicas go (default: /dev/shm)")
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="of each fio job")
    parser.add_argument("--json", type=Path, help="save the results here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory or Path("/dev/shm")) as name:
        directory = Path(name)
        size = asked.size_mib * MIB
        if asked.what == "metadata":
            results = measure_metadata(directory, size, asked.rounds, asked.seconds)
        else:
            results = measure_resync(directory, size, asked.rounds)
    for result in results:
        print(f"{result.row:20} {result.contender:26} {result.iops:10.0f} {result.ratio:6.2f}")
    if asked.json:
        asked.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
