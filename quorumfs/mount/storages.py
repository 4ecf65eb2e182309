"""The storages of a replica: its image and its sidecar, both open."""

import os
from contextlib import suppress

from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.images import Image


def image_storage(image: Image, size: int) -> FileStorage:
    name = os.path.basename(image.path)
    written = image.sidecar.identity.regions if image.sidecar else ()
    return FileStorage(
        image.fd, size, name, locality=image.locality, direct=image.direct, written=written
    )


def sidecar_storage(image: Image, size: int) -> FileStorage:
    assert image.sidecar_fd is not None
    name = f"{os.path.basename(image.path)} sidecar"
    where = image.sidecar_locality
    return FileStorage(image.sidecar_fd, size, name, locality=where)


def lengthen(sidecar_fd: int, size: int) -> None:
    """Give a sidecar its length back where it was cut off: it is written in place."""
    with suppress(OSError):
        if os.fstat(sidecar_fd).st_size < size:
            os.ftruncate(sidecar_fd, size)
