"""The commands and their arguments."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeAlias

from benchmark import contenders, matrix, rows, saving

MIB = 1 << 20

_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Measure quorumfs beside its peers. Speeds are ratios within one run, never "
        "absolute. Needs fio, qemu-utils, and root or fusermount3.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_matrix(commands)
    _add_metadata(commands)
    asked = parser.parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    run: Callable[[argparse.Namespace], None] = asked.run
    try:
        run(asked)
    except KeyboardInterrupt:
        return 130
    except (ValueError, RuntimeError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """End, once: cleaning up must not be interrupted."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _command(
    commands: _Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    description: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=description,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are taken")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save every run here")
    return parser


def _add_matrix(commands: _Commands) -> None:
    parser = _command(commands, "matrix", run_matrix, "every row beside QEMU's quorum driver")
    _add_matrix_arguments(parser, "peer ours raw null")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the ratios here")


def _add_metadata(commands: _Commands) -> None:
    parser = _command(commands, "metadata", run_matrix, "what the sidecars cost")
    _add_matrix_arguments(parser, "none ours")
    parser.set_defaults(svg=None)


def _add_matrix_arguments(parser: argparse.ArgumentParser, who: str) -> None:
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=who.split(),
        metavar="NAME",
        help=f"of {', '.join(contenders.STANDARD)}, or NAME=CHECKOUT: quorumfs of another "
        "checkout; the first is what others are compared with",
    )
    parser.add_argument(
        "--directory",
        nargs="+",
        type=Path,
        default=[Path("/dev/shm"), Path("/var/tmp")],
        metavar="DIR",
        help="where the replicas go",
    )
    parser.add_argument("--size-mib", type=int, default=512, help="of the disk")
    parser.add_argument("--seconds", type=float, default=3, help="of each run")


def run_matrix(asked: argparse.Namespace) -> None:
    """Measure, print, save, draw."""
    plan = matrix.Plan(
        rows=rows.matching(asked.rows),
        families=matrix.FAMILIES,
        contenders=[contenders.named(name) for name in asked.contenders],
        directories=asked.directory,
        size=asked.size_mib * MIB,
        rounds=asked.rounds,
        seconds=asked.seconds,
    )
    about = saving.facts(plan.contenders)
    runs = list(matrix.measure(plan))
    print("\n".join(matrix.report(plan, runs)))
    if asked.json:
        saving.save(asked.json, about, runs)
    if asked.svg:
        names = [contender.name for contender in plan.contenders]
        asked.svg.write_text(matrix.chart(plan, runs, names[0], names[1]).svg())
