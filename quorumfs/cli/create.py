"""``quorumfs create``."""

import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from quorumfs.cli.command import IF_NEEDED, Verb
from quorumfs.cli.completion import FilePath
from quorumfs.cli.needed import option_of_devices, options_of_change, would
from quorumfs.cli.output import printable
from quorumfs.control.human import human_bytes
from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.quoting import joined
from quorumfs.decisions.record import RoleState
from quorumfs.errors import ExitCode, UsageError, UserError
from quorumfs.mount.daemon import in_child_process
from quorumfs.mount.examination import look_at_all
from quorumfs.options.values import RefusedError, parse_size


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs create --size 20G /nas1/a.img /nas2/b.img", "A new disk of two replicas."),
        (
            "quorumfs create --source /nas1/a.img /nas1/a.img /nas2/b.img",
            "The image a.img is kept, and b.img becomes a copy of it.",
        ),
        (
            "quorumfs create --size 20G --sidecars /var/lib/quorumfs --overwrite /dev/vg1/vdisk "
            "/dev/vg2/vdisk",
            "A new disk of two logical volumes, whatever they hold.",
        ),
    ],
    exits=IF_NEEDED,
    see=["mount", "resolve"],
)
@click.option("--size", metavar="SIZE", help="Size of a new disk, like 20G: new, sparse images.")
@click.option(
    "--source",
    type=FilePath(),
    help="An image to keep: it is copied over all others, which are created if need be.",
)
@click.option(
    "--vote-threshold",
    "threshold",
    type=click.IntRange(min=1),
    help="What mount uses when it is not told another one (default: a majority).",
)
@click.option(
    "--mode",
    "mode_text",
    metavar="OCTAL",
    help="Mode of new images and their sidecars, like 0660, whatever the umask (default: 0600).",
)
@option_of_devices
@click.option(
    "--overwrite",
    is_flag=True,
    help="With --size: give up what those REPLICAs hold that are block devices.",
)
@options_of_change
@click.argument("replicas", type=FilePath(), nargs=-1, required=True, metavar="REPLICA...")
def create(
    size: str | None,
    source: str | None,
    threshold: int | None,
    mode_text: str | None,
    sidecars: str | None,
    overwrite: bool,
    if_needed: bool,
    check: bool,
    replicas: tuple[str, ...],
) -> ExitCode:
    """Make a set of the REPLICA image files or block devices.

    Either new ones of --size, all zeros; or copies of --source, which is one of the replicas. If
    that was interrupted, the same command goes on.
    """
    from quorumfs.mount.copies import create_from  # noqa: PLC0415 (see mount)
    from quorumfs.mount.creating import create_empty  # noqa: PLC0415

    if (size is None) == (source is None):
        raise UsageError("give either --size or --source")
    if overwrite and size is None:
        raise UsageError("--overwrite: got --source too, which is copied over all others anyway")
    others = list(replicas)
    if source is not None:
        others = [path for path in replicas if os.path.abspath(path) != os.path.abspath(source)]
    for path in others:
        if path.endswith("/"):
            raise UsageError(f"{path} names a directory: name the image in it")
    count = len(others) + (source is not None)
    if threshold is not None and threshold > count:
        raise UsageError(f"--vote-threshold {threshold} is more than there are replicas: {count}")
    mode = _parsed("--mode", mode_text or "0600", _image_mode)
    length = None if size is None else _parsed("--size", size, parse_size)
    if source is not None and not others:
        raise UsageError("give the replicas to be made from the source too")
    names = [os.path.abspath(path) for path in ([source] if source else []) + others]
    asked = _Asked(names, length, threshold, mode if mode_text else None, sidecars)
    if if_needed and in_child_process(asked.is_so):
        print(f"nothing to do: {printable(', '.join(names))} are a set already")
        return ExitCode.OK
    if length is not None:
        create_empty(
            replicas,
            length,
            threshold,
            mode,
            directory=sidecars,
            overwrite=overwrite,
            dry_run=check,
        )
        if check:
            return would(f"make {', '.join(names)}, of {human_bytes(length)} each")
        return ExitCode.OK
    assert source is not None
    shown = sys.stderr.isatty()

    def say(done: int, total: int) -> None:
        if shown and total:
            click.echo(f"\rcopied {min(done, total) * 100 // total} %", err=True, nl=False)

    create_from(source, others, threshold, say, mode, directory=sidecars, dry_run=check)
    if check:
        return would(f"copy {names[0]} over {', '.join(names[1:])}")
    if shown:
        click.echo("\r", err=True)
    return ExitCode.OK


@dataclass(frozen=True, slots=True)
class _Asked:
    """The set that is asked for."""

    paths: Sequence[str]
    size: int | None
    """Bytes; None: copies of the first."""
    threshold: int | None
    mode: int | None
    """None, as for the threshold: nobody said."""
    sidecars: str | None
    """The directory for those of block devices."""

    def is_so(self) -> bool:
        """Whether there is such a set already, mounted or not; False if there is none.

        Raises `UserError` if there is another one. Where only some of the paths have a sidecar, or
        a copy was not finished, it is for the command itself to go on or to refuse.
        """
        all_examined = look_at_all(self.paths, directory=self.sidecars)
        sidecars = [one.sidecar for one in all_examined if one.sidecar and one.image]
        if len(sidecars) < len(self.paths):
            return False
        latest = max((one.record for one in sidecars), key=lambda record: record.sequence)
        roles = [role for role in latest.roles if role.state is not RoleState.REMOVED]
        in_use = any(one.in_use or one.open_elsewhere for one in all_examined)
        whole = all(role.state is RoleState.CURRENT for role in roles)
        if self.size is None and not in_use and not whole:
            return False
        if self.size is None and not in_use and any(one.map.count(UNVERIFIED) for one in sidecars):
            raise UserError(
                f"{', '.join(self.paths)} were taken as they are, and not found equal: mount them, "
                "and quorumfs status tells where they differ; to have copies of the first, run: "
                f"quorumfs resolve --keep {joined([self.paths[0], *self.paths])}"
            )
        differences = []
        if len(roles) == len(self.paths):
            assemble([one.found() for one in all_examined])  # refuses what are not one set
        else:
            named = ", ".join(role.path for role in roles)
            differences.append(f"it has {len(roles)} replicas: {named}")
        if self.size not in (None, latest.size):
            differences.append(f"its size is {latest.size} bytes, not {self.size}")
        if self.threshold not in (None, latest.threshold):
            differences.append(f"its vote-threshold is {latest.threshold}, not {self.threshold}")
        images = [one.path for one in all_examined if not one.device]
        for path in images if self.mode is not None else ():
            mode = stat.S_IMODE(os.stat(path).st_mode)
            if mode != self.mode:
                differences.append(f"the mode of {path} is {mode:04o}, not {self.mode:04o}")
        if differences:
            raise UserError(
                f"{self.paths[0]} is a member of a set already, and of another one than is asked "
                f"for: {'; '.join(differences)}"
            )
        return True


def _image_mode(text: str) -> int:
    if not re.fullmatch(r"0?6[0246]{2}", text):
        raise RefusedError("an octal mode from 0600 to 0666 of reading and writing, like 0660")
    return int(text, 8)


def _parsed(name: str, text: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(text)
    except RefusedError as refused:
        raise UsageError(f"option {name}: got {text!r}, allowed: {refused}") from None
