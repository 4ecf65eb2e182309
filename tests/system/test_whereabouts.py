"""A replica whose file is removed, renamed or replaced while it is in use."""

from pathlib import Path

import pytest
from support.command import one_line
from support.mounting import as_qemu, quorumfs
from support.sets import MIB, SetMount, create, named, sidecar, write

pytestmark = pytest.mark.usefixtures("mountpoint")


def warnings(disk: SetMount, path: Path) -> list[str]:
    """What the log says of a replica's path."""
    told = [record["message"] for record in disk.log() if record["level"] == "warning"]
    return [text for text in told if text.startswith(f"{path}: its file was removed")]


@pytest.mark.parametrize("metadata", ["sidecar", "none"])
def test_a_renamed_file_is_told_until_it_is_back(tmp_path: Path, metadata: str) -> None:
    """56: it gets every write, and is not found any more by the next mount."""
    options = as_qemu() if metadata == "none" else ""
    images = create(named(tmp_path, 2))
    if metadata == "none":
        for path in images:
            sidecar(path).unlink()
    with SetMount(images, tmp_path, options) as disk:
        away = images[1].rename(tmp_path / "away")
        status = disk.wait(lambda status: status["state"] == "degraded", "a warning")
        assert [part["state"] for part in status["replicas"]] == ["current", "current"]
        assert status["replicas"][0]["reason"] is None
        assert "nothing is at its path" in status["replicas"][1]["reason"]
        done = quorumfs("status", disk.mountpoint, check=False)
        assert done.returncode == 1
        assert f"{images[1]}: its file was removed or replaced" in done.stdout
        write(disk, b"w")
        assert away.read_bytes() == images[0].read_bytes()
        assert len(warnings(disk, images[1])) == 1
        away.rename(images[1])
        disk.wait_healthy()
        assert disk.replica(images[1])["reason"] is None


def test_another_file_in_its_place_is_told(tmp_path: Path) -> None:
    """Though one with the same content and name."""
    images = create(named(tmp_path, 2))
    with SetMount(images, tmp_path) as disk:
        content = images[0].read_bytes()
        images[0].unlink()
        images[0].write_bytes(content)
        status = disk.wait(lambda status: status["state"] == "degraded", "a warning")
        assert "another one is at its path" in status["replicas"][0]["reason"]


def test_a_file_removed_just_before_unmounting_is_told(tmp_path: Path) -> None:
    """The last chance: nobody may have asked for the status since."""
    images = create(named(tmp_path, 2), 4 * MIB)
    with SetMount(images, tmp_path) as disk:
        images[1].unlink()
    assert len(warnings(disk, images[1])) == 1
    line = one_line(quorumfs("mount", *images, disk.mountpoint, check=False), 1)
    assert str(images[1]) in line
