"""What a shell offers at the cursor, and the files that ``manual`` writes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class
from support.mounting import quorumfs
from support.sets import MIB, SetMount, create, named

from quorumfs.cli import quorumfs as commands
from quorumfs.cli.command import COMPLETION

COMMAND = Path(sys.executable).with_name("quorumfs")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetMount]:
    directory = tmp_path_factory.mktemp("completion")
    with SetMount(create(named(directory, 2), MIB), directory) as mounted:
        yield mounted


def offered(line: str, shell: str = "zsh") -> list[str]:
    """What is offered for the last word of *line*: values, or ``<file>``."""
    *words, incomplete = line.split(" ")
    kind: type[ShellComplete] | None = get_completion_class(shell)
    assert kind is not None
    found = kind(commands, {}, "quorumfs", COMPLETION).get_completions(words, incomplete)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("um", ["umount"]),
        ("status --js", ["--json", "--json-schema"]),
        ("check --nothing w", ["warning"]),
        ("create a.img ", ["<file>"]),
        ("create --source ", ["<file>"]),
        ("mount a.img ", ["<file>"]),
        ("mount -o read-p", ["read-pattern="]),
        ("mount -o ro,read-pattern=f", ["ro,read-pattern=fifo"]),
        ("mount -o sync,syn", []),
        ("mount -o read-pattern=fifo -o de", ["degraded", "detect-zeroes=", "dev", "default_p"]),
        ("mount -o uid=roo", ["uid=root"]),
        ("mount -o gid=roo", ["gid=root"]),
        ("mount -o nonsense=", []),
        ("wait --for c", ["clean", "current:"]),
        ("offline /nowhere ", []),
        ("completion f", ["fish"]),
    ],
)
def test_words_are_completed(line: str, expected: list[str]) -> None:
    found = offered(line)
    assert len(found) == len(expected)
    for begin in expected:
        assert any(value.startswith(begin) for value in found)


def test_what_is_mounted_is_offered_and_its_replicas(disk: SetMount) -> None:
    """By file name, and by path where that was begun."""
    place, (a, b) = disk.mountpoint, disk.replicas
    parent = str(place.parent)
    for verb in ("umount", "status", "set", "grow", "resolve --keep a.img", "events", "check"):
        assert offered(f"{verb} {parent}") == [str(place)]
    assert offered(f"resolve --keep a.img {a}") == ["<file>"]
    for verb in ("offline", "remove", "replace", "clear", "clear --json"):
        assert offered(f"{verb} {place} ") == [a.name, b.name]
        assert offered(f"{verb} {place} {b}") == [str(b)]
    assert offered(f"replace {place} {a.name} ") == ["<file>"]
    assert offered(f"set {place} read-pattern=q") == ["read-pattern=quorum"]
    assert offered(f"set {place} write-mostly={a.name}:") == [
        f"write-mostly={a.name}:{a.name}",
        f"write-mostly={a.name}:{b.name}",
    ]
    assert "uid=" not in offered(f"set {place} ")
    assert offered(f"wait {place} --for current:b") == ["current:b.img"]


def test_a_real_bash_completes(disk: SetMount, tmp_path: Path) -> None:
    """Also words that it takes apart at ``=`` and ``:``, and paths with spaces."""
    script = tmp_path / "quorumfs.bash"
    script.write_text(quorumfs("completion", "bash").stdout)
    line = """
        export PATH="$1:$PATH"; source "$2"
        compopt() { opts="$*"; }
        for line in "${@:3}"; do
            COMPREPLY=() opts= COMP_LINE=$line COMP_POINT=${#line}
            _quorumfs_completion quorumfs
            echo "${COMPREPLY[*]}|$opts"
        done
        complete -p quorumfs
    """
    place = disk.mountpoint
    lines = [
        "quorumfs umo",
        "quorumfs mount -o ro,read-pattern=fi",
        "quorumfs mount -o ro,read-p",
        f"quorumfs umount {place.parent}",
        f"quorumfs set {place} write-mostly=b.img:a",
        "quorumfs create ",
    ]
    done = subprocess.run(
        ["bash", "--norc", "-ic", line, "bash", COMMAND.parent, script, *lines],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,  # an interactive shell wants the terminal, which is another's
    )
    assert done.stdout.splitlines() == [
        "umount|",
        "fifo|",
        "ro,read-pattern=|-o nospace",
        f"{place}|",
        "a.img|",
        "|-o default",
        "complete -o nosort -F _quorumfs_completion quorumfs",
    ]


@pytest.mark.parametrize(
    ("shell", "check"),
    [("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "--no-execute"])],
)
def test_each_shell_can_read_its_script(shell: str, check: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(quorumfs("completion", shell).stdout)
    assert COMPLETION in script.read_text()
    subprocess.run([*check, script], check=True)


def test_a_real_fish_completes(disk: SetMount, tmp_path: Path) -> None:
    """It asks for the words of the line as the others do."""
    script = tmp_path / "quorumfs.fish"
    script.write_text(quorumfs("completion", "fish").stdout)
    line = f"source {script}; complete -C 'quorumfs umount {disk.mountpoint.parent}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", line],
        env=os.environ | {"PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(disk.mountpoint)]


def test_manual_pages_are_written_where_man_looks(tmp_path: Path) -> None:
    directory = tmp_path / "share" / "man"
    for _ in range(2):  # the second time over the first
        quorumfs("manual", "--directory", directory)
    found = {path.parent.name: path for path in directory.glob("man*/*quorumfs*")}
    assert sorted(found) == ["man1", "man5", "man7", "man8"]
    done = subprocess.run(
        ["man", "-M", directory, "--warnings", "quorumfs-mount"],
        env=os.environ | {"MANPAGER": "cat", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "quorumfs-mount —" in done.stdout
    assert not done.stderr
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "man1").touch()
    refused = quorumfs("manual", "--directory", blocked, check=False)
    assert (refused.returncode, "cannot write" in refused.stderr) == (1, True)
