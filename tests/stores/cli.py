"""The command: every store through every outage, and tables of what that cost."""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from benchmark.table import lines

from stores import speed
from stores.kinds import KINDS
from stores.network import require_own_namespace
from stores.trial import CASES, Outcome, TrialError, attempt, versions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/stores", description=__doc__)
    parser.add_argument("--stores", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--outages", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--no-speed", action="store_true", help="only the outages")
    parser.add_argument(
        "--slack", type=float, default=2.0, metavar="SECONDS",
        help="how much longer than promised a request may take, for the daemon is not alone",
    )  # fmt: skip
    parsed = parser.parse_args(arguments)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    require_own_namespace()
    print(versions([KINDS[name] for name in parsed.stores]), flush=True)
    try:
        failures = _run(
            parsed.stores, parsed.outages, slack_s=parsed.slack, speeds=not parsed.no_speed
        )
    except KeyboardInterrupt:
        return 130
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _run(
    stores: Sequence[str], outages: Sequence[str], *, slack_s: float, speeds: bool
) -> list[str]:
    """Try all of it, print the tables, and return what was wrong."""
    failures: list[str] = []
    for name in stores:
        rows = []
        for outage in outages:
            try:
                outcome = attempt(KINDS[name], CASES[outage], slack_s)
            except (RuntimeError, OSError, TrialError) as error:
                failures += (f"{name}, {outage}: {line}" for line in str(error).splitlines())
                print(f"FAILED {name}, {outage}: {error}", file=sys.stderr, flush=True)
                continue
            rows.append(_row(outage, outcome))
            print(f"{name}: {'  '.join(rows[-1])}", file=sys.stderr, flush=True)
        _print_table(f"{name}: outages", _OUTAGE_HEADER, rows)
        if speeds:
            try:
                _print_table(f"{name}: speed", speed.HEADER, speed.rows(KINDS[name]))
            except (RuntimeError, OSError, TrialError) as error:
                failures += (f"{name}, speed: {line}" for line in str(error).splitlines())
    return failures


_OUTAGE_HEADER = [
    "outage", "read stall", "write stall", "flush stall", "healthy after", "copied", "states",
]  # fmt: skip


def _row(outage: str, outcome: Outcome) -> list[str]:
    stalls = [f"{outcome.longest[kind]:.2f} s" for kind in ("read", "write", "flush")]
    copied = f"{outcome.copied_bytes / 2**20:.1f} MiB"
    states = " ".join(outcome.states)
    return [outage, *stalls, f"{outcome.healthy_after_s:.1f} s", copied, states]


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}", *lines(header, rows), sep="\n", flush=True)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
