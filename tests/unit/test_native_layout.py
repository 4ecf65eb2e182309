"""Python and C agree on where each field of what they share lies, and on each number."""

import ctypes
import re
from pathlib import Path

from support.native import SOURCES, compile_c, run

from quorumfs.decisions.latency import BOUNDS_NS
from quorumfs.decisions.record import REGIONS
from quorumfs.fastpath import native
from quorumfs.fuse import shim

STRUCTURES = {
    "struct gate_range": native.Range,
    "struct gate_replica": native.GateReplica,
    "struct gate_plane": native.GatePlane,
    "struct gate_counters": native.GateCounters,
    "struct gate": native.Gate,
    "struct request": native.Request,
    "struct server": native.Server,
}

NUMBERS = {
    "GATE_REPLICAS": native.REPLICAS,
    "GATE_PLANES": native.PLANES,
    "GATE_RANGES": native.RANGES,
    "GATE_JOURNAL": native.JOURNAL,
    "GATE_HANDLES": native.HANDLES,
    "GATE_BOUNDS": native.BOUNDS,
    "GATE_REGIONS": REGIONS,
    "SERVERS": native.SERVERS,
    "TRY_AGAIN": native.TRY_AGAIN,
    **{f"KEEPS_OUT_{one.name}": one.value for one in native.KeepsOut},
    **{f"REQUEST_{one.name}": one.value for one in native.RequestKind},
    **{one.name: one.value for one in native.Phase},
}

OF_C_ALONE = {"GATE_TIMED", "QUEUE_MAX", "IDLE", "BRIEF", "BUSY"}
"""Numbers that Python need not know."""

HISTOGRAM = {
    "sizeof(struct gate_durations)": 8 * (len(BOUNDS_NS) + 5),
    "offsetof(struct gate_durations, total_ns)": 8 * (len(BOUNDS_NS) + 1),
}
"""Python's own memory, which is no structure there."""


def test_python_and_c_agree(tmp_path: Path) -> None:
    asked: dict[str, int] = {**NUMBERS, **HISTOGRAM}
    for name, structure in STRUCTURES.items():
        asked[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            asked[f"offsetof({name}, {field})"] = place.offset
            asked[f"sizeof((({name} *)0)->{field})"] = place.size
    lines = "".join(f'    printf("%ld\\n", (long)({one}));\n' for one in asked)
    source = tmp_path / "layout.c"
    source.write_text(
        f'#include "loop.h"\n#include <stdio.h>\nint main(void)\n{{\n{lines}    return 0;\n}}\n'
    )
    compile_c(tmp_path / "layout", source)
    told = map(int, run(tmp_path / "layout").split())
    assert dict(zip(asked, told, strict=True)) == asked


def test_nothing_that_they_share_is_left_out() -> None:
    shared = {one for one in vars(native).values() if isinstance(one, type)}
    assert {one for one in shared if issubclass(one, ctypes.Structure)} == set(STRUCTURES.values())
    headers = "".join((SOURCES / name).read_text() for name in ("gate.h", "loop.h"))
    headers = re.sub(r"/\*.*?\*/", "", headers, flags=re.DOTALL)
    bodies = re.findall(r"\benum(?: \w+)? \{(.*?)\}", headers, re.DOTALL)
    numbers = {one.split("=")[0].strip() for body in bodies for one in body.split(",")} - {""}
    assert numbers - OF_C_ALONE == NUMBERS.keys()


def test_python_and_the_shim_agree() -> None:
    source = Path(shim.__file__).with_name("shim.c").read_text()
    bits = dict(re.findall(r"#define (\w+_WRITE) \(UINT64_C\(1\) << (\d+)\)", source))
    assert {name: 1 << int(bit) for name, bit in bits.items()} == {
        "DURABLE_WRITE": shim.DURABLE_WRITE,
        "DIRECT_WRITE": shim.DIRECT_WRITE,
    }
    kinds = dict(re.findall(r"\b(CALL_\w+) = (\d+)", source))
    assert {name: int(number) for name, number in kinds.items()} == {
        f"CALL_{one.name}": one.value for one in shim.Call
    }
