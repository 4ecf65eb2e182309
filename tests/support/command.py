"""What the tests of the command look at: refusals, processes, and the command as another user."""

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import quorumfs as package
from quorumfs.control import mounts, runtime
from support.faultfs import unmount
from support.mounting import QUORUMFS, quorumfs

PATIENCE_S = 60.0
"""How long something that is about to happen may take before the test fails: minutes of a busy
machine's disk, for who waits longer than needed loses time only with a failure."""


def require_root() -> None:
    """Fail at once, with the reason, where mounting cannot work."""
    assert os.geteuid() == 0, "the system tests mount, lock and change users: run them as root"


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return once *condition* holds; fail, saying *what* did not come, after *timeout_s*."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def waits_of_python(pid: int) -> int:
    """How often the first thread has waited: once for each time it woke up."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


def is_alive(pid: int) -> bool:
    """Whether *pid* can still do anything, or holds anything: a zombie only waits for its parent.

    Its first thread may be a zombie while others still have its files open.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_of(path: Path) -> list[int]:
    """Living processes with *path* in their command line, such as a daemon that mounts it."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            if os.fsencode(path) in arguments and int(pid) != os.getpid():
                found.append(int(pid))
    return [pid for pid in found if is_alive(pid)]


def filesystem_at(mountpoint: Path) -> str | None:
    """The type of the topmost mount at *mountpoint*, if any, from the kernel's table."""
    mount = mounts.mount_at(str(mountpoint))
    return None if mount is None else mount.fs_type


def mounted_below(directory: Path) -> list[str]:
    """Mount points that have the path of *directory* in theirs."""
    return [mount.mountpoint for mount in mounts.table() if str(directory) in mount.mountpoint]


@contextlib.contextmanager
def empty_mountpoint(path: Path) -> Iterator[Path]:
    """A new directory; what a failed test leaves mounted or running there is taken away."""
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        for pid in processes_of(path):
            os.kill(pid, signal.SIGKILL)
        while filesystem_at(path):
            subprocess.run(["umount", "-l", path], check=True)
        for suffix in ("log", "where"):  # of a daemon that was killed, or had trouble to tell
            runtime.path_for(str(path), suffix).unlink(missing_ok=True)


