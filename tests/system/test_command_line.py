"""The command and its options, as the user's own card writes them, and what its log tells."""

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import (
    file_replaced,
    filesystem_at,
    is_alive,
    one_line,
    ordinary_user,
    processes_of,
    quorumfs_in_background,
    refused,
    wait_until,
)
from support.mounting import QUORUMFS, Mounted, quorumfs

from quorumfs.control import journald, runtime
from quorumfs.options.table import OPTIONS


def daemon_of(mountpoint: Path) -> int:
    pid = runtime.daemon_pid(str(mountpoint), os.geteuid())
    assert pid is not None
    return pid


# The command


def test_an_empty_path_is_not_the_current_directory(make_images: MakeImages) -> None:
    """As an unset variable leaves it."""
    commands: list[list[str | Path]] = [["mount", *make_images(2), ""], ["status", ""]]
    for command in commands:
        line = one_line(quorumfs(*command, check=False), 4)
        assert "got an empty text, allowed: a path" in line


def test_a_sidecar_is_no_replica(make_images: MakeImages, mountpoint: Path) -> None:
    """As after ``mount /nas/*``."""
    images = make_images(2)
    quorumfs("mount", *images, mountpoint)
    quorumfs("umount", mountpoint)
    line = refused(sorted(images[0].parent.glob("*.img*")), mountpoint)
    assert f"{images[0]}.quorumfs is the sidecar of {images[0]}: name that one" in line


def test_a_log_inside_the_mount_is_refused(make_images: MakeImages, mountpoint: Path) -> None:
    """The daemon would keep its own disk in use for ever."""
    line = refused(["--log-file", mountpoint / "disk.img", *make_images(2)], mountpoint)
    assert f"is inside the mount point {mountpoint}" in line


def test_a_bind_mount_is_no_second_disk(make_images: MakeImages, mountpoint: Path) -> None:
    quorumfs("mount", *make_images(2), mountpoint)
    shown = mountpoint.parent / "shown"
    shown.mkdir()
    subprocess.run(["mount", "--bind", mountpoint, shown], check=True)
    assert str(shown) not in quorumfs("check", check=False).stdout
    line = one_line(quorumfs("status", shown, check=False), 4)
    assert f"{shown} is a bind mount of what is mounted at {mountpoint}" in line
    assert quorumfs("umount", shown).stderr == ""
    quorumfs("umount", mountpoint)


def test_a_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    command = (
        f"mkdir {gone}; cd {gone}; rmdir {gone}; exec {' '.join(map(str, QUORUMFS))} examine x"
    )
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert "the current directory was removed" in one_line(done, 1)


@pytest.mark.parametrize("arguments", [["status", "--json-schema"], ["--help"]])
def test_output_that_finds_no_space_is_an_error_in_one_line(arguments: list[str]) -> None:
    """Where it was closed nobody wants it: no error, and no file opened since gets it."""
    shell = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *QUORUMFS, *arguments]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert one_line(done, 1) == (
        "quorumfs: cannot write to standard output: No space left on device"
    )
    shell[2] = 'exec "$@" >&-'
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_nobody_takes_keeps_its_exit_code() -> None:
    """With stderr closed it does not go to standard output either."""
    for redirection in ("2>/dev/full", "2>&-"):
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *QUORUMFS, "status", "/nothing"]
        done = subprocess.run(shell, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (4, "")


def test_an_error_cannot_steer_the_terminal() -> None:
    """Whatever is named in it: a path, or what another user's daemon said."""
    done = quorumfs("status", "/\x1b[2J\udcff\nx", check=False)
    assert one_line(done, 4) == "quorumfs: /\\x1b[2J\\udcff\\nx is not a quorumfs mount"


@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).with_name("quorumfs"))], QUORUMFS], ids=["script", "-m"]
)
def test_both_ways_to_start_it_say_the_version(command: list[str]) -> None:
    """``quorumfs`` and ``python -m quorumfs`` are the same command."""
    from importlib.metadata import version

    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["quorumfs,", "version", version("quorumfs")]


