"""``quorumfs check``: the answer that Nagios, Icinga and their kin expect."""

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import click

from quorumfs.cli.answers import Answer, ask_all
from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import OutputError, complain, forget_stdout, printable
from quorumfs.control.advice import describe
from quorumfs.control.status import DiskState, Status
from quorumfs.errors import ExitCode, UserError

NOTHING = ("ok", "warning", "critical", "unknown")


class Service(IntEnum):
    """The exit codes of a monitoring plugin."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


_SERVICE = {
    DiskState.HEALTHY: Service.OK,
    DiskState.DEGRADED: Service.WARNING,
    DiskState.NEEDS_OPERATOR: Service.CRITICAL,
    DiskState.NO_QUORUM: Service.CRITICAL,
}

_SEVERITY = (Service.OK, Service.UNKNOWN, Service.WARNING, Service.CRITICAL)


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs check", "All disks that are mounted."),
        ("quorumfs check --nothing critical", "A host on which one is to be mounted."),
    ],
    exits={
        Service.OK: "OK: all are healthy.",
        Service.WARNING: "Warning: one is degraded.",
        Service.CRITICAL: "Critical: one is unusable, needs the operator, does not answer or is "
        "not mounted.",
        Service.UNKNOWN: "Unknown: nothing is known.",
        ExitCode.USAGE: "The command line cannot be meant like this.",
    },
    see=["metrics", "status"],
)
@click.option(
    "--nothing",
    type=click.Choice(NOTHING),
    default="unknown",
    show_default=True,
    help="The result to report where no MOUNTPOINT is given and nothing is mounted.",
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Look for daemons there too: the directory that was given to mount --runtime-dir.",
)
@click.argument("mountpoints", type=MountPoint(), nargs=-1, metavar="[MOUNTPOINT...]")
def check(nothing: str, runtime_dir: Path | None, mountpoints: tuple[str, ...]) -> int:
    """Check each MOUNTPOINT, or all quorumfs mounts, for Nagios, Icinga and their kin.

    Prints one line with performance data, then what to do.
    """
    worst = Service.UNKNOWN
    try:
        worst, lines = _report(nothing, runtime_dir, mountpoints)
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        forget_stdout()
    except UserError as error:  # whoever looks at the exit code alone is told the worst
        complain(f"quorumfs: {error}")
        if isinstance(error, OutputError):
            forget_stdout()
        return max(worst, Service.UNKNOWN, key=_SEVERITY.index)
    return worst


def _report(
    nothing: str, runtime_dir: Path | None, mountpoints: tuple[str, ...]
) -> tuple[Service, list[str]]:
    """The worst that was found, and the lines to print."""
    view = ask_all(mountpoints, runtime_dir)
    services = {answer: _service(answer) for answer in view.answers}
    default = Service.UNKNOWN if view.unasked else Service[nothing.upper()]
    worst = max(services.values(), key=_SEVERITY.index, default=default)
    bad = [answer for answer, service in services.items() if service is not Service.OK]
    told = [f"{printable(answer.mountpoint)} is {_word(answer)}" for answer in bad]
    summary = "; ".join(told) or (f"{len(services)} healthy" if services else "no quorumfs mounts")
    if view.unasked:
        summary += f"; {view.unasked} of other users not asked"
    summary = summary.replace("|", "/")  # which begins the performance data
    lines = [f"QUORUMFS {worst.name}: {summary} | {_performance(view.answers)}".rstrip(" |")]
    for answer in bad:
        status = answer.status
        told = [str(answer.error)] if status is None else describe(status)
        lines += map(printable, told)
    return worst, lines


def _service(answer: Answer) -> Service:
    return Service.CRITICAL if answer.status is None else _SERVICE[answer.status.state]


def _word(answer: Answer) -> str:
    if answer.status is not None:
        return answer.status.state.value
    return "unknown" if answer.error is None else answer.error.problem


def _performance(answers: Sequence[Answer]) -> str:
    """Performance data: per disk what is current, what is out of sync, and errors."""
    statuses = [answer.status for answer in answers if answer.status is not None]
    return " ".join(value for status in statuses for value in _values(status))


def _values(status: Status) -> list[str]:
    def labelled(name: str) -> str:
        text = f"{printable(status.mountpoint)} {name}".replace("'", "''").replace("=", "_")
        return f"'{text}'"

    current = sum(replica.current for replica in status.replicas)
    lacking = sum(replica.out_of_sync_bytes for replica in status.replicas)
    errors = sum(replica.errors.total for replica in status.replicas)
    least = status.vote_threshold
    return [
        f"{labelled('current')}={current};@0:{len(status.replicas) - 1};@0:{least - 1};0;"
        f"{len(status.replicas)}",
        f"{labelled('out_of_sync')}={lacking}B",
        f"{labelled('errors')}={errors}c",
    ]
