"""The disks of this host that have a name: ``/etc/quorumfs/NAME.conf``.

A file is TOML: Python reads that by itself, a path is quoted and may hold anything, and a list of
replicas is a list::

    replicas = ["/nas1/a.img", "/nas2/b.img"]
    mountpoint = "/mnt/vdisk"
    options = "read-pattern=fifo,vote-threshold=1"  # as after -o; may be left out
"""

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from quorumfs.errors import UsageError
from quorumfs.options import parse_options

DIRECTORY = "/etc/quorumfs"

SUFFIX = ".conf"

KEYS = ("replicas", "mountpoint", "options")


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
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    return _File(path, text).disk(name)


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
        except tomllib.TOMLDecodeError as error:
            said, _, place = str(error).partition(" (at ")
            found = re.match(r"line (\d+)", place)
            self._refuse(int(found[1]) if found else len(self._lines) or 1, f"no TOML: {said}")

    def disk(self, name: str) -> ConfiguredDisk:
        for key in self._content:
            if key not in KEYS:
                self._refuse(key, f"unknown key {key!r}; there are: {', '.join(KEYS)}")
        replicas = self._content.get("replicas")
        allowed = 'a list of absolute paths, like ["/nas1/a.img", "/nas2/b.img"]'
        if not (isinstance(replicas, list) and replicas and all(map(_is_path, replicas))):
            self._refuse("replicas", f"replicas: got {replicas!r}, allowed: {allowed}")
        mountpoint = self._content.get("mountpoint")
        if not _is_path(mountpoint):
            allowed = 'an absolute path, like "/mnt/vdisk"'
            self._refuse("mountpoint", f"mountpoint: got {mountpoint!r}, allowed: {allowed}")
        options = self._content.get("options", "")
        if not isinstance(options, str):
            allowed = 'a text as after -o, like "read-pattern=fifo,vote-threshold=1"'
            self._refuse("options", f"options: got {options!r}, allowed: {allowed}")
        try:
            parse_options([options], len(replicas))
        except UsageError as error:
            self._refuse("options", str(error))
        return ConfiguredDisk(name, tuple(replicas), mountpoint, options)

    def _refuse(self, where: int | str, why: str) -> NoReturn:
        """*where*: the number of the line, or the key that it is about, which may be missing."""
        if isinstance(where, str):
            begins = re.compile(rf"""\s*["']?{re.escape(where)}["']?\s*[=.]|\s*\[+\s*{where}\b""")
            found = [n for n, line in enumerate(self._lines, 1) if begins.match(line)]
            where = found[0] if found else len(self._lines) or 1
        raise UsageError(f"{self._path}, line {where}: {why}")


def _is_path(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.startswith("/") and "\0" not in value
