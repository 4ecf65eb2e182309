"""The simulation's own parts: each fault does what it says, and the oracle misses nothing."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.closing import close
from support.simulation.harness import run_seeded
from support.simulation.media import BLOCK, SECTOR, Content, SimulatedFile, sector_pieces
from support.simulation.oracle import Oracle, ViolationError, Wrong
from support.simulation.storage import (
    STORM,
    Agenda,
    DaemonKilledError,
    Effect,
    Fault,
    SimulatedStorage,
    Weather,
)
from support.simulation.world import Life, World

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import INTENT, DirtyMap
from quorumfs.decisions.record import Identity, Sidecar
from quorumfs.decisions.sidecar import PAGE
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.storage import FileStatus, Kind, Operation, TruncatedError, Value

SIZE = 1 << 18
OLD, NEW, NEWER = b"o" * BLOCK, b"n" * BLOCK, b"w" * BLOCK


def write(file: SimulatedFile, start: int, data: bytes) -> None:
    file.change(Kind.WRITE, start, start + len(data), data)


def sync(file: SimulatedFile) -> None:
    file.end_sync(file.begin_sync())


def file_of(content: bytes = OLD * 4, size: int = SIZE) -> SimulatedFile:
    return SimulatedFile("file", size, content=content)


def after_power_cuts(make: Callable[[], SimulatedFile], count: int = 200) -> Iterator[bytes]:
    """The first block of a file, each time after another power cut."""
    for seed in range(count):
        file = make()
        file.power_cut(random.Random(seed))
        assert file.cache.differing_blocks(file.durable) == []
        yield file.cache.read(0, BLOCK)


def mixture(block: bytes) -> str:
    """The first byte of each sector, every one of which must be whole."""
    sectors = [block[at : at + SECTOR] for at in range(0, BLOCK, SECTOR)]
    assert all(len(set(sector)) == 1 for sector in sectors)
    return "".join(chr(sector[0]) for sector in sectors)


# Content


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "punch", "allocate", "resize"]),
            st.integers(0, 5 * BLOCK),
            st.integers(0, 3 * BLOCK),
        ),
        max_size=12,
    )
)
def test_content_is_what_a_plain_array_of_bytes_would_be(steps: list[tuple[str, int, int]]) -> None:
    content, model = Content(4 * BLOCK + 100), bytearray(4 * BLOCK + 100)
    for number, (kind, start, length) in enumerate(steps):
        end = min(start + length, content.size)
        if kind == "resize":
            content.resize(start)
            model = bytearray(model[:start].ljust(start, b"\0"))
        elif start < end:
            data = bytes([number + 1]) * (end - start)
            match kind:
                case "write":
                    content.write(start, data)
                    model[start:end] = data
                case "punch":
                    content.punch(start, end)
                    model[start:end] = bytes(end - start)
                case "allocate":
                    content.allocate(start, end)
        twin = content.copy()
        assert twin.read(0, twin.size) == content.read(0, content.size) == model
        assert twin.differing_blocks(content) == []
        offset, rebuilt = 0, b""
        while offset < content.size:
            data_at = content.seek(offset, data=True)
            hole_at = content.seek(data_at, data=False)
            rebuilt += bytes(data_at - offset) + content.read(data_at, hole_at)
            offset = hole_at
        assert rebuilt == model  # nothing but zeros in holes


def test_a_hole_is_no_difference_and_takes_no_space() -> None:
    one, two = Content(SIZE), Content(SIZE)
    one.write(0, bytes(BLOCK))
    assert one.differing_blocks(two) == []
    assert (one.allocated, two.allocated) == (BLOCK, 0)
    one.punch(100, BLOCK)
    assert one.allocated == BLOCK
    one.punch(0, BLOCK)
    assert one.allocated == 0


@pytest.mark.parametrize("seed", range(50))
def test_torn_pieces_are_whole_sectors_and_never_all(seed: int) -> None:
    pieces = sector_pieces(random.Random(seed), 100, 100 + 3 * BLOCK)
    assert sum(high - low for low, high in pieces) < 3 * BLOCK
    for low, high in pieces:
        assert low == 100 or low % SECTOR == 0
        assert high == 100 + 3 * BLOCK or high % SECTOR == 0


# The page cache and the medium


def test_an_unsynced_write_survives_is_lost_or_is_torn_between_sectors() -> None:
    def make() -> SimulatedFile:
        file = file_of()
        write(file, 0, NEW)
        assert file.cache.read(0, BLOCK) == NEW
        return file

    seen = {mixture(block) for block in after_power_cuts(make)}
    assert {"oooooooo", "nnnnnnnn"} < seen
    assert len(seen) > 10


def test_two_unsynced_writes_come_out_in_any_order_and_mixture() -> None:
    def make() -> SimulatedFile:
        file = file_of()
        write(file, 0, NEW)
        write(file, 0, NEWER)
        return file

    seen = {mixture(block) for block in after_power_cuts(make, 500)}
    assert {"oooooooo", "nnnnnnnn", "wwwwwwww"} < seen
    assert any(set(block) == set("onw") for block in seen)


def test_unsynced_writes_to_different_places_survive_independently() -> None:
    outcomes = set()
    for seed in range(100):
        file = file_of()
        write(file, 0, NEW)
        write(file, BLOCK, NEW)
        file.power_cut(random.Random(seed))
        outcomes.add((file.cache.read(0, 1), file.cache.read(BLOCK, BLOCK + 1)))
    assert outcomes == {(b"o", b"o"), (b"n", b"o"), (b"o", b"n"), (b"n", b"n")}


def test_small_writes_to_one_sector_never_mix_with_what_came_later() -> None:
    """The cache writes whole sectors: the second write brings the first with it."""

    def make() -> SimulatedFile:
        file = file_of()
        write(file, 0, b"1")
        write(file, 1, b"2")
        return file

    assert {block[:2] for block in after_power_cuts(make)} == {b"oo", b"1o", b"12"}


def test_a_sync_makes_durable_what_was_written_before_it_began_and_nothing_later() -> None:
    def make() -> SimulatedFile:
        file = file_of()
        write(file, 0, NEW)
        began = file.begin_sync()
        write(file, BLOCK, NEW)
        file.end_sync(began)
        assert len(file.unsynced) == 1
        return file

    assert {mixture(block) for block in after_power_cuts(make)} == {"nnnnnnnn"}
    later = set()
    for seed in range(50):
        file = make()
        file.power_cut(random.Random(seed))
        later.add(file.cache.read(BLOCK, BLOCK + 1))
    assert later == {b"o", b"n"}


def test_a_failed_sync_drops_pages_that_a_reader_still_sees_and_a_later_sync_does_not_save() -> (
    None
):
    file = file_of()
    write(file, 0, NEW)
    file.fail_sync(file.begin_sync())
    assert file.cache.read(0, BLOCK) == NEW
    sync(file)
    assert file.cache.read(0, BLOCK) == NEW
    file.power_cut(random.Random(0))
    assert file.cache.read(0, BLOCK) == OLD


def test_dropped_pages_come_back_old_when_memory_is_short() -> None:
    file = file_of()
    write(file, 0, NEW)
    write(file, 5 * BLOCK, NEW)
    file.fail_sync(file.begin_sync())
    write(file, BLOCK, NEW)
    file.evict()
    assert file.cache.read(0, 2 * BLOCK) == OLD + NEW
    assert not file.cache.is_data(5)
    sync(file)
    assert file.durable.read(0, 2 * BLOCK) == OLD + NEW


def test_what_is_written_again_after_a_failed_sync_can_be_synced() -> None:
    file = file_of()
    write(file, 0, NEW)
    file.fail_sync(file.begin_sync())
    write(file, 0, NEWER)
    sync(file)
    file.evict()
    file.power_cut(random.Random(0))
    assert file.cache.read(0, BLOCK) == NEWER


def test_a_failed_sync_may_have_written_some_pages() -> None:
    seen = set()
    for seed in range(100):
        file = file_of()
        write(file, 0, NEW)
        file.fail_sync(file.begin_sync(), random.Random(seed))
        seen.add(mixture(file.durable.read(0, BLOCK)))
    assert {"oooooooo", "nnnnnnnn"} < seen


def test_a_discard_is_a_hole_at_once_and_durable_with_a_sync() -> None:
    def make() -> SimulatedFile:
        file = file_of()
        file.change(Kind.DISCARD, 0, BLOCK)
        assert not file.cache.is_data(0)
        assert file.durable.is_data(0)
        return file

    assert {b"o", b"\0"} == {block[:1] for block in after_power_cuts(make)}
    file = make()
    sync(file)
    assert not file.durable.is_data(0)
    file.change(Kind.ZERO, BLOCK, 2 * BLOCK)
    sync(file)
    assert file.durable.is_data(1)
    assert file.durable.read(BLOCK, 2 * BLOCK) == bytes(BLOCK)


def test_a_full_file_system_takes_what_fits_and_overwrites_for_ever() -> None:
    file = file_of(OLD)
    file.space = 2 * BLOCK
    with pytest.raises(OSError, match="no space") as info:
        write(file, 0, NEW * 3)
    assert info.value.errno == errno.ENOSPC
    assert file.cache.read(0, 3 * BLOCK) == NEW * 2 + bytes(BLOCK)
    write(file, 0, NEWER * 2)
    with pytest.raises(OSError, match="no space"):
        file.allocate(0, 3 * BLOCK)
    file.change(Kind.DISCARD, 0, BLOCK)
    write(file, 2 * BLOCK, NEW)


def test_times_tell_of_a_change_and_may_go_back_with_the_power() -> None:
    """fdatasync does not write them; an umount does."""
    file = file_of()
    identities = [file.identity]
    write(file, 0, NEW)
    sync(file)
    identities.append(file.identity)
    assert len(set(identities)) == 2
    seen = set()
    for seed in range(20):
        file = file_of()
        write(file, 0, NEW)
        sync(file)
        file.power_cut(random.Random(seed))
        seen.add(file.identity)
    assert seen == set(identities)
    file = file_of()
    write(file, 0, NEW)
    file.settle()
    file.power_cut(random.Random(0))
    assert file.identity == identities[1]


def test_what_others_do_to_the_file() -> None:
    file = file_of()
    backup, before = file.backup(), file.identity
    write(file, 0, NEW)
    file.truncate(2 * BLOCK)
    assert file.size == 2 * BLOCK
    file.truncate(SIZE)
    assert file.cache.read(0, 3 * BLOCK) == NEW + OLD + bytes(BLOCK)
    now = file.identity
    file.rot(0, b"x")
    assert (file.cache.read(0, 2), file.identity) == (b"xn", now)
    file.edit(0, b"y")
    assert file.identity != now
    file.restore(backup)
    assert file.whole[: 4 * BLOCK] == OLD * 4
    assert file.identity.inode != before.inode


def test_a_truncation_takes_what_was_unsynced_behind_the_end_with_it() -> None:
    for seed in range(20):
        file = file_of()
        write(file, BLOCK, NEW * 2)
        file.change(Kind.DISCARD, BLOCK, 4 * BLOCK)
        file.fail_sync(file.begin_sync())
        write(file, BLOCK, NEW * 2)
        file.truncate(BLOCK + 1000)
        file.evict()
        file.power_cut(random.Random(seed))
        assert len(file.whole) == BLOCK + 1000


# Storage


class Bench:
    """One storage, and what it answered."""

    def __init__(self, nursery: trio.Nursery, size: int = SIZE, seed: int = 0) -> None:
        self.file = file_of(size=size)
        self.agenda = Agenda()
        self.answers: list[tuple[float, Operation, Value, int]] = []
        self.storage = SimulatedStorage(self.file, self.agenda, dice=random.Random(seed))
        nursery.start_soon(self.agenda.run)

    def submit(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> Operation:
        operation = Operation(kind, offset, length or len(data), data)
        self.storage.submit(operation, self._done)
        return operation

    async def do(
        self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b""
    ) -> tuple[Value, int]:
        """Submit and wait: the value and the errno."""
        operation = self.submit(kind, offset, length, data)
        while True:
            for _, answered, value, error in self.answers:
                if answered is operation:
                    return value, error
            await trio.sleep(0.001)

    @property
    def kinds(self) -> list[Kind]:
        return [operation.kind for _, operation, _, _ in self.answers]

    def _done(self, operation: Operation, value: Value, error: OSError | None) -> None:
        number = error.errno if error else 0
        assert number is not None
        self.answers.append((trio.current_time(), operation, value, number))


def seeded(body: Callable[[trio.Nursery], object]) -> None:
    """Run *body* in a nursery that ends with it, on simulated time."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await body(nursery)  # type: ignore[misc]
            nursery.cancel_scope.cancel()

    run_seeded(0, main)


