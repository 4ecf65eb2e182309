"""Disks that have a name: their files, sources of fstab, and the units of both."""

import os
import subprocess
from pathlib import Path

import pytest

from quorumfs.cli.mount_helper import is_for_fstab
from quorumfs.errors import UsageError
from quorumfs.mount import configuration, units

GOOD = 'replicas = ["/nas1/a.img", "/nas 2/b:1.img"]\nmountpoint = "/mnt/vdisk"\n'


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /etc/quorumfs."""
    monkeypatch.setattr(configuration, "DIRECTORY", str(tmp_path))
    return tmp_path


def test_a_file_says_what_mount_is_told_else(directory: Path) -> None:
    options = "options = 'read-pattern=fifo,vote-threshold=1'  # as after -o\n"
    (directory / "vdisk.conf").write_text(GOOD + options)
    disk = configuration.configured("vdisk")
    assert disk.replicas == ("/nas1/a.img", "/nas 2/b:1.img")
    assert disk.mountpoint == "/mnt/vdisk"
    assert disk.options == "read-pattern=fifo,vote-threshold=1"


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("", 1, "replicas: got None, allowed: a list of absolute paths"),
        ("\nreplicas = 7\n", 2, "replicas: got 7"),
        ("replicas = []\n", 1, "replicas: got []"),
        ('# mine\nreplicas = ["a.img"]\n', 2, "replicas: got ['a.img'], allowed: a list of abs"),
        ("\n\nreplicas = [\n", 3, "no TOML: "),
        ('replicas = ["/a"]\n\nmount point = "/mnt"\n', 3, "no TOML: "),
        ('replicas = ["/a"]\n', 1, "mountpoint: got None, allowed: an absolute path"),
        ('replicas = ["/a"]\nmountpoint = "mnt"\n', 2, "mountpoint: got 'mnt'"),
        (GOOD + 'option = "ro"\n', 3, "unknown key 'option'; there are: replicas, mountpoint"),
        (GOOD + "[options]\nro = true\n", 3, "options: got {'ro': True}, allowed: a text as aft"),
        (GOOD + '\noptions = "vote-threshold=3"\n', 4, "option vote-threshold: got 3"),
        (GOOD + '"options" = "nofail"\n', 3, "unknown option 'nofail'"),
    ],
)
def test_what_cannot_be_meant_is_told_with_file_and_line(
    directory: Path, text: str, line: int, why: str
) -> None:
    path = directory / "vdisk.conf"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        configuration.configured("vdisk")
    assert str(refused.value).startswith(f"{path}, line {line}: {why}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("replicas = " + "9" * 5000, "no TOML"),
        ("replicas = " + "[" * 5000, "brackets too deep"),
        ("#" * 100_000, "has more than 65536 bytes"),
        (GOOD.replace("vdisk", r"\u0000"), "mountpoint: got"),
        (GOOD.replace("/nas1", r"/\u0000"), "replicas: got"),
    ],
    ids=["number", "brackets", "long", "mountpoint with NUL", "replica with NUL"],
)
def test_a_damaged_file_takes_no_other_disk_away(directory: Path, text: str, why: str) -> None:
    """Whatever is in it, it is refused, and named; units are generated for all others."""
    (directory / "bad.conf").write_text(text)
    (directory / "good.conf").write_text(GOOD)
    os.mkfifo(directory / "fifo.conf")
    (directory / "zero.conf").symlink_to("/dev/zero")
    complaints: list[str] = []
    made = [name for name, _ in units.drop_ins(complaints.append)]
    assert [name for name in made if name.startswith("quorumfs@")] == [
        f"quorumfs@good.service.d/{units.DROP_IN}"
    ]
    told = "\n".join(complaints)
    assert why in told
    for name in ("bad", "fifo", "zero"):
        assert str(directory / f"{name}.conf") in told
    assert told.count("is no regular file") == 2


def test_a_file_that_cannot_be_read_is_named(directory: Path) -> None:
    with pytest.raises(UsageError, match=r"vdisk\.conf: No such file or directory"):
        configuration.configured("vdisk")
    (directory / "vdisk.conf").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"vdisk\.conf is no text in UTF-8"):
        configuration.configured("vdisk")


def test_only_files_that_have_a_name_for_a_unit_are_disks(directory: Path) -> None:
    for name in ("b.conf", "a.1.conf", ".conf", ".a.conf.swp", "a.conf~", "a b.conf", "a"):
        (directory / name).touch()
    assert list(configuration.names()) == ["a.1", "b"]
    assert not configuration.is_name("a/b")
    assert not configuration.is_name("a:b")


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("/a.img:/b.img", ["/a.img", "/b.img"]),
        ("/a.img", ["/a.img"]),
        (r"/a\:1.img:/b.img", ["/a:1.img", "/b.img"]),
        (r"/a\\:/b", ["/a\\", "/b"]),
        (r"/a\x:/b", [r"/a\x", "/b"]),
        ("/a b:/c\nd", ["/a b", "/c\nd"]),
    ],
)
def test_a_colon_in_a_path_of_a_source_has_a_backslash(source: str, paths: list[str]) -> None:
    assert configuration.replicas_of(source) == paths


@pytest.mark.parametrize("source", ["", ":", "/a:", ":/a", "/a::/b"])
def test_an_empty_path_is_none(source: str) -> None:
    with pytest.raises(UsageError, match="allowed: paths of replicas with colons between them"):
        configuration.replicas_of(source)


@pytest.mark.parametrize("option", ["nofail", "x-systemd.automount", "X-mount.mkdir", "user=me"])
def test_what_fstab_alone_knows(option: str) -> None:
    assert is_for_fstab(option)
    assert not is_for_fstab(f"no-{option}")


@pytest.mark.parametrize("directory", ["/mnt/vdisk", "/mnt/my-disk/", "//a b//ü", "/.x/.y", "/"])
def test_the_unit_of_a_mount_has_the_name_that_systemd_gives_it(directory: str) -> None:
    command = ["systemd-escape", "--path", "--suffix=mount", directory]
    named = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert units.mount_unit(directory) == named.rstrip("\n")
