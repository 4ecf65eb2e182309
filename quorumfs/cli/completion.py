"""``quorumfs completion``, and what a shell is told of the word at its cursor."""

import grp
import os
import pwd
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)
from click.types import StringParamType

from quorumfs.cli.command import COMPLETION, Verb
from quorumfs.control import client, mounts
from quorumfs.control.goals import CURRENT, GOALS
from quorumfs.errors import UsageError, UserError
from quorumfs.mount import configuration
from quorumfs.options.table import OPTIONS, Option

SHELLS = ("bash", "zsh", "fish")

PATIENCE_S = 1.0
"""How long (seconds) a user at the keyboard waits for a daemon."""

_SCRIPT = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            plain)
                COMPREPLY+=("$value")
                case $value in *[=:]) compopt -o nospace ;; esac
                ;;
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
        esac
    done < <(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT COMP_BREAKS=$COMP_WORDBREAKS \\
        %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


_SPECIAL = re.compile(r"[^\w@%+=:,./-]")
"""What means something to a shell, or may."""


class _Bash(BashComplete):
    """As click's, for words with ``=`` and ``:``, which bash takes apart.

    The words are read from the line, and what bash takes for words before is not told again.
    """

    source_template = _SCRIPT

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
        _, *words = split_arg_string(line)
        self._incomplete = "" if line[-1:].isspace() or not words else words.pop()
        return words, self._incomplete

    def format_completion(self, item: CompletionItem) -> str:
        if item.type != "plain":
            return f"{item.type},{item.value}"
        breaks = set("=:") & set(os.environ["COMP_BREAKS"])
        told = max((self._incomplete.rfind(one) for one in breaks), default=-1) + 1
        value = _SPECIAL.sub(r"\\\g<0>", item.value.removeprefix(self._incomplete[:told]))
        return f"plain,{value}"


add_completion_class(_Bash)


def _named(text: str, param: click.Parameter | None) -> str:
    """*text*. Raises `UsageError` if it is empty: it would stand for the current directory."""
    if not text:
        name = "an argument" if param is None else param.make_metavar(click.get_current_context())
        raise UsageError(f"{name}: got an empty text, allowed: a path")
    return text


class FilePath(StringParamType):
    """The path of a file, which is not looked at: its file system may never answer."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        return _named(super().convert(value, param, ctx), param)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The shell knows better."""
        return [CompletionItem(incomplete, type="file")]


class MountPoint(StringParamType):
    """Where a quorumfs is mounted that the user may ask; or the NAME of /etc/quorumfs/NAME.conf,
    for the mount point that the file tells of.
    """

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """The mount point. Raises `UsageError` if it is a NAME, and its file tells of none."""
        return configuration.mountpoint_of(_named(super().convert(value, param, ctx), param))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Those in the kernel's table, and the names of those: none of them is touched."""
        places = [m.mountpoint for m in mounts.of_quorumfs() if os.geteuid() in (0, m.owner)]
        return _beginning(incomplete, [*places, *_names(places)])


class MountPointOrImage(MountPoint):
    """The same, or the path of an image: who knows how many there are converts it."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        return StringParamType.convert(self, value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found = super().shell_complete(ctx, param, incomplete)
        return found or [CompletionItem(incomplete, type="file")]


class FilePathOrName(FilePath):
    """The path of a file; or, as the first, the NAME of a disk."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # click gives a single word before to the last of the arguments.
        before = [ctx.args, ctx.params.get("replicas"), ctx.params.get("mountpoint")]
        names = [] if any(before) else _beginning(incomplete, configuration.names())
        return names or super().shell_complete(ctx, param, incomplete)


class Replica(StringParamType):
    """A replica of the mount that the command line names before."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """By file name, or by path where that was begun, or a name is not enough."""
        return _beginning(incomplete, _replicas(ctx, incomplete))


class OptionList(StringParamType):
    """What ``mount -o`` takes: the last item of the list is completed."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        before, comma, item = incomplete.rpartition(",")
        given = {one.partition("=")[0] for one in before.split(",")}
        offered = {name: option for name, option in OPTIONS.items() if name not in given}
        return _items(ctx, before + comma, item, offered)


class Setting(StringParamType):
    """What ``set`` takes: ``OPTION=VALUE``."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from quorumfs.live.settings import TUNED  # noqa: PLC0415 (as mount imports the daemon)

        offered = {name: option for name, option in OPTIONS.items() if option.field in TUNED}
        return _items(ctx, "", incomplete, offered)


class State(StringParamType):
    """What ``wait --for`` takes."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        replicas = _replicas(ctx, incomplete.removeprefix(CURRENT))
        states = [goal for goal in GOALS.split(", ") if not goal.startswith(CURRENT)]
        return _beginning(incomplete, [*states, CURRENT, *(CURRENT + name for name in replicas)])


def _names(places: Iterable[str]) -> Iterator[str]:
    """Of the disks of /etc/quorumfs whose mount point is one of *places*."""
    for name in configuration.names():
        with suppress(UserError):  # a file that says nothing, or is not for this user
            if os.path.normpath(configuration.configured(name).mountpoint) in places:
                yield name


def _replicas(ctx: click.Context, incomplete: str) -> list[str]:
    """What the replicas of the mount that *ctx* names may be called."""
    # Where the value of an option is asked for, click leaves arguments before it as they are.
    mountpoint = ctx.params.get("mountpoint") or next(iter(ctx.args), None)
    if mountpoint is None:
        return []
    try:
        status = client.status(
            configuration.mountpoint_of(mountpoint),
            timeout_s=PATIENCE_S,
            runtime_dir=ctx.params.get("runtime_dir"),
        )
    except UserError:
        return []
    paths = [replica.path for replica in status.replicas]
    names = [os.path.basename(path) for path in paths]
    unique = len(set(names)) == len(names)
    return names if unique and "/" not in incomplete else paths


def _items(
    ctx: click.Context, before: str, item: str, offered: Mapping[str, Option]
) -> list[CompletionItem]:
    """How *item*, one of the options *offered* or its value, may go on, after what is *before*."""
    name, equals, value = item.partition("=")
    if equals:
        values = _values(ctx, offered[name], value) if name in offered else []
        return _beginning(f"{before}{item}", (f"{before}{name}={one}" for one in values))
    return [
        CompletionItem(f"{before}{name}{'=' if option.value else ''}", help=option.help)
        for name, option in offered.items()
        if name.startswith(item)
    ]


def _values(ctx: click.Context, option: Option, value: str) -> list[str]:
    match option.value:
        case "USER":
            return [user.pw_name for user in pwd.getpwall()]
        case "GROUP":
            return [group.gr_name for group in grp.getgrall()]
        case "REPLICA[:REPLICA]":
            before, colon, last = value.rpartition(":")
            return [f"{before}{colon}{name}" for name in _replicas(ctx, last)]
        case choices if "|" in choices:
            return choices.split("|")
    return []


def _beginning(incomplete: str, values: Iterable[str]) -> list[CompletionItem]:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]


@click.command(
    cls=Verb,
    examples=[
        (
            "quorumfs completion bash > /etc/bash_completion.d/quorumfs",
            "For all users of bash with the package bash-completion; for one: "
            "~/.local/share/bash-completion/completions/quorumfs.",
        ),
        (
            "quorumfs completion zsh > /usr/local/share/zsh/site-functions/_quorumfs",
            "For all users of zsh; for one: a directory in fpath.",
        ),
        (
            "quorumfs completion fish > /etc/fish/completions/quorumfs.fish",
            "For all users of fish; for one: ~/.config/fish/completions/quorumfs.fish.",
        ),
        ('eval "$(quorumfs completion bash)"', "For this bash alone."),
    ],
    see=["manual"],
)
@click.argument("shell", type=click.Choice(SHELLS), metavar="bash|zsh|fish")
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that has a shell complete the command lines of quorumfs.

    Completed are commands, their options and files; mount points, and the replicas of the mount
    that stands before on the line; mount options and their values.
    """
    print(script(ctx.find_root().command, shell))


def script(command: click.Command, shell: str) -> str:
    """The same, of *command*, for whoever installs it."""
    kind: Any = get_completion_class(shell)
    return str(kind(command, {}, "quorumfs", COMPLETION).source()).strip()
