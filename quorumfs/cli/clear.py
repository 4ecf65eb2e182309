"""``quorumfs clear``."""

from pathlib import Path

import click

from quorumfs.cli.acting import act, options_of_action
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import MountPoint, Replica
from quorumfs.cli.membership import named


@click.command(
    cls=Verb,
    examples=[("quorumfs clear /mnt/vdisk b.img", "The cable of b.img was mended.")],
    exits=OF_A_MOUNT,
    see=["status"],
)
@options_of_action
@click.argument("mountpoint", type=MountPoint())
@click.argument("replicas", type=Replica(), nargs=-1, metavar="[REPLICA...]")
def clear(
    as_json: bool, runtime_dir: Path | None, mountpoint: str, replicas: tuple[str, ...]
) -> None:
    """Forget the errors that the REPLICAs of MOUNTPOINT had, by default all of them.

    Their counters of errors begin at 0 again. Those that are not current are tried at once, not
    after a wait that grows with each attempt. What is still wrong stays in the status.
    """
    names = [named(replica) for replica in replicas]
    act(mountpoint, "clear", as_json=as_json, runtime_dir=runtime_dir, replicas=names)
