"""Block devices as the kernel knows them: what they are, who has them, and how large they are.

What is asked here is answered from memory, except for a fingerprint, which reads the device.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import xxhash

from quorumfs.decisions.devices import REGION, number_of, samples, stable_name
from quorumfs.decisions.record import Identity
from quorumfs.replica.filesystems import Locality, locality

_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64 = 232
"""Bytes of ``struct loop_info64`` of ``linux/loop.h``; device and inode number of what is behind
come first, and its own number if that is a device."""

_BAD_PLACE = (errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EBADMSG)
"""Errors of a place on a medium; the rest of the medium may be good."""

_NETWORKED = ("nbd", "rbd", "drbd")
_OWN = ("sd", "vd", "xvd", "nvme", "mmcblk", "ram", "zram", "pmem")
"""Beginnings of names in sysfs: devices whose answers come over a network, and those that are this
host's, but for disks that a transport tells of."""
_WAYS = ("/session", "/rport-")
"""Parts of paths in sysfs, of iSCSI and of Fibre Channel."""


@dataclass(frozen=True, slots=True)
class Device:
    """A block device that something is attached to."""

    number: tuple[int, int]
    """Major and minor."""
    name: str | None
    """As of `stable_name`."""
    identity: int
    """A number for what the device is, also after a restart; 0: nothing tells."""
    attachment: int
    """A number for this time that it is attached; 0: nothing tells."""
    sector: int
    """Bytes that it reads and writes at least."""


def is_device(path: str) -> bool:
    """Whether a block device is at *path*; False if nothing is, or nobody may know."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def device_of(fd: int) -> Device:
    """The block device that is open at *fd*. Raises `OSError` if nothing is attached to it."""
    if not size_of(fd):
        raise OSError(errno.ENXIO, "nothing is attached to the device, or it is gone")
    number = os.fstat(fd).st_rdev
    read = partial(_attribute, number)
    name = stable_name(read)
    sector = int(read("queue/logical_block_size") or read("../queue/logical_block_size") or 512)
    behind = file_behind(fd)
    identity = number_of(name, behind[1] if behind else 0) if name else 0
    turn = read("diskseq") or read("../diskseq")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    # What is nameless may be given another medium without the kernel counting that: so zram is, and
    # a network block device, which is one disk to it whatever server it is connected to.
    attachment = number_of(boot, turn, number, identity) if turn and identity else 0
    return Device((os.major(number), os.minor(number)), name, identity, attachment, sector)


def size_of(fd: int) -> int:
    """Bytes of the block device, or file, that is open at *fd*; 0 if no device is attached."""
    return os.lseek(fd, 0, os.SEEK_END)


def size_at(path: str) -> int:
    """Bytes of the image or block device at *path*. Raises `OSError`."""
    if not is_device(path):
        return os.stat(path).st_size
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return size_of(fd)
    finally:
        os.close(fd)


def content_identity(
    fd: int, device: Device, over: int | None = None, regions: tuple[int, ...] = ()
) -> Identity:
    """What tells the content of the *device* open at *fd*: in place of an inode number what the
    device is, and in place of times a fingerprint of what it holds.

    *over*: how many bytes the fingerprint is taken of, at most; None: all. *regions*: the numbers
    of those that it covers, too. A place that cannot be read counts as a change of the content.
    Raises `OSError`, if the device is gone.
    """
    size = size_of(fd)
    whole = size if over is None else min(over, size)
    digest = xxhash.xxh3_64()
    last = [(region * REGION, min(REGION, whole - region * REGION)) for region in sorted(regions)]
    for offset, length in (*samples(whole), *(one for one in last if one[1] > 0)):
        try:
            digest.update(os.pread(fd, length, offset))
        except OSError as error:
            if error.errno not in _BAD_PLACE:
                raise
            digest.update(b"unreadable")
    return Identity(device.identity, size, digest.intdigest() >> 1 or 1, regions=regions)


def locality_of_device(number: int) -> Locality:
    """Where the device with *number* (``st_rdev``) has its data; never in memory alone, for then a
    flush would be left out."""
    path = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    name = os.path.basename(path)
    if any(way in path for way in _WAYS) or name.startswith(_NETWORKED):
        return Locality.ELSEWHERE
    if _attribute(number, "partition"):
        return locality_of_device(_number(os.path.dirname(path)))
    if backing := _attribute(number, "loop/backing_file"):
        here = locality(backing) is not Locality.ELSEWHERE
        return Locality.HERE if here else Locality.ELSEWHERE
    with suppress(OSError, ValueError):
        below = [_number(f"{path}/slaves/{one}") for one in os.listdir(f"{path}/slaves")]
        if below:
            here = all(locality_of_device(one) is Locality.HERE for one in below)
            return Locality.HERE if here else Locality.ELSEWHERE
    ours = name.startswith(_OWN)
    if name.startswith("nvme"):  # or over fabrics; of one with several ways nothing tells
        ours = _attribute(number, "device/transport") == "pcie"
    return Locality.HERE if ours else Locality.ELSEWHERE


def who_has(number: int) -> str | None:
    """Who has the device with *number* (``st_rdev``) for itself, in words; None if nobody tells."""
    name = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for mount in map(str.split, mounts):
            if mount[2] == name:
                return f"it is mounted at {mount[4]}"
    with suppress(OSError):
        if holders := sorted(os.listdir(f"/sys/dev/block/{name}/holders")):
            return f"it is part of {', '.join(holders)}"
    return None


def loop_in_use_over(fd: int, path: str) -> str | None:
    """A loop device over the file open at *fd*, or at *path* (without symbolic links), that
    somebody has for himself, such as a file system that is mounted; None: there is none."""
    (file,) = files_of(fd)
    for place in Path("/sys/block").glob("loop*/loop/backing_file"):
        device = f"/dev/{place.parent.parent.name}"
        with suppress(OSError):
            behind = place.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
            if behind != path and not _is_over(device, file):
                continue
            try:
                os.close(os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_EXCL))
            except OSError as error:
                if error.errno == errno.EBUSY:
                    return device
    return None


def files_below(number: int) -> Iterator[str]:
    """The paths of the files that the device with *number* (``st_dev`` of a file on it, or
    ``st_rdev``) lies on, the nearest first: through loop devices, partitions, devices made of
    others, and the file systems of those files. It may ask any of them, and hang.
    """
    if backing := _attribute(number, "loop/backing_file"):
        yield backing
        with suppress(OSError):
            status = os.stat(backing)
            yield from files_below(status.st_rdev or status.st_dev)
        return
    path = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    with suppress(OSError, ValueError):
        if _attribute(number, "partition"):
            yield from files_below(_number(os.path.dirname(path)))
        for one in os.listdir(f"{path}/slaves"):
            yield from files_below(_number(f"{path}/slaves/{one}"))


def _is_over(device: str, file: tuple[int, int]) -> bool:
    """Whether the loop *device* is over *file*; False if the device must not be opened."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return file in files_of(fd)
    finally:
        os.close(fd)


