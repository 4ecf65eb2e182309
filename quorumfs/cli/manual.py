"""``quorumfs manual``: the manual pages, from what the commands tell of themselves."""

import inspect
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import click

from quorumfs.cli import mdoc
from quorumfs.cli.command import EXIT_STATUS, Verb, Verbs
from quorumfs.cli.mount_helper import EXIT_STATUS as HELPER_STATUS
from quorumfs.cli.mount_helper import FSTAB_ONLY, FSTAB_ONLY_BEGIN
from quorumfs.control.mounts import FS_TYPE, SUBTYPE
from quorumfs.errors import UserError
from quorumfs.mount import configuration
from quorumfs.options.table import option_rows

RECOVERY = "quorumfs-recovery"
"""The page of what to do when something is wrong."""

CONFIGURATION = "quorumfs.conf"
"""The page of the files of /etc/quorumfs."""

HELPER = "mount.quorumfs"
"""The page of fstab, and of what mount(8) and umount(8) run."""

TEXTS = {
    "quorumfs-administration": (
        "change, back up, check and watch a disk of quorumfs that is in use",
        ["add", "events", "grow", "metrics", "offline", "replace", "scrub", "set", "status"],
    ),
    "quorumfs-concepts": (
        "what quorumfs promises, and how it keeps it",
        ["create", "mount", "status"],
    ),
    "quorumfs-limits": (
        "what quorumfs does not do, or does otherwise than expected",
        ["mount", "resolve"],
    ),
    "quorumfs-machines": (
        "disks of quorumfs for QEMU and libvirt, and at boot",
        ["grow", "install-units", "mount"],
    ),
    RECOVERY: (
        "what to do when something is wrong with a disk of quorumfs",
        ["examine", "replace", "resolve", "scrub", "status"],
    ),
    "quorumfs-stores": (
        "replicas of quorumfs on block devices, and on stores that are far or slow",
        ["create", "mount", "replace", "set"],
    ),
}
"""Pages of the files in ``pages``, with a summary, and the commands that they tell of."""

OTHERS = {CONFIGURATION: 5, **dict.fromkeys(TEXTS, 7), HELPER: 8}
"""Pages that are none of a command, and their sections."""


