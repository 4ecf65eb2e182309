"""What `.debian` says twice, for Debian's tools read it there: it is what pyproject.toml says.

The package itself is built and used by ``tests/debian.sh``.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quorumfs.cli import quorumfs
from quorumfs.errors import UsageError

CHECKOUT = Path(__file__).parents[2]
DEBIAN = CHECKOUT / ".debian"

AN_ADMINISTRATORS = {"etc/systemd": "usr/lib/systemd", "usr/local/share": "usr/share"}
"""Where ``install-units`` puts what a package has elsewhere."""


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))


def wanted(field: str) -> dict[str, str | None]:
    """The packages in a field of `control`, and the version from which on each will do."""
    control = (DEBIAN / "control").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:((?:\n .*)+)", control, re.MULTILINE)
    assert found is not None
    lines = [line.strip(" ,") for line in found[1].split("\n") if line]
    packages = [re.fullmatch(r"([a-z0-9-]+)(?: \(>= (\S+)\))?", line) for line in lines]
    return {package[1]: package[2] for package in packages if package is not None}


def debian(requirements: list[str]) -> dict[str, str]:
    """What Debian calls these packages of Python, with their versions."""
    pairs = [requirement.split(">=") for requirement in requirements]
    return {f"python3-{name}": version for name, version in pairs}


def test_the_package_depends_on_what_the_command_does(pyproject: dict[str, Any]) -> None:
    needed = wanted("Depends")
    assert needed.pop("fuse3", "missing") is None
    assert needed == debian(pyproject["project"]["dependencies"])


def test_it_is_built_by_what_builds_a_wheel(pyproject: dict[str, Any]) -> None:
    """Which includes what the command imports to write its manual pages."""
    own = debian(pyproject["project"]["dependencies"])
    building = debian(pyproject["build-system"]["requires"])
    versioned = {name: least for name, least in wanted("Build-Depends").items() if least}
    backend = (CHECKOUT / ".build" / "quorumfs_build.py").read_text(encoding="utf-8")
    imports = re.search(r"^COMMAND_IMPORTS = \((.*)\)$", backend, re.MULTILINE)
    assert imports is not None
    names = [f"python3-{name}" for name in re.findall(r'"(\w+)"', imports[1])]
    assert versioned == building | {name: own[name] for name in names}


def test_it_is_this_version_for_these_pythons(pyproject: dict[str, Any]) -> None:
    changelog = (DEBIAN / "changelog").read_text(encoding="utf-8")
    assert changelog.startswith(f"quorumfs ({pyproject['project']['version']}) ")
    pythons = f"X-Python3-Version: {pyproject['project']['requires-python'].replace('>=', '>= ')}\n"
    assert pythons in (DEBIAN / "control").read_text(encoding="utf-8")


def test_its_licence_is_ours() -> None:
    ours = (CHECKOUT / "LICENSE").read_text(encoding="utf-8")
    theirs = (DEBIAN / "copyright").read_text(encoding="utf-8").replace("\n .\n", "\n\n")
    permission = ours[ours.index("Permission") :].split()
    assert theirs[theirs.index("Permission") :].split() == permission
    assert re.search(r"Copyright \(c\) (.*)", ours)[1] in theirs  # type: ignore[index]


def installed(root: Path, *options: str) -> dict[str, tuple[str, int]]:
    """What ``install-units`` installs, by path below *root*: contents and mode."""
    done = CliRunner().invoke(quorumfs, ["install-units", "--root", str(root), *options])
    assert done.exception is None
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)): (path.read_text(encoding="utf-8"), path.stat().st_mode)
        for path in files
    }


def test_a_package_has_all_that_is_installed_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the places of a package, and nothing in those of an administrator."""
    command = tmp_path / "somewhere" / "quorumfs"
    command.parent.mkdir()
    command.touch(0o755)
    monkeypatch.setattr("sys.argv", [str(command)])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    expected = {}
    for path, (text, mode) in installed(tmp_path / "administrator").items():
        place = path
        for theirs, of_package in AN_ADMINISTRATORS.items():
            place = re.sub(rf"^{theirs}\b", of_package, place)
        assert str(command) in text or "/share/" in path or "needrestart" in path
        expected[place] = (text.replace(str(command), "/usr/bin/quorumfs"), mode)
    assert installed(tmp_path / "package", "--package") == expected
    assert "install-units --package" in (DEBIAN / "rules").read_text(encoding="utf-8")


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed on this host, whatever a test finds."""
    monkeypatch.setattr("quorumfs.cli.units._install", lambda *_: "written")


@pytest.mark.usefixtures("unwritten")
def test_nothing_is_put_in_the_places_of_a_package_but_by_one() -> None:
    done = CliRunner().invoke(quorumfs, ["install-units", "--package"])
    assert isinstance(done.exception, UsageError)
    assert "--package: got no --root" in str(done.exception)


@pytest.mark.usefixtures("unwritten")
def test_the_command_of_a_package_has_nothing_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else an upgrade of the package would be hidden by what was written once."""
    monkeypatch.setattr("sys.argv", ["/usr/bin/quorumfs"])
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr("os.path.exists", lambda path: path.startswith("/usr/lib/systemd/"))
    done = CliRunner().invoke(quorumfs, ["install-units"])
    assert done.output.startswith("nothing to do: ")
