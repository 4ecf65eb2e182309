"""The ``quorumfs`` command: parsing and printing, nothing else. One file a subcommand."""

import os
import sys
from importlib import import_module

import click

from quorumfs.cli.command import COMPLETION, ReaderGoneError, Verbs
from quorumfs.cli.output import (
    OutputError,
    complain,
    forget_stdout,
    watched_stdout,
)
from quorumfs.errors import ExitCode, UserError
from quorumfs.mount.limits import reset

VERBS = {
    "create": "create.create",
    "mount": "mount.mount",
    "umount": "umount.umount",
    "status": "status.status",
    "check": "check.check",
    "metrics": "metrics.metrics",
    "top": "top.top",
    "events": "events.events",
    "wait": "waiting.wait",
    "offline": "membership.offline",
    "online": "membership.online",
    "add": "membership.add",
    "remove": "membership.remove",
    "replace": "membership.replace",
    "grow": "grow.grow",
    "set": "setting.set_options",
    "clear": "clear.clear",
    "examine": "examine.examine",
    "resolve": "resolve.resolve",
    "scrub": "scrub.scrub",
    "resync": "resync.resync",
    "manual": "manual.manual",
    "completion": "completion.completion",
    "install-units": "units.install_units",
    "generate-units": "units.generate_units",
    "mount-helper": "mount_helper.mount_helper",
    "umount-helper": "mount_helper.umount_helper",
}
"""Where each command is, by name: a module of this package, and what the module calls it. A command
is imported when it is used: the daemon of a mount does not keep all others in memory."""

HELP_WIDTH = 100
"""Columns of help at most, in a terminal that has more: longer lines are hard to read."""


@click.group(
    cls=Verbs,
    places={name: f"{__name__}.{place}" for name, place in VERBS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
    no_args_is_help=False,
)
@click.version_option(package_name="quorumfs", prog_name="quorumfs")
def quorumfs() -> None:
    """One virtual disk kept as N full copies, with the semantics of QEMU's quorum driver.

    Where a command asks for a MOUNTPOINT, the NAME of /etc/quorumfs/NAME.conf will do, too.
    """


def _is_somewhere() -> bool:
    """Whether the current directory is there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code of ours."""
    reset()
    if COMPLETION in os.environ:
        import_module(f"{__name__}.completion")  # it tells click how to answer each shell
    sys.stdout = watched_stdout()
    exit_code: int
    try:
        exit_code = quorumfs(prog_name="quorumfs", standalone_mode=False) or ExitCode.OK
        sys.stdout.flush()
    except (BrokenPipeError, ReaderGoneError):
        forget_stdout()
        exit_code = ExitCode.OK
    except UserError as error:
        exit_code = error.exit_code
        complain(f"quorumfs: {error}")
    except click.UsageError as error:
        exit_code, message = ExitCode.USAGE, " ".join(error.format_message().split())
        if error.ctx is not None and error.ctx.command is quorumfs:
            message = f"{message} Commands: {', '.join(one.name or '' for one in quorumfs.shown())}"
        complain(f"quorumfs: {message}")
    except FileNotFoundError:
        if _is_somewhere():
            raise
        exit_code = ExitCode.FAILED
        complain("quorumfs: the current directory was removed: change to another one first")
    except click.Abort:
        exit_code = ExitCode.INTERRUPTED
        complain("quorumfs: interrupted")
    try:
        sys.stdout.flush()
    except (BrokenPipeError, OutputError):  # told before, or nobody listens
        forget_stdout()
    sys.exit(exit_code)
