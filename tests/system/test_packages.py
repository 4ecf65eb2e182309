"""What is distributed can be installed, and works where it is."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

LIBRARY_NAMES = ("fuse/_shim", "fastpath/_native", "replica/_copy")
"""What is written in C."""

LIBRARIES = """
from quorumfs.fastpath import native
from quorumfs.fuse import shim
from quorumfs.replica import rangecopy
print(*(one._name for one in (shim._library, native.library, rangecopy._library)))
"""
"""Prints where the libraries in C were loaded from."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The source distribution, and the wheel that is built from it and from nothing else."""
    made = tmp_path_factory.mktemp("packages")
    succeeds(sys.executable, "-m", "build", "--no-isolation", "--outdir", made, CHECKOUT)
    return sorted(made.iterdir())


def succeeds(*command: str | Path) -> str:
    """What it prints; it is not to find the checkout by the way."""
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pages_in(manual: Path) -> list[str]:
    return sorted(str(page.relative_to(manual)) for page in manual.glob("man?/*"))


@pytest.mark.parametrize("kind", [".tar.gz", ".whl"])
def test_a_package_installs_and_mounts(packages: list[Path], kind: str, tmp_path: Path) -> None:
    """In an environment of its own, which has our dependencies from the one of the tests."""
    (package,) = (path for path in packages if path.name.endswith(kind))
    environment = tmp_path / "venv"
    succeeds(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    own = succeeds(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(own) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    succeeds(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", package)

    found = succeeds(python, "-c", "import quorumfs.fuse as room; print(room.__file__)")
    assert found.startswith(own)
    loaded = succeeds(python, "-c", LIBRARIES)
    assert loaded.split() == [f"{own}/quorumfs/{name}.abi3.so" for name in LIBRARY_NAMES]
    command = environment / "bin" / "quorumfs"
    assert succeeds(command, "--version").startswith("quorumfs, version ")
    succeeds(command, "manual", "--directory", tmp_path / "man")
    assert pages_in(environment / "share" / "man") == pages_in(tmp_path / "man")
    assert "man5/quorumfs.conf.5" in pages_in(tmp_path / "man")
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    succeeds(command, "create", "--size", "1M", *images)
    succeeds(command, "mount", *images, mountpoint)
    try:
        (mountpoint / "disk.img").write_bytes(b"w" * (1 << 20))
        succeeds(command, "status", mountpoint)
    finally:
        succeeds(command, "umount", mountpoint)
    assert {image.read_bytes() for image in images} == {b"w" * (1 << 20)}


def test_one_wheel_is_for_every_python(packages: list[Path], tmp_path: Path) -> None:
    """Its name says so, and it is true: nothing in C asks for anything that Python defines."""
    (package,) = (path for path in packages if path.name.endswith(".whl"))
    assert re.fullmatch(r"quorumfs-[0-9.]+-py3-none-linux_\w+\.whl", package.name)
    with zipfile.ZipFile(package) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, libraries)
    assert set(libraries) == {f"quorumfs/{name}.abi3.so" for name in LIBRARY_NAMES}
    for library in libraries:
        asked_for = succeeds("nm", "--dynamic", "--undefined-only", tmp_path / library)
        assert "@GLIBC" in asked_for
        assert not re.search(r"\b_?Py", asked_for)


def test_the_source_distribution_has_what_builds_it(packages: list[Path]) -> None:
    (package,) = (path for path in packages if path.name.endswith(".tar.gz"))
    with tarfile.open(package) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {".build/quorumfs_build.py", "quorumfs/fuse/shim.c", "pyproject.toml"} <= inside
    assert "LICENSE" in inside
