"""Options: one place that knows them all, and says what is wrong with one."""

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.errors import UsageError
from quorumfs.options.parsing import parse_options
from quorumfs.options.table import OPTIONS, MountOptions, option_rows
from quorumfs.options.texts import option_text


@pytest.mark.parametrize(("replicas", "majority"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)])
def test_the_defaults_are_a_vote_by_majority(replicas: int, majority: int) -> None:
    assert parse_options([], replicas) == MountOptions("quorum", majority)
    assert parse_options([], replicas).metadata == "sidecar"


def test_a_set_keeps_its_threshold_unless_one_is_given() -> None:
    assert not parse_options([], 3).vote_threshold_given
    assert parse_options(["vote-threshold=2"], 3).vote_threshold_given


def test_the_card_s_own_command() -> None:
    options = parse_options(["read-pattern=fifo,vote-threshold=1"], 2)
    assert (options.read_pattern, options.vote_threshold) == ("fifo", 1)


def test_repeated_o_is_one_list_and_the_last_one_counts() -> None:
    options = parse_options(["vote-threshold=1,ro", "vote-threshold=2", "rw"], 3)
    assert (options.vote_threshold, options.read_only) == (2, False)


def test_hyphen_and_underscore_are_the_same() -> None:
    assert parse_options(["read_pattern=fifo,allow-other"], 2) == dataclasses.replace(
        parse_options(["read-pattern=fifo"], 2), kernel_flags=frozenset({"allow_other"})
    )


def test_of_opposite_flags_the_last_one_counts() -> None:
    assert parse_options(["noexec,exec,dev,nodev"], 2).kernel_flags == {"exec", "nodev"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("8", 8), ("8s", 8), ("250ms", 0.25), ("1.5s", 1.5), ("2m", 120)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_options([f"replica-timeout={text}"], 2).replica_timeout_s == seconds


@pytest.mark.parametrize(
    ("text", "rate"), [("1", 1), ("8k", 8 << 10), ("100M", 100 << 20), ("1T", 1 << 40)]
)
def test_sizes(text: str, rate: int) -> None:
    assert parse_options([f"resync-rate={text}"], 2).resync_rate == rate


@pytest.mark.parametrize(
    ("text", "size"), [("64K", 1 << 16), ("1M", 1 << 20), ("4194304", 4 << 20)]
)
def test_a_chunk_size_is_a_power_of_two(text: str, size: int) -> None:
    assert parse_options([f"chunk-size={text}"], 2).chunk_size == size


@pytest.mark.parametrize("text", ["", "32K", "8M", "100K", "x"])
def test_any_other_chunk_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"option chunk-size: got .*, allowed: a "):
        parse_options([f"chunk-size={text}"], 2)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "G", "1P", "1 M", "²"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"option resync-rate: got .*, allowed: none, or a number"):
        parse_options([f"resync-rate={text}"], 2)


@pytest.mark.parametrize("text", ["on", "true", ""])
def test_switches(text: str) -> None:
    assert parse_options([f"rewrite-corrupted={text}"], 3).rewrite_corrupted
    assert parse_options(["rewrite-corrupted"], 3).rewrite_corrupted
    assert not parse_options(["rewrite-corrupted,rewrite-corrupted=off"], 3).rewrite_corrupted


@given(st.sampled_from(sorted(OPTIONS)), st.text(st.characters(exclude_characters=","), max_size=9))
def test_any_text_is_parsed_or_refused_by_name(name: str, value: str) -> None:
    """No value crashes, and a refusal says which option, what was given and what is allowed."""
    message = f"option {name}: got , allowed: "
    try:
        parse_options([f"{name}={value}"], 2)
    except UsageError as error:
        message = str(error)
    assert message.startswith(f"option {name}: got ")
    assert "allowed: " in message


def test_an_unknown_option_is_refused_with_the_list_and_a_guess() -> None:
    with pytest.raises(UsageError, match=r"unknown option 'vote-treshold'.*did you mean") as info:
        parse_options(["vote-treshold=1"], 2)
    assert all(name in str(info.value) for name in OPTIONS)


@pytest.mark.parametrize(
    ("text", "replicas"),
    [
        ("vote-threshold=3", 2),
        ("blkverify,read-pattern=fifo,vote-threshold=2", 2),
        ("blkverify", 3),
        ("blkverify,vote-threshold=1", 2),
        ("blkverify,rewrite-corrupted", 2),
        ("rewrite-corrupted,ro", 3),
        ("rewrite-corrupted", 1),
        ("metadata=none,degraded", 2),
        ("metadata=none,resync-rate=1M", 2),
        ("metadata=none,chunk-size=1M", 2),
        ("detect-zeroes=on,ro", 2),
        ("sync,ro", 2),
        ("allow_other,allow_root", 2),
    ],
)
def test_what_means_nothing_together_is_refused(text: str, replicas: int) -> None:
    with pytest.raises(UsageError, match=r"option .*: got .*, allowed: "):
        parse_options([text], replicas)


def test_the_help_shows_every_option() -> None:
    assert [term.partition("=")[0] for term, _ in option_rows()] == list(OPTIONS)


@pytest.mark.parametrize("name", ["dev", "suid"])
def test_what_only_root_gets_is_refused_to_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fusermount3 would leave it out without a word."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match=f"option {name}: .* root alone"):
        parse_options([name], 2)
    assert parse_options([f"{name},no{name}"], 2).kernel_flags == {f"no{name}"}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert parse_options([name], 2).kernel_flags == {name}


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 30 * 86400), ("12h", 43200), ("1m", 60), ("off", None)]
)
def test_intervals(text: str, seconds: float | None) -> None:
    assert parse_options([f"scrub-every={text}"], 2).scrub_every_s == seconds


@pytest.mark.parametrize("text", ["", "30", "0d", "1s", "4000d", "d", "1.5d"])
def test_any_other_interval_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"option scrub-every: got .*, allowed: a time"):
        parse_options([f"scrub-every={text}"], 2)


@pytest.mark.parametrize("other", ["ro", "metadata=none"])
def test_nobody_remembers_a_scrub_without_sidecars(other: str) -> None:
    with pytest.raises(UsageError, match=f"option scrub-every: got {other} too"):
        parse_options([f"scrub-every=30d,{other}"], 2)


@pytest.mark.parametrize("text", ["90m", "36h", "100d", "off"])
def test_an_interval_is_shown_as_it_may_be_given(text: str) -> None:
    options = parse_options([f"scrub-every={text}"], 2)
    assert option_text(options, "scrub_every_s") == f"scrub-every={text}"
