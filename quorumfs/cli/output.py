"""What the commands write: harmless to a terminal, and never written in part without a word."""

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from quorumfs.control.journald import ERROR, has_stderr
from quorumfs.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class OutputError(UserError):
    """Standard output takes no more: it is full, as a rule."""


class _Output(io.RawIOBase):
    """Standard output, whose errors are told apart from those of other files."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def isatty(self) -> bool:
        return os.isatty(1)

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return os.write(1, data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror}") from None


def watched_stdout() -> TextIO:
    """Standard output for `sys.stdout`, with errors that `OutputError` tells."""
    output = io.BufferedWriter(_Output())
    encoding, errors = ("utf-8", "strict")
    if sys.stdout is not None:
        encoding, errors = sys.stdout.encoding, sys.stdout.errors or errors
    return io.TextIOWrapper(output, encoding, errors, line_buffering=os.isatty(1))


def forget_stdout() -> None:
    """What is still in the buffer of standard output goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def complain(message: str, priority: int = ERROR) -> None:
    """One line on stderr, if anybody takes it; with *priority* where that is the journal."""
    if sys.stderr is not None:
        prefix = f"<{priority}>" if has_stderr() else ""
        line = prefix + printable(message, sys.stderr)
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def printable(text: str, stream: TextIO | None = None) -> str:
    """*text* on one line, in characters that every terminal and pipe takes.

    *stream* is where it goes to, by default standard output.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = (stream or sys.stdout).encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
