"""Where the sidecar of a replica lies: the only place that decides it.

That of an image lies beside the image. That of a block device lies in the directory that the user
names, under what the device is (`quorumfs.decisions.devices`).
"""

import os

from quorumfs.decisions.devices import file_name
from quorumfs.decisions.record import SUFFIX, path_for
from quorumfs.errors import UserError
from quorumfs.replica.devices import Device, device_of, is_device


def place_for(path: str, directory: str | None) -> str:
    """The path of the sidecar of the replica at *path*; a *directory* for those of devices.

    Neither need exist. Raises `UserError` for a device without *directory*, and `OSError` for one
    that nothing is attached to.
    """
    if not is_device(path):
        return path_for(path)
    require_directory(path, directory)
    # To be asked what it is; whoever has it for himself is not disturbed.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return place_of_device(path, device_of(fd), directory)
    finally:
        os.close(fd)


def place_of_device(path: str, device: Device, directory: str | None) -> str:
    """The path of the sidecar of *device*, which is open by *path*. Raises `UserError`."""
    name = device.name or f"path-{os.path.realpath(path)}"
    return os.path.join(require_directory(path, directory), file_name(name) + SUFFIX)


def refuse_sidecar(path: str) -> None:
    """Raise `UserError` if *path* is the sidecar of an image beside it, as in ``mount /nas/*``."""
    image = os.path.realpath(path).removesuffix(SUFFIX)
    if image != os.path.realpath(path) and os.path.lexists(image):
        raise UserError(f"{path} is the sidecar of {image}: name that one")


def require_directory(path: str, directory: str | None) -> str:
    """The *directory* for the sidecar of the device at *path*. Raises `UserError` if it is None."""
    if directory is None:
        raise UserError(
            f"{path} is a block device, and has no room beside it for a sidecar: name a directory "
            "for that, to mount and set with the option sidecars=DIR, to create, examine and "
            "resolve with --sidecars DIR"
        )
    return directory
