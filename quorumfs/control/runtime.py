"""The runtime directory: how commands find the daemon of a mount point.

Each mount holds a locked file named after its mount point, with the daemon's process id in it.
The lock, not the file, says that the daemon lives: the kernel drops it however the process ends.

What a command finds in another user's directory is that user's: perhaps a FIFO, a link to
anything, a file without an end, a file under a lease, or a file system that never answers. So
nothing is followed, nothing waited for, and no more read than our daemons write.
"""

import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import xxhash

from quorumfs.control import mounts
from quorumfs.errors import UserError
from quorumfs.replica.ofdlock import could_lock, try_lock

SHARED = Path("/tmp")  # noqa: S108 (what is there is checked to be the user's)
"""Where users make directories side by side."""

SESSIONS = Path("/run/user")

NOTE_MAX = 8192
"""Bytes of what a daemon notes for a reader."""

PLACE_MAX = 8192
"""Bytes of the path of a mount point, at most."""

WORD_MAX = 1024
"""Bytes of the word that a daemon leaves: reserved beforehand, since it must not fail."""

LISTING_S = 0.5
"""How long to look through `SHARED`, which anybody can fill."""

HOMES_MAX = 8
"""Directories of one user: of more than that, somebody makes fun of us."""

SOCKET_PATH_MAX = 107
"""Bytes: what the kernel takes."""


def directories(uid: int, given: Path | None = None) -> list[Path]:
    """Where the runtime directory of user *uid* may be; the first that can be used is, now.

    *given* is what ``--runtime-dir`` said. Else it is ``/run/quorumfs`` for root, and for others
    in their own ``/run/user/UID`` while they are logged in, or under ``/tmp``. The environment
    has no say: who mounts, who unmounts, and root must all look in the same place. Except for
    root of a user namespace, whom nobody else looks for, and who often may not write to ``/run``.
    """
    without_session = SHARED / f"quorumfs-{uid}"
    if uid != 0:
        usual = [SESSIONS / str(uid) / "quorumfs", without_session]
    else:
        usual = [Path("/run/quorumfs")]
        if in_user_namespace():
            session = os.environ.get("XDG_RUNTIME_DIR", "")
            usual += [Path(session) / "quorumfs"] if os.path.isabs(session) else []
            usual.append(without_session)
    return [given, *usual] if given else usual


def in_user_namespace() -> bool:
    """Whether user ids mean something else here than to the host."""
    with suppress(OSError):
        return Path("/proc/self/uid_map").read_text("ascii").split() != ["0", "0", "4294967295"]
    return False


def path_for(mountpoint: str, suffix: str, home: Path | None = None) -> Path:
    """The file for *mountpoint* (absolute, without symbolic links) in a runtime directory.

    *home* is that directory, by default the first of our own.
    """
    name = xxhash.xxh3_64_hexdigest(os.fsencode(mountpoint))
    return (home or directories(os.geteuid())[0]) / f"{name}.{suffix}"


