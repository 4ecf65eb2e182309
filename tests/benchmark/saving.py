"""Results as JSON: every run, and where it was measured."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from benchmark import machine
from benchmark.alternation import Run
from benchmark.contenders import Contender
from benchmark.idle import Idle
from benchmark.memory import Memory
from benchmark.replacing import Felt
from benchmark.resync import Copy


def facts(contenders: Iterable[Contender]) -> dict[str, object]:
    """What was measured, where; to be asked for before the load of measuring."""
    versions = {contender.name: contender.version() for contender in contenders}
    return {"command": sys.argv[1:], "machine": machine.facts(), "contenders": versions}


def save(
    path: Path, about: Mapping[str, object], runs: Iterable[Run | Copy | Memory | Felt | Idle]
) -> None:
    """Write *runs* and what `facts` gave to *path*."""
    text = json.dumps({**about, "runs": [asdict(run) for run in runs]}, indent=1)
    path.write_text(text + "\n")
