"""When ``replica-io=auto`` goes past the page cache, and what is refused."""

import itertools

import pytest

from quorumfs.decisions.replicaio import ASKED, FAST_US, Medium, Store, Way, way_of

TIMES = (None, 80.0, FAST_US, FAST_US + 1, 8000.0)
STORES = list(itertools.product(Medium, TIMES))


@pytest.mark.parametrize(
    ("medium", "read_us", "way"),
    [
        (Medium.MEMORY, 1.0, Way.BUFFERED),
        (Medium.ELSEWHERE, None, Way.DIRECT),
        (Medium.ELSEWHERE, 200_000.0, Way.DIRECT),
        (Medium.STEADY, 80.0, Way.DIRECT),
        (Medium.STEADY, None, Way.DIRECT),
        (Medium.STEADY, 3000.0, Way.BUFFERED),
        (Medium.ROTATING, None, Way.BUFFERED),
        (Medium.ROTATING, 8000.0, Way.BUFFERED),
        (Medium.ROTATING, 80.0, Way.DIRECT),
        (Medium.UNKNOWN, None, Way.BUFFERED),
        (Medium.UNKNOWN, 80.0, Way.DIRECT),
    ],
)
def test_auto_goes_by_the_store_and_by_what_was_measured(
    medium: Medium, read_us: float | None, way: Way
) -> None:
    assert way_of("auto", Store(medium, takes_direct=True, read_us=read_us)) is way


@pytest.mark.parametrize(("medium", "read_us"), STORES)
def test_auto_is_never_refused(medium: Medium, read_us: float | None) -> None:
    assert way_of("auto", Store(medium, takes_direct=False, read_us=read_us)) is Way.BUFFERED


@pytest.mark.parametrize(("medium", "read_us"), STORES)
def test_who_asks_for_one_way_gets_it_or_nothing(medium: Medium, read_us: float | None) -> None:
    for takes_direct in (True, False):
        store = Store(medium, takes_direct, read_us)
        assert way_of("buffered", store) is Way.BUFFERED
        assert way_of("direct", store) is (Way.DIRECT if takes_direct else None)


def test_each_way_can_be_asked_for() -> None:
    assert {way.value for way in Way} | {"auto"} == set(ASKED)
