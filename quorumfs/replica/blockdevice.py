"""A block device, and the system calls on it, which may wait and so belong in threads."""

import errno
import os
from dataclasses import replace

from quorumfs.decisions.record import Identity
from quorumfs.replica.devices import Device, content_identity, size_of
from quorumfs.replica.lastregions import LastRegions
from quorumfs.replica.punching import Puncher
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import FileStatus, Kind, TooShortError


class BlockDevice(RegularFile):
    """An open block device of which a disk takes *size* bytes, from its begin on.

    It has a size that we cannot change, and no holes that can be asked for: all is data.
    """

    plain = False

    def __init__(self, fd: int, size: int, device: Device, written: LastRegions) -> None:
        """*written*: the fingerprint covers these regions, too."""
        super().__init__(fd, size)
        self.device = device
        self.sector = device.sector
        self._written = written

    def length(self) -> int:
        if (size := size_of(self.fd)) == 0:
            raise OSError(errno.ENXIO, "the device is gone")
        return size

    def status(self) -> FileStatus:
        return FileStatus(-(-self.size // 512), Identity(self.device.identity, self.size))

    def sealed(self) -> FileStatus:
        # Of a nameless device, perhaps a slow one on the network, no fingerprint proves anything.
        regions = tuple(self._written) if self.device.identity else ()
        identity = content_identity(self.fd, self.device, self.size, regions)
        # With the size that the fingerprint is of: what is behind may change.
        return FileStatus(-(-self.size // 512), replace(identity, size=self.size))

    def resize(self, offset: int, length: int) -> None:
        """Make zeros of *length* bytes from *offset* on, if the device is as long as that.

        Raises `TooShortError`, that says what to do, if it is not.
        """
        if (size := self.length()) < offset + length:
            raise TooShortError(
                errno.ENOSPC,
                f"the device has {size} bytes, and is to have {offset + length}: make it longer "
                "first (with lvextend or the like)",
            )
        if length:
            Puncher(self).make_zeros(Kind.DISCARD, offset, length)

    def seek_data(self, offset: int) -> int:
        self.refuse_if_truncated()
        return offset

    def seek_hole(self, offset: int) -> int:
        self.refuse_if_truncated()
        return self.size


def clear(fd: int, size: int, device: Device) -> None:
    """Make zeros of the first *size* bytes of the *device* open at *fd*, durably; it may take long.

    Raises `OSError`.
    """
    file = BlockDevice(fd, size, device, LastRegions())
    puncher, offset = Puncher(file), 0
    while offset < size:
        stop = puncher.find_reach(offset, size - offset)
        puncher.make_zeros(Kind.DISCARD, offset, stop - offset)
        offset = stop
    os.fsync(fd)
