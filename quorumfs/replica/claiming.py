"""The claims in the sidecars of opened images: those of other mounts, and this mount's."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

from quorumfs.decisions.claim import NOTICE_S, Claim, FoundClaim, Tenure, claim_state, in_the_way
from quorumfs.decisions.model import Found
from quorumfs.decisions.sidecar import FormatError
from quorumfs.errors import UserError
from quorumfs.replica.answers import PATIENCE_S, UnansweredError, ask_all
from quorumfs.replica.claimant import claim_of_this_mount, runs
from quorumfs.replica.images import Image, Unanswered, identity_now
from quorumfs.replica.sidecarfile import read_claim, read_sidecar, sign

log = logging.getLogger(__name__)

MOUNT = "mount with -o takeover"
RESOLVE = "add --takeover"

Opened = Image | Found


def found_claims(opened: Iterable[Opened], here: Claim) -> list[FoundClaim]:
    """The claims of other mounts in the sidecars of *opened*, for a mount that claims *here*."""
    images = (one for one in opened if isinstance(one, Image))
    claims = (image.found_claim(here) for image in images)
    return [one for one in claims if one is not None and one.claim.mount != here.mount]


def require_free(
    found: Sequence[FoundClaim], *, takeover: bool, how: str = MOUNT
) -> list[FoundClaim]:
    """The claims of *found* that are taken over, whose mounts may be at work.

    *how* tells a user how to take over. Raises `UserError`, naming the mount that has the set open
    and what to do, if there is such a claim without *takeover*.
    """
    held = in_the_way(found)
    if held and not takeover:
        raise UserError(held[0].in_words(how))
    return held


def claim_in(place: str) -> Claim | None:
    """The claim in the sidecar at *place*; None if no claim can be read."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        with suppress(OSError):
            return read_claim(fd)
        return None
    finally:
        os.close(fd)


def refuse_claimed(path: str, place: str, mine: Claim | None = None) -> None:
    """Raise `UserError` if the sidecar at *place* says that another mount than that with the claim
    *mine* has the image at *path* open."""
    claim = claim_in(place)
    if claim is not None and (mine is None or claim.mount != mine.mount):
        known = claim_state(claim, claim_of_this_mount(), runs)
        if not known.over:
            raise UserError(FoundClaim(path, claim, known).in_words(f"remove {place}"))


def claim_all(
    images: Iterable[Image], tenure: Tenure, patience_s: float = PATIENCE_S
) -> list[Unanswered]:
    """Write this mount's claim to the sidecars, which are open for writing; returns the replicas
    that did not answer for *patience_s* seconds, to be left out.

    A sidecar that cannot be written is skipped; its first use will tell. Raises `UserError` if
    another mount comes between.
    """
    mine = tenure.mine
    assert mine is not None

    def write(_: Image, fd: int) -> None:
        sign(fd, mine)

    def check(image: Image, fd: int) -> None:
        _require_ours(image, fd, tenure)

    answering, silent = list(images), list[Unanswered]()
    for step in (check, write, check):  # deciding what to mount took a while
        answering, more = _each(answering, step, patience_s)
        silent += more
    return silent


def require_ours(images: Iterable[Image], tenure: Tenure) -> None:
    """Raise `UserError` if a sidecar has the claim of a later mount."""
    for image in images:
        if image.sidecar_fd is not None:
            with suppress(OSError):
                _require_ours(image, image.sidecar_fd, tenure)


def _require_ours(image: Image, fd: int, tenure: Tenure) -> None:
    claim = read_claim(fd)
    if tenure.lost_to(claim):
        raise UserError(f"{image.path} has just been taken into use by {claim}")


def release_all(
    images: Iterable[Image], mine: Claim, patience_s: float = PATIENCE_S
) -> list[Unanswered]:
    """Release the claim *mine* in every sidecar that still has it; as `claim_all` else."""

    def release(_: Image, fd: int) -> None:
        claim = read_claim(fd)
        if claim is not None and claim.mount == mine.mount:
            sign(fd, mine.release())

    return _each(images, release, patience_s)[1]


def _each(
    images: Iterable[Image], step: Callable[[Image, int], None], patience_s: float
) -> tuple[list[Image], list[Unanswered]]:
    """Do *step* with each image and its sidecar, if it has one; returns those whose file systems
    answered in time, and the others, which are closed when they answer.

    A step that fails is skipped. Raises the `UserError` of a step.
    """

    def do(image: Image) -> tuple[Image, UserError | None]:
        try:
            if image.sidecar_fd is not None:
                with suppress(OSError):
                    step(image, image.sidecar_fd)
        except UserError as refusal:
            return image, refusal
        return image, None

    calls = {image.path: partial(do, image) for image in images}
    answered, silent = [], []
    for path, answer in zip(calls, ask_all(calls, patience_s, _close_late), strict=True):
        try:
            image, refusal = answer.result()
        except UnansweredError as error:
            silent.append(Unanswered(path, None, problem=error.strerror, opening=answer))
            continue
        if refusal is not None:
            raise refusal
        answered.append(image)
    return answered, silent


def _close_late(done: tuple[Image, UserError | None]) -> None:
    done[0].close()


def wait_until_noticed(held: Sequence[FoundClaim]) -> None:
    """Give mounts that were taken over from, but are still at work, the time to notice."""
    log.warning(
        "taking over from %s: waiting for %g s, should it be at work all the same",
        " and ".join(sorted({str(one.claim) for one in held})),
        NOTICE_S,
    )
    time.sleep(NOTICE_S)


def look_again(opened: Iterable[Opened]) -> list[Opened]:
    """Read again images and sidecars that another mount may have written since they were opened.

    Raises `UserError` if a sidecar cannot be read any more.
    """
    try:
        return [_look_at(one) if isinstance(one, Image) else one for one in opened]
    except (FormatError, OSError) as error:
        raise UserError(f"a sidecar cannot be read any more: {error}") from None


def _look_at(image: Image) -> Image:
    if image.sidecar_fd is None or image.sidecar is None:
        return image
    os.posix_fadvise(image.sidecar_fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the cache has it as found
    image = replace(image, sidecar=read_sidecar(image.sidecar_fd))
    identity = identity_now(image)
    return replace(image, identity=identity, size=identity.size)
