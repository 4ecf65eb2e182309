"""Python and C agree on where each field of what they share lies, and on each number."""

import ctypes
from pathlib import Path

from support.native import compile_c, run

from quorumfs.decisions.latency import BOUNDS_NS
from quorumfs.fastpath import native

STRUCTURES = {
    "struct gate_range": native.Range,
    "struct gate_replica": native.GateReplica,
    "struct gate_counters": native.GateCounters,
    "struct gate": native.Gate,
    "struct request": native.Request,
    "struct server": native.Server,
}

NUMBERS = {
    "GATE_REPLICAS": native.REPLICAS,
    "GATE_RANGES": native.RANGES,
    "GATE_JOURNAL": native.JOURNAL,
    "GATE_HANDLES": native.HANDLES,
    "GATE_BOUNDS": native.BOUNDS,
    "sizeof(struct gate_durations)": 8 * (len(BOUNDS_NS) + 5),
    "offsetof(struct gate_durations, total_ns)": 8 * (len(BOUNDS_NS) + 1),
    "SERVERS": native.SERVERS,
    "TRY_AGAIN": native.TRY_AGAIN,
    **{f"KEEPS_OUT_{one.name}": one.value for one in native.KeepsOut},
    **{f"REQUEST_{one.name}": one.value for one in native.RequestKind},
    **{one.name: one.value for one in native.Phase},
}


def test_python_and_c_agree(tmp_path: Path) -> None:
    asked: dict[str, int] = dict(NUMBERS)
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
