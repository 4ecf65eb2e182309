"""The identity of this mount, for its claim; and whether a process still exists."""

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
"""Files that outlast a restart and differ on each machine; the first that exists counts."""

_HOST_MAX = 64
"""Bytes of a host name; Linux allows no more."""


def claim_of_this_mount() -> Claim:
    """The claim of a mount that begins now; to be made once for each mount."""
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
    """Whether the process *pid* that began at *started* exists, even if ``/proc`` hides it.

    A killed process exists as long as one of its threads hangs in a system call.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return _started(pid) in (started, None)


def _started(pid: int) -> int | None:
    """When a process began; -1 if only a zombie is left, None if ``/proc`` does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *fields = stat.rpartition(b")")[2].split()  # a name may contain anything
    threads, started = int(fields[16]), int(fields[18])
    return -1 if state in (b"Z", b"X") and threads <= 1 else started


def _machine() -> str:
    """A digest of the machine's id, which not every reader of a sidecar may see (machine-id(5))."""
    for path in _MACHINE_IDS:
        name = _line(path)
        if name and name != "uninitialized":
            return hashlib.blake2b(name.encode(), digest_size=16, person=b"quorumfs").hexdigest()
    return ""


def _namespace() -> str:
    """The namespaces in which the number and the start of a process count."""
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
