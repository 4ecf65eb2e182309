"""The head docstring of the simulation says what each of its modules is for."""

import re
from pathlib import Path

from support import simulation

MODULES = {path.stem for path in Path(simulation.__path__[0]).glob("*.py")} - {"__init__"}


def test_the_package_lists_all_its_modules_and_no_others() -> None:
    listed = re.findall(r"^`(\w+)` +\S", simulation.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == sorted(MODULES)
