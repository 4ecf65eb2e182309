"""Claims in real sidecars: who is refused, who takes over, and what is left behind."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.claims import claim

from quorumfs.decisions.claim import NOTICE_S, Claim
from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import Sidecar, path_for
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.errors import UsageError, UserError
from quorumfs.mount import replicaset
from quorumfs.mount.copies import create_from
from quorumfs.mount.creating import create_empty
from quorumfs.mount.keeping import keep_one
from quorumfs.mount.replicaset import ReplicaSet, open_replica_set
from quorumfs.options.parsing import parse_options
from quorumfs.replica.claimant import claim_of_this_mount
from quorumfs.replica.sidecarfile import create_sidecar, read_claim, sign

SIZE = 1 << 20


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """A set of two that nobody has open."""
    paths = [str(tmp_path / name) for name in ("a.img", "b.img")]
    create_empty(paths, SIZE, None)
    return paths


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept, in no time."""
    sleeps: list[float] = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    return sleeps


def leave(path: str, one: Claim) -> None:
    fd = os.open(path_for(path), os.O_RDWR)
    sign(fd, one)
    os.close(fd)


def left(path: str) -> Claim | None:
    fd = os.open(path_for(path), os.O_RDONLY)
    try:
        return read_claim(fd)
    finally:
        os.close(fd)


def mount(paths: Sequence[str], *options: str) -> ReplicaSet:
    """What happens before the mount point appears, and its end."""
    parsed = parse_options(options, len(paths))
    replica_set = open_replica_set(paths, None, parsed)
    try:
        if not parsed.read_only:
            replica_set.take_into_use(parsed)
    finally:
        for image in replica_set.images:
            image.close()
    return replica_set


def contents(paths: Sequence[str]) -> list[bytes]:
    return [Path(path_for(path)).read_bytes() for path in paths]


