"""Whether an image is the one that its sidecar was left with, as far as anything tells. Pure."""

from dataclasses import replace

from quorumfs.decisions.model import Found

LATER_NS = 300 * 10**9
"""The longest time (nanoseconds) between a daemon's last write to a sidecar and a later one of its
own to the image."""


def image_changed(found: Found) -> bool:
    """Whether the image was changed behind its sidecar, as far as a stat can tell.

    An image in use has no times on record, because times move: `touched_after_crash` says more, and
    where the sidecar does not vouch for the image, `image_unproven`.
    """
    assert found.sidecar is not None
    known = found.sidecar.identity
    if known.mtime_ns or known.ctime_ns:
        now = found.image
        if found.device and now is not None:  # one that was lengthened is still the same
            now = replace(now, size=min(now.size, known.size))
        return known != now
    if found.left_ns and found.image is not None and found.image.ctime_ns > found.left_ns:
        return True  # somebody wrote to it while it was out
    return bool(known.inode) and found.instance is None and not _is_as_in_use(found)


def has_its_times(found: Found) -> bool:
    """Whether the image has the size and the mtime that it was left with; if it was in use, whether
    nothing but its ctime is later than its sidecar, as after a change of owner or mode."""
    assert found.sidecar is not None
    left, now = found.sidecar.identity, found.image
    if now is None:
        return False
    if left.mtime_ns or left.ctime_ns:
        return (now.size, now.mtime_ns) == (left.size, left.mtime_ns)
    return not image_changed(found) and not _is_later(now.mtime_ns, found)


def touched_after_crash(found: Found) -> bool:
    """Whether somebody else touched the image after a crash: a guest was booted on it, or a backup
    put over it, with its times.

    Both times are of the clock of one store. A change of an extent without a mark writes the
    sidecar first, and while there are marks `quorumfs.repair.repairs` writes it now and then.
    """
    assert found.sidecar is not None
    known, now = found.sidecar.identity, found.image
    closed = known.mtime_ns or known.ctime_ns
    if found.device or closed or now is None or not found.recorded_ns:
        return False
    return _is_later(max(now.mtime_ns, now.ctime_ns), found)  # nobody puts back a ctime


def _is_later(time_ns: int, found: Found) -> bool:
    return time_ns > found.recorded_ns + LATER_NS


def image_unproven(found: Found) -> bool:
    """Whether nothing proves that the image is the one of its sidecar (R15).

    True where the sidecar does not vouch for an image that was in use, and the mount that held the
    image is gone, or does not vouch for it either: an older image, or an empty one, may be in its
    place. Also true where the sidecar lies apart and is a copy; and of a device without an identity
    of its own: its fingerprint covers only a part of it.
    """
    assert found.sidecar is not None
    known = found.sidecar.identity
    if found.copied or (found.device and not known.inode):
        return True
    if found.instance is None or found.proven or known.mtime_ns or known.ctime_ns:
        return False
    return found.exchangeable or was_remounted(found)


def was_remounted(found: Found) -> bool:
    """Whether the mount that held an image in use is gone, as far as known."""
    return not found.instance or not _is_as_in_use(found)


def _is_as_in_use(found: Found) -> bool:
    """Whether the image is the one that was in use, as far as its identity tells.

    It may be longer than on record, because a daemon died while it grew the disk; or shorter,
    because that was not durable. It must not be shorter than the disk.
    """
    assert found.sidecar is not None
    now, size = found.in_use, found.sidecar.record.size
    same = now is not None and found.sidecar.identity.inode == now.inode
    return same and not found.is_short(size)
