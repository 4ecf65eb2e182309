"""What there is of a set, offline, and what a mount would make of it.

Reads only, and takes no lock: what a daemon has in use may be looked at, too.
"""

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.claim import Claim, ClaimState, FoundClaim, claim_state, in_the_way
from quorumfs.decisions.dirtymap import UNVERIFIED, DirtyMap
from quorumfs.decisions.model import Found, Plan
from quorumfs.decisions.record import SUFFIX, UNKNOWN_IDENTITY, Identity, Sidecar, path_for
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sameimage import image_changed, image_unproven, touched_after_crash
from quorumfs.decisions.sidecar import FormatError, UnknownVersionError
from quorumfs.errors import ExitCode, UserError
from quorumfs.replica.answers import PATIENCE_S, Answer, UnansweredError, ask_all
from quorumfs.replica.claimant import claim_of_this_mount, runs
from quorumfs.replica.claiming import MOUNT
from quorumfs.replica.devices import content_identity, device_of, files_of, is_device
from quorumfs.replica.filesystems import close
from quorumfs.replica.images import lasting_identity, passing_identity
from quorumfs.replica.ofdlock import could_lock
from quorumfs.replica.places import place_for
from quorumfs.replica.sidecarfile import (
    holder,
    is_copied,
    misplaced,
    open_regular,
    read_claim,
    read_sidecar,
)

