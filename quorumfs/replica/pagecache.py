"""What the page cache holds of a file, asked without waiting."""

import errno
import os


def answers_from_cache(fd: int) -> bool:
    """Whether the file system answers a read from its page cache, or else says so at once."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return True