def test_each_operation_gives_what_the_real_file_gives(tmp_path: Path) -> None:
    """The same operations on a real file: the same values and errors."""
    size = 16 * BLOCK
    path = tmp_path / "image"
    path.write_bytes(bytes(4 * BLOCK))
    os.truncate(path, size)
    steps: list[tuple[Kind, int, int, bytes]] = [
        (Kind.WRITE, 4 * BLOCK, BLOCK, NEW),
        (Kind.WRITE, 6 * BLOCK + 100, 1000, NEW[:1000]),
        (Kind.READ, 0, size, b""),
        (Kind.DISCARD, 4 * BLOCK, 2 * BLOCK, b""),
        (Kind.ZERO, 6 * BLOCK, 2 * BLOCK, b""),
        (Kind.ALLOCATE, 8 * BLOCK, BLOCK, b""),
        (Kind.READ, 3 * BLOCK, 5 * BLOCK, b""),
        (Kind.SYNC, 0, 0, b""),
        *(
            (kind, n * BLOCK, 0, b"")
            for kind in (Kind.SEEK_DATA, Kind.SEEK_HOLE)
            for n in range(16)
        ),
        (Kind.STAT, 0, 0, b""),
    ]
    truncated: list[tuple[Kind, int, int, bytes]] = [
        (Kind.READ, 0, BLOCK, b""),
        (Kind.READ, 4 * BLOCK, BLOCK, b""),
        (Kind.READ, 9 * BLOCK, BLOCK, b""),
        (Kind.WRITE, 0, BLOCK, NEW),
        (Kind.DISCARD, 0, BLOCK, b""),
        (Kind.SEEK_DATA, 0, 0, b""),
        (Kind.SYNC, 0, 0, b""),
    ]

    async def real() -> list[tuple[object, object]]:
        storage = FileStorage(os.open(path, os.O_RDWR), size, "real")
        answers = [await ask(storage, *step) for step in steps]
        os.truncate(path, 4 * BLOCK)
        answers += [await ask(storage, *step) for step in truncated]
        await close(storage)
        return answers

    async def simulated() -> list[tuple[object, object]]:
        file = SimulatedFile("file", size, content=bytes(4 * BLOCK))
        agenda = Agenda()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agenda.run)
            storage = SimulatedStorage(file, agenda, dice=random.Random(0))
            answers = [await ask(storage, *step) for step in steps]
            file.truncate(4 * BLOCK)
            answers += [await ask(storage, *step) for step in truncated]
            nursery.cancel_scope.cancel()
        return answers

    async def ask(
        storage: FileStorage | SimulatedStorage, kind: Kind, offset: int, length: int, data: bytes
    ) -> tuple[object, object]:
        answered = trio.Event()
        answers: list[tuple[Value, OSError | None]] = []

        def done(_: Operation, value: Value, error: OSError | None) -> None:
            answers.append((value, error))
            answered.set()

        storage.submit(Operation(kind, offset, length, data), done)
        await answered.wait()
        value, error = answers[0]
        if isinstance(value, FileStatus):
            value = value.blocks
        return value, (type(error), error.errno) if error else None

    expected = trio.run(real)
    assert run_seeded(0, simulated) == expected
    assert (0, (TruncatedError, errno.EIO)) in expected


