"""``quorumfs resolve``."""

import json

import click

from quorumfs.mount.daemon import in_child_process


@click.command()
@click.option("--keep", required=True, type=click.Path(), help="The replica whose data is right.")
@click.option("--dry-run", is_flag=True, help="Only say what would be overwritten.")
@click.option(
    "--takeover", is_flag=True, help="Also where another host, which is down, has them open."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.argument("replicas", nargs=-1, required=True, metavar="REPLICA...")
def resolve(
    keep: str, dry_run: bool, takeover: bool, as_json: bool, replicas: tuple[str, ...]
) -> None:
    """Decide after a split brain, or where adopted images differ: all become copies of --keep.

    REPLICA... are all replicas, the one to keep among them; none may be mounted. Only sidecars are
    written: the next mount copies what differs. An image without a sidecar becomes a member.
    """
    from quorumfs.mount import administration  # noqa: PLC0415 (see mount)

    resolution = in_child_process(
        lambda: administration.keep(keep, replicas, dry_run=dry_run, takeover=takeover)
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
