"""``quorumfs install-units``, and what the files that it installs run."""

import os
import sys
from contextlib import suppress
from pathlib import Path

import click

from quorumfs.cli.command import Verb, Verbs
from quorumfs.cli.completion import script
from quorumfs.cli.manual import pages
from quorumfs.cli.output import complain
from quorumfs.errors import UsageError, UserError
from quorumfs.mount.units import SYSTEMD, SYSTEMD_OF_PACKAGE, UNIT, drop_ins, files

SHARE, SHARE_OF_PACKAGE = "/usr/local/share", "/usr/share"
"""Where manual pages and completions lie: an administrator's, and a distribution's package's."""

PACKAGED = "/usr/bin/quorumfs"
"""The command of a distribution's package."""

COMPLETIONS = {
    "bash": "bash-completion/completions/quorumfs",
    "zsh": "zsh/site-functions/_quorumfs",
    "fish": "fish/vendor_completions.d/quorumfs.fish",
}
"""By shell, below ``share``: where it looks for what completes a command."""


@click.command(
    "install-units",
    cls=Verb,
    examples=[
        ("quorumfs install-units", "As root; then: systemctl enable --now quorumfs@NAME"),
        ("quorumfs install-units --print", "Shows what it would install."),
    ],
    see=["mount"],
)
@click.option("--print", "only_print", is_flag=True, help="Print the files, and write nothing.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, resolve_path=True),
    default=Path("/"),
    help="Install below this directory, as for a package or an image.",
)
@click.option(
    "--package",
    "for_package",
    is_flag=True,
    help="Install what a package of a distribution has: for /usr/bin/quorumfs, and below /usr/lib "
    "and /usr/share. It needs --root.",
)
@click.pass_context
def install_units(ctx: click.Context, only_print: bool, root: Path, for_package: bool) -> None:
    """Install what systemd and mount(8) need: for disks of /etc/quorumfs and of /etc/fstab.

    The unit quorumfs@.service, its generator, the programs that mount(8) and umount(8) run, and a
    line for needrestart; and, below /usr/local/share, manual pages and what bash, zsh and fish
    complete command lines by. Files that are there already and differ are written anew. Nothing
    else is changed, and nothing is started: that is done by systemctl enable --now quorumfs@NAME.
    Where a package of the distribution has brought the command it has brought all this, too.
    """
    group = ctx.find_root().command
    assert isinstance(group, Verbs)
    command = [PACKAGED] if for_package else _this_command()
    if not only_print and root == Path("/"):
        if for_package:
            raise UsageError("option --package: got no --root, which it needs")
        if command == [PACKAGED] and os.path.exists(f"{SYSTEMD_OF_PACKAGE}/{UNIT}"):
            print("nothing to do: all that is needed came with the package of this command")
            return
    share = SHARE_OF_PACKAGE if for_package else SHARE
    systemd = SYSTEMD_OF_PACKAGE if for_package else SYSTEMD
    for path, (text, mode) in {**files(command, systemd), **_for_people(group, share)}.items():
        if only_print:
            print(f"# {path}\n{text}")
            continue
        place = root / path.removeprefix("/")
        try:
            print(f"{place}: {_install(place, text, mode)}")
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}") from None
    if not only_print and root == Path("/"):
        print("now run: systemctl daemon-reload")


@click.command("generate-units", hidden=True)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("others", nargs=-1)
def generate_units(directory: Path, others: tuple[str, ...]) -> None:
    """Write drop-ins below DIRECTORY: see systemd.generator(7), which names two OTHERS."""
    del others
    for name, text in drop_ins(lambda why: complain(f"quorumfs: {why}")):
        place = directory / name
        try:
            _install(place, text, 0o644)
        except OSError as error:
            raise UserError(f"{place}: {error.strerror}") from None


def _for_people(group: Verbs, share: str) -> dict[str, tuple[str, int]]:
    """Manual pages and completions of the commands of *group*: by path below *share*, contents
    and mode.
    """
    texts = {f"man/man{name[-1]}/{name}": page for name, page in pages(group).items()}
    for shell, place in COMPLETIONS.items():
        texts[place] = f"{script(group, shell)}\n"
    return {f"{share}/{path}": (text, 0o644) for path, text in texts.items()}


def _install(place: Path, text: str, mode: int) -> str:
    """Have *text* at *place*; returns what was done. Raises `OSError`."""
    with suppress(FileNotFoundError, UnicodeDecodeError):
        if place.read_text("utf-8") == text and place.stat().st_mode & 0o7777 == mode:
            return "is there already"
    missing = [parent for parent in place.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir()
        parent.chmod(0o755)  # whatever the umask
    new = place.with_name(f".{place.name}.new")
    new.write_text(text, "utf-8")
    new.chmod(mode)
    new.replace(place)
    return "written"


def _this_command() -> list[str]:
    """How this command is run, from any directory and without a PATH."""
    program = os.path.abspath(sys.argv[0])
    if os.path.basename(program) == "quorumfs" and os.access(program, os.X_OK):
        return [program]
    return [sys.executable, "-P", "-m", "quorumfs"]