def test_operations_finish_when_due_and_at_one_time_in_the_order_of_asking() -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        delays = {Kind.WRITE: 5.0, Kind.READ: 2.0, Kind.STAT: 2.0, Kind.SYNC: 1.0}
        bench.storage.faults.script = lambda operation: Fault(delays[operation.kind])
        for kind in (Kind.WRITE, Kind.READ, Kind.STAT):
            bench.submit(kind, 0, BLOCK, NEW if kind is Kind.WRITE else b"")
        await trio.sleep(1)
        bench.submit(Kind.SYNC)
        await trio.sleep(10)
        assert bench.kinds == [Kind.READ, Kind.STAT, Kind.SYNC, Kind.WRITE]
        assert [at for at, *_ in bench.answers] == [2, 2, 2, 5]
        assert bench.answers[0][2] == OLD  # the write came later

    seeded(body)


def test_a_sync_does_not_cover_a_write_that_returned_after_it_began() -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        bench.storage.faults.plan(Kind.SYNC, Fault(5.0))
        bench.storage.faults.plan(Kind.WRITE, Fault(1.0))
        bench.submit(Kind.SYNC)
        bench.submit(Kind.WRITE, 0, data=NEW)
        await trio.sleep(6)
        assert bench.kinds == [Kind.WRITE, Kind.SYNC]
        assert bench.file.durable.read(0, BLOCK) == OLD
        await bench.do(Kind.SYNC)
        assert bench.file.durable.read(0, BLOCK) == NEW

    seeded(body)


