"""What tells this mount from all others, for its claim; and whether a process is still there."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from quorumfs.decisions.claim import Claim
from quorumfs.decisions.record import random_identity

_MACHINE_IDS = (
    "/etc/machine-id",
    "/var/lib/dbus/machine-id",
    "/sys/class/dmi/id/product_uuid",
    "/sys/firmware/devicetree/base/serial-number",
)
"""What outlasts a restart and is another one's on each machine; the first that there is counts."""

_HOST_MAX = 64
"""Bytes; Linux has no longer ones."""


def claim_of_this_mount() -> Claim:
    """The claim of a mount that begins now; to be made once for each."""
    return Claim(
        mount=random_identity(),
        machine=_machine(),
        boot=_line("/proc/sys/kernel/random/boot_id"),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        host=_shown(os.uname().nodename),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


def runs(pid: int, started: int) -> bool:
    """Whether the process *pid*, that began at *started*, is there: also if it is not ours to see.

    One that was killed is, as long as one of its threads hangs in a system call.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return _started(pid) in (started, None)


def _started(pid: int) -> int | None:
    """When a process began; -1 if it has ended and nobody asked how, None if that is hidden."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()  # a name may contain anything
    threads, started = int(fields[16]), int(fields[18])
    return -1 if state in (b"Z", b"X") and threads <= 1 else started


def _machine() -> str:
    """A digest: the id itself is not for everybody who can read a sidecar (machine-id(5))."""
    for path in _MACHINE_IDS:
        name = _line(path)
        if name and name != "uninitialized":
            return hashlib.blake2b(name.encode(), digest_size=16, person=b"quorumfs").hexdigest()
    return ""


def _namespace() -> str:
    """The namespaces in which a process's number and start count."""
    names = []
    for kind in ("pid", "time"):
        with suppress(OSError):
            names.append(str(os.stat(f"/proc/self/ns/{kind}").st_ino))
    return " ".join(names)


def _line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace").strip("\0\n ")
    return ""


def _shown(name: str) -> str:
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable.encode()[:_HOST_MAX].decode(errors="ignore")
