"""Claims: page 2 of each sidecar names the mount that has the set open, by its *claim*.

Locks tell that only where all mounts share them: not on two hosts, nor on two paths to one
directory (a bind of sshfs onto the same host). So a mount writes a claim before anything else,
marks the claim as released when the set was closed in order, and reads the claim back while the
mount lives. A mount that finds another claim has lost the set, and is *fenced*
(`quorumfs.metadata.sidecars`).

The page is readable text: a line that names the format, an object of JSON, the xxh3-128 of both in
hexadecimal digits, and zeros. The text fits the first sector of 512 bytes, so that no half of it is
ever there. Any other page (zeros, the text of earlier versions) claims nothing.

Whose mount is over
===================

A mount may take over at once from an older mount that has certainly ended, because

* the older mount released its claim, on any sidecar;
* the older mount was of this boot of the machine, and its process is gone: the process number is
  free, or belongs to a process that began later. The number of another PID namespace says nothing
  here; but if the very sidecar that the older mount had locked can be locked, on a file system of
  this host, the sidecar is not open any more (a container that was started anew);
* the older mount was of an earlier boot of this machine, under its present host name.

The last rule serves a power cut of the only host, after which the set must be mounted unasked.
Cloned machines share a machine id, and differ in boot id as one machine does after a restart; so
the host name must be the same, too. Clones that share even the host name cannot be told from a
restart. An older mount that has not certainly ended is taken to be at work: the new mount is
refused until the operator says ``takeover``.

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
"""How often (seconds) a mount in use reads its claim back; an idle one, every few seconds."""

NOTICE_S = 8.0
"""How long (seconds) a mount waits after taking over, so that an older mount that is still at work
has noticed, even if it was idle, and the requests of the older mount are done."""

_MAGIC = b"quorumfs claim 1"
_TEXT_MAX = 128


@dataclass(frozen=True, slots=True)
class Claim:
    """The claim of one mount to have the set open."""

    mount: int
    """A random 64-bit id."""
    machine: str
    """A digest of the machine's id; empty if there is none."""
    boot: str
    """The id of this boot of the kernel; empty if unknown."""
    namespace: str
    """The namespace in which `pid` and `started` count; empty if unknown."""
    pid: int
    started: int
    """When the process began: ticks of the kernel's clock since the boot."""
    host: str
    """The host's name."""
    since: str
    """The time of the mount, by the host's clock, in UTC; for people alone."""
    file: tuple[int, int] = (0, 0)
    """Device and inode number of the sidecar, as seen by the mount of the claim."""
    released: bool = False
    """The set was closed in order."""
    turn: int = 0
    """Which file it is that has the inode number, which may be used again; 0: unknown."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def release(self) -> "Claim":
        """The claim, marked as released."""
        return replace(self, released=True)


def encode_claim(claim: Claim) -> bytes:
    """The page with *claim*: 4096 bytes."""
    content = asdict(claim) | {"mount": f"{claim.mount:016x}"}
    text = _MAGIC + b"\n" + json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return (text + b"\n" + _checksum(text) + b"\n").ljust(PAGE, b"\0")


def decode_claim(page: bytes) -> Claim | None:
    """The claim in *page*; None if there is none."""
    text, _, rest = page.partition(b"\0")[0].rstrip(b"\n").rpartition(b"\n")
    magic, _, body = text.partition(b"\n")
    if magic != _MAGIC or rest != _checksum(text):
        return None
    try:
        content = json.loads(body)
        known = {name: content[name] for name in Claim.__slots__ if name != "turn"}
        known["turn"] = content.get("turn", 0)  # earlier versions did not say
        return _checked(known | {"mount": int(content["mount"], 16)})
    except (KeyError, RecursionError, TypeError, ValueError):
        return None


def _checked(content: dict[str, Any]) -> Claim:
    """The claim with the members *content*. Raises `TypeError` and `ValueError` if impossible."""
    content["file"] = device, inode = tuple(content["file"])
    for name in ("mount", "pid", "started", "turn"):
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
    """The state of a mount, as far as its claim tells."""

    RELEASED = "released"
    ENDED = "ended"
    RUNNING = "running"
    """The process of the mount exists, on this host."""
    HIDDEN = "hidden"
    """The mount was in another PID namespace of this host, which cannot be seen from here."""
    ELSEWHERE = "elsewhere"
    """The mount was on another host, or that cannot be ruled out."""

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
    """The state of the mount that left *claim*, for a mount that would claim *here*.

    *runs* tells whether a process, by number and start in this namespace, exists.
    *locked*: device and inode number of the sidecar, if this mount has locked the sidecar and it
    lies on a file system of this host, where a lock proves something.
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
    """A claim found in the sidecar of a replica."""

    path: str
    """The path of the replica."""
    claim: Claim
    claim_state: ClaimState

    def in_words(self, takeover: str) -> str:
        """The mount in the way, and the way out; *takeover* says how to go on regardless."""
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
    """The claim of one mount, and the older mounts whose claims it disregards."""

    mine: Claim | None
    """None: a read-only mount, which claims nothing."""
    over: frozenset[int] = frozenset()
    """The ids of mounts that have ended or were taken over from."""

    def lost_to(self, claim: Claim | None) -> bool:
        """Whether *claim*, found in the place of this mount's own, is a later mount's.

        A released claim counts, too, because its mount may have changed the set.
        """
        mine = self.mine is not None and claim is not None and claim.mount == self.mine.mount
        return claim is not None and not mine and claim.mount not in self.over


def in_the_way(found: Iterable[FoundClaim], over: Iterable[int] = ()) -> list[FoundClaim]:
    """The claims *found* whose mounts may be at work; the mounts *over* are not.

    A mount that ended by any of its claims has ended: the other replicas were away then.
    """
    found = list(found)
    ended = {one.claim.mount for one in found if one.claim_state.over} | set(over)
    return [one for one in found if one.claim.mount not in ended]
