"""What is distributed can be installed, and works where it is."""

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


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
    assert list((Path(own) / "quorumfs" / "fuse").glob("_shim.*.so"))
    command = environment / "bin" / "quorumfs"
    assert succeeds(command, "--version").startswith("quorumfs, version ")
    succeeds(command, "manual", "--directory", tmp_path / "man")
    assert (tmp_path / "man" / "man7" / "quorumfs-recovery.7").exists()
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


def test_the_source_distribution_has_what_builds_it(packages: list[Path]) -> None:
    (package,) = (path for path in packages if path.name.endswith(".tar.gz"))
    with tarfile.open(package) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {".build/quorumfs_build.py", "quorumfs/fuse/shim.c", "pyproject.toml"} <= inside
    assert "LICENSE" in inside
