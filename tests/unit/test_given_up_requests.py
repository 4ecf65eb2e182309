"""What pyfuse3 logs of replies that nobody waits for, and of others that fail."""

import errno
import logging
import os
from collections.abc import Iterator
from typing import cast

import pyfuse3
import pytest

from quorumfs.fuse import session, shim
from quorumfs.fuse.operations import DiskOperations

OPERATIONS = ("release", "read", "write", "write_buf", "fsync", "getattr")


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """pyfuse3's logger after a mount, which is pretended here."""
    monkeypatch.setattr(pyfuse3, "init", lambda *_: None)
    monkeypatch.setattr(shim, "configure", lambda *_: None)
    theirs = logging.getLogger("pyfuse3")
    before = theirs.filters[:]
    session.mount(cast("DiskOperations", None), "/mnt", set(), 1)
    yield theirs
    theirs.filters[:] = before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_request_that_the_kernel_gave_up_is_no_error(
    operation: str, theirs: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    theirs.error("fuse_%s(): fuse_reply_* failed with %s", operation, os.strerror(errno.ENOENT))
    assert caplog.text == ""


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EPERM, errno.ENOMEM])
def test_a_reply_that_fails_otherwise_is_an_error(
    number: int, theirs: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    text = f"fuse_read(): fuse_reply_* failed with {os.strerror(number)}"
    theirs.error("%s", text)
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.ERROR, text)
    ]


def test_whatever_else_is_not_found_is_an_error(
    theirs: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    theirs.error("Failed to submit invalidate_entry: %s", os.strerror(errno.ENOENT))
    assert len(caplog.records) == 1
