"""``quorumfs status``."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from quorumfs.cli.answers import View, ask_all, json_schema
from quorumfs.cli.command import Verb
from quorumfs.cli.completion import MountPoint
from quorumfs.cli.output import OutputError, forget_stdout
from quorumfs.cli.statuspicture import console_of_stdout, live_on, picture
from quorumfs.cli.statustext import plain
from quorumfs.control.status import worst
from quorumfs.errors import ExitCode

WATCH_S = 1.0
"""Between two pictures of --watch."""


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs status", "All disks that are mounted."),
        ("quorumfs status --watch /mnt/vdisk", "One disk, while it is resynced."),
        ("quorumfs status -x --json", "Whatever is not healthy, for a program."),
    ],
    exits={
        ExitCode.OK: "All that are shown are healthy. Of several the worst state counts.",
        ExitCode.FAILED: "Degraded: the disk can be used, and something is to be done or awaited.",
        ExitCode.UNUSABLE: "Unusable: too few replicas are current, or the daemon is gone, does "
        "not answer, or answers what is no status.",
        ExitCode.NEEDS_OPERATOR: "A person must decide something.",
        ExitCode.USAGE: "It is not mounted, or not to be asked by this user; or a wrong option.",
    },
    see=["check", "events", "examine", "metrics", "wait"],
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: one object for one MOUNTPOINT, else (and with -x) a list of them.",
)
@click.option("-x", "only_unhealthy", is_flag=True, help="Show only mounts that are not healthy.")
@click.option("--watch", "watched", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option(
    "--runtime-dir",
    type=click.Path(path_type=Path, resolve_path=True),
    help="Look for daemons there too: the directory that was given to mount --runtime-dir.",
)
@click.option(
    "--json-schema", "only_schema", is_flag=True, help="Print the JSON Schema of one object."
)
@click.argument("mountpoints", type=MountPoint(), nargs=-1, metavar="[MOUNTPOINT...]")
def status(
    as_json: bool,
    only_unhealthy: bool,
    watched: bool,
    runtime_dir: Path | None,
    only_schema: bool,
    mountpoints: tuple[str, ...],
) -> ExitCode:
    """Show the state of each MOUNTPOINT, or of all quorumfs mounts, and what to do next."""
    if only_schema:
        print(json.dumps(json_schema(), indent=2))
        return ExitCode.OK
    single = len(mountpoints) == 1 and not only_unhealthy
    in_colours = sys.stdout.isatty() and not as_json

    def look() -> View:
        view = ask_all(mountpoints, runtime_dir)
        return view.unhealthy() if only_unhealthy else view

    def as_text(view: View) -> str:
        if not as_json:
            return "\n".join([*map(plain, view.answers), *view.remarks])
        content = [answer.to_json() for answer in view.answers]
        return json.dumps(content[0] if single else content)

    view = View([])
    try:
        if watched:
            if not in_colours:
                return watch(look, lambda view: print(as_text(view), flush=True))
            console = console_of_stdout()
            with live_on(console) as live:
                return watch(
                    look, lambda view: live.update(picture(view, console.width), refresh=True)
                )
        view = look()
        if single and not as_json and view.answers[0].error is not None:
            raise view.answers[0].error
        if in_colours:
            console = console_of_stdout()
            console.print(picture(view, console.width))
        else:
            print(as_text(view).rstrip("\n"), flush=True)
    except BrokenPipeError:
        forget_stdout()
        return ExitCode.OK
    except OutputError as error:  # whoever looks at the exit code alone is told the worst
        error.exit_code = worst([view.exit_code, error.exit_code])
        raise
    return view.exit_code


def watch(look: Callable[[], View], show: Callable[[View], None]) -> ExitCode:
    """Show what *look* finds every second until Ctrl-C; the exit code is of what was shown last."""
    exit_code = ExitCode.OK
    try:
        while True:
            view = look()
            exit_code = view.exit_code
            show(view)
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return exit_code