def test_help_shows_every_command_and_every_option() -> None:
    """What ``mount -o`` accepts can be looked up without a manual, a row per option."""
    overview = quorumfs("--help").stdout
    assert re.search(r"^ +mount ", overview, re.MULTILINE)
    assert re.search(r"^ +umount ", overview, re.MULTILINE)
    options = quorumfs("mount", "--help").stdout
    shown = re.findall(r"^  ([a-z_-]+)(?:=\S+)?\n {6}\S", options, re.MULTILINE)
    assert shown == list(OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["mount"], "REPLICA"),
        (["mount", "--frobnicate", "a.img", "mnt"], "--frobnicate"),
        (["mount", "-o"], "-o"),
        (["umount"], "MOUNTPOINT"),
        (["umount", "a", "b"], "b"),
        (["umount", "/proc"], "/proc is not a quorumfs mount"),
        (["umount", "/no/such/directory"], "/no/such/directory is not a quorumfs mount"),
        (["resolve", "--keep", "/a", "/b"], "/a is to be kept, and is not one of the replicas"),
        (["resolve", "--keep", "/c", "/a", "/b"], "/c is to be kept, and is not one"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], named: str) -> None:
    """A command that cannot be meant exits with 4 and one line that names what is wrong."""
    assert named in one_line(quorumfs(*arguments, check=False), 4)


@pytest.mark.parametrize(
    ("options", "beside"), [("", ["a.img.quorumfs", "b.img.quorumfs"]), (",metadata=none", [])]
)
def test_the_users_own_command(
    make_images: MakeImages, mountpoint: Path, options: str, beside: list[str]
) -> None:
    """The card's command returns 0 when the file is there; its writes are on both replicas.

    Beside each replica there is its sidecar, and with metadata=none nothing.
    """
    a, b = make_images(2)
    quorumfs("mount", "-o", f"read-pattern=fifo,vote-threshold=1{options}", a, b, mountpoint)
    with (mountpoint / "disk.img").open("r+b", buffering=0) as file:
        assert file.write(b"quorum") == 6
        assert file.seek(0, os.SEEK_END) == 1 << 20
    quorumfs("umount", mountpoint)
    assert a.read_bytes() == b.read_bytes() == b"quorum" + bytes((1 << 20) - 6)
    assert sorted(os.listdir(a.parent)) == sorted(["a.img", "b.img", "mnt", *beside])


def test_relative_paths_count_from_where_the_command_is_run(
    make_images: MakeImages, mountpoint: Path
) -> None:
    """The daemon's change to / does not change what the user's paths mean, nor do links."""
    make_images(2)
    work = mountpoint.parent
    (work / "sub").mkdir()
    (work / "link").symlink_to("mnt")
    subprocess.run([*QUORUMFS, "mount", "a.img", "./b.img", "link/"], cwd=work, check=True)
    assert filesystem_at(mountpoint) == "fuse.quorumfs"
    subprocess.run([*QUORUMFS, "umount", "../link"], cwd=work / "sub", check=True)
    assert filesystem_at(mountpoint) is None


@pytest.mark.parametrize("name", ["a b", "x,y=z\n\\134ü%2C"])
def test_any_path_can_be_a_replica_and_a_mount_point(
    make_images: MakeImages, tmp_path: Path, name: str
) -> None:
    """Spaces, commas, backslashes and letters of any kind in paths need no care of the user."""
    directory = tmp_path / name
    directory.mkdir()
    with Mounted(make_images(2, directory=directory), directory) as mounted:
        assert mounted.file.stat().st_size == 1 << 20
    assert not mounted.file.exists()


# The daemon


