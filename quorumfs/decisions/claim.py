"""Who has a set open: the *claim* in page 2 of each sidecar, and what becomes of another one's.

Locks tell it only where all who mount share them: not two hosts, nor two paths to one directory
(a bind of sshfs onto the same host). So a mount writes a claim before anything else, marks it as
released when it has closed the set in order, and reads it back while it lives: who finds the claim
of another mount has lost the set, and is *fenced* (`quorumfs.metadata.sidecars`).

The page is text, so that a person can read it: a line that says what it is, an object of JSON, the
xxh3-128 of both in hexadecimal digits, and zeros. It fits the first sector of 512 bytes: no
half of it is ever there. What is none (zeros, the text of earlier versions) claims nothing.

Whose mount is over
===================

A mount may take over at once from one of which it is certain that it has ended:

* it released its claim, on any sidecar;
* it was of this boot of the machine, and its process is gone: its number is free, or another
  process's by now, which began later. The number of another PID namespace says nothing here; but
  where the very sidecar that it had locked could be locked, on a file system of this host, nobody
  has it open any more (a container that was started anew);
* it was of this machine under its present host name, and of an earlier boot.

The last rule is there for the power cut of the only host: the set must be mounted again by itself.
Machines that were cloned share a machine id, and differ in boot id as before and after a restart
do; that is why the host name must be the same too. Clones that even share that name cannot be told
from a restart. One that is not certain to have ended is taken to be at work: the mount is refused
until a person says, by ``takeover``, that it is not.

Pure: no I/O, no clock.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import xxhash

from quorumfs.decisions.sidecar import PAGE

CHECK_S = 1.0
"""How often (seconds) a mount looks whether the set is still its own."""

NOTICE_S = 3.0
"""How long (seconds) who takes over waits before it does anything, so that a mount that is at work
all the same has noticed, and what it had asked for is done."""

_MAGIC = b"quorumfs claim 1"
_TEXT_MAX = 128


@dataclass(frozen=True, slots=True)
class Claim:
    """One mount's word that it has the set open."""

    mount: int
    """A random 64-bit id."""
    machine: str
    """A digest of the machine's id; empty if it has none."""
    boot: str
    """The id of this boot of its kernel; empty if that is not known."""
    namespace: str
    """In which `pid` and `started` count; empty if that is not known."""
    pid: int
    started: int
    """When the process began: ticks of its kernel's clock since the boot."""
    host: str
    """The host's name."""
    since: str
    """When it was mounted, by the host's clock, in UTC; for people alone."""
    file: tuple[int, int] = (0, 0)
    """Device and inode number of the sidecar, as that mount saw them."""
    released: bool = False
    """The set was closed in order."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def release(self) -> "Claim":
        """The same, as it is left behind."""
        return replace(self, released=True)


def encode_claim(claim: Claim) -> bytes:
    """The page that says so: 4096 bytes."""
    content = asdict(claim) | {"mount": f"{claim.mount:016x}"}
    text = _MAGIC + b"\n" + json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return (text + b"\n" + _checksum(text) + b"\n").ljust(PAGE, b"\0")


def decode_claim(page: bytes) -> Claim | None:
    """What a page claims; None: nothing."""
    text, _, rest = page.partition(b"\0")[0].rstrip(b"\n").rpartition(b"\n")
    magic, _, body = text.partition(b"\n")
    if magic != _MAGIC or rest != _checksum(text):
        return None
    try:
        content = json.loads(body)
        known = {name: content[name] for name in Claim.__slots__}
        return _checked(known | {"mount": int(content["mount"], 16)})
    except (KeyError, RecursionError, TypeError, ValueError):
        return None


def _checked(content: dict[str, Any]) -> Claim:
    """The claim with these members. Raises `TypeError` and `ValueError` if there is none."""
    content["file"] = device, inode = tuple(content["file"])
    for name in ("mount", "pid", "started"):
        _require_number(content[name])
    for number in (device, inode):
        _require_number(number)
    for name in ("machine", "boot", "namespace", "host", "since"):
        text = content[name]
        if not isinstance(text, str) or not text.isprintable() or len(text) > _TEXT_MAX:
            raise ValueError("a text that cannot be")
    if not isinstance(content["released"], bool):
        raise TypeError("yes or no")
    return Claim(**content)


def _require_number(value: object) -> None:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError("a number that cannot be")


def _checksum(text: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(text).encode()


class ClaimState(Enum):
    """What is known of a mount by its claim."""

    RELEASED = "released"
    ENDED = "ended"
    RUNNING = "running"
    """Its process is there, on this host."""
    HIDDEN = "hidden"
    """It was in another PID namespace of this host, where nobody can look from here."""
    ELSEWHERE = "elsewhere"
    """It was on another host, or one that cannot be told from another."""

    @property
    def over(self) -> bool:
        """Whether the mount is certain to have ended."""
        return self in (ClaimState.RELEASED, ClaimState.ENDED)


def claim_state(
    claim: Claim,
    here: Claim,
    runs: Callable[[int, int], bool],
    locked: tuple[int, int] | None = None,
) -> ClaimState:
    """What is known of the mount that left *claim*, for one that would claim *here*.

    *runs* tells whether the process with that number and start, of our own namespace, is there.
    *locked*: device and inode number of the sidecar, if we have the lock of it and that says
    something: on a file system of this host.
    """
    if claim.released:
        return ClaimState.RELEASED
    if claim.boot and claim.boot == here.boot:
        if claim.namespace and claim.namespace == here.namespace:
            return ClaimState.RUNNING if runs(claim.pid, claim.started) else ClaimState.ENDED
        return ClaimState.ENDED if claim.file == locked else ClaimState.HIDDEN
    same_machine = claim.machine and claim.machine == here.machine and claim.host == here.host
    known = claim.boot and here.boot
    return ClaimState.ENDED if same_machine and known else ClaimState.ELSEWHERE


@dataclass(frozen=True, slots=True)
class FoundClaim:
    """A claim that is in the sidecar of a replica."""

    path: str
    """Of the replica."""
    claim: Claim
    claim_state: ClaimState

    def in_words(self, takeover: str) -> str:
        """Who has it, and what to do; *takeover* says how to go on without asking that mount."""
        match self.claim_state:
            case ClaimState.RUNNING:
                way_out = (
                    "unmount it first: it is on this host, by another path; or, if this is a copy, "
                    + takeover
                )
            case ClaimState.HIDDEN:
                way_out = f"unmount it in that container first; or, if that has ended, {takeover}"
            case _:
                way_out = f"unmount it there first; or, if that host is down, {takeover}"
        return f"{self.path} is in use by {self.claim}: {way_out}"


@dataclass(frozen=True, slots=True)
class Tenure:
    """What one mount goes by: its own claim, and whose claims mean nothing to it."""

    mine: Claim | None
    """None: a read-only mount, which claims nothing."""
    over: frozenset[int] = frozenset()
    """Mounts, by their ids, that have ended or were taken over from."""

    def lost_to(self, claim: Claim | None) -> bool:
        """Whether *claim*, found where this mount's own should be, is that of a later mount.

        Also a released one: what it changed is not known here.
        """
        mine = self.mine is not None and claim is not None and claim.mount == self.mine.mount
        return claim is not None and not mine and claim.mount not in self.over


def in_the_way(found: Iterable[FoundClaim], over: Iterable[int] = ()) -> list[FoundClaim]:
    """Those of the claims *found* whose mounts may be at work; *over* are known not to be.

    A mount that released its claim anywhere has ended: the replica where it did not was away.
    """
    found = list(found)
    ended = {one.claim.mount for one in found if one.claim_state.over} | set(over)
    return [one for one in found if one.claim.mount not in ended]