def test_a_hung_write_really_happens_when_it_is_released() -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        bench.storage.faults.plan(Kind.WRITE, Fault(hang=True))
        bench.submit(Kind.WRITE, 0, data=NEW)
        await trio.sleep(1000)
        assert bench.answers == []
        await bench.do(Kind.WRITE, 0, data=NEWER)
        bench.storage.release()
        await trio.sleep(1)
        assert bench.file.cache.read(0, BLOCK) == NEW  # over the later one
        assert bench.storage.in_flight == 0

    seeded(body)


@pytest.mark.parametrize("effect", Effect)
def test_a_failed_write_may_have_happened_all_the_same(effect: Effect) -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        bench.storage.faults.plan(Kind.WRITE, Fault(error=errno.EIO, effect=effect))
        assert await bench.do(Kind.WRITE, 0, data=NEW) == (0, errno.EIO)
        found = set(mixture(bench.file.cache.read(0, BLOCK)))
        assert found == {Effect.ALL: {"n"}, Effect.PART: {"n", "o"}, Effect.NONE: {"o"}}[effect]

    seeded(body)


def test_a_lying_sync_a_lost_write_and_a_refusal() -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        bench.storage.faults.plan(Kind.SYNC, Fault(effect=Effect.NONE))
        bench.storage.faults.plan(Kind.WRITE, Fault(), Fault(effect=Effect.NONE))
        assert await bench.do(Kind.WRITE, 0, data=NEW) == (0, 0)
        assert await bench.do(Kind.SYNC) == (0, 0)
        assert bench.file.durable.read(0, BLOCK) == OLD
        assert await bench.do(Kind.WRITE, 0, data=NEWER) == (0, 0)
        assert bench.file.cache.read(0, BLOCK) == NEW
        bench.storage.faults.plan(Kind.READ, Fault(error=errno.EAGAIN, at_once=True))
        bench.submit(Kind.READ, 0, BLOCK)
        assert bench.answers[-1][3] == errno.EAGAIN

    seeded(body)


def test_a_sync_that_fails_does_so_once_and_drops_the_pages() -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        bench.storage.faults.plan(Kind.SYNC, Fault(error=errno.EIO))
        await bench.do(Kind.WRITE, 0, data=NEW)
        assert await bench.do(Kind.SYNC) == (0, errno.EIO)
        assert await bench.do(Kind.SYNC) == (0, 0)
        assert await bench.do(Kind.READ, 0, BLOCK) == (NEW, 0)
        bench.file.power_cut(random.Random(0))
        assert await bench.do(Kind.READ, 0, BLOCK) == (OLD, 0)

    seeded(body)


def test_a_close_is_the_last_operation_and_closes_even_with_an_error() -> None:
    async def body(nursery: trio.Nursery) -> None:
        bench = Bench(nursery)
        bench.submit(Kind.WRITE, 0, data=NEW)
        with pytest.raises(AssertionError, match="may still happen"):
            bench.submit(Kind.CLOSE)
        await trio.sleep(1)
        bench.storage.faults.plan(Kind.CLOSE, Fault(error=errno.EAGAIN, at_once=True))
        assert await bench.do(Kind.CLOSE) == (0, errno.EAGAIN)
        states = [bench.storage.closed]
        bench.storage.faults.plan(Kind.CLOSE, Fault(error=errno.EIO))
        assert await bench.do(Kind.CLOSE) == (0, errno.EIO)
        assert [*states, bench.storage.closed] == [False, True]
        with pytest.raises(AssertionError, match="after close"):
            bench.submit(Kind.SYNC)

    seeded(body)


def test_a_storm_has_every_kind_of_weather() -> None:
    dice = random.Random(0)
    weather = Weather(slow=0.1, late=0.1, hang=0.1, fail=0.1, sync_fail=0.1, refuse=0.1)
    kinds = [Kind.WRITE, Kind.READ, Kind.SYNC, Kind.STAT]
    faults = [
        (kind, weather.fault(dice, Operation(kind, 0, BLOCK, NEW)))
        for _ in range(500)
        for kind in kinds
    ]
    for kind, fault in faults:
        if kind is Kind.STAT:
            assert fault.error in {0, errno.EAGAIN}
        if kind in {Kind.READ, Kind.SYNC}:
            assert fault.error in {0, errno.EAGAIN, errno.EIO}
    assert {fault.error for kind, fault in faults if kind is Kind.WRITE} >= {
        errno.EIO,
        errno.ENOSPC,
    }
    assert {fault.what_happens for kind, fault in faults if fault.error} == set(Effect)
    assert any(fault.hang for _, fault in faults)
    assert any(fault.delay_s > 8 for _, fault in faults)
    assert any(0.05 < fault.delay_s <= 2 for _, fault in faults)
    assert any(fault.at_once for _, fault in faults)


# The world


async def operate(
    storage: SimulatedStorage, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b""
) -> Value:
    """One operation, as a daemon without replicas would do it; raises its error."""
    answered = trio.Event()
    answers: list[tuple[Value, OSError | None]] = []

    def done(_: Operation, value: Value, error: OSError | None) -> None:
        answers.append((value, error))
        answered.set()

    storage.submit(Operation(kind, offset, length or len(data), data), done)
    await answered.wait()
    value, error = answers[0]
    if error:
        raise error
    return value


