"""The ``quorumfs`` command: parsing and printing, nothing else. One file a subcommand."""

import sys

import click

from quorumfs import __version__
from quorumfs.cli.create import create
from quorumfs.cli.examine import examine
from quorumfs.cli.mount import mount
from quorumfs.cli.resolve import resolve
from quorumfs.cli.status import printable, status
from quorumfs.cli.umount import umount
from quorumfs.errors import ExitCode, UserError
from quorumfs.limits import reset


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(__version__, prog_name="quorumfs")
def quorumfs() -> None:
    """One virtual disk kept as N full copies, with the semantics of QEMU's quorum driver."""


quorumfs.add_command(create)
quorumfs.add_command(mount)
quorumfs.add_command(umount)
quorumfs.add_command(status)
quorumfs.add_command(examine)
quorumfs.add_command(resolve)


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code of ours."""
    reset()
    try:
        sys.exit(quorumfs(standalone_mode=False) or ExitCode.OK)
    except UserError as error:
        exit_code, message = error.exit_code, str(error)
    except click.UsageError as error:
        exit_code, message = ExitCode.USAGE, error.format_message()
        if error.ctx is not None and error.ctx.command is quorumfs:
            message = f"{message} Commands: {', '.join(quorumfs.commands)}"
    except click.Abort:
        exit_code, message = ExitCode.INTERRUPTED, "interrupted"
    # What it quotes may come from a sidecar, which anybody may have written.
    print(f"quorumfs: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(exit_code)
