"""``quorumfs events``."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quorumfs.cli.answers import Answer
from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import complain, forget_stdout, printable
from quorumfs.cli.statustext import plain
from quorumfs.control.human import time_stamp
from quorumfs.errors import ExitCode, UserError

if TYPE_CHECKING:
    from quorumfs.control import mounts
    from quorumfs.control.recent import Recent

LOOK_S = 0.25
"""Between two questions."""

END_S = 3.0
"""How long (seconds) a daemon that is gone may still be unmounting."""


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs events /mnt/vdisk", "To look on."),
        ("quorumfs events --json /mnt/vdisk | logger -t vdisk", "One JSON object a line."),
    ],
    exits={
        ExitCode.OK: "The disk was unmounted.",
        ExitCode.UNUSABLE: "The daemon died, or does not answer.",
    },
    see=["status", "wait"],
)
@click.option("--now", "only_now", is_flag=True, help="Show what is now, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object a line.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Where mount was told to keep what commands need to find its daemon.",
)
@click.option(
    "--json-schema", "only_schema", is_flag=True, help="Print the JSON Schema of one object."
)
@click.argument("mountpoint", type=MountPoint(), required=False)
def events(
    only_now: bool,
    as_json: bool,
    runtime_dir: Path | None,
    only_schema: bool,
    mountpoint: str | None,
) -> ExitCode:
    """Show how MOUNTPOINT is, then each event as it happens, until Ctrl-C or the mount ends.

    What is now is the status; with --json it is an event named STATUS. What could not be shown,
    because too much happened at once, is counted (LEFT_OUT). What a daemon tells in the moment of
    its end is in its log.
    """
    from quorumfs.control import client  # noqa: PLC0415 (not needed for --help)

    if only_schema:
        from quorumfs.control.event_schema import json_schema  # noqa: PLC0415

        print(json.dumps(json_schema(), indent=2))
        return ExitCode.OK
    if mountpoint is None:
        raise click.UsageError("Missing argument 'MOUNTPOINT'.")
    mount = client.find(mountpoint)
    try:
        # First: what happens while the status is taken is told twice, not never.
        begin = None if only_now else client.events(mount, None, runtime_dir=runtime_dir)
        status = client.status(mountpoint, runtime_dir=runtime_dir, mount=mount)
        answer = Answer(mount.mountpoint, status, owner=mount.owner)
        content = event("STATUS", answer.to_json())
        print(content if as_json else plain(answer), end="\n" if as_json else "", flush=True)
        if begin is not None:
            _follow(mount, begin, runtime_dir, as_json=as_json)
    except BrokenPipeError:
        forget_stdout()
    except KeyboardInterrupt:
        pass
    return ExitCode.OK


def event(name: str, members: dict[str, Any]) -> str:
    """An event of this command's own, as JSON."""
    return json.dumps({"event": name, "time": time_stamp(time.time()), **members})


def _follow(
    mount: "mounts.Mount", begin: "Recent", runtime_dir: Path | None, *, as_json: bool
) -> None:
    """Print each event after *begin*, until the mount ends. Raises `UserError` if that is not in
    order.
    """
    from quorumfs.control import client, mounts  # noqa: PLC0415

    last = begin.last
    gone_at: float | None = None
    silent = False
    while True:
        try:
            recent = client.events(mount, last, runtime_dir=runtime_dir)
        except client.NoAnswerError as error:
            if not silent:
                complain(f"quorumfs: {error}; waiting for it")
            silent = True
            continue
        except client.ControlError:
            if not mounts.is_ours(mount.mountpoint):
                return
            gone_at = gone_at or time.monotonic()
            if time.monotonic() - gone_at > END_S:
                raise
            time.sleep(LOOK_S)
            continue
        if recent.pid != begin.pid:
            raise UserError(
                f"{mount.mountpoint} was unmounted, and mounted anew as pid {recent.pid}: to see "
                "what happens there, give the command again"
            )
        gone_at, silent = None, False
        show(recent, lambda line: print(line, flush=True), as_json=as_json)
        if recent.last == last:
            time.sleep(LOOK_S)
        last = recent.last


def show(recent: "Recent", say: "Callable[[str], None]", *, as_json: bool) -> None:
    """Say what happened, a line for each event."""
    if recent.forgotten:
        count = {"count": recent.forgotten}
        say(event("LEFT_OUT", count) if as_json else f"{recent.forgotten} events were left out")
    for told in recent.events:
        say(json.dumps(_object(told.json)) if as_json else printable(told.text))


def _object(line: str) -> object:
    """The event in a *line* of a daemon's, who may be anybody. Raises `UserError`."""
    try:
        content: object = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("what answers is no quorumfs: it tells an event that is no JSON") from None
    return content