def of_this_host(**changes: object) -> Claim:
    return replace(claim_of_this_mount(), mount=7, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("options", [(), ("ro",), ("degraded",), ("vote-threshold=1",)])
def test_a_set_open_elsewhere_is_refused(
    pair: list[str], which: int, options: tuple[str, ...]
) -> None:
    """Whichever sidecar says so; also a reader, who would see mixtures. Nothing is written."""
    leave(pair[which], claim())
    before = contents(pair)
    with pytest.raises(UserError, match=f"{pair[which]} is in use by pid 4711 on nas1") as caught:
        mount(pair, *options)
    assert caught.value.exit_code == 1
    assert "mount with -o takeover" in str(caught.value)
    assert contents(pair) == before


def test_takeover_waits_and_looks_again(pair: list[str], slept: list[float]) -> None:
    """Whoever is at work all the same writes until it notices: what is decided is decided then."""
    leave(pair[0], claim())
    replica_set = mount(pair, "takeover")
    assert slept == [NOTICE_S]
    mine = replica_set.tenure.mine
    assert mine is not None
    for path in pair:
        found = left(path)
        assert found is not None
        assert (found.mount, found.released) == (mine.mount, False)
    replica_set = open_replica_set(pair, None, parse_options(["takeover"], 2))
    for image in replica_set.images:
        image.close()


def test_takeover_is_not_needed_nor_waited_for_where_the_other_one_has_ended(
    pair: list[str], slept: list[float]
) -> None:
    mount(pair, "takeover")  # nobody has it
    for ended in (
        claim().release(),
        of_this_host(started=1),
        of_this_host(boot="another"),
        of_this_host(namespace="another", file=_file(pair[0])),
    ):
        for path in pair:
            leave(path, ended)
        mount(pair)
    assert not slept


def _file(path: str) -> tuple[int, int]:
    """As another container sees it: `sign` notes it by itself."""
    status = os.stat(path_for(path))
    return status.st_dev, status.st_ino


def test_a_process_of_this_host_that_is_there_is_refused(pair: list[str]) -> None:
    leave(pair[0], of_this_host())
    with pytest.raises(UserError, match=rf"in use by pid {os.getpid()} on .* on this host"):
        mount(pair)


@pytest.mark.parametrize("changes", [{"host": "clone"}, {"machine": "another"}])
def test_what_may_be_another_host_is_not_taken_for_an_earlier_boot(
    pair: list[str], changes: dict[str, str]
) -> None:
    """Machines are cloned with their ids."""
    leave(pair[0], of_this_host(boot="another", **changes))
    with pytest.raises(UserError, match="is in use by"):
        mount(pair)


def test_a_reader_may_be_told_that_the_host_is_down(pair: list[str], slept: list[float]) -> None:
    """And writes nothing even so."""
    leave(pair[0], claim())
    before = contents(pair)
    assert mount(pair, "ro,takeover").tenure.mine is None
    assert contents(pair) == before
    assert not slept


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("by", [claim(), None])
def test_of_two_hosts_that_adopt_the_same_images_one_has_them(
    tmp_path: Path, which: int, by: Claim | None
) -> None:
    """Neither sees the other's locks: the second one finds a sidecar where there was none."""
    paths = [str(tmp_path / name) for name in ("a.img", "b.img")]
    for path in paths:
        Path(path).write_bytes(bytes(SIZE))
    options = parse_options([], 2)
    replica_set = open_replica_set(paths, None, options)
    record = new_record(paths, SIZE, 2)
    other = Sidecar(record.roles[0].replica_id, record, DirtyMap(SIZE, record.chunk_size))
    create_sidecar(paths[which], other, by)
    before = Path(path_for(paths[which])).read_bytes()
    try:
        with pytest.raises(UserError, match=f"{paths[which]} has just been taken into use by") as e:
            replica_set.take_into_use(options)
    finally:
        for image in replica_set.images:
            image.close()
    assert ("pid 4711 on nas1" if by else "another quorumfs") in str(e.value)
    assert Path(path_for(paths[which])).read_bytes() == before
    assert not os.path.lexists(path_for(paths[1 - which]))


def test_one_image_by_two_paths_that_look_different_is_not_adopted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As through two mounts of one network directory that do not share locks either."""
    path = tmp_path / "a.img"
    path.write_bytes(bytes(SIZE))
    options = parse_options([], 1)
    replica_set = open_replica_set([str(path)], None, options)
    (image,) = replica_set.images
    plan = replica_set.plan
    assert plan is not None
    (member,) = plan.members
    two = replace(plan, members=(member, member))
    replica_set = replace(replica_set, opened=[image, replace(image, path="again")], plan=two)
    try:
        with pytest.raises(UserError, match="again and another replica are the same file"):
            replica_set.take_into_use(options)
    finally:
        image.close()
    assert not os.path.lexists(path_for(str(path)))


def test_takeover_means_nothing_without_metadata() -> None:
    with pytest.raises(UsageError, match="option takeover: got metadata=none too"):
        parse_options(["takeover,metadata=none"], 2)


def test_one_that_comes_between_is_noticed(
    pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that begin at once, or that take over from the same one."""
    leave(pair[0], claim())

    def meanwhile(_: float) -> None:
        leave(pair[1], claim(mount=9, host="nas2"))

    monkeypatch.setattr(time, "sleep", meanwhile)
    with pytest.raises(UserError, match="has just been taken into use by pid 4711 on nas2"):
        mount(pair, "takeover")
    mine, its = map(left, pair)
    assert mine is not None
    assert mine.released  # nobody is to wait for who gave up
    assert its is not None
    assert its.mount == 9

    opened = open_replica_set(pair, None, parse_options(["takeover"], 2))
    leave(pair[1], claim(mount=10))
    with pytest.raises(UserError, match="has just been taken into use"):
        opened.take_into_use(parse_options(["takeover"], 2))
    for image in opened.images:
        image.close()


def test_what_is_refused_after_the_wait_is_given_back(
    pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(pair[0], claim())

    def refuse(*_: object, **__: object) -> None:
        raise AssemblyRefusedError("rule", "meanwhile it cannot be mounted")

    def meanwhile(_: float) -> None:
        monkeypatch.setattr(replicaset, "assemble", refuse)

    monkeypatch.setattr(time, "sleep", meanwhile)
    with pytest.raises(AssemblyRefusedError):
        mount(pair, "takeover")
    for path in pair:
        found = left(path)
        assert found is not None
        assert found.released


Command = Callable[[list[str]], object]


@pytest.mark.parametrize(
    "command",
    [
        lambda pair: keep_one(pair[0], pair),
        lambda pair: keep_one(pair[0], pair, dry_run=True),
        lambda pair: create_empty(pair, SIZE, None),
        lambda pair: create_from(pair[0], pair[1:], None, lambda *_: None),
        lambda pair: create_from(_raw(pair), pair[1:], None, lambda *_: None),
    ],
    ids=["resolve", "dry run", "create", "create from it", "create over it"],
)
def test_offline_commands_leave_what_is_open_elsewhere(pair: list[str], command: Command) -> None:
    leave(pair[1], claim())
    before = contents(pair)
    with pytest.raises(UserError, match=f"{pair[1]} is in use by pid 4711 on nas1"):
        command(pair)
    assert contents(pair) == before


def _raw(pair: list[str]) -> str:
    path = Path(pair[0]).with_name("raw.img")
    path.write_bytes(bytes(SIZE))
    return str(path)


def test_resolve_takes_over_if_told_so(pair: list[str], slept: list[float]) -> None:
    """The old mount notices by the old sidecars, before they are replaced."""
    leave(pair[1], claim())
    fds = [os.open(path_for(path), os.O_RDONLY) for path in pair]
    try:
        with pytest.raises(UserError, match="add --takeover"):
            keep_one(pair[0], pair)
        keep_one(pair[0], pair, takeover=True)
        assert slept == [NOTICE_S]
        for fd in fds:
            found = read_claim(fd)
            assert found is not None
            assert found.mount != claim().mount
    finally:
        for fd in fds:
            os.close(fd)
    assert [left(path) for path in pair] == [None, None]
    mount(pair)
