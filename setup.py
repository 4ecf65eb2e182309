"""Builds the libfuse shim, if it can be built; everything else is in pyproject.toml.

Without a compiler or libfuse's headers, or with QUORUMFS_NO_SHIM set, the package is installed
without it and says at run time what is missing.
"""

import os
import subprocess

from setuptools import Extension, setup


def pkg_config(*what: str) -> list[str]:
    try:
        return subprocess.check_output(["pkg-config", *what, "fuse3"], text=True).split()
    except (OSError, subprocess.CalledProcessError):
        return []


shim = Extension(
    "quorumfs.fuse._shim",
    ["quorumfs/fuse/shim.c"],
    extra_compile_args=["-fvisibility=hidden", *pkg_config("--cflags")],
    # Our own reference to libfuse is what the search for the real functions starts from.
    extra_link_args=["-Wl,--no-as-needed", *pkg_config("--libs")],
    optional=True,
)

setup(ext_modules=[] if os.environ.get("QUORUMFS_NO_SHIM") else [shim])
