"""The build backend: setuptools, and what is written in C if it can be built.

Without a compiler, or libfuse's headers for the shim, or with QUORUMFS_NO_SHIM set, the package is
installed without it and says at run time what is missing.
"""

import os
import subprocess

from setuptools import Extension
from setuptools.build_meta import *  # noqa: F403 (the hooks that pip calls)
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist


class BuildShim(build_ext):
    """Builds the extensions that pyproject.toml lists, the shim for the libfuse that is here."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if os.environ.get("QUORUMFS_NO_SHIM"):
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        # Python's own flags turn assertions off.
        ext.extra_compile_args = ["-fvisibility=hidden", "-UNDEBUG", "-pthread"]
        ext.extra_link_args = ["-pthread"]
        if ext.name.endswith("_shim"):
            ext.extra_compile_args += pkg_config("--cflags")
            # Our own reference to libfuse is what the search for the real functions starts from.
            ext.extra_link_args += ["-Wl,--no-as-needed", *pkg_config("--libs")]
        super().build_extension(ext)


class WithBackend(sdist):
    """Makes a source distribution that can be built: with this file."""

    def make_distribution(self) -> None:
        self.filelist.append(os.path.relpath(__file__))
        super().make_distribution()


def pkg_config(what: str) -> list[str]:
    """What pkg-config says of libfuse; nothing where it, or libfuse, is missing."""
    try:
        return subprocess.check_output(["pkg-config", what, "fuse3"], text=True).split()
    except (OSError, subprocess.CalledProcessError):
        return []