async def fails_with(number: int, storage: SimulatedStorage, kind: Kind, data: bytes = b"") -> None:
    with pytest.raises(OSError) as info:  # noqa: PT011
        await operate(storage, kind, 0, BLOCK, data)
    assert info.value.errno == number


def test_a_kill_leaves_what_was_answered_and_decides_about_the_rest() -> None:
    seen = set()
    for seed in range(40):
        world = World(seed, 1, SIZE)

        async def main(world: World = world) -> None:
            async with world.boot() as life:
                image = life.image(0)
                await operate(image, Kind.WRITE, BLOCK, data=OLD)
                image.faults.plan(Kind.WRITE, Fault(hang=True))
                life.nursery.start_soon(partial(operate, image, Kind.WRITE, 0, data=NEW))
                await trio.sleep(1)
                world.kill()
                with pytest.raises(DaemonKilledError):
                    image.submit(Operation(Kind.SYNC), lambda *_: None)
                await trio.sleep(1)
                pytest.fail("it lives on")

        run_seeded(seed, main)
        assert world.life is None
        assert world.contents()[0].read(BLOCK, 2 * BLOCK) == OLD
        seen.add(mixture(world.contents()[0].read(0, BLOCK)))
    assert {"\0" * 8, "n" * 8} < seen


def test_a_power_cut_takes_what_was_answered_and_not_flushed() -> None:
    seen = set()
    for seed in range(40):
        world = World(seed, 2, SIZE)

        async def main(world: World = world) -> None:
            async with world.boot() as life:
                images = [life.image(0), life.image(1)]
                for image in images:
                    await operate(image, Kind.WRITE, BLOCK, data=OLD)
                    await operate(image, Kind.SYNC)
                    await operate(image, Kind.WRITE, 0, data=NEW)
                world.power_cut()

        run_seeded(seed, main)
        one, two = world.contents()
        assert one.read(BLOCK, 2 * BLOCK) == two.read(BLOCK, 2 * BLOCK) == OLD
        seen.add((one.read(0, 1), two.read(0, 1)))
    assert len(seen) == 4  # each replica on its own


@pytest.mark.parametrize("power", [False, True])
def test_a_crash_at_each_step_ends_that_life_there(power: bool) -> None:
    def run(step: int) -> tuple[int, list[str]]:
        world = World(3, 2, SIZE)
        steps = 0

        async def main() -> None:
            nonlocal steps
            async with world.boot() as life:
                life.crash_at(step, power=power)
                try:
                    for index in (0, 1):
                        await operate(life.image(index), Kind.WRITE, 0, data=NEW)
                        await operate(life.image(index), Kind.SYNC)
                finally:
                    steps = life.steps

        run_seeded(3, main)
        return steps, world.trace

    whole, _ = run(0)
    assert whole == 8  # four operations, each asked for and done
    for step in range(1, whole + 1):
        steps, trace = run(step)
        assert steps == step
        assert any(f"crash at step {step}" in line for line in trace)
        assert run(step)[1] == trace


def test_a_replica_that_breaks_off_fails_until_it_is_opened_again() -> None:
    async def main() -> None:
        world = World(0, 2, SIZE)
        async with world.boot() as life:
            image = life.image(0)
            image.faults.plan(Kind.READ, Fault(hang=True))
            life.nursery.start_soon(fails_with, errno.ENOTCONN, image, Kind.READ)
            await trio.sleep(1)
            world.detach(0)
            assert world.found()[0].image is None
            await fails_with(errno.ENOTCONN, image, Kind.WRITE, NEW)
            with pytest.raises(FileNotFoundError):
                life.image(0)
            await operate(life.image(1), Kind.WRITE, 0, data=NEW)
            world.attach(0)
            await fails_with(errno.ENOTCONN, image, Kind.READ)
            assert await operate(life.image(0), Kind.READ, 0, BLOCK) == bytes(BLOCK)

    run_seeded(0, main)


def test_a_replica_that_hangs_goes_on_when_it_is_back() -> None:
    async def main() -> None:
        world = World(0, 1, SIZE)
        async with world.boot() as life:
            image = life.image(0)
            image.faults.plan(Kind.WRITE, Fault(5.0))
            life.nursery.start_soon(partial(operate, image, Kind.WRITE, 0, data=OLD))
            await trio.sleep(1)
            world.detach(0, hang=True)
            life.nursery.start_soon(partial(operate, image, Kind.WRITE, 0, data=NEW))
            await trio.sleep(100)
            assert world.contents()[0].read(0, BLOCK) == bytes(BLOCK)
            world.attach(0)
            await trio.sleep(1)
            assert image.in_flight == 0
            assert world.contents()[0].read(0, BLOCK) == NEW

    run_seeded(0, main)


def test_a_medium_that_is_pulled_out_loses_its_cache_and_an_umount_does_not() -> None:
    kept = []
    for lose_cache in (False, True):
        for seed in range(20):
            world = World(seed, 1, SIZE)
            write(world.replicas[0].image, 0, NEW)
            world.detach(0, lose_cache=lose_cache)
            world.attach(0)
            kept.append(world.contents()[0].read(0, BLOCK) == NEW)
    assert all(kept[:20])
    assert not all(kept[20:])


def plain_sidecars(world: World) -> None:
    """Give every replica the sidecar that adopting them makes."""
    plan = assemble(world.found(), random_bytes=world.dice_for("sets").randbytes)
    for index, role in enumerate(plan.record.roles):
        world.create_sidecar(index, Sidecar(role.replica_id, plan.record, plan.map))


def test_assembly_works_on_what_the_world_finds() -> None:
    world = World(0, 3, SIZE)
    plain_sidecars(world)
    assert assemble(world.found()).rule.startswith("clean")
    world.detach(2)
    found = world.found([2, 0, 1])
    assert [one.path for one in found] == ["/c.img", "/a.img", "/b.img"]
    assert found[0].image is None
    assert assemble(found).rule.startswith("enough")
    world.attach(2)

    sidecar = world.replicas[0].sidecar
    assert sidecar
    sidecar.rot(0, b"broken")
    sidecar.rot(PAGE, b"broken")
    assert world.found()[0].sidecar is None
    assert "checksum" in (world.found()[0].problem or "")


