"""Commands in messages: quoted so that a shell takes every byte of a path back. Pure."""

import os
import shlex
from collections.abc import Iterable


def quoted(text: str) -> str:
    """*text* as one word of a shell, in printable characters alone: else ``$'...'`` of bash."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{''.join(escaped)}'"


def joined(texts: Iterable[str]) -> str:
    """*texts* as words of a shell."""
    return " ".join(map(quoted, texts))
