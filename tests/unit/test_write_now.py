"""The way of a write from libfuse's memory: a mistake would acknowledge what was not written."""

import ctypes

from quorumfs.fuse import shim


def offered(write_now: object) -> int:
    """What C is told of a write of 4 bytes at 4096."""
    assert shim._requests is not None
    before = shim._requests.handlers
    shim._requests.handlers = shim.Handlers(None, None, write_now)  # type: ignore[arg-type]
    data = ctypes.create_string_buffer(b"data", 4)
    try:
        return int(shim._requests.write_callback(7, ctypes.addressof(data), 4096, 4))
    finally:
        shim._requests.handlers = before


def test_what_was_written_is_acknowledged_and_nothing_else() -> None:
    seen = []

    def write(handle: int, offset: int, data: memoryview) -> bool:
        seen.append((handle, offset, bytes(data), data.format))
        return handle == 7

    assert offered(write) == 1
    assert seen == [(7, 4096, b"data", "B")]  # comparable with bytes
    assert offered(lambda *_: False) == 0


def test_an_internal_error_acknowledges_nothing() -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("on purpose")

    assert [offered(broken) for _ in range(100)] == [0] * 100
