"""``python -m quorumfs`` is the same command as ``quorumfs``."""

from quorumfs.cli import main

if __name__ == "__main__":
    main()
