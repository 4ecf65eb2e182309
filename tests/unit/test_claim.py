"""Claims: read back as they were written, or nothing; and whose mount is certain to be over."""

import itertools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from support.claims import HERE, claim

from quorumfs.decisions.claim import (
    Claim,
    ClaimState,
    FoundClaim,
    Tenure,
    claim_state,
    decode_claim,
    encode_claim,
    in_the_way,
)
from quorumfs.decisions.sidecar import PAGE
from quorumfs.replica import claimant
from quorumfs.replica.claimant import claim_of_this_mount, runs

u64 = st.integers(0, (1 << 64) - 1)
words = st.text(st.characters(exclude_categories=("C", "Z")), max_size=64)
claims = st.builds(
    Claim, u64, words, words, words, u64, u64, words, words, st.tuples(u64, u64), st.booleans()
)


# The page


@given(claims)
def test_a_claim_is_read_as_it_was_written(one: Claim) -> None:
    page = encode_claim(one)
    assert len(page) == PAGE
    assert decode_claim(page) == one


def test_a_claim_lies_in_one_sector() -> None:
    """Then no half of it is ever there, and none is overlooked for that."""
    most = claim_of_this_mount()
    most = replace(most, mount=2**64 - 1, pid=2**22, started=2**50, host="ä" * 32)
    most = replace(most, file=(2**32, 2**64 - 1))
    assert len(encode_claim(most).rstrip(b"\0")) <= 512


@given(claims, st.integers(0, 8 * PAGE - 1))
def test_one_bit_makes_it_claim_nothing_or_the_same(one: Claim, bit: int) -> None:
    page = bytearray(encode_claim(one))
    page[bit // 8] ^= 1 << bit % 8
    assert decode_claim(bytes(page)) in (None, one)


@given(st.binary(max_size=PAGE))
def test_what_is_no_claim_claims_nothing(page: bytes) -> None:
    assert decode_claim(page) is None


def test_the_text_of_earlier_versions_claims_nothing() -> None:
    assert decode_claim(b"pid 7 on nas1".ljust(PAGE, b"\0")) is None


def _forged(body: bytes) -> bytes:
    text = b"quorumfs claim 1\n" + body
    return text + b"\n" + xxhash.xxh3_128_hexdigest(text).encode() + b"\n"


WHOLE = {
    name: getattr(claim(), name) for name in Claim.__slots__ if name not in ("mount", "file")
} | {"mount": "00000000000000ff", "file": [1, 2]}


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "7"},
        {"pid": True},
        {"pid": -1},
        {"pid": 10**400},
        {"pid": 1.0},
        {"host": "\x1b[2J"},
        {"host": "x" * 1000},
        {"host": None},
        {"mount": 5},
        {"mount": "-1"},
        {"mount": "g"},
        {"file": [1]},
        {"file": [1, 2, 3]},
        {"file": 7},
        {"file": [1, "2"]},
        {"released": 0},
        {"released": "no"},
    ],
    ids=str,
)
def test_a_forged_claim_claims_nothing(change: dict[str, object]) -> None:
    assert decode_claim(_forged(json.dumps(WHOLE).encode())) == replace(
        claim(), mount=255, file=(1, 2)
    )
    assert decode_claim(_forged(json.dumps(WHOLE | change).encode())) is None


@pytest.mark.parametrize("body", [b"[]", b"7", b"[" * 4000, b"{}", b"\xff", b"null", b"{"])
def test_what_is_no_object_claims_nothing(body: bytes) -> None:
    assert decode_claim(_forged(body)) is None


# Whose mount is over


def _never(pid: int, started: int) -> bool:
    raise AssertionError("its number means nothing here")


def _says(running: bool) -> Callable[[int, int], bool]:
    return lambda *_: running


def test_the_whole_table() -> None:
    """Every combination of what may be the same, and what is known of the process."""
    for machine, boot, host, namespace, file, running, released in itertools.product(
        ("m1", "m2", ""), ("b1", "b2", ""), ("here", "other"), ("n1", "n2", ""), *[(0, 1)] * 3
    ):
        one = claim(
            machine=machine,
            boot=boot,
            host=host,
            namespace=namespace,
            file=(8, file),
            released=bool(released),
        )
        ours = boot == "b1" and namespace == "n1"
        found = claim_state(one, HERE, _says(bool(running)) if ours else _never, locked=(8, 1))
        if released:
            assert found is ClaimState.RELEASED
        elif ours:
            assert found is (ClaimState.RUNNING if running else ClaimState.ENDED)
        elif boot == "b1":
            assert found is (ClaimState.ENDED if file else ClaimState.HIDDEN)
        elif boot and machine == "m1" and host == "here":
            assert found is ClaimState.ENDED  # before the last restart
        else:
            assert found is ClaimState.ELSEWHERE