READS_MAX = 3
"""Attempts at a sidecar that looks damaged while a daemon writes to it."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What there is at one path."""

    path: str
    place: str
    """Where its sidecar is, or should be."""
    image: Identity | None
    files: tuple[tuple[int, int], ...] = ()
    """As of `files_of`; empty if there is no image."""
    image_problem: str | None = None
    """Why there is no image that could be used."""
    refusal: str | None = None
    """Why no mount takes this path, whatever the others are."""
    sidecar: Sidecar | None = None
    sidecar_problem: str | None = None
    """Why there is no sidecar that could be read."""
    absent: bool = False
    """There is no sidecar at all."""
    in_use: bool = False
    """A quorumfs holds a lock on the sidecar."""
    holder: str = ""
    """Who says that the set is in use, or said it last."""
    instance: int | None = None
    """As in `Found`."""
    recorded_ns: int = 0
    """As in `Found`."""
    copied: bool = False
    """As in `Found`."""
    claim: Claim | None = None
    """The claim in the sidecar: which mount has the set, or had it last; None: there is none."""
    claim_state: ClaimState | None = None
    """What this host knows of that mount; None: there is no claim."""
    device: bool = False
    """It is a block device."""

    @property
    def open_elsewhere(self) -> bool:
        """Whether a mount that may be at work has it open, and by no lock that is seen here."""
        return not self.in_use and self.claim_state is not None and not self.claim_state.over

    @property
    def changed(self) -> bool | None:
        """Whether the image was changed behind its sidecar; None if that cannot be told."""
        if self.sidecar is None or self.image is None:
            return None
        if self.sidecar.identity == UNKNOWN_IDENTITY:
            return None
        found = self.found()
        if image_changed(found) or self.in_use:  # then the mount answers for it
            return image_changed(found)
        return image_unproven(found) or touched_after_crash(found)

    def found(self) -> Found:
        """The same for `assemble`."""
        if self.image is None:
            return Found(self.path, None, None, self.image_problem)
        problem = None if self.absent else self.sidecar_problem
        return Found(
            self.path,
            self.image,
            self.sidecar,
            problem,
            self.instance,
            self.place,
            self.device,
            self.recorded_ns,
            self.copied,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What a mount of all of them would do."""

    rule: str
    plan: Plan | None = None
    refusal: str | None = None
    exit_code: ExitCode = ExitCode.OK

    @property
    def unverified(self) -> dict[str, int]:
        """How much of adopted images was not found equal yet; nobody noted if it was compared."""
        return marked(self.plan.map, UNVERIFIED) if self.plan else {"chunks": 0, "bytes": 0}


def look_at_all(
    paths: Sequence[str], patience_s: float = PATIENCE_S, directory: str | None = None
) -> list[Examined]:
    """`look_at` each of *paths*, all at once, for at most *patience_s* seconds."""
    once = dict.fromkeys(paths)
    answers = ask_all({path: partial(look_at, path, directory) for path in once}, patience_s)
    by_path = dict(zip(once, answers, strict=True))
    return [_answer(path, by_path[path]) for path in paths]


def _answer(path: str, answer: Answer[Examined]) -> Examined:
    try:
        return answer.result()
    except UnansweredError as error:
        why = error.strerror
        return Examined(path, path + SUFFIX, None, image_problem=why, sidecar_problem=why)


def look_at(path: str, directory: str | None = None) -> Examined:
    """Find out all there is to know of the replica at *path*; its sidecar's path will do too.

    *directory*: where the sidecars of block devices lie.
    """
    if path.endswith(SUFFIX) and not os.path.exists(path_for(path)):
        path = path.removesuffix(SUFFIX)
    try:
        place = place_for(path, directory)
    except UserError as error:
        why = str(error)
        return Examined(path, "", None, image_problem=why, refusal=why, sidecar_problem=why)
    except OSError as error:
        why = error.strerror or str(error)
        return Examined(path, "", None, image_problem=why, sidecar_problem=why)
    if is_device(path):
        examined = _look_at_device(Examined(path, place, None, device=True))
    else:
        examined = _look_at_image(path, place)
    try:
        fd = open_regular(place, os.O_RDONLY)
    except FileNotFoundError:
        return _without_sidecar(examined, place)
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    try:
        if examined.image is not None and not examined.device:
            when = os.fstat(fd).st_mtime_ns
            examined = replace(examined, instance=passing_identity(path, fd), recorded_ns=when)
        examined = _look_at_sidecar(examined, fd)
        known = examined.device and examined.sidecar is not None
        return _look_at_device(examined) if known else examined
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    finally:
        close(fd, place)


def _without_sidecar(examined: Examined, place: str) -> Examined:
    """Nothing can be opened at *place*, where its sidecar should be."""
    if os.path.islink(place):
        return replace(examined, sidecar_problem="a symbolic link to nothing")
    try:
        beside = examined.image is not None and not examined.device
        stray = misplaced(examined.path) if beside else None
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    if stray is not None:
        return replace(examined, sidecar_problem=stray, refusal=stray)
    return replace(examined, sidecar_problem="there is none", absent=True)


def _look_at_device(examined: Examined) -> Examined:
    """*examined*, a block device, as it is now, with a fingerprint of what its sidecar, if that was
    read, has one of."""
    path, known = examined.path, UNKNOWN_IDENTITY
    if examined.sidecar is not None:
        known = examined.sidecar.identity
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            device = device_of(fd)
            identity = content_identity(fd, device, known.size or None, known.regions)
            files = files_of(fd)
        finally:
            close(fd, path)
    except OSError as error:
        why = error.strerror or str(error)
        return Examined(path, examined.place, None, image_problem=why, device=True)
    return replace(examined, image=identity, files=files, instance=device.attachment)


def _look_at_image(path: str, place: str) -> Examined:
    try:
        status = os.stat(path)
        identity = lasting_identity(path)
    except OSError as error:
        return Examined(path, place, None, image_problem=error.strerror or str(error))
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file or block device"
        refusal = f"{path} is {problem}"
        return Examined(path, place, None, image_problem=problem, refusal=refusal)
    return Examined(path, place, identity, ((status.st_dev, status.st_ino),))


def _look_at_sidecar(examined: Examined, fd: int) -> Examined:
    try:
        in_use = _is_locked(fd)
        examined = replace(examined, in_use=in_use, holder=holder(fd))
        if (claim := read_claim(fd)) is not None:
            known = claim_state(claim, claim_of_this_mount(), runs)
            apart = examined.device or examined.instance is not None
            copied = apart and is_copied(fd, claim)
            examined = replace(examined, claim=claim, claim_state=known, copied=copied)
        sidecar = read_sidecar(fd)
        for _ in range(READS_MAX - 1):
            if not (in_use and sidecar.damage):
                break
            sidecar = read_sidecar(fd)  # a daemon may have been writing just there
    except UnknownVersionError as error:
        refusal = f"{examined.place}: {error}"
        return replace(examined, sidecar_problem=str(error), refusal=refusal)
    except FormatError as error:
        return replace(examined, sidecar_problem=str(error))
    except OSError as error:
        return replace(examined, sidecar_problem=error.strerror or str(error))
    return replace(examined, sidecar=sidecar)


def _is_locked(fd: int) -> bool:
    try:
        return not could_lock(fd, 0, 0, exclusive=True)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS):
            return False  # this file system has no locks
        raise


def decide(all_examined: Sequence[Examined]) -> Decision:
    """What a mount without options would make of these."""
    places: dict[tuple[int, int], int] = {}
    for position, examined in enumerate(all_examined):
        if examined.refusal:
            return Decision("unusable", refusal=examined.refusal, exit_code=ExitCode.FAILED)
        for file in examined.files:
            other = places.setdefault(file, position)
            if other != position:
                text = f"{all_examined[other].path} and {examined.path} are the same file"
                return Decision("same file", refusal=text, exit_code=ExitCode.FAILED)
    claims = [
        FoundClaim(examined.path, examined.claim, examined.claim_state)
        for examined in all_examined
        if examined.claim is not None and examined.claim_state is not None and not examined.in_use
    ]
    if held := in_the_way(claims):
        return Decision("in use", refusal=held[0].in_words(MOUNT), exit_code=ExitCode.FAILED)
    try:
        plan = assemble([examined.found() for examined in all_examined])
    except AssemblyRefusedError as error:
        return Decision(error.rule, refusal=str(error), exit_code=error.exit_code)
    return Decision(plan.rule, plan)


def marked(disk_map: DirtyMap, bits: int) -> dict[str, int]:
    """How many chunks have any of *bits*, and how many bytes of the disk they are."""
    chunks = disk_map.count(bits)
    count = chunks * disk_map.chunk_size
    last = len(disk_map) - 1
    if chunks and disk_map.any(bits, range(last, last + 1)):
        start, end = disk_map.bounds(last)
        count += end - start - disk_map.chunk_size
    return {"chunks": chunks, "bytes": count}
