"""The ``quorumfs`` command: parsing and printing, nothing else. One file a subcommand."""

import sys

import click

from quorumfs import __version__
from quorumfs.cli.check import check
from quorumfs.cli.clear import clear
from quorumfs.cli.command import Verbs
from quorumfs.cli.completion import completion
from quorumfs.cli.create import create
from quorumfs.cli.events import events
from quorumfs.cli.examine import examine
from quorumfs.cli.grow import grow
from quorumfs.cli.manual import manual
from quorumfs.cli.membership import add, offline, online, remove, replace
from quorumfs.cli.metrics import metrics
from quorumfs.cli.mount import mount
from quorumfs.cli.mount_helper import mount_helper, umount_helper
from quorumfs.cli.output import (
    OutputError,
    complain,
    forget_stdout,
    watched_stdout,
)
from quorumfs.cli.resolve import resolve
from quorumfs.cli.resync import resync
from quorumfs.cli.scrub import scrub
from quorumfs.cli.setting import set_options
from quorumfs.cli.status import status
from quorumfs.cli.top import top
from quorumfs.cli.umount import umount
from quorumfs.cli.units import generate_units, install_units
from quorumfs.cli.waiting import wait
from quorumfs.errors import ExitCode, UserError
from quorumfs.mount.limits import reset

HELP_WIDTH = 100
"""Columns of help at most, in a terminal that has more: longer lines are hard to read."""


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
    no_args_is_help=False,
)
@click.version_option(__version__, prog_name="quorumfs")
def quorumfs() -> None:
    """One virtual disk kept as N full copies, with the semantics of QEMU's quorum driver.

    Where a command asks for a MOUNTPOINT, the NAME of /etc/quorumfs/NAME.conf will do, too.
    """


quorumfs.add_command(create)
quorumfs.add_command(mount)
quorumfs.add_command(umount)
quorumfs.add_command(status)
quorumfs.add_command(check)
quorumfs.add_command(metrics)
quorumfs.add_command(top)
quorumfs.add_command(events)
quorumfs.add_command(wait)
quorumfs.add_command(offline)
quorumfs.add_command(online)
quorumfs.add_command(add)
quorumfs.add_command(remove)
quorumfs.add_command(replace)
quorumfs.add_command(grow)
quorumfs.add_command(set_options)
quorumfs.add_command(clear)
quorumfs.add_command(examine)
quorumfs.add_command(resolve)
quorumfs.add_command(scrub)
quorumfs.add_command(resync)
quorumfs.add_command(manual)
quorumfs.add_command(completion)
quorumfs.add_command(install_units)
quorumfs.add_command(generate_units)
quorumfs.add_command(mount_helper)
quorumfs.add_command(umount_helper)


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code of ours."""
    reset()
    sys.stdout = watched_stdout()
    exit_code: int
    try:
        exit_code = quorumfs(prog_name="quorumfs", standalone_mode=False) or ExitCode.OK
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough
        forget_stdout()
        exit_code = ExitCode.OK
    except UserError as error:
        exit_code = error.exit_code
        complain(f"quorumfs: {error}")
    except click.UsageError as error:
        exit_code, message = ExitCode.USAGE, error.format_message()
        if error.ctx is not None and error.ctx.command is quorumfs:
            shown = [name for name, one in quorumfs.commands.items() if not one.hidden]
            message = f"{message} Commands: {', '.join(shown)}"
        complain(f"quorumfs: {message}")
    except click.Abort:
        exit_code = ExitCode.INTERRUPTED
        complain("quorumfs: interrupted")
    try:
        sys.stdout.flush()
    except (BrokenPipeError, OutputError):  # told before, or nobody listens
        forget_stdout()
    sys.exit(exit_code)