def test_a_sidecar_is_written_as_any_file_is() -> None:
    async def main() -> None:
        world = World(0, 2, SIZE)
        async with world.boot() as life:
            with pytest.raises(FileNotFoundError):
                life.sidecar(0)
        plain_sidecars(world)
        async with world.boot() as life:
            storage = life.sidecar(0)
            await operate(storage, Kind.WRITE, 4 * PAGE, data=bytes([INTENT]) * PAGE)
        found = world.found()[0].sidecar
        assert found
        assert found.damage == ("1 of 1 map pages",)

    run_seeded(0, main)


def test_a_backup_is_another_file_with_the_old_content() -> None:
    world = World(0, 2, SIZE)
    plain_sidecars(world)
    backup, inode = world.backup(0), world.found()[0].image
    write(world.replicas[0].image, 0, NEW)
    sidecar = world.replicas[0].sidecar
    assert sidecar
    write(sidecar, 4 * PAGE, bytes([INTENT]))
    world.restore(0, backup, sidecar=False)
    assert world.contents()[0].read(0, BLOCK) == bytes(BLOCK)
    assert sidecar.cache.read(4 * PAGE, 4 * PAGE + 1) == bytes([INTENT])
    assert isinstance(inode, Identity)
    assert world.found()[0].image != inode
    world.restore(0, backup)
    found = world.found()[0].sidecar
    assert found
    assert len(found.map) == len(DirtyMap(SIZE, found.map.chunk_size))
    assert not found.damage


def test_an_error_in_a_life_is_not_swallowed() -> None:
    async def main() -> None:
        world = World(0, 1, SIZE)
        async with world.boot() as life:
            life.nursery.start_soon(partial(operate, life.image(0), Kind.READ, SIZE, BLOCK))
            await trio.sleep(1)

    with pytest.raises(ExceptionGroup) as info:
        run_seeded(0, main)
    assert isinstance(info.value.exceptions[0], TruncatedError)


# The oracle


class Guest:
    """A guest on a perfect disk that it may itself make wrong."""

    def __init__(self, *, reads_become_durable: bool = True) -> None:
        self.oracle = Oracle(SIZE, reads_become_durable=reads_become_durable)
        self.disk = bytearray(SIZE)

    def write(self, block: int = 0, blocks: int = 1, *, durably: bool = False) -> bytes:
        writing = self.oracle.begin_write(block * BLOCK, blocks * BLOCK, writer=1)
        self.put(block, writing.data)
        self.oracle.wrote(writing, durably=durably)
        return writing.data

    def write_fails(self, block: int = 0) -> bytes:
        writing = self.oracle.begin_write(block * BLOCK, BLOCK, writer=2)
        self.oracle.write_failed(writing)
        return writing.data

    def put(self, block: int, data: bytes) -> None:
        self.disk[block * BLOCK : block * BLOCK + len(data)] = data

    def read(self, block: int = 0, blocks: int = 1) -> None:
        reading = self.oracle.begin_read(block * BLOCK, blocks * BLOCK)
        self.oracle.read(reading, bytes(self.disk[block * BLOCK : (block + blocks) * BLOCK]))

    def flush(self) -> None:
        self.oracle.flushed(self.oracle.begin_flush())

    def wrong(self, block: int = 0) -> Wrong:
        """How the block is wrong; it must be."""
        with pytest.raises(ViolationError) as info:
            self.read(block)
        assert info.value.wrong.value in str(info.value)
        return info.value.wrong


def test_the_oracle_accepts_what_was_written() -> None:
    guest = Guest()
    guest.read(0, 8)
    guest.write(2, 3)
    guest.read(0, 8)
    assert guest.oracle.acknowledged == 1
    assert guest.oracle.checked == 2 * 8 * 8


def test_the_oracle_rejects_what_an_acknowledged_write_replaced() -> None:
    guest = Guest()
    old = guest.write()
    guest.write()
    guest.put(0, old)
    assert guest.wrong() is Wrong.STALE
    guest.put(0, bytes(BLOCK))
    assert guest.wrong() is Wrong.STALE


def test_the_oracle_rejects_one_stale_sector() -> None:
    guest = Guest()
    old = guest.write()
    guest.write()
    guest.put(0, old[:SECTOR])
    assert guest.wrong() is Wrong.STALE


def test_the_oracle_rejects_after_a_kill_what_was_acknowledged_before() -> None:
    guest = Guest()
    old = guest.write()
    guest.write()
    guest.oracle.killed()
    guest.read()
    guest.put(0, old)
    assert guest.wrong() is Wrong.STALE


def test_the_oracle_accepts_any_mixture_of_whole_sectors_of_writes_that_a_crash_cut_off() -> None:
    guest = Guest()
    old = guest.write()
    flying = [guest.oracle.begin_write(0, BLOCK, writer) for writer in (2, 3)]
    guest.oracle.killed()
    guest.put(0, old[:1024] + flying[0].data[1024:2048] + flying[1].data[2048:])
    guest.read()
    guest.read()
    guest.put(0, old)
    assert guest.wrong() is Wrong.TURNED_BACK


def test_the_oracle_rejects_a_sector_that_is_of_two_writes() -> None:
    guest = Guest()
    old = guest.write()
    flying = guest.oracle.begin_write(0, BLOCK, writer=2)
    guest.oracle.killed()
    guest.put(0, old[:100] + flying.data[100:])
    assert guest.wrong() is Wrong.GARBAGE