def one_line(done: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """What a command that refused said, which must be exactly one line, on stderr alone."""
    assert done.returncode == exit_code, f"exit code {done.returncode}: {done.stderr}"
    assert done.stdout == ""
    assert done.stderr.startswith("quorumfs: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    return done.stderr.strip()


def refused(arguments: Sequence[str | Path], mountpoint: Path, *, exit_code: int = 1) -> str:
    """The one line with which ``quorumfs mount *arguments* mountpoint`` refuses.

    A refusal changes nothing: no mount, no process, no new file around the mount point, and the
    mount point itself untouched.
    """

    def seen() -> object:
        return (
            sorted(os.listdir(mountpoint.parent)),
            sorted(os.listdir(mountpoint)),
            mountpoint.stat().st_mtime_ns,
            filesystem_at(mountpoint),
        )

    before = seen()
    done = quorumfs("mount", *arguments, mountpoint, check=False)
    line = one_line(done, exit_code)
    assert seen() == before
    assert processes_of(mountpoint) == []
    return line


def quorumfs_in_background(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the command; the test waits for it."""
    return subprocess.Popen(
        [*QUORUMFS, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class OrdinaryUser:
    """The user nobody, without a login session, able to import the package under test."""

    def __init__(self, directory: Path) -> None:
        entry = pwd.getpwnam("nobody")
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.directory = directory / "home"
        """Its own; everybody can look into it."""
        self.directory.mkdir()
        os.chown(self.directory, self.uid, self.gid)
        self.runtime = Path(f"/tmp/quorumfs-{self.uid}")
        """Where its daemons are found, for want of a login session."""
        self.environment = {
            "HOME": str(self.directory),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{directory / 'lib'}:{sysconfig.get_path('platlib')}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._python = ""

    @property
    def python(self) -> str:
        """An interpreter this user may run: ours can lie below root's private home."""
        if not self._python:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            candidates = (sys.executable, f"/usr/bin/python{version}")
            usable = [each for each in candidates if self._may_execute(each)]
            assert usable, f"an ordinary user may run none of {candidates}"
            self._python = usable[0]
        return self._python

    def _may_execute(self, program: str) -> bool:
        try:
            return self.run(program, "-S", "-c", "").returncode == 0
        except PermissionError:
            return False

    def make_images(self, count: int, size: int = 1 << 20) -> list[Path]:
        paths = [self.directory / f"{letter}.img" for letter in "abcdefgh"[:count]]
        for path in paths:
            with path.open("wb") as file:
                file.truncate(size)
            os.chown(path, self.uid, self.gid)
        return paths

    def make_directory(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(mode=0o700)
        os.chown(path, self.uid, self.gid)
        return path

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run any *command* as this user, in its directory, to the end."""
        return subprocess.run(
            list(map(str, command)),
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            cwd=self.directory,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def quorumfs(self, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``quorumfs`` as this user."""
        return self.run(*self.command(*arguments), **env)

    def start(self, *arguments: str | Path, **env: str) -> subprocess.Popen[str]:
        """Start ``quorumfs`` as this user; the test waits for it."""
        return subprocess.Popen(
            self.command(*arguments),
            user=self.uid,
            group=self.gid,
            extra_groups=[],
            cwd=self.directory,
            env=self.environment | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, *arguments: str | Path) -> list[str | Path]:
        """The command line of `quorumfs`, which takes this user's environment."""
        return [self.python, *QUORUMFS[1:], *arguments]


def _copy_for_all(source: str, to: str) -> None:
    """Copy a file, with the mode of a new one, and with its time: what is compiled fits it."""
    shutil.copyfile(source, to)
    status = os.stat(source)
    os.utime(to, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def ordinary_user() -> Iterator[OrdinaryUser]:
    """A user as most systems have them: /dev/fuse for everybody, no rights beyond.

    The package is copied, because a checkout may lie below a private directory. Tests in other
    processes wait: there is one such user, with one runtime directory, and one /dev/fuse.
    """
    require_root()
    with (
        open("/dev/fuse", "rb") as device,
        tempfile.TemporaryDirectory(prefix="quorumfs-test-", dir="/tmp") as name,
    ):
        fcntl.flock(device, fcntl.LOCK_EX)
        device_mode = os.fstat(device.fileno()).st_mode & 0o7777
        directory = Path(name)
        directory.chmod(0o755)
        source = Path(package.__file__).parent
        shutil.copytree(source, directory / "lib" / "quorumfs", copy_function=_copy_for_all)
        user = OrdinaryUser(directory)
        used_before = user.runtime.exists()
        os.chmod("/dev/fuse", 0o666)
        try:
            yield user
            assert not mounted_below(directory), "left mounted"
            wait_until(lambda: not processes_of(directory), "the end of the user's daemons")
        finally:
            os.chmod("/dev/fuse", device_mode)
            for mountpoint in user.directory.glob("mnt*"):
                unmount(mountpoint)  # else the directory could not be removed
            if not used_before:
                shutil.rmtree(user.runtime, ignore_errors=True)


def privately(script: str) -> list[str]:
    """The beginning of a command that runs a shell script, whose mounts nobody else sees.

    What others unmount meanwhile is unmounted there too: else it would go on for as long.
    """
    return ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh"]


@contextlib.contextmanager
def file_replaced(path: Path, by: Path) -> Iterator[list[str]]:
    """A command prefix under which *by* stands at *path*, for that command and its children only.

    What others unmount meanwhile is unmounted there too: else it would go on for as long.
    The real file stays as it is for everybody else; where there is none, an empty one stands in.
    """
    require_root()
    path = path.resolve()
    created = not path.exists()
    if created:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    try:
        script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
        yield [*privately(script), str(by), str(path)]
    finally:
        if created:
            path.unlink()
            with contextlib.suppress(OSError):  # it holds something else
                os.removedirs(path.parent)
