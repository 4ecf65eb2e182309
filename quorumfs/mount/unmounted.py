"""Sets that are not mounted: where their sidecars are, opened to be looked at, and written."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from quorumfs.decisions.record import Sidecar
from quorumfs.errors import UserError
from quorumfs.replica.answers import ask
from quorumfs.replica.claiming import refuse_claimed
from quorumfs.replica.devices import is_device
from quorumfs.replica.images import Image, open_set
from quorumfs.replica.newimages import require_blank
from quorumfs.replica.places import place_for
from quorumfs.replica.sidecarfile import replace_sidecar


def places_of(names: Sequence[str], directory: str | None) -> dict[str, str]:
    """Where the sidecars of the replicas at *names* are, or are to be; *directory* has those of
    devices. Raises `UserError`, also if another mount has one of them open.
    """
    places = {}
    for path in names:
        try:
            places[path] = place_for(path, directory)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if is_device(path) and not os.path.isdir(os.path.dirname(places[path])):
            raise UserError(f"option --sidecars: {directory} is no directory")
        refuse_claimed(path, places[path])
    return places


@contextmanager
def opened(
    names: Sequence[str], directory: str | None, *, read_only: bool = True
) -> Iterator[list[Image]]:
    """What there is of *names*, to be looked at, or written to. Raises `UserError`, also if it is
    in use."""
    with ExitStack() as stack:
        opened = open_set(names, None, read_only=read_only, directory=directory)
        images = [one for one in opened if isinstance(one, Image)]
        for image in images:
            stack.callback(image.close)
        yield images


def untouched(sidecar: Sidecar, names: Sequence[str], size: int) -> bool:
    """Whether *sidecar* is as it was made, by a command that was given the images *names*."""
    record = sidecar.record
    same = [role.path for role in record.roles] == list(names) and record.size == size
    return same and record.sequence == 1 and record.clean and sidecar.prepared is None


def refuse_to_create(path: str, size: int) -> None:
    """Raise `OSError` if no new image of *size* bytes can be made at *path*; change nothing."""
    directory = os.path.dirname(path)
    if os.path.lexists(path):
        require_blank(path, size)
    elif not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    elif not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def write_sidecar(path: str, sidecar: Sidecar, place: str) -> None:
    try:
        ask(path, partial(replace_sidecar, path, sidecar, place))
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from None
