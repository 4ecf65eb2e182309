"""What the commands that act on a running mount have in common."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from quorumfs.cli.output import complain, printable
from quorumfs.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def options_of_action(command: F) -> F:
    """Give *command* the options of all that act on a running mount: ``--json``,
    ``--runtime-dir``."""
    runtime_dir = click.option(
        "--runtime-dir",
        type=click.Path(path_type=Path, resolve_path=True),
        help="Where mount was told to keep what commands need to find its daemon.",
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    return as_json(runtime_dir(command))


def one_of(**flags: bool) -> str | None:
    """The name of the flag that was given, None if none was. Raises `UsageError` for two."""
    given = [name for name, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise UsageError(f"--{given[1]}: got --{given[0]} too, allowed: one of them")
    return given[0] if given else None


def act(
    mountpoint: str, verb: str, *, as_json: bool, runtime_dir: Path | None, **arguments: object
) -> Mapping[str, Any]:
    """Have the daemon of *mountpoint* carry out *verb*, and print what it did; returns its answer.

    Raises `UserError`. After Ctrl-C the action goes on, and the user is told so.
    """
    from quorumfs.control import client  # noqa: PLC0415 (not needed for --help)

    told = ""

    def doing(text: str) -> None:
        nonlocal told
        seen = sys.stderr is not None and sys.stderr.isatty()
        if text and text != told and (seen or text.startswith("waiting")):
            complain(text)
        told = text

    try:
        answer = client.act(mountpoint, verb, doing=doing, runtime_dir=runtime_dir, **arguments)
    except KeyboardInterrupt:
        complain(f"quorumfs: {verb} goes on in the daemon; see: quorumfs status {mountpoint}")
        raise
    if as_json:
        print(json.dumps(answer))
    else:
        print(printable(str(answer.get("message", ""))))
    return answer
