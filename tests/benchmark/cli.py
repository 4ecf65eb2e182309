"""The commands and their arguments."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from benchmark import (
    contenders,
    idle,
    interrupts,
    matrix,
    memory,
    profiling,
    replacing,
    replicas,
    resync,
    rows,
    saving,
    sizes,
)

MIB = 1 << 20
TMPFS = Path("/dev/shm")
DISK = Path("/var/tmp")

_Asked: TypeAlias = argparse.Namespace
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "rows": {"nargs": "+", "default": ["*"], "metavar": "GLOB", "help": "rows, by name"},
    "contenders": {
        "nargs": "+",
        "metavar": "NAME",
        "help": f"of {', '.join(contenders.STANDARD)}, or NAME=CHECKOUT: quorumfs of another "
        "checkout, or NAME=PROGRAM: another qemu-storage-daemon; the first is what others are "
        "compared with",
    },
    "directory": {
        "nargs": "+",
        "type": Path,
        "default": [TMPFS],
        "metavar": "DIR",
        "help": "where the replicas go, one after the other",
    },
    "size-mib": {"type": int, "default": 512, "help": "of the disk"},
    "small-gib": {"type": int, "default": 1, "help": "one disk"},
    "large-gib": {"type": int, "default": 16384, "help": "the other disk"},
    "limit": {
        "nargs": "+",
        "default": ["100M", "10M"],
        "metavar": "RATE",
        "help": "of the resync, bytes a second",
    },
    "mounts": {"type": int, "default": 20, "help": "at once"},
    "rounds": {"type": int, "default": 3, "help": "of which medians are taken"},
    "seconds": {"type": float, "default": 3.0, "help": "of each run"},
    "json": {"type": Path, "metavar": "FILE", "help": "save every run here"},
    "svg": {"type": Path, "metavar": "FILE", "help": "draw the ratios here"},
    "folded": {"type": Path, "metavar": "FILE", "help": "save samples for a flame graph here"},
}


def main() -> int:
    """Run the command; returns its exit code."""
    asked = _parser().parse_args()
    interrupts.install()
    run: Callable[[_Asked], None] = asked.run
    try:
        run(asked)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Measure quorumfs beside its peers. Speeds are ratios within one run, never "
        "absolute. Needs fio, qemu-utils, and root or fusermount3.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    timed = "directory size-mib rounds seconds json"
    _command(
        commands,
        "matrix",
        _matrix,
        f"rows contenders {timed} svg",
        "every row beside QEMU's quorum driver",
        contenders=["peer", "ours", "raw", "null"],
        directory=[TMPFS, DISK],
    )
    _command(
        commands,
        "metadata",
        _matrix,
        f"rows contenders {timed} svg",
        "every row with and without sidecars",
        contenders=["none", "ours"],
    )
    _command(
        commands,
        "replicas",
        _replicas,
        f"rows {timed} svg",
        "speed over the number of replicas",
        rows=["4k rand* qd32", "1M *"],
        size_mib=128,
    )
    _command(
        commands,
        "sizes",
        _sizes,
        "rows small-gib large-gib directory rounds seconds json",
        "what a large, sparse disk costs beside a small one",
        rows=["4k rand[rw][er]* qd*"],
    )
    _command(
        commands,
        "memory",
        _memory,
        "directory size-mib seconds json",
        "resident memory: idle, busy, idle again",
    )
    _command(
        commands,
        "idle",
        _idle,
        "contenders directory mounts seconds json",
        "what many mounts cost while nobody uses them",
        contenders=["ours", "peer"],
        seconds=60.0,
    )
    _command(
        commands,
        "resync",
        _resync,
        "directory size-mib rounds json",
        "a full copy beside cp",
        directory=[DISK],
    )
    _command(
        commands,
        "replace",
        _replace,
        "contenders directory size-mib limit rounds seconds json",
        "what a guest feels while a replica is replaced",
        contenders=["ours"],
        size_mib=1024,
    )
    profile = _command(
        commands,
        "profile",
        _profile,
        "directory size-mib seconds folded",
        "where our daemon's time goes in one row",
        seconds=10.0,
    )
    profile.add_argument("row", metavar="ROW", help="its name, or a pattern of it")
    profile.add_argument("--vote", action="store_true", help="over 3, instead of fifo over 2")
    return parser


def _command(
    commands: _Commands,
    name: str,
    run: Callable[[_Asked], None],
    arguments: str,
    description: str,
    **defaults: object,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=description,
        description=description[0].upper() + description[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for argument in arguments.split():
        command.add_argument(f"--{argument}", **_ARGUMENTS[argument])
    command.set_defaults(run=run, **defaults)
    return command


def _matrix(asked: _Asked) -> None:
    plan = matrix.Plan(
        rows=rows.matching(asked.rows),
        contenders=[contenders.named(name) for name in asked.contenders],
        directories=asked.directory,
        size=asked.size_mib * MIB,
        rounds=asked.rounds,
        seconds=asked.seconds,
    )
    about = saving.facts(plan.contenders)
    runs = list(matrix.measure(plan))
    _print(matrix.report(plan, runs))
    if asked.json:
        saving.save(asked.json, about, runs)
    if asked.svg:
        asked.svg.write_text(matrix.chart(plan, runs).svg())


def _replicas(asked: _Asked) -> None:
    plan = replicas.Plan(
        rows=rows.matching(asked.rows),
        directories=asked.directory,
        size=asked.size_mib * MIB,
        rounds=asked.rounds,
        seconds=asked.seconds,
    )
    about = saving.facts(contenders.both())
    runs = list(replicas.measure(plan))
    _print(replicas.report(plan, runs))
    if asked.json:
        saving.save(asked.json, about, runs)
    if asked.svg:
        asked.svg.write_text(replicas.chart(plan, runs).svg())


def _sizes(asked: _Asked) -> None:
    chosen = rows.matching(asked.rows)
    spaces = sizes.spaces(asked.small_gib, asked.large_gib)
    about = saving.facts(contenders.both())
    runs = []
    for directory in asked.directory:
        runs += list(sizes.measure(directory, chosen, spaces, asked.rounds, asked.seconds))
        _print(sizes.report(directory, chosen, spaces, runs))
    if asked.json:
        saving.save(asked.json, about, runs)


def _memory(asked: _Asked) -> None:
    about = saving.facts(contenders.both())
    measured = [
        each
        for directory in asked.directory
        for each in memory.measure(directory, asked.size_mib * MIB, asked.seconds)
    ]
    _print(memory.report(measured))
    if asked.json:
        saving.save(asked.json, about, measured)


def _idle(asked: _Asked) -> None:
    entrants = [contenders.named(name) for name in asked.contenders]
    about = saving.facts(entrants)
    measured = [
        each
        for directory in asked.directory
        for each in idle.measure(directory, entrants, asked.mounts, asked.seconds)
    ]
    _print(idle.report(measured))
    if asked.json:
        saving.save(asked.json, about, measured)


def _resync(asked: _Asked) -> None:
    about = saving.facts([contenders.STANDARD["ours"]])
    copies = []
    for directory in asked.directory:
        of = list(resync.measure(directory, asked.size_mib * MIB, asked.rounds))
        _print(resync.report(of))
        copies += of
    if asked.json:
        saving.save(asked.json, about, copies)


def _replace(asked: _Asked) -> None:
    entrants = [contenders.named(name) for name in asked.contenders]
    ours = [entrant for entrant in entrants if isinstance(entrant, contenders.Quorumfs)]
    if ours != entrants:
        raise ValueError("only quorumfs replaces a replica: take ours, or NAME=CHECKOUT")
    about = saving.facts(entrants)
    felt = []
    for directory in asked.directory:
        of = list(
            replacing.measure(
                directory, ours, asked.limit, asked.size_mib * MIB, asked.rounds, asked.seconds
            )
        )
        _print(replacing.report(of))
        felt += of
    if asked.json:
        saving.save(asked.json, about, felt)


def _profile(asked: _Asked) -> None:
    family = matrix.FAMILIES[1 if asked.vote else 0]
    row = rows.matching([asked.row])[0]
    for directory in asked.directory:
        profile = profiling.measure(directory, row, family, asked.size_mib * MIB, asked.seconds)
        _print(profiling.report(profile))
        if asked.folded:
            asked.folded.write_text(profiling.folded(profile))


def _print(lines: list[str]) -> None:
    print("\n".join(["", *lines]), flush=True)