@pytest.mark.parametrize("seen_first", ["old", "new"])
def test_the_oracle_rejects_that_a_failed_write_appears_or_vanishes(seen_first: str) -> None:
    guest = Guest()
    values = {"old": guest.write(), "new": guest.write_fails()}
    for value in values.values():
        guest.put(0, value)
        if value is values[seen_first]:
            break
    guest.put(0, values[seen_first])
    guest.read()
    guest.oracle.killed()
    guest.read()
    guest.put(0, next(v for k, v in values.items() if k != seen_first))
    assert guest.wrong() is Wrong.TURNED_BACK


def test_the_oracle_rejects_a_failed_write_that_comes_after_a_later_one() -> None:
    """A zombie: a late write over an acknowledged one."""
    guest = Guest()
    zombie = guest.write_fails()
    guest.write()
    guest.read()
    guest.put(0, zombie)
    assert guest.wrong() is Wrong.STALE


def test_the_oracle_accepts_two_writes_under_way_together_in_either_order() -> None:
    for first in (0, 1):
        guest = Guest()
        both = [guest.oracle.begin_write(0, BLOCK, writer) for writer in (1, 2)]
        for writing in both:
            guest.oracle.wrote(writing)
        guest.put(0, both[first].data)
        guest.read()
        guest.put(0, both[1 - first].data)
        assert guest.wrong() is Wrong.TURNED_BACK


def test_the_oracle_accepts_old_and_new_during_a_write_but_not_old_after_new() -> None:
    guest = Guest()
    old = guest.write()
    writing = guest.oracle.begin_write(0, BLOCK, writer=2)
    guest.read()
    guest.put(0, writing.data)
    guest.read()
    guest.put(0, old)
    assert guest.wrong() is Wrong.TURNED_BACK


def test_the_oracle_accepts_what_was_there_at_any_time_during_a_read() -> None:
    for choice in range(3):
        guest = Guest()
        values = [guest.write()]
        reading = guest.oracle.begin_read(0, BLOCK)
        values += [guest.write(), guest.write()]
        guest.flush()
        for _ in range(50):
            guest.write(1)
        guest.oracle.read(reading, values[choice])
        guest.read()
        guest.put(0, values[0])
        assert guest.wrong() is Wrong.STALE


def test_a_read_under_way_keeps_what_it_may_see_however_much_is_written() -> None:
    guest = Guest()
    reading = guest.oracle.begin_read(0, BLOCK)
    early = guest.write(durably=True)
    for _ in range(100):
        guest.write(durably=True)
    guest.oracle.read(reading, early)


def test_the_oracle_rejects_two_reads_that_disagree_with_no_write_under_way() -> None:
    guest = Guest()
    old, new = guest.write(), guest.write_fails()
    readings = [guest.oracle.begin_read(0, BLOCK) for _ in range(2)]
    guest.oracle.read(readings[0], old)
    with pytest.raises(ViolationError) as info:
        guest.oracle.read(readings[1], new)
    assert info.value.wrong is Wrong.TURNED_BACK


def test_after_a_power_cut_anything_since_the_flush_may_be_there_and_nothing_older() -> None:
    guest = Guest()
    oldest, flushed = guest.write(), guest.write()
    guest.flush()
    later = [guest.write(), guest.write_fails(), guest.write()]
    guest.read()
    guest.oracle.power_cut()
    mixed = [flushed, *later]
    guest.put(0, b"".join(mixed[n % 4][n * SECTOR : (n + 1) * SECTOR] for n in range(8)))
    guest.read()
    guest.put(0, mixed[3])
    assert guest.wrong() is Wrong.TURNED_BACK
    guest.put(0, oldest)
    assert guest.wrong() is Wrong.LOST


def test_a_flush_covers_what_was_acknowledged_when_it_began() -> None:
    guest = Guest()
    old = guest.write()
    flushing = guest.oracle.begin_flush()
    guest.write(1)
    new = guest.write()
    guest.oracle.flushed(flushing)
    guest.oracle.power_cut()
    guest.put(0, old)
    guest.put(1, bytes(BLOCK))
    guest.read(0, 2)
    guest.put(0, new)
    assert guest.wrong() is Wrong.TURNED_BACK
    guest = Guest()
    guest.write()
    guest.oracle.begin_flush()  # and it fails
    guest.oracle.power_cut()
    guest.put(0, bytes(BLOCK))
    guest.read()


def test_a_durable_write_needs_no_flush() -> None:
    guest = Guest()
    guest.write(durably=True)
    guest.oracle.power_cut()
    guest.read()
    guest.put(0, bytes(BLOCK))
    assert guest.wrong() is Wrong.LOST


@pytest.mark.parametrize("reads_become_durable", [True, False])
def test_what_was_read_and_then_flushed_stays(reads_become_durable: bool) -> None:
    guest = Guest(reads_become_durable=reads_become_durable)
    guest.write()
    guest.flush()
    new = guest.write_fails()
    guest.read()
    guest.flush()
    guest.oracle.power_cut()
    guest.put(0, new)
    if reads_become_durable:
        assert guest.wrong() is Wrong.TURNED_BACK
    else:
        guest.read()


def test_forgotten_reads_may_turn_back_and_acknowledged_writes_may_not() -> None:
    guest = Guest()
    old = guest.write()
    guest.write()
    new = guest.write_fails()
    guest.read()
    guest.oracle.killed()
    guest.oracle.forget_reads()
    guest.put(0, new)
    guest.read()
    guest.put(0, old)
    assert guest.wrong() is Wrong.STALE


