"""Work in a process of its own: going to the background, or being left behind if it hangs.

The fork comes first: before any thread, before trio, before anything is opened. The parent waits
on a pipe for the child's word, so that the command's exit code and message are those of the
mount, and scripts may open the file when it returns 0.
"""

import contextlib
import json
import os
import pickle
import select
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

from quorumfs.errors import ExitCode, UserError
from quorumfs.mount.letting_go import end, let_go_of_streams
from quorumfs.mount.limits import short_of

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

PATIENCE_S = 3.0
"""How long (seconds) a child that was told to end may take to give back what it has."""

T = TypeVar("T")

Ready = Callable[[], None]
"""To be called once, when the service is up."""


def run_detached(serve: Callable[[Ready], None]) -> None:
    """Run *serve* in a process of its own; return when it is ready.

    Raises `UserError` with the reason if it ends before. After that the service has no terminal,
    and its standard streams are ``/dev/null``.
    """
    reader, writer = os.pipe()
    # None may come between the fork and the place where the child is ended with us.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reader)
        _be_the_daemon(serve, writer)
    os.close(writer)
    try:
        for signum in _STOPS:
            signal.signal(signum, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        word = _read(reader)
    except KeyboardInterrupt:
        _stop(child, reader)
        raise
    finally:
        os.close(reader)
    if not word:
        _, status = os.waitpid(child, 0)
        raise UserError(f"the daemon ended unexpectedly ({_how(status)}); see the log")
    outcome = json.loads(word)
    if outcome["exit_code"] != ExitCode.OK:
        raise UserError(outcome["message"], exit_code=ExitCode(outcome["exit_code"]))


def _read(reader: int) -> bytes:
    """All that comes through the pipe."""
    with os.fdopen(reader, "rb", closefd=False) as pipe:
        return pipe.read()


def _stop(child: int, reader: int) -> None:
    """End *child*, which may wait for a hung replica for ever; it closes the other end of *reader*
    with all that it has."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGINT)
        ending, _, _ = select.select([reader], [], [], PATIENCE_S)
        if not ending:
            os.kill(child, signal.SIGKILL)


def in_child_process(work: Callable[[], T]) -> T:
    """What *work* returns, from a child process; raises the `UserError` that it raises.

    The kernel lets no process end before every system call of it has returned and its files are
    closed, which a file system that does not answer may put off for ever: that is the child's
    fate, and not that of the command. Ctrl-C has *work* undo what it began, and does not wait.
    """
    reader, writer = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work_in_child_process(work, writer, before)
    os.close(writer)
    try:
        for signum in _STOPS:
            signal.signal(signum, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with os.fdopen(reader, "rb") as pipe:
            word = pipe.read()
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGINT)
        raise
    if not word:
        _, status = os.waitpid(child, 0)
        raise UserError(
            f"the process that looks at the replicas ended unexpectedly: {_how(status)}"
        )
    value, message, exit_code = pickle.loads(word)  # noqa: S301 (our own child wrote it)
    if message is not None:
        error = UserError(message)
        error.exit_code = exit_code
        raise error
    return cast("T", value)


def _work_in_child_process(
    work: Callable[[], T], writer: int, mask: set[int | signal.Signals]
) -> NoReturn:
    """The child's whole life."""
    word: tuple[T | None, str | None, ExitCode] = None, None, ExitCode.OK
    try:
        os.setsid()  # a Ctrl-C at the terminal is for the parent, which passes it on
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        word = work(), None, ExitCode.OK
    except UserError as error:
        word = None, str(error), error.exit_code
    except KeyboardInterrupt:
        _let_go_of_streams()
        end(ExitCode.INTERRUPTED)
    except BaseException as error:
        why = short_of(error)
        if why is None:
            sys.excepthook(*sys.exc_info())
        word = None, why or "internal error, see above", ExitCode.FAILED
    _let_go_of_streams()
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
        pipe.write(pickle.dumps(word))
    end(ExitCode.OK)


def _let_go_of_streams() -> None:
    """Who reads what we say must not wait for our end, which a hung replica can put off."""
    for text in (sys.stdout, sys.stderr):
        if text is not None:  # closed already when we were started
            text.flush()
    let_go_of_streams()


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _be_the_daemon(serve: Callable[[Ready], None], writer: int) -> NoReturn:
    """The child's whole life; ends the process without running the parent's exit handlers."""

    def say(exit_code: ExitCode, message: str = "") -> None:
        os.write(writer, json.dumps({"exit_code": exit_code, "message": message}).encode())
        os.close(writer)

    said = False

    def ready() -> None:
        nonlocal said
        # Not before: through the mount point of an automounter goes only its own process group
        # until what it started has mounted something there, and everybody else waits for that.
        os.setsid()
        _let_go_of_streams()
        said = True
        try:
            say(ExitCode.OK)
        except BrokenPipeError:  # the caller was killed while it waited: undo its work
            os.kill(os.getpid(), signal.SIGTERM)

    exit_code = ExitCode.OK
    try:
        os.chdir("/")
        # Whatever else the caller had open (a lock, a pipe that somebody reads) is not ours.
        os.closerange(3, writer)
        os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
        serve(ready)
    except UserError as error:
        exit_code = error.exit_code
        if not said:
            _let_go_of_streams()
            say(exit_code, str(error))
    except BaseException as error:
        exit_code = ExitCode.FAILED
        if not said:
            why = short_of(error)
            if why is None:
                sys.excepthook(*sys.exc_info())
            _let_go_of_streams()
            say(exit_code, why or "internal error, see above")
    if not said:
        end(exit_code)
    os._exit(exit_code)  # the disk was closed in order, or must not answer any more
