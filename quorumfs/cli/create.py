"""``quorumfs create``."""

import os
import re
import sys
from collections.abc import Callable

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
@click.option(
    "--mode",
    "mode_text",
    metavar="OCTAL",
    default="0600",
    help="Mode of new images and their sidecars, like 0660, whatever the umask (default: 0600).",
)
@click.argument("replicas", nargs=-1, required=True, metavar="REPLICA...")
def create(
    size: str | None,
    source: str | None,
    threshold: int | None,
    mode_text: str,
    replicas: tuple[str, ...],
) -> None:
    """Make a set of the REPLICA image files.

    Either new ones of --size, all zeros; or copies of --source, which is one of the replicas. If
    that was interrupted, the same command goes on.
    """
    from quorumfs.mount.administration import create_empty, create_from  # noqa: PLC0415 (see mount)

    if (size is None) == (source is None):
        raise UsageError("give either --size or --source")
    others = list(replicas)
    if source is not None:
        others = [path for path in replicas if os.path.abspath(path) != os.path.abspath(source)]
    count = len(others) + (source is not None)
    if threshold is not None and threshold > count:
        raise UsageError(f"--vote-threshold {threshold} is more than there are replicas: {count}")
    mode = _parsed("--mode", mode_text, _image_mode)
    if size is not None:
        create_empty(replicas, _parsed("--size", size, parse_size), threshold, mode)
        return
    assert source is not None
    if not others:
        raise UsageError("give the replicas to be made from the source too")
    shown = sys.stderr.isatty()

    def say(done: int, total: int) -> None:
        if shown and total:
            click.echo(f"\rcopied {min(done, total) * 100 // total} %", err=True, nl=False)

    create_from(source, others, threshold, say, mode)
    if shown:
        click.echo("\r", err=True)


def _image_mode(text: str) -> int:
    if not re.fullmatch(r"0?6[0246]{2}", text):
        raise RefusedError("an octal mode from 0600 to 0666 of reading and writing, like 0660")
    return int(text, 8)


def _parsed(name: str, text: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(text)
    except RefusedError as refused:
        raise UsageError(f"option {name}: got {text!r}, allowed: {refused}") from None
