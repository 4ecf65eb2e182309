"""The build backend: setuptools, and what is written in C if it can be built.

Without a compiler, or libfuse's headers for the shim, or with QUORUMFS_NO_SHIM set, the package is
installed without it and says at run time what is missing.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that pip calls)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

COMMAND_IMPORTS = ("click", "xxhash")
"""Of our dependencies, what the command imports to tell of itself."""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:  # noqa: ANN401
    """What pip installs before it has us build a wheel: the manual pages are the command's."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [one for one in project["dependencies"] if one.startswith(COMMAND_IMPORTS)]
    return [*build_meta.get_requires_for_build_wheel(config_settings), *needed]


class BuildShim(build_ext):
    """Builds the libraries that pyproject.toml lists, the shim for the libfuse that is here."""

    def get_ext_filename(self, fullname: str) -> str:
        """They are for ctypes, and the same for any Python: so they have the name of what is."""
        return f"{fullname.replace('.', os.sep)}.abi3.so"

    def finalize_options(self) -> None:
        super().finalize_options()
        if os.environ.get("QUORUMFS_NO_SHIM"):
            self.extensions = []

    def build_extension(self, ext: Extension) -> None:
        # Python's own flags turn assertions off.
        ext.extra_compile_args = [
            "-fvisibility=hidden",
            "-UNDEBUG",
            "-pthread",
            "-D_FILE_OFFSET_BITS=64",
        ]
        ext.extra_link_args = ["-pthread"]
        if ext.name.endswith("_shim"):
            ext.extra_compile_args += pkg_config("--cflags")
            # Our own reference to libfuse is what the search for the real functions starts from.
            ext.extra_link_args += ["-Wl,--no-as-needed", *pkg_config("--libs")]
        super().build_extension(ext)


class Wheel(bdist_wheel):
    """Makes a wheel for any Python, with the manual pages."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform

    def run(self) -> None:
        self.run_command("egg_info")  # from which the command has its version
        # An absolute path: what is built must find them, wherever it is built.
        manual = Path(self.get_finalized_command("build").build_base, "man").absolute()
        shutil.rmtree(manual, ignore_errors=True)
        command = [sys.executable, "-B", "-m", "quorumfs", "manual", "--directory", str(manual)]
        subprocess.run(command, check=True)
        self.distribution.data_files = [
            (f"share/man/{section.name}", sorted(map(str, section.iterdir())))
            for section in sorted(manual.iterdir())
        ]
        super().run()


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
