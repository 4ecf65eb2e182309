"""`quorumfs.live.settings`: an order to change options changes all that it names, or nothing."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.simulated import Bench, make_bench

from quorumfs.cli.setting import set_options
from quorumfs.decisions.patterns import Blkverify, Fastest, Fifo, Quorum
from quorumfs.disk.mirror import Mirror
from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, Request
from quorumfs.live.settings import FIXED, TUNED, Settings, in_force
from quorumfs.mount.replicaset import read_pattern
from quorumfs.options.parsing import changed_options
from quorumfs.options.table import OPTIONS, MountOptions, option_of_field

MOUNTED = MountOptions("quorum", 2)
GIVEN_ONCE = "vote_threshold_given"
"""The only field that is neither changed nor refused: no option sets it alone."""

Script = Callable[[Bench, Settings], Awaitable[None]]


def run_with(script: Script, replicas: int = 3) -> None:
    """Run *script* on a disk without sidecars, mounted with `MOUNTED`."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            bench = make_bench(nursery, replicas, pattern=Quorum(2), threshold=2)
            await script(bench, Settings(bench.disk, None, MOUNTED, read_pattern))
            nursery.cancel_scope.cancel()

    trio.run(main)


async def change(settings: Settings, *options: str) -> list[str]:
    told = await settings.set(Request({"options": list(options)}), Action(1, "set"))
    changed: list[str] = told["changed"]
    return changed


def at_work(mirror: Mirror) -> object:
    """What a disk without repairs goes by."""
    timeouts = {replica.timeout_s for replica in mirror.replicas}
    return (
        mirror.pattern,
        mirror.threshold,
        mirror.search_s,
        timeouts,
        mirror.read_order.write_mostly,
    )


def test_every_option_is_tuned_or_refused_with_a_reason() -> None:
    names = {field.name for field in fields(MountOptions)} - {GIVEN_ONCE}
    assert names == {*TUNED, *FIXED}
    assert not {*TUNED}.intersection(FIXED)
    assert {option.field for option in OPTIONS.values() if option.field} == names


def test_the_help_of_set_names_what_can_be_set() -> None:
    told = set(re.findall(r"[a-z-]+", set_options.help or ""))
    assert {option_of_field(name) for name in TUNED} <= told


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("read-pattern=fifo", (Fifo(), 2, 8.0, {8.0}, frozenset())),
        ("read-pattern=latency", (Fastest(), 2, 8.0, {8.0}, frozenset())),
        ("vote-threshold=3", (Quorum(3), 3, 8.0, {8.0}, frozenset())),
        ("replica-timeout=2s", (Quorum(2), 2, 2.0, {2.0}, frozenset())),
        ("write-mostly=r1", (Quorum(2), 2, 8.0, {8.0}, frozenset({"r1"}))),
    ],
)
def test_what_is_changed_is_what_the_disk_goes_by(option: str, expected: object) -> None:
    async def script(bench: Bench, settings: Settings) -> None:
        assert await change(settings, option) == [option]
        assert at_work(bench.disk.mirror) == expected
        assert option in in_force(settings.present)
        assert await change(settings, option) == []  # it is so already

    run_with(script)


def test_blkverify_is_for_two() -> None:
    async def of_two(bench: Bench, settings: Settings) -> None:
        await change(settings, "blkverify")
        assert bench.disk.mirror.pattern == Blkverify(2)

    async def of_three(bench: Bench, settings: Settings) -> None:
        before = at_work(bench.disk.mirror)
        with pytest.raises(UsageError, match="blkverify"):
            await change(settings, "blkverify")
        assert at_work(bench.disk.mirror) == before

    run_with(of_two, replicas=2)
    run_with(of_three)


options = st.sampled_from(
    [
        "read-pattern=fifo",
        "read-pattern=quorum",
        "vote-threshold=1",
        "vote-threshold=3",
        "vote-threshold=4",
        "replica-timeout=2s",
        "replica-timeout=-1",
        "write-mostly=r0",
        "write-mostly=nobody",
        "write-mostly=none",
        "rewrite-corrupted",
        "blkverify",
        "resync-rate=1M",
        "scrub-every=30d",
        "scrub-every=often",
        "metadata=none",
        "uid=4711",
        "no-such-option",
    ]
)


@given(st.lists(options, max_size=4))
def test_all_change_or_none(texts: list[str]) -> None:
    async def script(bench: Bench, settings: Settings) -> None:
        mirror = bench.disk.mirror
        before, options_before = at_work(mirror), settings.present
        try:
            changed = await change(settings, *texts)
        except UserError:
            assert (at_work(mirror), settings.present) == (before, options_before)
            return
        expected = changed_options(options_before, texts, len(mirror.replicas))
        assert replace(settings.present, vote_threshold_given=False) == replace(
            expected, vote_threshold_given=False
        )
        assert mirror.pattern == read_pattern(expected, expected.vote_threshold)
        assert mirror.threshold == expected.vote_threshold
        assert mirror.search_s == expected.replica_timeout_s
        assert mirror.read_order.write_mostly == {*expected.write_mostly}
        assert len(changed) == len({*changed})

    run_with(script)


def test_the_mark_write_mostly_follows_whoever_takes_the_place() -> None:
    async def script(bench: Bench, settings: Settings) -> None:
        await change(settings, "write-mostly=r1")
        await settings.replaced("r0", "r3")
        assert settings.present.write_mostly == ("r1",)
        await settings.replaced("r1", "r3")
        assert bench.disk.mirror.read_order.write_mostly == {"r3"}
        assert settings.present.write_mostly == ("r3",)
        await settings.replaced("r3", None)
        assert not settings.present.write_mostly

    run_with(script)