@click.command(
    cls=Verb,
    examples=[
        ("quorumfs manual --directory /usr/local/share/man", "For all users, as root."),
        ("quorumfs manual --directory ~/.local/share/man", "For one user."),
    ],
    see=["completion"],
)
@click.option(
    "--directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the directories man1, man5, man7 and man8 are, or are to be made.",
)
@click.pass_context
def manual(ctx: click.Context, directory: Path) -> None:
    """Write the manual pages: quorumfs(1), one for each command, quorumfs.conf(5),
    mount.quorumfs(8), and in section 7 quorumfs-concepts, -administration, -stores, -machines,
    -limits and -recovery.

    Pages that are there are replaced.
    """
    group = ctx.find_root().command
    assert isinstance(group, Verbs)
    for name, page in pages(group).items():
        place = directory / f"man{name[-1]}" / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(page, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {place}: {error.strerror}") from None


def pages(group: Verbs) -> dict[str, str]:
    """All manual pages of *group* by file name."""
    verbs = {verb.name or "": verb for verb in group.shown() if isinstance(verb, Verb)}
    made = {"quorumfs.1": _overview(group, verbs)}
    made |= {f"quorumfs-{name}.1": _page(name, verb) for name, verb in sorted(verbs.items())}
    others = {f"{CONFIGURATION}.5": _configuration(), f"{HELPER}.8": _helper()}
    return made | others | {f"{name}.7": _text(name) for name in TEXTS}


def _overview(group: click.Group, verbs: Mapping[str, Verb]) -> str:
    summary, details = _described(group)
    commands = mdoc.rows(
        (f"Xr quorumfs-{name} 1", mdoc.text(_described(verb)[0]))
        for name, verb in sorted(verbs.items())
    )
    first = ["create", "mount", "status", "umount"]
    examples = mdoc.paragraphs(
        mdoc.text("A disk of two replicas is made, mounted, looked at and unmounted:"),
        "".join(mdoc.command(verbs[name].examples[0][0]) for name in first),
    )
    return "".join(
        [
            _head("quorumfs", 1, summary),
            mdoc.section("Synopsis", ".Nm\n.Ar COMMAND\n.Op Ar OPTION ...\n.Op Ar ARGUMENT ...\n"),
            mdoc.section("Description", _paragraphs(f"{summary}.", *details) + commands),
            mdoc.section("Options", mdoc.rows(_options(group))),
            mdoc.section("Exit status", _exit_status(EXIT_STATUS)),
            mdoc.section("Examples", examples),
            mdoc.section(
                "See also",
                mdoc.references({**{f"quorumfs-{name}": 1 for name in verbs}, **OTHERS}),
            ),
        ]
    )


def _page(name: str, verb: Verb) -> str:
    summary, details = _described(verb)
    examples = mdoc.paragraphs(
        *(piece for line, use in verb.examples for piece in (mdoc.text(use), mdoc.command(line)))
    )
    tables = [
        mdoc.section(heading, mdoc.rows((mdoc.literal(term), mdoc.text(use)) for term, use in rows))
        for heading, rows in verb.tables.items()
    ]
    others = {f"quorumfs-{other}": 1 for other in verb.see}
    return "".join(
        [
            _head(f"quorumfs-{name}", 1, summary),
            mdoc.section("Synopsis", f".Nm quorumfs {name}\n{_synopsis(verb)}"),
            mdoc.section("Description", _paragraphs(f"{summary}.", *details)),
            mdoc.section("Options", mdoc.rows(_options(verb))),
            *tables,
            mdoc.section("Exit status", _exit_status(verb.exit_status)),
            mdoc.section("Examples", examples),
            mdoc.section("See also", mdoc.references({"quorumfs": 1, **others, RECOVERY: 7})),
        ]
    )


def _configuration() -> str:
    summary = "a disk of quorumfs that has a name on this host"
    place = f"{configuration.DIRECTORY}/NAME{configuration.SUFFIX}"
    described = _paragraphs(
        f"Each disk of this host that is to have a NAME has the file `{place}`. Wherever a command "
        "asks for a mount point, the NAME stands for the one in the file. In fstab(5) it stands "
        "for the replicas. The unit of the disk is `quorumfs@NAME.service`.",
        "NAME begins with a letter of ASCII, a digit or an underscore; dots and hyphens may follow."
        " It has at most 100 characters.",
        "The file is text in TOML: paths and options are in quotes, and what follows a # is a "
        "comment. It is refused if it says anything else than these:",
    )
    keys = mdoc.rows(
        (mdoc.literal(name), mdoc.text(f"{key.help} Allowed is {key.allowed}."))
        for name, key in configuration.KEYS.items()
    )
    examples = "".join(
        [
            mdoc.text(f"A disk with the name vdisk, in `{place.replace('NAME', 'vdisk')}`:"),
            mdoc.listing(configuration.EXAMPLE),
            mdoc.text("It is mounted once; or now, and at each boot:"),
            mdoc.command("quorumfs mount vdisk"),
            mdoc.command("systemctl enable --now quorumfs@vdisk"),
        ]
    )
    also = {f"quorumfs-{name}": 1 for name in ("install-units", "mount", "status", "umount")}
    options = mdoc.rows((mdoc.literal(term), mdoc.text(use)) for term, use in option_rows())
    return "".join(
        [
            _head(CONFIGURATION, 5, summary),
            mdoc.section("Synopsis", f".Pa {place}\n"),
            mdoc.section("Description", described + keys),
            mdoc.section("Mount options", options),
            mdoc.section("Examples", examples),
            mdoc.section("See also", mdoc.references({"quorumfs": 1, **also})),
        ]
    )


def _helper() -> str:
    summary = "mount and unmount disks of quorumfs by mount(8) and fstab(5)"
    synopsis = (
        f".Nm mount\n.Fl t Cm {FS_TYPE}\n.Op Fl o Ar OPTIONS\n.Ar SOURCE DIRECTORY\n"
        f".Nm umount\n.Ar DIRECTORY\n"
    )
    described = _paragraphs(
        f"The programs `mount.{SUBTYPE}` and `umount.{SUBTYPE}` are for mount(8) and umount(8), "
        f"which run them for file systems of the type `{FS_TYPE}`, also for those in fstab(5). "
        "They come with the package of a distribution, or by `quorumfs install-units`.",
        r"SOURCE is the paths of the replicas with colons between them, where `\:` is a colon in a "
        r"path, and in fstab(5) `\040` a space. Or it is the NAME of a file in /etc/quorumfs.",
        "OPTIONS are those of `quorumfs mount`. To change them in a disk in use add `remount`. "
        "What only mount(8) or systemd know is for them: "
        f"{', '.join(f'`{name}`' for name in sorted(FSTAB_ONLY))}, and whatever begins with "
        f"{', '.join(f'`{begin}`' for begin in FSTAB_ONLY_BEGIN)}.",
        "If there is an option like `_netdev`, umount(8) returns when the replicas are synced. "
        "Without one it takes the disk for any FUSE file system, and the daemon ends a moment "
        "later. A disk in use is left alone when a person unmounts it, and waited for when systemd "
        "does.",
    )
    status = mdoc.rows((str(code), mdoc.text(meaning)) for code, meaning in HELPER_STATUS.items())
    examples = "".join(
        [
            mdoc.text("A line of fstab(5) for two replicas, and one for a NAME:"),
            mdoc.listing(
                [
                    f"/nas1/a.img:/nas2/b.img /mnt/vdisk {FS_TYPE} read-pattern=fifo,_netdev 0 0",
                    f"vdisk /mnt/vdisk {FS_TYPE} noauto,x-systemd.automount 0 0",
                ]
            ),
        ]
    )
    also = {"quorumfs-install-units": 1, "quorumfs-mount": 1, "quorumfs-umount": 1}
    return "".join(
        [
            _head(HELPER, 8, summary),
            mdoc.section("Synopsis", synopsis),
            mdoc.section("Description", described),
            mdoc.section("Exit status", status),
            mdoc.section("Examples", examples),
            mdoc.section("See also", mdoc.references({**also, CONFIGURATION: 5})),
        ]
    )


def _text(name: str) -> str:
    summary, verbs = TEXTS[name]
    place = files("quorumfs.cli").joinpath("pages", f"{name.removeprefix('quorumfs-')}.md")
    also = {f"quorumfs-{verb}": 1 for verb in verbs} | dict.fromkeys(TEXTS, 7)
    del also[name]
    return "".join(
        [
            _head(name, 7, summary),
            mdoc.from_markdown(place.read_text(encoding="utf-8")),
            mdoc.section("See also", mdoc.references({"quorumfs": 1, **also})),
        ]
    )


def _head(name: str, number: int, summary: str) -> str:
    # A build that is to give the same again says when it is (reproducible-builds.org).
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = datetime.fromtimestamp(seconds, UTC)
    return (
        f".Dd {date:%B} {date.day}, {date.year}\n"
        f".Dt {name.upper()} {number}\n"
        f".Os\n"
        f".Sh NAME\n.Nm {name}\n.Nd {summary[:1].lower()}{summary[1:]}\n"
    )


def _described(command: click.Command) -> tuple[str, list[str]]:
    """The first sentence of the help, without its end, and the paragraphs after it."""
    summary, *details = inspect.cleandoc(command.help or "").split("\n\n")
    return " ".join(summary.split()).removesuffix("."), details


def _paragraphs(*pieces: str) -> str:
    return mdoc.paragraphs(*map(mdoc.text, pieces))


def _synopsis(verb: Verb) -> str:
    lines = []
    for parameter in verb.params:
        if isinstance(parameter, click.Option):
            option = _option(parameter, first=True)
            lines.append(f".{option}" if parameter.required else f".Op {option}")
        elif isinstance(parameter, click.Argument):
            word = metavar(parameter)
            optional = word.startswith("[")
            words = word.strip("[]").replace("...", " ...")
            lines.append(f".Op Ar {words}" if optional else f".Ar {words}")
    return "".join(f"{line}\n" for line in lines)


def _options(command: click.Command) -> list[tuple[str, str]]:
    """Each option as an item of a list, and what it does."""
    ctx = click.Context(command, help_option_names=["-h", "--help"])
    return [
        (_option(parameter), mdoc.text((parameter.get_help_record(ctx) or ("", ""))[1]))
        for parameter in command.get_params(ctx)
        if isinstance(parameter, click.Option)
    ]


def _option(option: click.Option, *, first: bool = False) -> str:
    """The names of *option*, or the first of them, with its value, for a line with a macro."""
    value = "" if option.is_flag else f" Ar {mdoc.argument(metavar(option))}"
    names = option.opts[:1] if first else option.opts
    flags = [f"Fl {mdoc.argument(name.removeprefix('-'))}{value}" for name in names]
    return " , ".join(flags)


def metavar(parameter: click.Parameter) -> str:
    """What stands for the value of *parameter* in a command line."""
    make: Callable[..., str] = parameter.make_metavar
    since_8_2 = "ctx" in inspect.signature(make).parameters  # Debian 13 has click 8.1
    return make(click.Context(click.Command(None))) if since_8_2 else make()


def _exit_status(codes: Mapping[int, str]) -> str:
    return mdoc.rows((str(int(code)), mdoc.text(meaning)) for code, meaning in codes.items())
