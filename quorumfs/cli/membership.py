"""``quorumfs offline`` and ``online``."""

import os
from pathlib import Path

import click

from quorumfs.cli.acting import act, options_of_action


@click.command()
@options_of_action
@click.argument("mountpoint")
@click.argument("replica")
def offline(as_json: bool, runtime_dir: Path | None, mountpoint: str, replica: str) -> None:
    """Take REPLICA of the set at MOUNTPOINT out, while the disk stays in use.

    Its image then holds the disk as it was at that moment, as after a power cut; its files are
    closed, and any program may read them: a backup. It stays out, also at later mounts, until
    quorumfs online. Refused where too few replicas would be left.
    """
    act(mountpoint, "offline", as_json=as_json, runtime_dir=runtime_dir, replica=named(replica))


@click.command()
@options_of_action
@click.argument("mountpoint")
@click.argument("replica")
def online(as_json: bool, runtime_dir: Path | None, mountpoint: str, replica: str) -> None:
    """Take REPLICA of the set at MOUNTPOINT in again: it gets what was written meanwhile."""
    act(mountpoint, "online", as_json=as_json, runtime_dir=runtime_dir, replica=named(replica))


def named(replica: str) -> str:
    """What to call *replica* before a daemon, which has another working directory."""
    is_path = os.path.dirname(replica) or os.path.lexists(replica)
    return os.path.abspath(replica) if is_path else replica