# For the daemon


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to be the daemon of *mountpoint*, and its files in the runtime directory."""

    mountpoint: str
    home: Path
    descriptor: int
    """Holds the lock while it is open."""

    def path(self, suffix: str) -> Path:
        """Our file of this kind."""
        return path_for(self.mountpoint, suffix, self.home)

    def note_device(self) -> None:
        """Note by which number the kernel knows the file system, which is mounted now: its path may
        change, by a new name of a directory above, or be one of several."""
        with suppress(OSError):  # then it is found by its path alone
            mounted = mounts.mount_at(self.mountpoint)
            if mounted is not None and mounted.device:
                self._device_file(mounted).write_bytes(os.fsencode(self.mountpoint))

    def _device_file(self, mounted: mounts.Mount) -> Path:
        return self.home / _name_of_device(mounted)

    def leave_word(self, text: str) -> None:
        """Leave *text* for whoever waits for this daemon to end; there is room for it."""
        content = text.encode("utf-8", "backslashreplace")[:WORD_MAX]
        word = os.open(self.path("word"), os.O_WRONLY | os.O_NOFOLLOW)
        try:
            os.pwrite(word, content, 0)
        finally:
            os.close(word)

    def give_up(self) -> None:
        """End what `claim` began. A word that was left stays, and what tells of a dead mount."""
        mounted = mounts.mount_at(self.mountpoint)
        if mounted is None or mounted.fs_type != mounts.FS_TYPE:
            self.path("where").unlink(missing_ok=True)
        with suppress(OSError):
            if not self.path("word").read_bytes().strip():
                self.path("word").unlink()
        with suppress(OSError):
            for noted in self.home.glob("*.at"):
                if noted.read_bytes() == os.fsencode(self.mountpoint):
                    noted.unlink()
        self.path("pid").unlink(missing_ok=True)
        os.close(self.descriptor)


def claim(mountpoint: str, given: Path | None = None) -> Claim:
    """Become the daemon of *mountpoint*.

    Raises `UserError` if another daemon is, or no runtime directory can be used.
    """
    uid = os.geteuid()
    with Finder(given) as finder:
        if finder.daemon_pid(mountpoint, uid):
            raise _taken(mountpoint)
        privately = finder.private(uid)
    refused = []
    for home in directories(uid, given)[: 1 if given else None]:
        try:
            return _claim_in(home, mountpoint)
        except FileNotFoundError as error:  # of who is not logged in
            refused += [_refusal(home, error)] if home == given else []
        except OSError as error:
            refused.append(_refusal(home, error))
    if given is None and _may_be_private(uid):
        # Somebody took the name that all know. Nobody can take one that nobody knows.
        try:
            if not privately:
                privately = [Path(tempfile.mkdtemp(prefix=f"quorumfs-{uid}-", dir=SHARED))]
            return _claim_in(privately[0], mountpoint)
        except OSError as error:
            refused.append(_refusal(privately[0] if privately else SHARED, error))
    raise UserError(f"{'; '.join(refused)}; --runtime-dir names another one")


def _name_of_device(mounted: mounts.Mount) -> str:
    return f"{mounted.device.replace(':', '-')}.at"


def _refusal(home: Path, error: OSError) -> str:
    return f"cannot use the runtime directory {home}: {error.strerror or error}"


def _may_be_private(uid: int) -> bool:
    """Whether the directory of *uid* may be one in `SHARED` with a name of its own."""
    return uid != 0 or in_user_namespace()


def _taken(mountpoint: str) -> UserError:
    return UserError(f"{mountpoint} is being mounted by another quorumfs")


def _claim_in(home: Path, mountpoint: str) -> Claim:
    """Raises `OSError` if *home* cannot be used, `UserError` if another daemon has the claim."""
    _make(home)
    longest = os.fsencode(path_for(mountpoint, "sock", home))
    if len(longest) > SOCKET_PATH_MAX:
        raise OSError(0, f"its path is too long for a socket by {len(longest) - SOCKET_PATH_MAX}")
    path = path_for(mountpoint, "pid", home)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        if not try_lock(descriptor, 0, 0, exclusive=True):
            raise _taken(mountpoint)
        os.truncate(descriptor, 0)
        try:
            os.write(descriptor, b"%d\n" % os.getpid())
            word = os.open(
                path.with_suffix(".word"),
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW,
                0o600,
            )
            try:
                os.write(word, b" " * WORD_MAX)
            finally:
                os.close(word)
        except OSError:  # no space
            path.unlink()
            path.with_suffix(".word").unlink(missing_ok=True)
            raise
    except BaseException:
        os.close(descriptor)
        raise
    return Claim(mountpoint, home, descriptor)


def _make(home: Path) -> None:
    """Have *home*, ours alone. Raises `OSError`."""
    with suppress(FileExistsError):
        home.mkdir(mode=0o700)
    status = home.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(0, "it is no directory")
    if status.st_uid != os.geteuid():
        raise PermissionError(0, "it belongs to somebody else")
    if status.st_mode & 0o022:
        raise PermissionError(0, "others may write to it")


def note_log(path: Path, place: str) -> None:
    """Note in words where the log of a mount goes; *path*: the place for it in this directory."""
    with suppress(OSError):  # it only helps a reader
        path.with_suffix(".where").write_text(place, errors="backslashreplace")


# For the commands


class Finder:
    """Finds what daemons left in their users' runtime directories.

    Made for one question, with ``with``: each directory is looked for once. *given* is another
    place for all of them, which is looked at first.
    """

    def __init__(self, given: Path | None = None) -> None:
        self._given = given
        self._homes: dict[tuple[int, str], list[tuple[Path, int]]] = {}
        """Of each user, by how they are found: paths, and descriptors that are open."""
        self._listed: list[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for homes in self._homes.values():
            for _, descriptor in homes:
                os.close(descriptor)

    def place_of(self, mounted: mounts.Mount) -> str:
        """The path by which the daemon of *mounted* is found: where it mounted first. Another one
        may lead there now, or none."""
        if mounted.device:
            for _, directory in self._found(mounted.owner, "usual"):
                with suppress(OSError):
                    descriptor = _open_file(directory, _name_of_device(mounted), mounted.owner)
                    try:
                        place = os.fsdecode(os.read(descriptor, PLACE_MAX))
                    finally:
                        os.close(descriptor)
                    # A daemon that was killed leaves its note, and another gets its number.
                    if self.daemon_pid(place, mounted.owner) is not None:
                        return place
        return mounted.mountpoint

    def sockets(self, mountpoint: str, uid: int) -> Iterator[tuple[Path, int]]:
        """The sockets of *mountpoint* that are really *uid*'s: paths, and descriptors to close.

        The descriptor is of the socket itself (``O_PATH``): what is connected to through it is
        that one, wherever the path leads by then.
        """
        for home, directory in self._homes_of(uid):
            path = path_for(mountpoint, "sock", home)
            with suppress(OSError):
                descriptor = open_below(directory, path.name, uid, stat.S_ISSOCK)
                yield path, descriptor

    def daemon_pid(self, mountpoint: str, uid: int) -> int | None:
        """The process id of the daemon that serves *mountpoint* for user *uid*, if it lives."""
        for home, directory in self._homes_of(uid):
            name = path_for(mountpoint, "pid", home).name
            with suppress(OSError):
                descriptor = _open_file(directory, name, uid)
                try:
                    if could_lock(descriptor, 0, 0, exclusive=False):
                        continue  # left by a daemon that died
                    noted = re.fullmatch(rb"([1-9][0-9]{0,8})\n", os.read(descriptor, 32))
                finally:
                    os.close(descriptor)
                # The file is the user's: nobody is to wait for somebody else's process.
                if noted and os.stat(f"/proc/{int(noted[1])}").st_uid == uid:
                    return int(noted[1])
        return None

    def log_of(self, mountpoint: str, uid: int) -> str:
        """Where to look for what befell the daemon of *mountpoint*, in words for a reader."""
        place = self._text(mountpoint, "where", uid, NOTE_MAX)
        return f"its log: {place}" if place and place.isprintable() else "its log"

    def take_word(self, mountpoint: str, uid: int) -> str | None:
        """What the daemon of *mountpoint* left, once; None if it ended well."""
        word = self._text(mountpoint, "word", uid, WORD_MAX)
        for home, directory in self._homes_of(uid):
            with suppress(OSError):
                os.unlink(path_for(mountpoint, "word", home).name, dir_fd=directory)
        return word

    def is_elsewhere(self, uid: int) -> bool:
        """Whether a place for the directory of *uid* alone is another one's.

        So it is in a user namespace, whose root sees what the host's root mounted.
        """
        with suppress(OSError):
            return uid == 0 and os.lstat(directories(uid)[0]).st_uid != 0
        return False

    def private(self, uid: int) -> list[Path]:
        """Directories of *uid* in `SHARED` that have a name of their own."""
        return [home for home, _ in self._found(uid, "private")]

    def _homes_of(self, uid: int) -> Iterator[tuple[Path, int]]:
        yield from self._found(uid, "usual")
        yield from self._found(uid, "private")  # last: it takes longest, and is hardly ever needed

    def _found(self, uid: int, how: str) -> list[tuple[Path, int]]:
        if (uid, how) not in self._homes:
            paths = directories(uid, self._given) if how == "usual" else self._named_privately(uid)
            self._homes[uid, how] = list(_open_homes(paths, uid))
        return self._homes[uid, how]

    def _named_privately(self, uid: int) -> list[Path]:
        if not _may_be_private(uid):
            return []
        if self._listed is None:
            self._listed = list(_listed(SHARED, "quorumfs-"))
        named = re.compile(rf"quorumfs-{uid}-[a-z0-9_]{{1,16}}")
        return [SHARED / name for name in self._listed if named.fullmatch(name)]

    def _text(self, mountpoint: str, suffix: str, uid: int, limit: int) -> str | None:
        for home, directory in self._homes_of(uid):
            with suppress(OSError):
                descriptor = _open_file(directory, path_for(mountpoint, suffix, home).name, uid)
                try:
                    if text := os.read(descriptor, limit).decode("utf-8", "replace").strip():
                        return text
                finally:
                    os.close(descriptor)
        return None


def daemon_pid(mountpoint: str, uid: int, given: Path | None = None) -> int | None:
    """The same as `Finder.daemon_pid`, once."""
    with Finder(given) as finder:
        return finder.daemon_pid(mountpoint, uid)


def open_below(directory: int, name: str, uid: int, is_kind: Callable[[int], bool]) -> int:
    """A descriptor (``O_PATH``) of *name* in *directory*, if it is *uid*'s and of that kind.

    Raises `OSError`. Nothing is asked of a file system that a user may serve, for it may never
    answer: what is mounted there is found out from the kernel alone.
    """
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory)
    try:
        mount = _mount_id(descriptor)
        if mount != _mount_id(directory):
            fs_type = mounts.fs_type_of(mount)
            if fs_type is None or fs_type.startswith("fuse"):
                raise PermissionError(0, "a user's file system is mounted there")
        status = os.fstat(descriptor)
        if status.st_uid != uid or not is_kind(status.st_mode):
            raise PermissionError(0, "it is something else, or somebody else's")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open_file(directory: int, name: str, uid: int) -> int:
    """A descriptor for reading a regular file, as `open_below`; it waits for no lease either."""
    descriptor = open_below(directory, name, uid, stat.S_ISREG)
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_NONBLOCK)
    finally:
        os.close(descriptor)


def _open_homes(homes: list[Path], uid: int) -> Iterator[tuple[Path, int]]:
    """The first `HOMES_MAX` of *homes* that are there and *uid*'s, with a descriptor of each."""
    opened = 0
    for home in homes:
        if opened == HOMES_MAX:
            return
        session = home.parent.parent == SESSIONS  # in a directory that is the user's, too
        trusted = home.parent.parent if session else home.parent
        with suppress(OSError):
            descriptor = os.open(trusted, os.O_PATH | os.O_DIRECTORY)
            for name in home.relative_to(trusted).parts:
                try:
                    below = open_below(descriptor, name, uid, stat.S_ISDIR)
                finally:
                    os.close(descriptor)
                descriptor = below
            opened += 1
            yield home, descriptor


def _mount_id(descriptor: int) -> int:
    """The kernel's number of the mount that the file is reached by."""
    told = Path(f"/proc/self/fdinfo/{descriptor}").read_text("ascii")
    found = re.search(r"^mnt_id:\s*(\d+)$", told, re.MULTILINE)
    assert found is not None
    return int(found[1])


def _listed(directory: Path, prefix: str) -> Iterator[str]:
    """Names in *directory* that begin so, as many as are found in `LISTING_S`."""
    deadline = time.monotonic() + LISTING_S
    with suppress(OSError), os.scandir(directory) as entries:
        for count, entry in enumerate(entries):
            if entry.name.startswith(prefix):
                yield entry.name
            if count % 1024 == 0 and time.monotonic() > deadline:
                return
