"""mount(8), umount(8) and fstab with our helpers, and disks that have a name in /etc/quorumfs.

On a host of its own: a mount namespace where they are installed, and nowhere else.
"""

import json
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeImages
from support.command import (
    PATIENCE_S,
    filesystem_at,
    is_alive,
    one_line,
    privately,
    wait_until,
)
from support.mounting import QUORUMFS, quorumfs

from quorumfs.cli.command import COMPLETION

INSTALLED = ("etc", "usr/sbin")


class Host:
    """What is installed below *root* is seen in a namespace, over what this host has."""

    def __init__(self, root: Path) -> None:
        self._root = root
        script = "".join(
            f'mount -t overlay overlay -o "lowerdir=$1/{name}:/{name}" /{name} || exit 1\n'
            for name in INSTALLED
        )
        self._namespace = subprocess.Popen(
            [*privately(f"{script}echo; cat"), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._namespace.stdout is not None
        assert self._namespace.stdout.readline() == b"\n"

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run any *command* there, to its end."""
        return subprocess.run(
            self.command(*command),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    def command(self, *command: str | Path) -> list[str | Path]:
        entered = f"--mount=/proc/{self._namespace.pid}/ns/mnt"
        # Else it is the root of this machine, where anything may lie.
        return ["nsenter", entered, f"--wd={self._root}", *command]

    def quorumfs(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(*QUORUMFS, *arguments)

    def succeeds(self, *command: str | Path) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def configure(self, name: str, text: str) -> None:
        """Have the file *name* below /etc."""
        path = self._root / "etc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def end(self) -> None:
        self._namespace.communicate(timeout=PATIENCE_S)


@pytest.fixture
def host(tmp_path: Path, mountpoint: Path) -> Iterator[Host]:
    """Nothing is left mounted there."""
    root = tmp_path / "root"
    quorumfs("install-units", "--root", root)
    (root / "etc" / "fstab").touch()
    host = Host(root)
    try:
        yield host
    finally:
        while host.run("umount", "-il", mountpoint).returncode == 0:
            pass
        host.end()


def status(host: Host, mountpoint: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(host.quorumfs("status", "--json", mountpoint).stdout)
    return answer


def test_a_line_of_fstab_is_a_disk(host: Host, mountpoint: Path, make_images: MakeImages) -> None:
    """Whatever is in a path; what only mount(8) and systemd know is no business of the disk."""
    directory = mountpoint.parent / "a store:1"
    directory.mkdir()
    images = make_images(2, 1 << 20, directory)
    source = ":".join(str(image).replace(":", r"\:").replace(" ", r"\040") for image in images)
    options = "read-pattern=fifo,vote-threshold=1,_netdev,nofail,users,noauto,x-systemd.automount"
    host.configure("fstab", f"{source} {mountpoint} fuse.quorumfs {options},comment=x 0 0\n")
    host.succeeds("mount", mountpoint)
    assert host.succeeds("stat", "-c", "%s", mountpoint / "disk.img") == f"{1 << 20}\n"
    told = status(host, mountpoint)
    assert told["read_pattern"] == "fifo"
    assert [replica["path"] for replica in told["replicas"]] == list(map(str, images))

    host.succeeds("mount", "-o", "remount,resync-rate=5M", mountpoint)
    assert "resync-rate=5242880" in status(host, mountpoint)["options"]

    host.succeeds("dd", "if=/dev/urandom", f"of={mountpoint}/disk.img", "conv=notrunc", "count=9")
    host.succeeds("umount", mountpoint)
    assert not is_alive(told["pid"])
    assert images[0].read_bytes() == images[1].read_bytes() != bytes(1 << 20)


def test_a_name_is_a_source(host: Host, mountpoint: Path, make_images: MakeImages) -> None:
    """And mount -a sees that it is mounted already."""
    images = [str(image) for image in make_images(2)]
    host.configure(
        "quorumfs/vdisk.conf",
        f"""\
        replicas = {images}
        mountpoint = "{mountpoint}"
        options = "read-pattern=fifo,vote-threshold=1"
        """,
    )
    host.configure("fstab", f"vdisk {mountpoint} fuse.quorumfs noatime 0 0\n")
    for _ in range(2):
        host.succeeds("mount", "-a", "-t", "fuse.quorumfs")
    assert host.succeeds("findmnt", "-no", "SOURCE", mountpoint) == "vdisk\n"
    assert status(host, mountpoint)["vote_threshold"] == 1
    host.succeeds("umount", mountpoint)

    host.succeeds(*QUORUMFS, "mount", "-o", "resync-rate=1M", "vdisk")
    assert {"read-pattern=fifo", "resync-rate=1048576"} <= set(status(host, mountpoint)["options"])
    host.configure("quorumfs/vdisk.conf", f'replicas={images}\nmountpoint="{mountpoint}"\n')
    host.succeeds(*QUORUMFS, "mount", "-o", "remount,read-pattern=quorum", "vdisk")
    assert "read-pattern=quorum" in status(host, mountpoint)["options"]
    host.succeeds(*QUORUMFS, "umount", "vdisk")
    assert host.run("findmnt", mountpoint).returncode == 1


def offered(host: Host, *words: str) -> list[str]:
    """What is offered for the last of *words*, as zsh is told it: type, value and help by turns."""
    line = " ".join(["quorumfs", *words])
    asked = [f"{COMPLETION}=zsh_complete", f"COMP_WORDS={line}", f"COMP_CWORD={len(words)}"]
    told = host.succeeds("env", *asked, *QUORUMFS).splitlines()
    items = zip(told[::3], told[1::3], strict=False)  # one empty line, if there are none
    return [value if kind == "plain" else f"<{kind}>" for kind, value in items]


def test_a_name_stands_for_its_mount_point(
    host: Host, mountpoint: Path, make_images: MakeImages, tmp_path: Path
) -> None:
    """For each command that asks for one, and for a shell that completes its line."""
    a, b = make_images(2, 1 << 20)
    host.configure(
        "quorumfs/vdisk.conf",
        f"""\
        replicas = ["{a}", "{b}"]
        mountpoint = "{mountpoint}/"
        options = "vote-threshold=1"
        """,
    )
    host.configure("quorumfs/other.conf", 'replicas = ["/a"]\nmountpoint = "/nowhere"\n')
    host.configure("quorumfs/broken.conf", "replicas = 7\n")
    not_mounted = host.quorumfs("status", "vdisk")
    assert f"{mountpoint}/ is not a quorumfs mount" in one_line(not_mounted, 4)
    assert offered(host, "mount", "v") == ["vdisk"]
    assert offered(host, "mount", "x") == ["<file>"]
    assert offered(host, "mount", "a.img", "v") == ["<file>"]
    assert offered(host, "umount", "v") == []
    host.succeeds(*QUORUMFS, "mount", "vdisk")

    assert host.succeeds(*QUORUMFS, "status", "vdisk").startswith(f"{mountpoint}: healthy")
    assert "1 healthy" in host.succeeds(*QUORUMFS, "check", "vdisk")
    assert str(mountpoint) in host.succeeds(*QUORUMFS, "metrics", "vdisk")
    host.succeeds(*QUORUMFS, "offline", "vdisk", b.name)
    host.succeeds(*QUORUMFS, "online", "vdisk", b.name)
    host.succeeds(*QUORUMFS, "wait", "--for", "clean", "--timeout", str(PATIENCE_S), "vdisk")
    host.succeeds(*QUORUMFS, "set", "vdisk", "resync-rate=3M")
    assert "resync-rate=3145728" in host.succeeds(*QUORUMFS, "events", "--now", "--json", "vdisk")
    undecided = host.quorumfs("resolve", "--keep", a.name, "vdisk")
    assert undecided.stderr + undecided.stdout != ""
    assert "vdisk" not in undecided.stderr.replace(str(mountpoint), "")

    assert offered(host, "status", "v") == ["vdisk"]
    assert offered(host, "status", "o") == []
    assert offered(host, "status", str(mountpoint)) == [str(mountpoint)]
    assert offered(host, "offline", "vdisk", "b") == [b.name]
    assert offered(host, "wait", "vdisk", "--for", "current:b") == [f"current:{b.name}"]

    # A directory of that name is another one
    (tmp_path / "vdisk").mkdir()
    there = ["env", f"--chdir={tmp_path}", *QUORUMFS]
    assert host.run(*there, "status", "vdisk").returncode == 0
    assert "./vdisk is not a quorumfs mount" in one_line(host.run(*there, "status", "./vdisk"), 4)
    broken = one_line(host.quorumfs("status", "broken"), 4)
    assert broken.startswith("quorumfs: /etc/quorumfs/broken.conf, line 1: replicas: got 7")
    host.succeeds(*QUORUMFS, "umount", "vdisk")
    assert host.run("findmnt", mountpoint).returncode == 1


@pytest.mark.parametrize(
    ("source", "options", "exit_code", "told"),
    [
        ("{a}:{b}", "vote-treshold=1", 1, "unknown option 'vote-treshold' (did you mean"),
        ("{a}::{b}", "rw", 1, "allowed: paths of replicas with colons between them"),
        ("{a}:{b}:{a}x", "rw", 32, "a.imgx"),
        ("vdisk", "rw", 1, "/etc/quorumfs/vdisk.conf: No such file or directory"),
        ("broken", "rw", 1, "/etc/quorumfs/broken.conf, line 2: unknown key 'replica'"),
    ],
)
def test_a_refusal_has_the_exit_code_that_mount_knows(
    host: Host,
    mountpoint: Path,
    make_images: MakeImages,
    source: str,
    options: str,
    exit_code: int,
    told: str,
) -> None:
    a, b = make_images(2)
    host.configure("quorumfs/broken.conf", "\nreplica = []\n")
    type_and_options = "-t", "fuse.quorumfs", "-o", options
    done = host.run("mount", *type_and_options, source.format(a=a, b=b), mountpoint)
    assert done.returncode == exit_code
    assert done.stderr.startswith("mount.quorumfs: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_mount_may_pretend_and_be_sloppy(
    host: Host, mountpoint: Path, make_images: MakeImages
) -> None:
    source = ":".join(map(str, make_images(2)))
    sloppy = "-t", "quorumfs", "-s", "-o", "read-pattern=fifo,whatever=7"
    assert host.run("/usr/sbin/mount.quorumfs", source, mountpoint, "-fo", "whatever").returncode
    host.succeeds("/usr/sbin/mount.quorumfs", source, mountpoint, "-f", "-o", "nofail,sync")
    assert host.run("findmnt", mountpoint).returncode == 1
    host.succeeds("mount", *sloppy, source, mountpoint)
    assert status(host, mountpoint)["read_pattern"] == "fifo"
    host.succeeds("umount", mountpoint)


def user_of(host: Host, mountpoint: Path) -> subprocess.Popen[bytes]:
    """A process that has the disk open until its standard input ends."""
    user = subprocess.Popen(
        host.command("sh", "-c", f"exec 3<{mountpoint}/disk.img; echo; exec cat"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert user.stdout is not None
    user.stdout.readline()
    return user


def test_a_disk_in_use_is_unmounted_by_who_has_a_reason_to(
    host: Host, mountpoint: Path, make_images: MakeImages
) -> None:
    """umount(8) names who uses it; umount --wait waits for them; umount -l waits for nobody."""
    source = ":".join(map(str, make_images(2)))
    # Without an option for mount(8) itself, umount(8) takes it for any FUSE: it asks statfs(2).
    mount = "mount", "-t", "fuse.quorumfs", "-o", "_netdev", source, mountpoint
    host.succeeds(*mount)
    user = user_of(host, mountpoint)
    done = host.run("umount", mountpoint)
    assert done.returncode == 32
    assert f"it is busy; in use by pid {user.pid} (cat)" in done.stderr

    pid = status(host, mountpoint)["pid"]
    waiting = subprocess.Popen(
        host.command(*QUORUMFS, "umount", "--wait", f"--pid={pid}"),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    assert line == (
        f"quorumfs: waiting until {mountpoint} is not in use any more by pid {user.pid} (cat)\n"
    )
    user.communicate()
    waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 0
    assert not is_alive(pid)

    host.succeeds(*mount)
    pid = status(host, mountpoint)["pid"]
    user = user_of(host, mountpoint)
    host.succeeds("umount", "-l", mountpoint)
    assert host.run("findmnt", mountpoint).returncode == 1
    assert is_alive(pid)
    user.communicate()
    wait_until(lambda: not is_alive(pid), "the daemon's end")


def test_who_waits_for_a_daemon_that_ended_has_nothing_to_do() -> None:
    """systemd knows no main process then, and its variable is empty."""
    for pid in ("", "1"):
        assert quorumfs("umount", "--wait", f"--pid={pid}").stderr == ""


@pytest.mark.parametrize("option", ["nofail", "_netdev", "x-systemd.automount", "defaults"])
def test_our_own_command_knows_no_options_of_fstab(
    make_images: MakeImages, mountpoint: Path, option: str
) -> None:
    done = quorumfs("mount", "-o", option, *make_images(2), mountpoint, check=False)
    assert f"unknown option '{option}'" in one_line(done, 4)
    assert filesystem_at(mountpoint) is None


def test_units_are_installed_once_and_where_they_are_told(tmp_path: Path) -> None:
    """Each written file is told, and readable for all, whatever the umask."""
    printed = quorumfs("install-units", "--print", "--root", tmp_path / "none").stdout
    assert not (tmp_path / "none").exists()
    assert "ExecStart=" in printed
    first = quorumfs("install-units", "--root", tmp_path).stdout.splitlines()
    assert all(line.endswith(": written") for line in first)
    again = quorumfs("install-units", "--root", tmp_path).stdout.splitlines()
    assert all(line.endswith(": is there already") for line in again)
    for line in first:
        path = Path(line.removesuffix(": written"))
        assert path.stat().st_mode & 0o444 == 0o444
        assert path.parent.stat().st_mode & 0o755 == 0o755
        assert path.read_text() in printed
    unit = tmp_path / "etc/systemd/system/quorumfs@.service"
    unit.write_text("something else")
    assert f"{unit}: written" in quorumfs("install-units", "--root", tmp_path).stdout
    assert "ExecStart=" in unit.read_text()


def test_systemd_understands_the_units(host: Host, tmp_path: Path, make_images: MakeImages) -> None:
    """And the generator tells it which file systems the replicas are on."""
    images = [str(image) for image in make_images(2, directory=tmp_path)]
    host.configure("quorumfs/vdisk.conf", f'replicas = {images}\nmountpoint = "/mnt/vdisk"\n')
    host.configure("quorumfs/broken.conf", "replicas = 7\n")
    host.configure(
        "fstab",
        r"/nas\0401/a.img:/b%.img /mnt/my-disk fuse.quorumfs nofail 0 0"
        "\n/dev/vg/my-lv:/c.img /mnt/lv fuse.quorumfs nofail,sidecars=/var/lib/side 0 0",
    )
    units = tmp_path / "units"
    units.mkdir()
    generator = "/etc/systemd/system-generators/quorumfs"
    done = host.run(generator, units, units, units)
    assert done.returncode == 0
    assert "/etc/quorumfs/broken.conf, line 1: replicas: got 7" in done.stderr
    drop_in = (units / "quorumfs@vdisk.service.d" / "50-quorumfs.conf").read_text()
    assert all(f"\nRequiresMountsFor={image}\n" in drop_in for image in images)
    assert "\nRequiresMountsFor=/mnt\n" in drop_in
    mount = (units / r"mnt-my\x2ddisk.mount.d" / "50-quorumfs.conf").read_text()
    assert '\nRequiresMountsFor="/nas 1/a.img"\n' in mount
    assert "\nRequiresMountsFor=/b%%.img\n" in mount
    assert "\nBefore=libvirtd.service " in mount
    on_device = (units / "mnt-lv.mount.d" / "50-quorumfs.conf").read_text()
    for line in (
        "RequiresMountsFor=/var/lib/side",
        r"Wants=dev-vg-my\x2dlv.device",
        r"After=dev-vg-my\x2dlv.device",
    ):
        assert f"\n{line}\n" in on_device

    path = f"SYSTEMD_UNIT_PATH={units}:/etc/systemd/system:"
    unit = "quorumfs@vdisk.service"
    verified = host.run("env", path, "systemd-analyze", "verify", "--man=no", unit)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_nothing_is_generated_where_nothing_is_configured(host: Host, tmp_path: Path) -> None:
    host.configure("fstab", "/dev/sda1 / ext4 defaults 0 1\n")
    host.succeeds("/etc/systemd/system-generators/quorumfs", tmp_path / "x", "y", "z")
    assert not (tmp_path / "x").exists()
