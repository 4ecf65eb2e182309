"""What a store costs that is well, near or far: 4k requests of fio with some sets of options."""

import json
import tempfile
from pathlib import Path

from stores.kinds import Store
from stores.network import run
from stores.sets import SIZE, MountedSet
from stores.trial import bench

HEADER = ["distance", "options", "read MB/s", "p99 ms", "write MB/s", "p99 ms", "replica"]

_DISTANCES_S = {"calm": 0.0, "20 ms": 0.02, "200 ms": 0.2}
_DEFAULTS = "read-pattern=quorum,vote-threshold=2,write-mostly=none,write-ack=all"
_RECOMMENDED = "read-pattern=fifo,vote-threshold=1,write-mostly=b.img,write-ack=all"
_AHEAD = "read-pattern=fifo,vote-threshold=1,write-mostly=b.img,write-ack=threshold,behind-max=50ms"
_OPTIONS = {"defaults": _DEFAULTS, "recommended": _RECOMMENDED, "write-ack=threshold": _AHEAD}
_SECONDS = 3


def rows(kind: type[Store]) -> list[list[str]]:
    """One for each distance and set of options, after those of a set without a store."""
    found = _rows_here()
    for distance, round_trip_s in _DISTANCES_S.items():
        with bench(kind, relayed=True) as made:
            assert made.relay is not None
            made.set.mount(made.store.options)
            made.set.wait_until_healthy(120)
            for name, options in _OPTIONS.items():
                made.set.wait_until_healthy(120)
                made.set.set_options(options)
                made.relay.round_trip_s = round_trip_s
                found.append([distance, name, *_figures(made.set)])
                made.relay.round_trip_s = 0.0
            made.set.wait_until_healthy(120)
            made.set.unmount()
            made.store.settle()
            made.store.unmount()
    return found


def _rows_here() -> list[list[str]]:
    """Both replicas are local: what all else is to be compared with."""
    with tempfile.TemporaryDirectory(prefix="stores-", dir="/var/tmp") as directory:
        here = MountedSet(Path(directory), Path(directory) / "b.img")
        here.create()
        here.mount(Store.options)
        try:
            here.set_options(_DEFAULTS)
            found = [["both here", "defaults", *_figures(here)]]
            here.set_options(_RECOMMENDED)
            found.append(["both here", "recommended", *_figures(here)])
        finally:
            here.unmount()
    return found


def _figures(measured: MountedSet) -> list[str]:
    read, write = (_fio(str(measured.disk), pattern) for pattern in ("randread", "randwrite"))
    return [*read, *write, measured.status()["replicas"][1]["state"]]


def _fio(disk: str, pattern: str) -> tuple[str, str]:
    """Throughput and p99 latency of 4k requests, four at a time."""
    told = run(
        "fio", "--name=row", "--output-format=json", f"--filename={disk}", f"--size={SIZE}",
        "--allow_file_create=0", "--bs=4k", "--iodepth=4", "--ioengine=libaio", "--direct=1",
        f"--rw={pattern}", "--time_based", f"--runtime={_SECONDS}",
    )  # fmt: skip
    job = json.loads(told)["jobs"][0][pattern.removeprefix("rand")]
    p99_ms = job["clat_ns"]["percentile"]["99.000000"] / 1e6
    return f"{job['bw_bytes'] / 1e6:.2f}", f"{p99_ms:.1f}"
