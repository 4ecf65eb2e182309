"""The threads of the fast path, driven from both sides under the sanitizers.

``tests/native/drive_loop.c`` says what is compared with what, and how to run it for longer.
"""

from pathlib import Path

import pytest
from support.native import MEMORY, THREADS, build, run

CALLS = ("read", "writev", "pwrite", "preadv2", "lseek", "pthread_create")
WRAPPED = (*CALLS, "gate_admits", "gate_note")


@pytest.mark.parametrize("sanitizer", [MEMORY, THREADS], ids=["memory", "threads"])
def test_every_request_is_served_once_and_as_it_has_to_be(
    sanitizer: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the sleep it waits a second at each end for more races to come.
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1:atexit_sleep_ms=0")
    wrapped = [f"-Wl,--wrap={name}" for name in WRAPPED]
    parts = ("gate.c", "loop.c")
    run(build(tmp_path, "drive_loop", *sanitizer, *wrapped, with_=parts), 3, 1)
