"""The replicas' files opened: which ones are used, and which are left as they are."""

import os
from pathlib import Path

import pytest

from quorumfs.administration import create_empty
from quorumfs.assembly import State
from quorumfs.errors import UserError
from quorumfs.options import parse_options
from quorumfs.replicaset import open_replica_set

SIZE = 1 << 20


def make_set(directory: Path, count: int) -> list[str]:
    """The paths of a new set's images."""
    directory.mkdir(exist_ok=True)
    paths = [str(directory / f"{letter}.img") for letter in "abc"[:count]]
    create_empty(paths, SIZE, None)
    return paths


@pytest.mark.parametrize("size", [4096, 1, 0])
def test_an_image_cut_to_nothing_is_not_used(size: int, tmp_path: Path) -> None:
    """Scenario 38: as one cut to a block is; two of three are enough."""
    paths = make_set(tmp_path, 3)
    os.truncate(paths[0], size)
    replica_set = open_replica_set(paths, None, parse_options([], 3))
    for image in replica_set.images:
        image.close()
    assert replica_set.plan is not None
    members = replica_set.plan.members
    assert [member.state for member in members] == [State.MISSING, State.CURRENT, State.CURRENT]
    assert f"truncated to {size} bytes" in str(members[0].reason)


def test_an_empty_image_of_no_set_is_refused(tmp_path: Path) -> None:
    """Also beside members: nobody says that it ever was one."""
    paths = make_set(tmp_path, 2)
    (tmp_path / "new.img").touch()
    for others in ([], paths):
        given = [*others, str(tmp_path / "new.img")]
        with pytest.raises(UserError, match=r"new\.img is empty"):
            open_replica_set(given, None, parse_options([], len(given)))
