"""What C takes for a plain read or write of the disk: no message makes it read behind its end."""

from pathlib import Path

from support.native import MEMORY, build, run


def test_messages_are_taken_for_what_they_are(tmp_path: Path) -> None:
    # Seeds beside 1 find nothing else; tests/native/fuzz_parse.c says how to run it for hours.
    run(build(tmp_path, "fuzz_parse", *MEMORY), 300_000, 1)
