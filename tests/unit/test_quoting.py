"""Commands in messages: whatever a path is called, a shell makes that path of what is printed."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.cli.output import printable
from quorumfs.decisions.quoting import joined, quoted

PATHS = st.binary(min_size=1).filter(lambda path: b"\0" not in path).map(os.fsdecode)


@pytest.mark.parametrize(
    "path", ["/a b/c  d", "/it's", "/line\nbreak", "/\x1b[31m", "/\udcff", "~"]
)
def test_a_shell_takes_it_back(path: str) -> None:
    shown = printable(joined([path, path]))
    command = ["bash", "-c", f"printf '%s\\0' {shown}"]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert told == 2 * (os.fsencode(path) + b"\0")


@given(PATHS)
def test_nothing_in_it_is_changed_when_it_is_printed(path: str) -> None:
    assert printable(quoted(path)) == quoted(path)
