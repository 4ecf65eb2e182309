"""What the process that starts us hands down, and would end or fail a daemon days later.

Limits of resources (``getrlimit(2)``) and the like: what can be set right is, and the rest is
refused by name before anything begins.
"""

import errno
import os
import resource
import signal

from quorumfs.errors import UserError

DESCRIPTORS = 48
"""Open files of a daemon besides its replicas': FUSE, log, socket, threads, and who asks it."""

DESCRIPTORS_PER_REPLICA = 8
"""Image and sidecar, those of an earlier opening that hangs, and those lent to a resync."""


def reset() -> None:
    """Undo what a parent process may have left behind, and would change what our code does.

    A descriptor of a standard stream that is closed would go to the next file opened. Files are to
    be for this user alone, unless we say otherwise. And who ignores ``SIGCHLD`` is not told how a
    child process ended.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    os.umask(0o077)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def require_file_size(size: int, what: str) -> None:
    """Refuse (`UserError`) where no file of *size* bytes, as *what* need, may be written."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < size:
        raise UserError(
            f"the limit on the size of files is {limit} bytes, {what} need {size}: run ulimit -f "
            "unlimited before (systemd: LimitFSIZE=infinity)"
        )


def require_for_service(replicas: int) -> None:
    """Raise what limits a daemon with so many *replicas* as far as it may be raised, and refuse
    (`UserError`) where that is too little.
    """
    wanted = DESCRIPTORS + DESCRIPTORS_PER_REPLICA * replicas
    if (limit := _raised(resource.RLIMIT_NOFILE, wanted)) < wanted:
        raise UserError(
            f"the limit on open files is {limit}, a mount of {replicas} replicas needs {wanted}: "
            f"run ulimit -n {wanted} before (systemd: LimitNOFILE={wanted})"
        )
    infinity = resource.RLIM_INFINITY
    if (limit := _raised(resource.RLIMIT_CPU, infinity)) != infinity:
        raise UserError(
            f"the limit on processor time is {limit} s, after which the kernel would end the "
            "mount: run ulimit -t unlimited before (systemd: LimitCPU=infinity)"
        )


def _raised(kind: int, wanted: int) -> int:
    """The limit of this *kind*, after it was raised to *wanted* or as near to it as allowed."""
    soft, hard = resource.getrlimit(kind)
    if not _less(soft, wanted):
        return soft
    soft = hard if _less(hard, wanted) else wanted
    resource.setrlimit(kind, (soft, hard))
    return soft


def _less(limit: int, wanted: int) -> bool:
    infinity = resource.RLIM_INFINITY
    return limit != infinity and (wanted == infinity or limit < wanted)


def short_of(error: BaseException) -> str | None:
    """What to tell the user of *error* if a limit of this process, or of its service, is its cause;
    else None."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(short_of, error.exceptions)), None)
    code = error.errno if isinstance(error, OSError) else None
    no_thread = isinstance(error, RuntimeError) and "start new thread" in str(error)
    if no_thread or code == errno.EAGAIN:
        return "no further thread can be started: ulimit -u, or TasksMax of the service, is too low"
    if isinstance(error, MemoryError) or code == errno.ENOMEM:
        return "memory is short: ulimit -v, or MemoryMax of the service, is too low"
    return None