def test_who_does_not_know_itself_takes_over_from_nobody() -> None:
    """Two hosts without ids must not take each other for themselves."""
    nameless = replace(HERE, machine="", boot="", namespace="")
    assert claim_state(replace(nameless, mount=2), nameless, _never) is ClaimState.ELSEWHERE
    assert claim_state(claim(host="here"), nameless, _never) is ClaimState.ELSEWHERE
    no_namespace = replace(HERE, namespace="")
    assert claim_state(replace(no_namespace, mount=2), no_namespace, _never) is ClaimState.HIDDEN


def test_a_mount_that_released_anywhere_is_over() -> None:
    """The replica where it did not was away when it was unmounted."""
    left = FoundClaim("b", claim(), ClaimState.ELSEWHERE)
    assert in_the_way([left]) == [left]
    assert not in_the_way([left, FoundClaim("a", claim(released=True), ClaimState.RELEASED)])
    other = FoundClaim("a", claim(mount=3, released=True), ClaimState.RELEASED)
    assert in_the_way([other, left]) == [left]
    assert not in_the_way([left], over=[2])


@pytest.mark.parametrize("kind", [k for k in ClaimState if not k.over])
def test_a_refusal_names_who_and_what_to_do(kind: ClaimState) -> None:
    text = FoundClaim("/a.img", claim(), kind).in_words("mount with -o takeover")
    assert "/a.img is in use by pid 4711 on nas1 since 2026-01-02 00:00:00 UTC: " in text
    assert text.endswith("mount with -o takeover")


def test_whose_claim_means_that_the_set_is_lost() -> None:
    tenure = Tenure(HERE, frozenset({3}))
    assert not tenure.lost_to(None)
    assert not tenure.lost_to(HERE)
    assert not tenure.lost_to(claim(mount=3))  # it was there before
    assert tenure.lost_to(claim())
    assert tenure.lost_to(claim().release())  # it changed what is not known here
    assert Tenure(None).lost_to(HERE)


# This host


def test_this_process_is_there() -> None:
    mine = claim_of_this_mount()
    assert mine.pid == os.getpid()
    assert claim_state(replace(mine, mount=2), mine, runs) is ClaimState.RUNNING
    assert claim_of_this_mount().mount != mine.mount


def test_a_number_given_to_another_process_is_not_taken_for_the_same() -> None:
    mine = claim_of_this_mount()
    assert not runs(mine.pid, mine.started - 1)


def test_a_process_that_ended_is_gone_also_before_anybody_asked_how() -> None:
    process = subprocess.Popen(["sleep", "60"])
    started = claimant._started(process.pid)
    assert started is not None
    assert runs(process.pid, started)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not runs(process.pid, started)
    process.wait()
    assert not runs(process.pid, started)


def test_a_killed_process_with_a_thread_that_hangs_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may write yet."""
    stat = b"7 (a) b) Z 1 7 7 0 -1 4 0 0 0 0 0 0 0 0 20 0 %d 0 500 0"
    for threads, there in ((1, False), (2, True)):
        shown = stat % threads
        monkeypatch.setattr(Path, "read_bytes", lambda _, shown=shown: shown)
        assert runs(os.getpid(), 500) is there


def test_a_process_that_is_hidden_is_taken_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may be mounted with hidepid, and the process be another user's."""

    def hidden(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", hidden)
    assert runs(os.getpid(), 1)


def test_the_machine_id_itself_is_told_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that there is counts; without any the machine has none."""
    first, second = tmp_path / "machine-id", tmp_path / "uuid"
    monkeypatch.setattr(claimant, "_MACHINE_IDS", (str(first), str(second)))
    assert claimant._machine() == ""
    second.write_text("AB-CD\n")
    one = claimant._machine()
    assert len(one) == 32
    first.write_text("uninitialized\n")
    assert claimant._machine() == one
    first.write_text("0123456789abcdef0123456789abcdef\n")
    other = claimant._machine()
    assert other not in (one, "0123456789abcdef0123456789abcdef")
