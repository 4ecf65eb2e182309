"""The disks of this host that have a name: ``/etc/quorumfs/NAME.conf``.

A file is TOML: Python reads that by itself, a path is quoted and may hold anything, and a list of
replicas is a list. What it may say is in one table, `KEYS`, from which quorumfs.conf(5) is made.
"""

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from quorumfs.errors import UsageError
from quorumfs.options.parsing import parse_options

DIRECTORY = "/etc/quorumfs"

SUFFIX = ".conf"

LONGEST = 1 << 16
"""Bytes of a file."""


@dataclass(frozen=True, slots=True)
class Key:
    """What one line of a file says."""

    example: str
    """In TOML."""
    help: str
    allowed: str
    """What its value may be, for the message about another one."""


KEYS: Mapping[str, Key] = {
    "replicas": Key(
        '["/nas1/a.img", "/nas2/b.img"]',
        "The image files, as mount is given them. With read-pattern=fifo they are read in this "
        "order.",
        "a list of absolute paths",
    ),
    "mountpoint": Key(
        '"/mnt/vdisk"',
        "The directory where the disk is to be mounted. It exists, and disk.img is the file in it.",
        "an absolute path",
    ),
    "options": Key(
        '"read-pattern=fifo,vote-threshold=1"',
        "Mount options, as after -o. It may be left out.",
        "a text as after -o",
    ),
}
"""All that a file may say; whatever else it says is refused."""

EXAMPLE = [f"{name} = {key.example}" for name, key in KEYS.items()]
"""The lines of a file."""


@dataclass(frozen=True, slots=True)
class ConfiguredDisk:
    """What a file says; its options are possible ones."""

    name: str
    replicas: tuple[str, ...]
    mountpoint: str
    options: str


def is_name(text: str) -> bool:
    """Whether *text* can be the name of a disk: of characters that a unit's name may have, too."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text) is not None


def path_of(name: str) -> str:
    """The file of the disk *name*."""
    return os.path.join(DIRECTORY, name + SUFFIX)


def names() -> Iterator[str]:
    """Of all disks that have a file, in alphabetical order."""
    try:
        entries = sorted(os.listdir(DIRECTORY))
    except FileNotFoundError:
        return
    for entry in entries:
        name = entry.removesuffix(SUFFIX)
        if name != entry and is_name(name):
            yield name


def configured(name: str) -> ConfiguredDisk:
    """The disk *name*. Raises `UsageError` that names the file, and the line if there is one."""
    path = path_of(name)
    try:
        return _File(path, _text_in(path)).disk(name)
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _text_in(path: str) -> str:
    """The text of a file, which may be anything. Raises `UsageError`, `OSError` and
    `UnicodeDecodeError`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UsageError(f"{path} is no regular file")
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise UsageError(f"{path} has more than {LONGEST} bytes")
    return content.decode()


def mountpoint_of(text: str) -> str:
    """The mount point that *text* stands for: a disk's, where that is the name of one, else a path.

    The name counts for more than a directory of the same name, as it does to ``mount NAME``; that
    one is ``./NAME``. Raises `UsageError` as `configured` does.
    """
    if is_name(text) and os.path.exists(path_of(text)):
        return configured(text).mountpoint
    return text


def replicas_of(source: str) -> list[str]:
    """The paths in *source*, as a line of fstab has them: with colons between them; ``\\:`` is a
    colon in a path. Raises `UsageError`.
    """
    paths = [""]
    for piece in re.findall(r"\\[:\\]|.", source, re.DOTALL):
        if piece == ":":
            paths.append("")
        else:
            paths[-1] += piece[-1]
    if not all(paths):
        raise UsageError(
            f"source: got {source!r}, allowed: paths of replicas with colons between them (a colon "
            r"in a path is \:), or the NAME of /etc/quorumfs/NAME.conf"
        )
    return paths


class _File:
    """One file, for messages that name the line."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()
        try:
            self._content: dict[str, Any] = tomllib.loads(text)
        except RecursionError:
            raise UsageError(f"{path}: brackets too deep in each other") from None
        except ValueError as error:  # a `TOMLDecodeError`, or of a number that is too long
            said, _, place = str(error).partition(" (at ")
            found = re.match(r"line (\d+)", place)
            self._refuse(int(found[1]) if found else len(self._lines) or 1, f"no TOML: {said}")

    def disk(self, name: str) -> ConfiguredDisk:
        for key in self._content:
            if key not in KEYS:
                self._refuse(key, f"unknown key {key!r}; there are: {', '.join(KEYS)}")
        replicas = self._content.get("replicas")
        if not (isinstance(replicas, list) and replicas and all(map(_is_path, replicas))):
            self._refuse_value("replicas")
        mountpoint = self._content.get("mountpoint")
        if not _is_path(mountpoint):
            self._refuse_value("mountpoint")
        options = self._content.get("options", "")
        if not isinstance(options, str):
            self._refuse_value("options")
        try:
            parse_options([options], len(replicas))
        except UsageError as error:
            self._refuse("options", str(error))
        return ConfiguredDisk(name, tuple(replicas), mountpoint, options)

    def _refuse_value(self, name: str) -> NoReturn:
        """For the key *name* is none that can be meant."""
        key = KEYS[name]
        got = self._content.get(name)
        self._refuse(name, f"{name}: got {got!r}, allowed: {key.allowed}, like {key.example}")

    def _refuse(self, where: int | str, why: str) -> NoReturn:
        """*where*: the number of the line, or the key that it is about, which may be missing."""
        if isinstance(where, str):
            begins = re.compile(rf"""\s*["']?{re.escape(where)}["']?\s*[=.]|\s*\[+\s*{where}\b""")
            found = [n for n, line in enumerate(self._lines, 1) if begins.match(line)]
            where = found[0] if found else len(self._lines) or 1
        raise UsageError(f"{self._path}, line {where}: {why}")


def _is_path(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith("/") and "\0" not in value
