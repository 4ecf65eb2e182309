"""``python tests/stores [--stores NAME...] [--outages NAME...]``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put this directory first; we are the package in it, and the tests' support is beside.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from stores.cli import main

    sys.exit(main())
