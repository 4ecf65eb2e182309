"""Help and manual pages: every command tells all that is to be known of it, from one source."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from support import manual_pages

from quorumfs.cli import mdoc, quorumfs
from quorumfs.cli.command import EXIT_STATUS, Verb
from quorumfs.cli.completion import FilePathOrName, MountPoint
from quorumfs.cli.manual import metavar, pages
from quorumfs.errors import ExitCode
from quorumfs.mount import configuration
from quorumfs.options.table import OPTIONS

CHECKOUT = Path(__file__).parents[2]

SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "EXAMPLES", "SEE ALSO"]


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all pages, where the checker finds what they refer to."""
    directory = tmp_path_factory.mktemp("manual")
    for name, page in pages(quorumfs).items():
        (directory / name).write_text(page, encoding="utf-8")
    return directory


def named(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def shown(page: Path) -> str:
    """A page as plain text of 78 columns."""
    command = ["mandoc", "-T", "utf8", "-O", "width=78", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.sub(".\b", "", done.stdout)  # what makes it bold


def verbs() -> list[Verb]:
    """All commands for people; each is one that tells of itself."""
    found = quorumfs.shown()
    assert all(isinstance(verb, Verb) for verb in found)
    return [verb for verb in found if isinstance(verb, Verb)]


def test_there_is_a_page_for_each_command_and_for_what_is_none(manual: Path) -> None:
    texts = Path(mdoc.__file__).with_name("pages").glob("*.md")
    expected = ["mount.quorumfs.8", "quorumfs.1", "quorumfs.conf.5"]
    expected += [f"quorumfs-{text.stem}.7" for text in texts]
    expected += [f"quorumfs-{verb.name}.1" for verb in verbs()]
    assert named(manual) == sorted(expected)


def test_the_pages_on_the_repository_say_the_same() -> None:
    there = {path.name: path.read_text("utf-8") for path in manual_pages.DIRECTORY.iterdir()}
    assert there == manual_pages.rendered(), "cd tests && python -m support.manual_pages"


def test_what_readme_and_pages_refer_to_is_there() -> None:
    made = manual_pages.DIRECTORY.glob("*.md")
    for source in (CHECKOUT / "README.md", CHECKOUT / "tests/benchmark/README.md", *made):
        for link in re.findall(r"\]\(([^)#:]+)\)", source.read_text("utf-8")):
            assert (source.parent / link).exists(), (source, link)


def test_a_checker_of_manuals_finds_nothing(manual: Path) -> None:
    """No error, no warning, no question of style; no reference to a page that there is not."""
    command = ["mandoc", "-T", "lint", *named(manual)]
    done = subprocess.run(command, cwd=manual, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_each_page_can_be_found_by_what_it_is_about(manual: Path) -> None:
    """By man -k, which reads names and summaries like this."""
    done = subprocess.run(
        ["lexgrog", *named(manual)], cwd=manual, capture_output=True, text=True, check=True
    )
    for line, name in zip(done.stdout.splitlines(), named(manual), strict=True):
        assert re.fullmatch(rf'{name}: "{name[:-2]} - [a-z].{{20,}}[^.]"', line)


def test_each_page_of_a_command_has_all_sections(manual: Path) -> None:
    for page in manual.glob("*.1"):
        found = re.findall(r"^\S.*$", shown(page), re.MULTILINE)[1:-1]
        assert [section for section in found if section != "MOUNT OPTIONS"] == SECTIONS


def test_help_and_manual_show_the_same(manual: Path) -> None:
    """Every option, exit code and example of a command."""
    for verb in verbs():
        assert verb.name is not None
        ctx = click.Context(verb, info_name=f"quorumfs {verb.name}", max_content_width=100)
        page = " ".join(shown(manual / f"quorumfs-{verb.name}.1").split())
        text = " ".join(verb.get_help(ctx).split())
        options = [one for one in verb.params if isinstance(one, click.Option)]
        terms = [name for option in options for name in option.opts]
        terms += [f"{code:d} {meaning}" for code, meaning in verb.exit_status.items()]
        terms += [word for row in verb.examples for word in row]
        for term in terms:
            assert term in text
            assert term in page


def test_the_page_of_mount_shows_every_mount_option(manual: Path) -> None:
    page = shown(manual / "quorumfs-mount.1")
    assert all(re.search(rf"^ +{name}\b", page, re.MULTILINE) for name in OPTIONS)


def test_the_page_of_the_configuration_shows_all_that_a_file_may_say(manual: Path) -> None:
    page = shown(manual / "quorumfs.conf.5")
    for name in (*configuration.KEYS, *OPTIONS):
        assert re.search(rf"^ +{name}\b", page, re.MULTILINE)
    for key in configuration.KEYS.values():
        assert " ".join(f"{key.help} Allowed is {key.allowed}.".split()) in " ".join(page.split())


def test_the_example_of_the_configuration_is_a_file(
    manual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands on the page, copied from there."""
    page = shown(manual / "quorumfs.conf.5")
    lines = re.findall(r"^ +(\w+ = .*)$", page, re.MULTILINE)
    monkeypatch.setattr(configuration, "DIRECTORY", str(tmp_path))
    (tmp_path / "vdisk.conf").write_text("\n".join(lines))
    disk = configuration.configured("vdisk")
    assert (disk.mountpoint, len(disk.replicas)) == ("/mnt/vdisk", 2)
    assert len(lines) == len(configuration.KEYS)


def test_wherever_a_mount_point_is_asked_for_a_name_will_do() -> None:
    """As quorumfs(1) says. What ``mount`` asks for is where there is none yet, or a NAME."""
    named = {
        verb.name: parameter.type
        for verb in verbs()
        for parameter in verb.params
        if "MOUNTPOINT" in metavar(parameter)
    }
    assert isinstance(named.pop("mount"), FilePathOrName)
    assert len(named) > 10
    assert all(isinstance(kind, MountPoint) for kind in named.values())


class _OptionOfClick81(click.Option):
    """What it shows for its value needs no context there. Debian 13 has this version."""

    def make_metavar(self) -> str:  # type: ignore[override]
        return "WORD"


@pytest.mark.parametrize("kind", [click.Option, _OptionOfClick81])
def test_the_manual_is_made_with_older_versions_of_click(kind: type[click.Option]) -> None:
    assert metavar(kind(["--word"], metavar="WORD")) == "WORD"


def test_every_example_is_a_command_line_that_can_be_meant() -> None:
    """Options are of the command, and there are as many arguments as it takes."""
    for verb in verbs():
        assert verb.examples
        for line, _ in verb.examples:
            words = shlex.split(re.split(r"[|>&]", line)[0])
            if words[0] != "quorumfs":
                continue  # the command is within another one
            assert words[1] == verb.name
            ctx = click.Context(verb)
            _, left, _ = verb.make_parser(ctx).parse_args(words[2:])
            assert not left


def test_every_exit_code_is_explained() -> None:
    assert set(EXIT_STATUS) == set(ExitCode)


@pytest.mark.parametrize("columns", [60, 100])
def test_help_is_as_wide_as_the_terminal(columns: int) -> None:
    """But for command lines, which are to be copied."""
    for verb in verbs():
        examples = {line for line, _ in verb.examples}
        ctx = click.Context(verb, terminal_width=columns - 2)
        lines = verb.get_help(ctx).splitlines()
        assert all(len(line) <= columns for line in lines if line.strip() not in examples)


def test_markdown_becomes_lists_and_paragraphs() -> None:
    source = """# Recipes

One `--word`. Two,
on a line.

| seen | means | to do |
|---|---|---|
| `No` space | it is full | make "room" |
| other | | wait |

- a list - of
  two,
- items

| a | b |
|---|---|
| c | d |
"""
    assert mdoc.from_markdown(source) == (
        ".Sh RECIPES\nOne \\fB\\-\\-word\\fP.\nTwo, on a line.\n.Bl -tag -width Ds\n"
        '.It "\\fBNo\\fP space"\nIt is full.\n.Pp\nTo do: make "room".\n'
        '.It "other"\nTo do: wait.\n.El\n'
        ".Bl -bullet\n.It\na list \\- of two,\n.It\nitems\n.El\n"
        '.Bl -tag -width Ds\n.It "c"\nD.\n.El\n'
    )


def test_no_line_of_text_is_taken_for_a_request() -> None:
    assert mdoc.text(".Sh is 'text") == "\\&.Sh is 'text\n"
    assert mdoc.text("a\\b") == "a\\eb\n"
