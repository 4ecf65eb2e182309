"""The manual pages as they can be read on the repository's page: ``.github/manual``.

Made by: cd tests && python -m support.manual_pages. Pages of section 7 are written by hand, in
``quorumfs/cli/pages``.
"""

import os
import re
import subprocess
from pathlib import Path

from quorumfs.cli import quorumfs
from quorumfs.cli.manual import pages

DIRECTORY = Path(__file__).parents[2] / ".github" / "manual"
WRITTEN = "../../quorumfs/cli/pages"

_REFERENCE = re.compile(r"^([a-z.-]*quorumfs[a-z.-]*)\((\d)\)", re.MULTILINE)


def rendered() -> dict[str, str]:
    """All pages that are made, by file name: Markdown, with links to other pages."""
    made = {}
    for name, page in pages(quorumfs).items():
        if not name.endswith(".7"):
            command = ["mandoc", "-T", "markdown"]
            done = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
            # Without the lines at its head and foot, which tell a date.
            _, body = done.stdout.split("\n\n", 1)
            body, _, _ = body.rstrip().rpartition("\n\n")
            text, heading, others = body.partition("# SEE ALSO")
            made[f"{name}.md"] = f"{text}{heading}{_REFERENCE.sub(_link, others)}\n"
    return made


def _link(reference: re.Match[str]) -> str:
    name, section = reference.groups()
    page = f"{name}.{section}.md"
    if section == "7":
        page = f"{WRITTEN}/{name.removeprefix('quorumfs-')}.md"
    return f"[{reference.group()}]({page})"


def main() -> None:
    """Write the pages, and remove those of commands that there are no more."""
    DIRECTORY.mkdir(exist_ok=True)
    made = rendered()
    for name in set(os.listdir(DIRECTORY)) - made.keys():
        (DIRECTORY / name).unlink()
    for name, page in made.items():
        (DIRECTORY / name).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
