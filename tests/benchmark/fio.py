"""One run of fio."""

import contextlib
import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmark.rows import PATTERN, Row

HANGS_S = 300.0
"""A run that takes this much longer than asked is given up (a flush of a slow disk may last)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What fio says of one job, reads and writes together."""

    iops: float
    bytes_per_s: float
    moved_bytes: int
    p99_us: float
    """Completion latency: of reads or of writes, whichever is higher."""
    sync_p99_us: float
    """Of its fsyncs; 0 where it makes none."""


def run(disk: Path, row: Row, size: int, seconds: float) -> Outcome:
    """Run *row* on the first *size* bytes of *disk*.

    Raises `RuntimeError` with fio's words if it fails.
    """
    command = [
        "fio", "--name=row", "--thread", "--group_reporting", "--output-format=json",
        f"--filename={disk}", "--allow_file_create=0", f"--size={size}", f"--bs={row.block_size}",
        "--time_based", f"--runtime={round(seconds * 1000)}ms",
        "--randrepeat=0", "--norandommap", "--random_generator=tausworthe64",
        f"--buffer_pattern=0x{PATTERN.hex()}", *row.fio,
    ]  # fmt: skip
    # A Ctrl-C while it is being started would leave it behind.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us: fio would report a short run as a good one
    )
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        report, complaints = process.communicate(timeout=seconds + HANGS_S)
    except BaseException:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it ends with the daemon it waits for
            process.wait(timeout=10)
        raise
    if process.returncode:
        last = "\n".join((complaints or report).splitlines()[-5:])
        raise RuntimeError(f"fio failed on {disk}: {last}")
    return _outcome(json.loads(report)["jobs"][0])


def _outcome(job: dict[str, dict[str, float]]) -> Outcome:
    directions = [job["read"], job["write"]]
    return Outcome(
        iops=sum(each["iops"] for each in directions),
        bytes_per_s=sum(each["bw_bytes"] for each in directions),
        moved_bytes=int(sum(each["io_bytes"] for each in directions)),
        p99_us=max(_p99_us(each, "clat_ns") for each in directions),
        sync_p99_us=_p99_us(job.get("sync", {}), "lat_ns"),
    )


def _p99_us(direction: dict[str, object] | dict[str, float], kind: str) -> float:
    latency = direction.get(kind)
    percentiles = latency.get("percentile", {}) if isinstance(latency, dict) else {}
    return float(percentiles.get("99.000000", 0)) / 1000