def test_the_daemon_leaves_its_caller_alone(make_images: MakeImages, mountpoint: Path) -> None:
    """It has a session of its own, cwd /, and neither terminal nor pipes of its caller.

    Whoever reads the command's output to the end would wait for the daemon otherwise.
    """
    reader, writer = os.pipe()
    subprocess.run(
        [*QUORUMFS, "mount", *make_images(2), mountpoint],
        stdout=writer,
        stderr=writer,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    os.close(writer)
    os.set_blocking(reader, False)
    assert os.read(reader, 100) == b""  # the end, and not "nothing yet", which would raise
    os.close(reader)

    pid = daemon_of(mountpoint)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{stream}") for stream in (0, 1, 2)} == {"/dev/null"}
    quorumfs("umount", mountpoint)


def test_the_daemon_keeps_no_file_of_its_caller(make_images: MakeImages, mountpoint: Path) -> None:
    """A script under flock(1), as cron jobs are, gives its lock back when the script ends."""
    lock = mountpoint.parent / "lock"
    subprocess.run(["flock", lock, *QUORUMFS, "mount", *make_images(2), mountpoint], check=True)
    try:
        done = subprocess.run(["flock", "-n", lock, "true"], check=False)
        assert done.returncode == 0, "the daemon holds the caller's lock"
    finally:
        quorumfs("umount", mountpoint)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_in_the_foreground_a_signal_ends_it_in_good_order(
    make_images: MakeImages, mountpoint: Path, signum: signal.Signals
) -> None:
    """``-f`` serves until SIGTERM or SIGINT, then unmounts, exits with 0 and tells stderr why."""
    replicas = make_images(2)
    process = quorumfs_in_background("mount", "-f", *replicas, mountpoint)
    disk = mountpoint / "disk.img"
    wait_until(disk.exists, "the mount")
    with disk.open("r+b") as file:
        file.write(b"data")
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (0, "")
    assert signum.name in stderr
    assert filesystem_at(mountpoint) is None
    assert all(path.read_bytes().startswith(b"data") for path in replicas)


def test_in_the_foreground_an_unmount_ends_it(make_images: MakeImages, mountpoint: Path) -> None:
    """``-f`` ends with 0 as well when somebody unmounts."""
    process = quorumfs_in_background("mount", "-f", *make_images(1), mountpoint)
    wait_until((mountpoint / "disk.img").exists, "the mount")
    quorumfs("umount", mountpoint)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_in_the_foreground_a_refusal_is_one_line_too(
    make_images: MakeImages, mountpoint: Path
) -> None:
    """``-f`` does not turn a reason into a traceback."""
    make_images(1)
    done = quorumfs("mount", "-f", "/no/such.img", mountpoint, check=False)
    assert "/no/such.img" in one_line(done, 1)


# Options


@pytest.mark.parametrize(
    ("option", "given", "allowed"),
    [
        ("read-pattern", "random", "quorum or fifo"),
        ("vote-threshold", "0", "a whole number from 1"),
        ("vote-threshold", "²", "a whole number from 1"),
        ("vote-threshold", "3", "1 to 2, the number of replicas"),
        ("rewrite-corrupted", "maybe", "on or off"),
        ("blkverify", "2", "on or off"),
        ("metadata", "elsewhere", "sidecar or none"),
        ("degraded", "yes", "without a value"),
        ("resync-rate", "fast", "a number of bytes from 1"),
        ("replica-timeout", "", "a time from 100ms to 60m"),
        ("replica-timeout", "-8s", "a time from 100ms to 60m"),
        ("ro", "1", "without a value"),
        ("rw", "yes", "without a value"),
        ("uid", "no such user", "a user's name or number"),
        ("uid", "4294967295", "a user's name or number"),  # (uid_t)-1 means "unchanged"
        ("gid", "no such group", "a group's name or number"),
        ("mode", "4755", "an octal mode from 000 to 777"),
        ("fsname", "two words", "1 to 200 printable ASCII"),
        ("allow_other", "yes", "without a value"),
        ("allow_root", "yes", "without a value"),
        ("default_permissions", "no", "without a value"),
        ("noatime", "on", "without a value"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(
    make_images: MakeImages, mountpoint: Path, option: str, given: str, allowed: str
) -> None:
    """The one line names the option, what was given and what is allowed; the exit code is 4."""
    a, b = make_images(2)
    line = refused(["-o", f"{option}={given}", a, b], mountpoint, exit_code=4)
    assert line.startswith(f"quorumfs: option {option}: got ")
    assert given in line
    assert allowed in line


@pytest.mark.parametrize("unknown", ["frobnicate", "=", "vote-treshold=2", "-o"])
def test_an_unknown_option_is_refused_with_the_list(
    make_images: MakeImages, mountpoint: Path, unknown: str
) -> None:
    """Nobody guesses option names: the line lists every one, and the nearest first."""
    line = refused(["-o", unknown, *make_images(2)], mountpoint, exit_code=4)
    assert f"unknown option {unknown.partition('=')[0]!r}" in line
    assert line.endswith(f"there are: {', '.join(OPTIONS)}")
    assert ("did you mean vote-threshold?" in line) == ("treshold" in unknown)


@pytest.mark.parametrize(
    ("options", "replicas", "named"),
    [
        ("vote-threshold=2", 1, ["vote-threshold", "2", "1 to 1"]),
        ("blkverify,read-pattern=fifo", 2, ["blkverify", "read-pattern=fifo"]),
        ("blkverify", 3, ["blkverify", "3 replicas"]),
        ("blkverify", 1, ["blkverify", "1 replica"]),
        ("blkverify,vote-threshold=1", 2, ["blkverify", "vote-threshold=1"]),
        ("blkverify,rewrite-corrupted", 2, ["blkverify", "rewrite-corrupted"]),
        ("rewrite-corrupted,ro", 2, ["rewrite-corrupted", "ro"]),
        ("rewrite-corrupted", 1, ["rewrite-corrupted", "1 replica"]),
        ("degraded,metadata=none", 2, ["degraded", "metadata=none"]),
        ("resync-rate=1M,metadata=none", 2, ["resync-rate", "metadata=none"]),
        ("allow_other,allow_root", 2, ["allow_other", "allow_root"]),
    ],
)
def test_an_impossible_combination_is_refused(
    make_images: MakeImages, mountpoint: Path, options: str, replicas: int, named: list[str]
) -> None:
    """What QEMU or fuse(8) would ignore or reject late is refused at once, naming both sides."""
    line = refused(["-o", options, *make_images(replicas)], mountpoint, exit_code=4)
    assert all(word in line for word in named), line


def test_options_may_be_repeated_and_the_last_one_counts(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """Like mount(8): several ``-o``, lists in each, and a later value replaces an earlier one.

    QEMU spells with hyphens and fuse(8) with underscores; here both are the same.
    """
    arguments = ["-o", "vote_threshold=2,mode=0600,ro", "-o", "mode=0640,,rw", "-o", "uid=7"]
    a, b = make_images(2)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    quorumfs("mount", *arguments, a, b, mountpoint)
    status = (mountpoint / "disk.img").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o640, 7)
    (mountpoint / "disk.img").open("r+b").close()
    quorumfs("umount", mountpoint)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", (0, 0, 0o600)),
        ("uid=123,gid=456,mode=444", (123, 456, 0o444)),
        ("uid=nobody,gid=daemon,mode=0660", (65534, 1, 0o660)),
    ],
)
def test_owner_and_mode_are_as_asked(
    make_images: MakeImages, tmp_path: Path, options: str, expected: tuple[int, int, int]
) -> None:
    """``uid=``, ``gid=`` and ``mode=`` show in stat; the default is private to who mounts."""
    with Mounted(make_images(2), tmp_path, options) as mounted:
        status = mounted.file.stat()
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == expected
        assert stat.S_IMODE(mounted.mountpoint.stat().st_mode) == 0o755


def test_mode_and_allow_other_let_a_group_in_and_nobody_else(tmp_path: Path) -> None:
    """The kernel checks uid, gid and mode of ``disk.img`` for every user let in."""
    with ordinary_user() as user:
        images = user.make_images(2)
        mountpoint = user.make_directory("mnt")
        options = f"allow_other,uid=0,gid={user.gid},mode=0640"
        quorumfs("mount", "-o", options, *images, mountpoint)
        try:
            read = user.run("head", "-c1", mountpoint / "disk.img")
            write = user.run("dd", "if=/dev/zero", f"of={mountpoint}/disk.img", "count=1")
            assert (read.returncode, write.returncode) == (0, 1)
            assert "Permission denied" in write.stderr
        finally:
            quorumfs("umount", mountpoint)


def test_ro_writes_nothing_anywhere(make_images: MakeImages, tmp_path: Path) -> None:
    """Writing gives EROFS, and a whole ro mount leaves the replicas' times as they were."""
    replicas = make_images(2)
    for path in replicas:
        os.utime(path, (1, 1))
    with Mounted(replicas, tmp_path, "ro") as mounted:
        assert len(mounted.file.read_bytes()) == 1 << 20
        for call in (
            lambda: os.open(mounted.file, os.O_WRONLY),
            lambda: os.truncate(mounted.file, 0),
            lambda: os.utime(mounted.file),
            lambda: os.unlink(mounted.file),
        ):
            with pytest.raises(OSError, match="Read-only") as caught:
                call()
            assert caught.value.errno == errno.EROFS
    assert [path.stat().st_mtime for path in replicas] == [1, 1]


@pytest.mark.parametrize("fsname", ["nas:/vol#a=b", "user_id=7"])
def test_fsname_and_type_are_what_findmnt_shows(
    make_images: MakeImages, tmp_path: Path, fsname: str
) -> None:
    """Administrators find the mount by type ``fuse.quorumfs`` and by the source they chose."""
    with Mounted(make_images(2), tmp_path, f"fsname={fsname}") as mounted:
        found = subprocess.run(
            ["findmnt", "--json", "-t", "fuse.quorumfs", "-o", "TARGET,SOURCE"],
            capture_output=True,
            check=True,
        )
        mine = {"target": str(mounted.mountpoint), "source": fsname}
        assert mine in json.loads(found.stdout)["filesystems"]


# The log


def test_the_log_is_for_reading_unless_asked_otherwise(
    make_images: MakeImages, mountpoint: Path
) -> None:
    """By default a line is time, level and text; it says what was mounted where and how."""
    log = mountpoint.parent / "log"
    a, b = make_images(2)
    quorumfs("mount", "--log-file", log, a, b, mountpoint)
    quorumfs("umount", mountpoint)
    lines = log.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    for line in lines:
        assert re.match(rf"{stamp} [A-Z]+: \S", line), line
    assert lines[0].endswith(f"INFO: mounted {a}, {b} at {mountpoint}: quorum, threshold 2")
    assert lines[-1].endswith(f"INFO: unmounted {mountpoint}")


def test_log_json_is_one_object_a_line(make_images: MakeImages, tmp_path: Path) -> None:
    """Every line is JSON with a name and a time in UTC, also where a path has odd characters."""
    directory = tmp_path / 'quo"te\nline'
    directory.mkdir()
    with Mounted(make_images(2, directory=directory), directory) as mounted:
        pass
    records = mounted.log()  # fails on any line that is no JSON
    assert {record["event"] for record in records} == {"LOG"}
    assert all(re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{3}Z", record["time"]) for record in records)
    assert str(mounted.mountpoint) in records[0]["message"]


def test_a_signal_puts_the_status_into_the_log(make_images: MakeImages, tmp_path: Path) -> None:
    """SIGUSR1 ends nothing, also where nobody can ask at the socket any more."""
    with Mounted(make_images(2), tmp_path) as mounted:
        os.kill(mounted.pid, signal.SIGUSR1)
        (told,) = mounted.wait_for_events("STATUS")
        assert (told["state"], told["mountpoint"]) == ("healthy", str(mounted.mountpoint))
        assert [replica["path"] for replica in told["replicas"]] == list(map(str, mounted.replicas))
        quorumfs("status", mounted.mountpoint)


@pytest.mark.parametrize("command", ["resync", "scrub"])
def test_orders_that_contradict_each_other_are_refused(command: str, tmp_path: Path) -> None:
    done = quorumfs(command, "--resume", "--pause", tmp_path, check=False)
    assert done.returncode == 4
    assert "--resume: got --pause too, allowed: one of them" in done.stderr


def test_a_signal_that_means_nothing_ends_nothing(make_images: MakeImages, tmp_path: Path) -> None:
    with Mounted(make_images(2), tmp_path) as mounted:
        os.kill(mounted.pid, signal.SIGHUP)
        os.kill(mounted.pid, signal.SIGUSR2)
        os.kill(mounted.pid, signal.SIGUSR1)  # they are taken in order of number
        mounted.wait_for_events("STATUS")
        quorumfs("status", mounted.mountpoint)


def test_logrotate_may_rename_the_log(make_images: MakeImages, tmp_path: Path) -> None:
    """After a rename the next record goes to a new file of the old name; no signal is needed."""
    with Mounted(make_images(2), tmp_path) as mounted:
        wait_until(mounted.log_file.read_text, "the first record")
        old = mounted.log_file.rename(tmp_path / "log.1")
    assert "unmounted" in mounted.log()[-1]["message"]
    assert "unmounted" not in old.read_text()


def test_a_log_file_that_cannot_be_written_is_refused(
    make_images: MakeImages, mountpoint: Path
) -> None:
    """A log that was asked for is never silently left out."""
    line = refused(["--log-file", "/no/such/log", *make_images(2)], mountpoint)
    assert "/no/such/log: No such file or directory" in line
    os.mkfifo(fifo := mountpoint.parent / "fifo")
    line = refused(["--log-file", str(fifo), *make_images(2)], mountpoint)
    assert f"cannot write the log file {fifo}: No such device or address" in line


@pytest.fixture
def without_syslog(tmp_path: Path) -> Iterator[list[str]]:
    plain = tmp_path / "no-socket"
    plain.touch()
    with (
        file_replaced(Path("/dev/log"), plain) as no_syslog,
        file_replaced(Path(journald.SOCKET), plain) as no_journal,
    ):
        yield [*no_syslog, *no_journal]


def test_without_syslog_a_log_file_is_in_the_runtime_directory(
    make_images: MakeImages, mountpoint: Path, without_syslog: list[str]
) -> None:
    """In a container nothing listens at /dev/log; what happened can be read all the same.

    Nothing is left of a mount that ended well: each mount point would have a file there, in memory.
    """
    images = make_images(3)
    command = [*without_syslog, *QUORUMFS, "mount", *map(str, images), str(mountpoint)]
    subprocess.run(command, check=True)
    log = runtime.path_for(str(mountpoint), "log")
    wait_until(lambda: f"at {mountpoint}" in log.read_text(), "the first record")
    end_daemon(mountpoint)
    assert not log.exists()
    assert not log.with_suffix(".where").exists()
    images[2].unlink()
    subprocess.run(command, check=True)
    end_daemon(mountpoint)
    assert f"{images[2]} is missing" in log.read_text()
    assert f"unmounted {mountpoint}" in log.read_text()


@pytest.mark.parametrize("asked", [True, False], ids=["--log-file", "no syslog"])
def test_who_finds_the_daemon_gone_is_told_where_its_log_is(
    make_images: MakeImages, mountpoint: Path, without_syslog: list[str], asked: bool
) -> None:
    log = mountpoint.parent / "log" if asked else runtime.path_for(str(mountpoint), "log")
    arguments = ["--log-file", str(log)] if asked else []
    images = make_images(2)
    subprocess.run(
        [*without_syslog, *QUORUMFS, "mount", *arguments, *images, mountpoint], check=True
    )
    pid = daemon_of(mountpoint)
    with Path(f"/proc/{pid}/ns/mnt").open() as namespace:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the daemon's end")
        inside = ["nsenter", f"--mount=/proc/self/fd/{namespace.fileno()}"]
        done = subprocess.run(
            [*inside, *QUORUMFS, "status", mountpoint],
            pass_fds=[namespace.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"see its log: {log};" in done.stderr
    assert f"mounted {images[0]}" in log.read_text()


def test_a_daemon_logs_to_syslog(
    make_images: MakeImages, mountpoint: Path, without_syslog: list[str]
) -> None:
    """Detached, without --log-file and journal, each record is a syslog message of ``quorumfs``."""
    path = mountpoint.parent / "syslog"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(path))
        syslog.settimeout(10)
        with file_replaced(Path("/dev/log"), path) as prefix:
            command = [
                *without_syslog,
                *prefix,
                *QUORUMFS,
                "mount",
                *map(str, make_images(2)),
                str(mountpoint),
            ]
            subprocess.run(command, check=True)
            message = syslog.recv(4096)
            end_daemon(mountpoint)
    # <30>: facility daemon (3 * 8), severity info (6)
    assert message.startswith(b"<30>quorumfs: INFO: mounted ")
    assert not runtime.path_for(str(mountpoint), "log").exists()


def end_daemon(mountpoint: Path) -> None:
    """End a daemon whose mount is in a mount namespace of its own, out of reach of umount."""
    pid = daemon_of(mountpoint)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_alive(pid), "the daemon's end")
    assert processes_of(mountpoint) == []


def test_a_disk_is_found_wherever_its_mount_point_went(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """A directory above it gets another name; or a bind mount alone is left of it."""
    (tmp_path / "above" / "disk").mkdir(parents=True)
    images = make_images(2)
    quorumfs("mount", *images, tmp_path / "above" / "disk")
    (tmp_path / "above").rename(tmp_path / "renamed")
    renamed, shown = tmp_path / "renamed" / "disk", tmp_path / "shown"
    shown.mkdir()
    status = json.loads(quorumfs("status", "--json", renamed).stdout)
    assert (status["mountpoint"], status["state"]) == (str(renamed), "healthy")
    subprocess.run(["mount", "--bind", renamed, shown], check=True)
    quorumfs("umount", renamed)
    assert json.loads(quorumfs("status", "--json", shown).stdout)["state"] == "healthy"
    assert quorumfs("umount", shown).stderr == ""
    assert "clean: closed in order" in quorumfs("examine", *images).stdout


def test_who_has_the_disk_in_another_namespace_is_named(
    make_images: MakeImages, mountpoint: Path
) -> None:
    quorumfs("mount", *make_images(2), mountpoint)
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as elsewhere:
        try:
            assert elsewhere.stdout is not None
            elsewhere.stdout.readline()
            with subprocess.Popen(
                [*QUORUMFS, "umount", mountpoint], stderr=subprocess.PIPE, text=True
            ) as umount:
                assert umount.stderr is not None
                told = umount.stderr.readline()
                assert f"pid {elsewhere.pid}" in told
                assert "has the disk still" in told
                elsewhere.kill()
                assert umount.wait(60) == 0
        finally:
            elsewhere.kill()
