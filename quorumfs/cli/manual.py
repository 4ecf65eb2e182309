"""``quorumfs manual``: the manual pages, from what the commands tell of themselves."""

import inspect
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import click

from quorumfs.cli import mdoc
from quorumfs.cli.command import EXIT_STATUS, Verb
from quorumfs.errors import UserError
from quorumfs.mount import configuration
from quorumfs.options import option_rows

RECOVERY = "quorumfs-recovery"
"""The page of what to do when something is wrong."""

CONFIGURATION = "quorumfs.conf"
"""The page of the files of /etc/quorumfs."""


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
    help="Where the directories man1, man5 and man7 are, or are to be made.",
)
@click.pass_context
def manual(ctx: click.Context, directory: Path) -> None:
    """Write the manual pages: quorumfs(1), one for each command, quorumfs.conf(5), and
    quorumfs-recovery(7).

    Pages that are there are replaced.
    """
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    for name, page in pages(group).items():
        place = directory / f"man{name[-1]}" / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(page, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {place}: {error.strerror}") from None


def pages(group: click.Group) -> dict[str, str]:
    """All manual pages of *group* by file name."""
    verbs = {name: verb for name, verb in group.commands.items() if isinstance(verb, Verb)}
    made = {"quorumfs.1": _overview(group, verbs)}
    made |= {f"quorumfs-{name}.1": _page(name, verb) for name, verb in sorted(verbs.items())}
    return made | {f"{CONFIGURATION}.5": _configuration(), f"{RECOVERY}.7": _recovery()}


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
                mdoc.references(
                    {**{f"quorumfs-{name}": 1 for name in verbs}, CONFIGURATION: 5, RECOVERY: 7}
                ),
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


def _recovery() -> str:
    source = files("quorumfs.cli").joinpath("recovery.md").read_text(encoding="utf-8")
    summary = "what to do when something is wrong with a disk of quorumfs"
    also = {f"quorumfs-{name}": 1 for name in ("examine", "replace", "resolve", "scrub", "status")}
    return "".join(
        [
            _head(RECOVERY, 7, summary),
            mdoc.from_markdown(source),
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
            word = parameter.make_metavar(click.Context(verb))
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
    value = "" if option.is_flag else f" Ar {mdoc.argument(_metavar(option))}"
    names = option.opts[:1] if first else option.opts
    flags = [f"Fl {mdoc.argument(name.removeprefix('-'))}{value}" for name in names]
    return " , ".join(flags)


def _metavar(option: click.Option) -> str:
    return option.make_metavar(click.Context(click.Command(None)))


def _exit_status(codes: Mapping[int, str]) -> str:
    return mdoc.rows((str(int(code)), mdoc.text(meaning)) for code, meaning in codes.items())
