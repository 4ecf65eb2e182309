"""The scripts in ``examples/``, as a user runs them. What installs is run by hand, and by CI."""

import re
import shlex
import subprocess
from pathlib import Path

VM = Path(__file__).parents[2] / "examples" / "vm.sh"


def test_a_virtual_machine_outlives_a_replica() -> None:
    """On a terminal, so that it shows ``top``, too."""
    command = ["script", "--quiet", "--return", "--command", shlex.quote(str(VM)), "/dev/null"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=250
    )
    told = re.sub(r"\r|\x1b\[[0-9;?]*[mHJ]", "", done.stdout)
    assert done.returncode == 0, told
    assert re.search(r"\bb\.img +missing ", told)
    for line in (
        "files are as they were written",
        "a.img and c.img hold the same bytes",
        "Done: nothing is left running or mounted.",
    ):
        assert line in told
    assert "\x1b[?1049h" in done.stdout  # the screen that top draws on