def _attribute(number: int, attribute: str) -> str:
    """What sysfs says of the device with *number* (``st_rdev``)."""
    path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/{attribute}")
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip("\0\n ")
    return ""


def _number(path: str) -> int:
    """The number of the device with the directory *path* in sysfs. Raises `OSError`."""
    major, minor = Path(f"{path}/dev").read_text(encoding="ascii").split(":")
    return os.makedev(int(major), int(minor))


def backing_of(number: int) -> str | None:
    """The path of the file behind the loop device with *number* (``st_rdev``), also through further
    ones, as it was when the device was made; None for any other device."""
    path = _attribute(number, "loop/backing_file")
    if not path or not is_device(path):
        return path or None
    return backing_of(os.stat(path).st_rdev) or path


def files_of(fd: int) -> tuple[tuple[int, int], ...]:
    """Device and inode number of the file that is open at *fd*; of a device 0, which no file system
    has, and its own number, and the file behind it, if it is a loop device. Two that have one in
    common are one store.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return ((status.st_dev, status.st_ino),)
    behind = file_behind(fd)
    return ((0, status.st_rdev), *([behind] if behind else []))


def file_behind(fd: int) -> tuple[int, int] | None:
    """Device and inode number of the file behind the loop device that is open at *fd*, also through
    further ones; 0 and its own number, if that is another device; None for any other device."""
    backing = backing_of(os.fstat(fd).st_rdev)
    if backing is None:
        return None
    try:
        info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64))
        device, inode, is_over_device = struct.unpack_from("<QQQ", info)
        if not is_over_device:
            return device, inode
        status = os.stat(backing)
    except OSError:
        return None
    return (0, status.st_rdev) if status.st_rdev else (status.st_dev, status.st_ino)
