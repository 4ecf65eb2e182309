"""The values of options: one function for each kind of value. It turns the text behind the ``=``
into what it means, or raises `RefusedError` with what is allowed.
"""

import grp
import os
import pwd
import re
from collections.abc import Callable

from quorumfs.decisions.dirtymap import CHUNK_MIN, EXTENT


class RefusedError(Exception):
    """A parser's way to say what is allowed."""


def replicas(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(":"))
    if not all(names):
        raise RefusedError("replicas by path or file name, with a colon between them, or none")
    return names


def choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise RefusedError(" or ".join(allowed))
        return text

    return parse


def switch(text: str) -> bool:
    values = {"": True, "on": True, "true": True, "off": False, "false": False}
    if text not in values:
        raise RefusedError("on or off")
    return values[text]


def program(text: str) -> str | None:
    if text == "none":
        return None
    if not os.path.isabs(text) or not os.path.isfile(text) or not os.access(text, os.X_OK):
        raise RefusedError("the absolute path of a program that may be run, or none")
    return text


def directory(text: str) -> str | None:
    """The directory for sidecars of devices in *text*. Raises `RefusedError`."""
    if text == "none":
        return None
    if not os.path.isabs(text):
        raise RefusedError("the absolute path of a directory, or none")
    return os.path.normpath(text)


def flag(text: str) -> bool:
    if text:
        raise RefusedError("the option alone, without a value")
    return True


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise RefusedError("a whole number from 1")
    return int(text)


def background(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise RefusedError("a whole number from 1 to 65535")
    return int(text)


def duration(text: str) -> float:
    seconds = _seconds(text)
    if not 0.1 <= seconds <= 3600:
        raise RefusedError("a time from 100ms to 60m, like 8s")
    return seconds


def short_duration(text: str) -> float:
    seconds = _seconds(text)
    if not 0.001 <= seconds <= 60:
        raise RefusedError("a time from 1ms to 60s, like 100ms")
    return seconds


def _seconds(text: str) -> float:
    """A time in *text*; 0 if there is none."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|m|)", text)
    return float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60}[match[2]] if match else 0.0


def interval(text: str) -> float | None:
    if text == "off":
        return None
    match = re.fullmatch(r"([0-9]{1,5})([dhm])", text)
    seconds = int(match[1]) * {"d": 86400, "h": 3600, "m": 60}[match[2]] if match else 0
    if not 60 <= seconds <= 3650 * 86400:
        raise RefusedError("a time from 1m to 3650d with d, h or m, like 30d, or off")
    return float(seconds)


def rate(text: str) -> int | None:
    try:
        return None if text == "none" else parse_size(text)
    except RefusedError as refused:
        raise RefusedError(f"none, or {refused}") from None


def parse_size(text: str) -> int:
    """A number of bytes in *text*. Raises `RefusedError`."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper())
    if not match or not int(match[1]):
        raise RefusedError("a number of bytes from 1, with K, M, G or T for powers of 1024")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def chunk_size(text: str) -> int:
    size = parse_size(text)
    if size & (size - 1) or not CHUNK_MIN <= size <= EXTENT:
        raise RefusedError("a power of two from 64K to 4M")
    return size


def mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise RefusedError("an octal mode from 000 to 777, like 0660")
    return int(text, 8)


def uid(text: str) -> int:
    return _id(text, lambda name: pwd.getpwnam(name).pw_uid, "a user's name or number")


def gid(text: str) -> int:
    return _id(text, lambda name: grp.getgrnam(name).gr_gid, "a group's name or number")


def _id(text: str, look_up: Callable[[str], int], allowed: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text) and int(text) < 2**32 - 1:
        return int(text)
    try:
        return look_up(text)
    except (KeyError, ValueError):
        raise RefusedError(allowed) from None


def name(text: str) -> str:
    if not re.fullmatch(r"[\x21-\x5b\x5d-\x7e]{1,200}", text):  # libfuse drops a backslash
        raise RefusedError("1 to 200 printable ASCII characters, no space, no backslash")
    return text
