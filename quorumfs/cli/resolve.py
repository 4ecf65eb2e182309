"""``quorumfs resolve``."""

import json
from pathlib import Path

import click

from quorumfs.cli.acting import act
from quorumfs.cli.command import OF_A_MOUNT, Verb
from quorumfs.cli.completion import FilePath, MountPointOrImage
from quorumfs.cli.membership import named
from quorumfs.cli.needed import option_of_devices
from quorumfs.errors import UsageError
from quorumfs.mount import configuration
from quorumfs.mount.daemon import in_child_process


@click.command(
    cls=Verb,
    examples=[
        (
            "quorumfs resolve --keep a.img /mnt/vdisk",
            "A disk in use: a.img is right where they differ.",
        ),
        (
            "quorumfs resolve --dry-run --keep a.img a.img b.img",
            "After a split brain: what b.img would lose.",
        ),
    ],
    exits=OF_A_MOUNT,
    see=["examine", "scrub", "status"],
)
@click.option("--keep", required=True, type=FilePath(), help="The replica whose data is right.")
@click.option("--dry-run", is_flag=True, help="Only say what would be overwritten.")
@click.option(
    "--takeover", is_flag=True, help="Also where another host, which is down, has them open."
)
@click.option(
    "--range",
    "range_",
    metavar="OFFSET:LENGTH",
    help="Of a mounted set: decide only there; bytes, or with K, M, G, T.",
)
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Of a mounted set: where mount was told to keep what commands need.",
)
@option_of_devices
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.argument(
    "replicas", type=MountPointOrImage(), nargs=-1, required=True, metavar="MOUNTPOINT | REPLICA..."
)
def resolve(
    keep: str,
    dry_run: bool,
    takeover: bool,
    range_: str | None,
    runtime_dir: Path | None,
    sidecars: str | None,
    as_json: bool,
    replicas: tuple[str, ...],
) -> None:
    """Decide whose data is right, where nothing else tells.

    With the MOUNTPOINT of a set in use: where its replicas differ and none has a majority (see
    status), all get what --keep holds.

    With REPLICA..., after a split brain, or where adopted images differ: all become copies of
    --keep, which is among them; none may be mounted. Only sidecars are written: the next mount
    copies what differs. An image without a sidecar becomes a member.
    """
    place = configuration.mountpoint_of(replicas[0]) if len(replicas) == 1 else None
    if place is not None and _is_mountpoint(place):
        if dry_run or takeover:
            raise UsageError("--dry-run, --takeover: got a mount point too, allowed: replicas")
        offset, length = (None, None) if range_ is None else _range(range_)
        act(
            place,
            "resolve",
            as_json=as_json,
            runtime_dir=runtime_dir,
            keep=named(keep),
            offset=offset,
            length=length,
        )
        return
    if range_ is not None:
        raise UsageError(
            f"--range: got replicas too, allowed: a mount point; {replicas[0]} is none"
        )
    from quorumfs.mount.keeping import keep_one  # noqa: PLC0415 (see mount)

    resolution = in_child_process(
        lambda: keep_one(keep, replicas, directory=sidecars, dry_run=dry_run, takeover=takeover)
    )
    if as_json:
        content = {
            "dry_run": dry_run,
            "kept": list(resolution.kept),
            "overwritten": [
                {"path": one.path, "bytes_at_most": one.differs_at_most, "why": one.why}
                for one in resolution.overwritten
            ],
        }
        click.echo(json.dumps(content))
        return
    would = "would be" if dry_run else "is"
    for path in resolution.kept:
        click.echo(f"{path} {would} kept")
    for one in resolution.overwritten:
        will = "would be" if dry_run else "will be, at the next mount,"
        click.echo(f"{one.path} {will} overwritten in up to {one.differs_at_most} bytes: {one.why}")


def _is_mountpoint(path: str) -> bool:
    """Whether *path* is where a set is mounted."""
    from quorumfs.control import client  # noqa: PLC0415 (not needed for --help)

    try:
        client.find(path)
    except client.NotMountedError:
        return False
    return True


def _range(text: str) -> tuple[int, int]:
    """The offset and the length (bytes) in *text*. Raises `UsageError`."""
    from quorumfs.options import values  # noqa: PLC0415

    offset, _, length = text.partition(":")
    try:
        return 0 if offset == "0" else values.parse_size(offset), values.parse_size(length)
    except values.RefusedError:
        raise UsageError(
            f"--range: got {text!r}, allowed: OFFSET:LENGTH in bytes, or with K, M, G or T"
        ) from None
