"""``quorumfs create``."""

import os
import sys

import click

from quorumfs.errors import UsageError
from quorumfs.options import RefusedError, parse_size


@click.command()
@click.option("--size", metavar="SIZE", help="Size of a new disk, like 20G: new, sparse images.")
@click.option(
    "--source",
    type=click.Path(),
    help="An image to keep: it is copied over all others, which are created if need be.",
)
@click.option(
    "--vote-threshold",
    "threshold",
    type=click.IntRange(min=1),
    help="What mount uses when it is not told another one (default: a majority).",
)
@click.argument("replicas", nargs=-1, required=True, metavar="REPLICA...")
def create(
    size: str | None, source: str | None, threshold: int | None, replicas: tuple[str, ...]
) -> None:
    """Make a set of the REPLICA image files.

    Either new ones of --size, all zeros; or copies of --source, which is one of the replicas.
    """
    from quorumfs.administration import create_empty, create_from  # noqa: PLC0415 (see mount)

    if (size is None) == (source is None):
        raise UsageError("give either --size or --source")
    others = list(replicas)
    if source is not None:
        others = [path for path in replicas if os.path.abspath(path) != os.path.abspath(source)]
    count = len(others) + (source is not None)
    if threshold is not None and threshold > count:
        raise UsageError(f"--vote-threshold {threshold} is more than there are replicas: {count}")
    if size is not None:
        try:
            bytes_ = parse_size(size)
        except RefusedError as refused:
            raise UsageError(f"option --size: got {size!r}, allowed: {refused}") from None
        create_empty(replicas, bytes_, threshold)
        return
    assert source is not None
    if not others:
        raise UsageError("give the replicas to be made from the source too")
    shown = sys.stderr.isatty()

    def say(done: int, total: int) -> None:
        if shown and total:
            click.echo(f"\rcopied {min(done, total) * 100 // total} %", err=True, nl=False)

    create_from(source, others, threshold, say)
    if shown:
        click.echo("\r", err=True)