def test_zeros_are_a_version_like_any_other() -> None:
    guest = Guest()
    old = guest.write()
    writing = guest.oracle.begin_zeros(0, BLOCK, writer=1)
    guest.put(0, writing.data)
    guest.oracle.wrote(writing)
    guest.read()
    guest.put(0, old)
    assert guest.wrong() is Wrong.STALE
    guest.write()
    guest.put(0, bytes(BLOCK))
    assert guest.wrong() is Wrong.STALE


def test_the_oracle_knows_what_is_foreign() -> None:
    guest = Guest()
    here, there = guest.write(0), guest.write(1)
    guest.put(0, there)
    assert guest.wrong() is Wrong.MISPLACED
    guest.put(0, b"junk" * 1024)
    assert guest.wrong() is Wrong.GARBAGE
    guest.put(0, here[SECTOR:] + here[:SECTOR])
    assert guest.wrong() is Wrong.MISPLACED
    other = Guest()
    for _ in range(9):
        other.write(0)
    guest.put(0, other.write(0))
    assert guest.wrong() is Wrong.NEVER_WRITTEN
    with pytest.raises(ViolationError) as info:
        guest.oracle.read(guest.oracle.begin_read(0, BLOCK), here[:-1])
    assert info.value.wrong is Wrong.SHORT


def test_the_oracle_forgets_only_what_it_will_not_need() -> None:
    guest = Guest()
    old = [guest.write() for _ in range(100)]
    assert len(guest.oracle._sectors[0].candidates) == 101  # none of it was flushed
    guest.flush()
    guest.write()
    guest.write()
    assert len(guest.oracle._sectors[0].candidates) < 10
    guest.put(0, old[3])
    assert guest.wrong() is Wrong.STALE
    guest.oracle.power_cut()
    guest.put(0, old[-1])
    guest.read()


def test_the_oracle_wants_the_images_equal_and_right() -> None:
    guest = Guest()
    old, _ = guest.write(3), guest.write(3)
    images = [Content(SIZE), Content(SIZE)]
    for image in images:
        image.write(0, bytes(guest.disk))
    guest.oracle.check_images(images)
    changes: list[tuple[Callable[[], None], Wrong]] = [
        (lambda: images[1].write(3 * BLOCK, old), Wrong.DIFFERENT),
        (lambda: images[0].write(3 * BLOCK, old), Wrong.STALE),
        (lambda: images[1].resize(SIZE - 1), Wrong.SHORT),
    ]
    for change, wrong in changes:
        change()
        with pytest.raises(ViolationError) as info:
            guest.oracle.check_images(images, ["one", "two"])
        assert info.value.wrong is wrong


# All of it together: one file without quorumfs


async def live(world: World, oracle: Oracle, life: Life, dice: random.Random) -> None:
    """Guests on one file, which is read and written as it is, until the life ends."""
    image = life.image(0)

    async def guest(writer: int) -> None:
        while True:
            blocks = dice.randrange(1, 4)
            at = dice.randrange(0, 12 - blocks) * BLOCK
            length = blocks * BLOCK
            await trio.sleep(dice.uniform(0, 0.02))
            match dice.randrange(5):
                case 0 | 1:
                    writing = oracle.begin_write(at, length, writer)
                    try:
                        await operate(image, Kind.WRITE, at, data=writing.data)
                    except OSError:
                        oracle.write_failed(writing)
                    else:
                        oracle.wrote(writing)
                case 2:
                    writing = oracle.begin_zeros(at, length, writer)
                    kind = dice.choice([Kind.DISCARD, Kind.ZERO])
                    try:
                        await operate(image, kind, at, length)
                    except OSError:
                        oracle.write_failed(writing)
                    else:
                        oracle.wrote(writing)
                case 3:
                    reading = oracle.begin_read(at, length)
                    try:
                        data = await operate(image, Kind.READ, at, length)
                    except OSError:
                        oracle.read_failed(reading)
                    else:
                        assert isinstance(data, bytes)
                        oracle.read(reading, data)
                case _:
                    flushing = oracle.begin_flush()
                    with suppress(OSError):
                        await operate(image, Kind.SYNC)
                        oracle.flushed(flushing)

    for writer in range(3):
        life.nursery.start_soon(guest, writer)
    life.crash_at(dice.randrange(20, 400), power=dice.random() < 0.5)
    await trio.sleep_forever()


def simulate(seed: int, weather: Weather, lives: int = 8) -> tuple[World, Oracle]:
    """Lives, each ended by a crash, with everything read in between."""
    world, oracle = World(seed, 1, 12 * BLOCK), Oracle(12 * BLOCK)
    world.replicas[0].image_faults.weather = weather
    dice = world.dice_for("guests")

    async def main() -> None:
        cuts = 0
        for _ in range(lives):
            async with world.boot() as life:
                await live(world, oracle, life, dice)
            if world.power_cuts > cuts:
                oracle.power_cut()
            else:
                oracle.killed()
            cuts = world.power_cuts
            oracle.check_images(world.contents())

    run_seeded(seed, main)
    return world, oracle


HONEST = Weather(slow=0.05, late=0.002, hang=0.001, fail=0.02, refuse=0.001)


@pytest.mark.parametrize("seed", range(20))
def test_one_file_by_itself_breaks_no_promise_and_a_seed_gives_one_trace(seed: int) -> None:
    world, oracle = simulate(seed, HONEST)
    assert oracle.acknowledged > 20
    again, _ = simulate(seed, HONEST)
    assert again.trace == world.trace


def test_seeds_give_different_traces() -> None:
    assert simulate(1, HONEST)[0].trace != simulate(2, HONEST)[0].trace


def test_dropped_pages_are_found_out() -> None:
    """One file by itself cannot stand a sync that fails; that is what the others are for."""
    found = []
    for seed in range(20):
        try:
            simulate(seed, STORM)
        except* ViolationError as group:
            found += [e.wrong for e in group.exceptions if isinstance(e, ViolationError)]
    assert Wrong.LOST in found
