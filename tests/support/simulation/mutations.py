"""Rules of order that are not kept: each switches one off, in one small piece of the real runtime.

A simulation that is worth something notices. `MUTATIONS` is what ``--mutations`` of the command
tries random histories on; ``tests/unit/test_mutations.py`` tells each a story that must show it.
"""

import errno
import time
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from quorumfs.decisions import assembly, returned, sidecar, voting
from quorumfs.decisions.assembly import _Assembly
from quorumfs.decisions.dirtymap import INTENT
from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.record import Phase, Record
from quorumfs.decisions.survey import Survey
from quorumfs.decisions.voting import Outvoted
from quorumfs.disk import earlyvote
from quorumfs.disk.disk import Disk
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.rangelock import RangeClaim, RangeLock
from quorumfs.fastpath.publish import Publisher
from quorumfs.live.actions import Action
from quorumfs.live.grow import Growth
from quorumfs.live.membership import Membership
from quorumfs.metadata import sidecars as sidecars_module
from quorumfs.metadata.claims import Claims
from quorumfs.metadata.enrolment import Enrolment
from quorumfs.metadata.joining import Joining
from quorumfs.metadata.ledger import content as content_module
from quorumfs.metadata.ledger.chunks import Chunks
from quorumfs.metadata.ledger.commit import Order, Records
from quorumfs.metadata.ledger.knowledge import Outcome, Writable
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.ledger.target import Target
from quorumfs.metadata.recorder import Recorder
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.metadata.writer import SidecarWriter
from quorumfs.repair import inspection
from quorumfs.repair import repairs as repairs_module
from quorumfs.repair import settle as settle_module
from quorumfs.repair import work as work_module
from quorumfs.repair.copying import Copying
from quorumfs.repair.inspection import Inspection, Judgement
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.scrub import Scrub
from quorumfs.repair.verify import Verification
from quorumfs.replica import inflight as inflight_module
from quorumfs.replica import replica as replica_module
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.inflight import InFlight
from quorumfs.replica.lastwrites import LastWrite
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation, Value
from support.simulation.media import Content
from support.simulation.storage import DaemonKilledError, SimulatedStorage

Patch = Callable[[pytest.MonkeyPatch], None]
"""Switches a rule off until the patches are undone."""


def _always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def no_intent(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: no write needs a mark, only a set that is in use."""

    def in_use(self: Ledger, offset: int, length: int, **_: object) -> bool:
        assert offset + length <= self.map.size
        return self.in_use and self.membership.recorded

    monkeypatch.setattr(Ledger, "prepared", in_use)


def intent_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: a mark counts as soon as it is made."""

    async def forget(self: Recorder) -> None:
        self.ledger.recorded.written(self.ledger.recorded.begin_write())

    monkeypatch.setattr(Recorder, "write_map_locked", forget)


def map_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: a mark counts as soon as it is written, and before it is durable."""
    _leave_out_syncs(monkeypatch, of_map=True)


def slots_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: a record counts as soon as it is written, and before it is durable."""
    _leave_out_syncs(monkeypatch, of_map=False)


def _leave_out_syncs(monkeypatch: pytest.MonkeyPatch, *, of_map: bool) -> None:
    """What is written to sidecars is not synced: pages of the map, or slots."""
    put, submit = SidecarWriter.put, Replica.submit
    unsynced = False

    async def noted(
        self: SidecarWriter, replicas: Sequence[Replica], pieces: Any, **others: Any
    ) -> dict[Replica, OSError]:
        nonlocal unsynced
        unsynced = isinstance(pieces, tuple) is of_map
        return await put(self, replicas, pieces, **others)

    def without_syncs(
        self: Replica, operation: Operation, fan_out: FanOut, *, to_sidecar: bool = False
    ) -> None:
        if to_sidecar and operation.kind is Kind.SYNC and unsynced:
            fan_out.answered(operation)
        else:
            submit(self, operation, fan_out, to_sidecar=to_sidecar)

    monkeypatch.setattr(SidecarWriter, "put", noted)
    monkeypatch.setattr(Replica, "submit", without_syncs)


def not_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """R14: who has the set is written down, and nobody looks."""

    async def trust(self: Claims, _: Sequence[Replica]) -> None:
        assert self.tenure.mine is not None

    monkeypatch.setattr(Claims, "look", trust)


def fenced_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """R14: a mount that was taken over from says so, and goes on."""
    monkeypatch.setattr(Replica, "fence", _always(None))
    monkeypatch.setattr(Claims, "require_ours", _always(None))
    fence = Claims._fence

    def only_say(self: Claims, claim: Any) -> None:
        ledger, membership = self._ledger, self._ledger.membership
        fence(self, claim)
        ledger.membership, ledger.content.members = membership, membership.members
        ledger.epochs.follow(membership.receivers)

    monkeypatch.setattr(Claims, "_fence", only_say)


def one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: success below the threshold."""
    finish = Sidecars.finish

    async def lenient(
        self: Sidecars, outcomes: Sequence[Outcome], offset: int, length: int
    ) -> None:
        try:
            await finish(self, outcomes, offset, length)
        except OSError:
            if all(outcome.error for outcome in outcomes):
                raise

    monkeypatch.setattr(Sidecars, "finish", lenient)


def failed_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: who took a write that failed and who did not are still taken for equal."""
    monkeypatch.setattr(Chunks, "diverge", _always(None))


def all_are_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: whoever fails is ejected, whatever the others say; but for the last one."""
    finish = Sidecars.finish

    async def blame(self: Sidecars, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        failed = [outcome.replica for outcome in outcomes if outcome.operation.error]
        self.recorder.eject_in_memory(failed[1:], "blamed")
        await finish(self, outcomes, offset, length)

    monkeypatch.setattr(Sidecars, "finish", blame)


def ejected_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: the guest hears of success before it is on record who missed the write."""

    async def only_in_memory(
        self: Recorder, failed: Sequence[Replica], chunks: range, reason: str
    ) -> None:
        self.eject_in_memory(
            [replica for replica in failed if replica.standing is Standing.CURRENT], reason
        )

    monkeypatch.setattr(Recorder, "eject", only_in_memory)


def ejected_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: the record is on its way when the guest hears of success."""
    eject = Recorder.eject

    async def start(self: Recorder, *arguments: Any) -> None:
        async def quietly() -> None:
            with suppress(OSError, DaemonKilledError):
                await eject(self, *arguments)

        trio.lowlevel.spawn_system_task(quietly)

    monkeypatch.setattr(Recorder, "eject", start)


def failed_flush_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who could not flush stays current."""

    async def ignore(self: Sidecars, _: Sequence[Outcome]) -> None:
        self.ledger.chunks.end_flush()

    monkeypatch.setattr(Sidecars, "finish_flush", ignore)
    _nothing_early(monkeypatch)


def _nothing_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a sync failed counts when all have answered; a second line, which hides the first."""

    async def not_yet(self: Sidecars) -> None:
        pass

    monkeypatch.setattr(Sidecars, "record_losses", not_yet)
    monkeypatch.setattr(Ledger, "sync_ended", _always(None))


def lost_by_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who held a chunk last and may have lost a part of it is believed no more than others."""
    losers = content_module.Content.losers

    def all_lack_it(
        self: content_module.Content, losses: Mapping[Replica, RangeSet], chunks: range
    ) -> Iterator[tuple[range, list[Replica], list[Replica]]]:
        for part, lacking, last in losers(self, losses, chunks):
            yield part, [*lacking, *last], []

    monkeypatch.setattr(content_module.Content, "losers", all_lack_it)
    written_beside_a_loss(monkeypatch)  # a second line, which hides the first


def away_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who could not be asked has lost as much as who said that it did."""
    monkeypatch.setattr(sidecars_module, "is_away", _always(False))


def cut_off_flush_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: a sync that failed in a flush that was cut off counts for no later one."""

    def failed(_: Chunks, outcomes: Iterable[Outcome]) -> list[Replica]:
        return [replica for replica, operation in outcomes if operation.error is not None]

    monkeypatch.setattr(Chunks, "failed", failed)


def gone_is_lost_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who is opened anew has lost again what a failed sync has told of."""

    def find_out(content: content_module.Content) -> set[Replica]:
        return set()

    none = property(find_out, lambda *_: None)
    monkeypatch.setattr(content_module.Content, "gone", none, raising=False)


def repaired_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: what was made good is shown before the sidecars say so."""

    async def later(*_: object) -> None:
        pass

    monkeypatch.setattr(settle_module.Settling, "_remember", later)


def written_beside_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: what one lost, and others hold, is not given to it before more is written beside it."""
    monkeypatch.setattr(Ledger, "lossy", _always(value=False))


def resync_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: a resync leaves out what reads the same, if only in the page cache."""
    copy = Copying._copy

    async def comparing(
        self: Copying,
        source: Replica,
        offset: int,
        end: int,
        *,
        compare: bool,
        by_vote: bool = True,
    ) -> None:
        await copy(self, source, offset, end, compare=True, by_vote=by_vote)

    async def cached(_: Copying) -> None:
        pass

    monkeypatch.setattr(Copying, "_copy", comparing)
    monkeypatch.setattr(Copying, "forget_cached", cached)


def failed_flush_lost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who could not flush is ejected, but lacks nothing for that."""
    monkeypatch.setattr(Target, "lacks_unsynced", _always(None))
    log_is_believed(monkeypatch)  # a second line, which hides the first
    _nothing_early(monkeypatch)


def all_were_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who fails a sync lost also what a repair gave to others alone."""

    @contextmanager
    def to_all(self: Ledger, _: object, offset: int, length: int) -> Iterator[None]:
        self.epochs.latest.add(self.map.chunks(offset, length))
        yield
        self.epochs.latest.add(self.map.chunks(offset, length))

    monkeypatch.setattr(Ledger, "giving", to_all)
    lost_by_all_alike(monkeypatch)  # a second line, which hides the first


def given_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who holds something durably is given it anew, and may fail to sync that."""
    monkeypatch.setattr(Chunks, "durable_on", _always(value=False))
    lost_by_all_alike(monkeypatch)  # a second line, which hides the first


def loss_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: what those lost that cannot be ejected is forgotten with the daemon."""
    monkeypatch.setattr(Chunks, "_recall_losses", _always(None))


def options_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: what a mount was told is on record when something else is."""

    async def later(self: Sidecars) -> None:
        pass

    monkeypatch.setattr(Sidecars, "record_options", later)


def cleared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: a mark goes when its write is acknowledged."""
    finish = Sidecars.finish

    async def eager(self: Sidecars, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        await finish(self, outcomes, offset, length)
        known = self.ledger.map
        extents = known.extents(offset, length)
        self.ledger.recorded.remove(INTENT, known.extent_chunks(extents))
        await self.recorder.write_map()

    monkeypatch.setattr(Sidecars, "finish", eager)


def cleared_without_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: a mark goes after a while, synced or not."""

    async def hasty(self: Repairs) -> None:
        while not self._work.stopping:
            await self._work.sleep(repairs_module.CLEAR_S)
            with suppress(OSError):
                await self._sidecars.clear_marks(self._mirror.locks.claimed)

    monkeypatch.setattr(Repairs, "_clear_marks", hasty)


def cleared_while_one_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: a mark goes although not all replicas are current."""

    def in_use(self: Ledger) -> bool:
        return self.in_use and self.membership.recorded

    monkeypatch.setattr(Ledger, "all_current", in_use)


def nothing_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: overlapping writes are not serialised."""
    monkeypatch.setattr(RangeClaim, "conflicts", _always(value=False))


def reads_conflict_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: a vote may overlap a write."""
    conflicts = RangeClaim.conflicts

    def between_writes(self: RangeClaim, other: RangeClaim) -> bool:
        return self.exclusive and other.exclusive and conflicts(self, other)

    monkeypatch.setattr(RangeClaim, "conflicts", between_writes)


def repairs_do_not_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: a repair reads, and then writes, beside the guest."""

    @asynccontextmanager
    async def unlocked(*_: object, **__: object) -> AsyncGenerator[None, None]:
        yield

    monkeypatch.setattr(RangeLock, "held", unlocked)


def given_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: a request that was given up is taken for one that never was."""
    abandon_overdue = Replica.abandon_overdue

    def forget(self: Replica, now: float) -> None:
        abandon_overdue(self, now)
        self._in_flight.abandoned.clear()

    monkeypatch.setattr(Replica, "abandon_overdue", forget)


def opened_under_its_own_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: a file that is being closed is nothing to wait for."""

    def in_flight(self: Replica) -> int:
        closing = sum(operation in self._closing.under_way for operation in self._in_flight.waiting)
        return len(self._in_flight) - closing

    monkeypatch.setattr(Replica, "in_flight", property(in_flight))


def sidecar_closed_after_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing is not per file: after an error of the image's the sidecar stays open."""
    go_on = Replica._go_on_closing

    def give_up(self: Replica, returned: Operation, value: Value, error: OSError | None) -> None:
        if error is not None and returned in self._closing.under_way:
            self._in_flight.waiting.clear()
            for storage, _ in self._closing.under_way.values():
                assert isinstance(storage, SimulatedStorage)
                storage._in_flight.clear()  # the sidecar's close never happens
        go_on(self, returned, value, error)

    monkeypatch.setattr(Replica, "_go_on_closing", give_up)


def target_is_not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: a chunk is called held as soon as it was written."""

    async def skip(self: Joining, target: Target, changing: Iterable[tuple[int, int]]) -> int:
        ledger = self._ledger
        epoch = ledger.epochs.begin_sync([target.replica], ledger.chunks_of(changing))
        ledger.epochs.cover([target.replica], epoch)
        return target.synced(epoch)

    monkeypatch.setattr(Joining, "sync_target", skip)


def target_gets_no_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: what the guest writes during a resync goes to the current replicas alone."""
    arrange = Ledger.arrange

    def without_target(self: Ledger) -> None:
        arrange(self)
        self.membership = replace(self.membership, receivers=self.membership.members)

    monkeypatch.setattr(Ledger, "arrange", without_target)


def joins_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: a replica becomes current before what guests wrote to it meanwhile is durable."""
    join, submit = Joining.join, Replica.submit
    joining: Replica | None = None

    async def noted(self: Joining) -> None:
        nonlocal joining
        joining = self._ledger.resyncing
        try:
            await join(self)
        finally:
            joining = None

    def without_sync(
        self: Replica, operation: Operation, fan_out: FanOut, *, to_sidecar: bool = False
    ) -> None:
        if self is joining and operation.kind is Kind.SYNC and not to_sidecar:
            fan_out.answered(operation)
        else:
            submit(self, operation, fan_out, to_sidecar=to_sidecar)

    monkeypatch.setattr(Joining, "join", noted)
    monkeypatch.setattr(Replica, "submit", without_sync)


def mounts_have_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """R14: generations alone say whose data descends from whose."""

    def unknown(self: Record, *_: object, **__: object) -> Record:
        return self

    monkeypatch.setattr(Record, "entered", unknown)
    monkeypatch.setattr(Records, "entered", True)


def opening_is_changing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R14: who only had a set in use is taken for one that changed it."""
    entered = Record.entered

    def changed(self: Record, *arguments: Any, **others: Any) -> Record:
        return entered(self, *arguments, **others | {"changed": True})

    monkeypatch.setattr(Record, "entered", changed)


def unreadable_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: a torn page of the map says that nothing differs."""
    monkeypatch.setattr(sidecar, "UNKNOWN", 0)


def committed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: one phase, over the only slot that says what is valid."""
    write_slots = SidecarWriter.write_slots

    async def one_phase(
        self: SidecarWriter, replicas: Sequence[Replica], record: Record, phase: Phase, *rest: Any
    ) -> dict[Replica, OSError]:
        if phase is Phase.PREPARED:
            return {}
        return await write_slots(self, replicas, record, phase, *rest)

    monkeypatch.setattr(SidecarWriter, "write_slots", one_phase)


def short_is_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: what is behind the end of a truncated image reads as zeros."""
    write = Content.write

    def extending(self: Content, start: int, data: bytes) -> None:
        if start + len(data) > self.size:
            self.resize(start + len(data))
        write(self, start, data)

    monkeypatch.setattr(SimulatedStorage, "_truncated", _always(value=False))
    monkeypatch.setattr(Content, "write", extending)


def truncated_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: an image that was too short for a while is only as stale as its marks say."""

    async def forget(self: Sidecars, replica: Replica) -> None:
        pass

    monkeypatch.setattr(Sidecars, "truncated", forget)
    log_is_believed(monkeypatch)  # a second line, which hides the first


def absent_ones_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: whoever is there is mounted, whatever the others may hold."""

    def guess(self: _Assembly, *_: object, **__: object) -> tuple[str, int]:
        return "", self._threshold

    monkeypatch.setattr(_Assembly, "_absence_rule", guess)


def shown_before_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: what may differ is read from its source, and only later given to the others."""
    monkeypatch.setattr(Ledger, "may_differ", _always(value=False))


def latest_by_mtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """R12: the image that was written to last, by its time, is the one that knows best."""
    latest = Survey._latest

    def by_mtime(self: Survey) -> Record:
        latest(self)  # a split brain is still refused
        usable = [one for one in self.found if one.path in self.present]
        newest = max(usable, key=lambda one: one.image.mtime_ns if one.image else 0)
        return self.present[newest.path].record

    monkeypatch.setattr(Survey, "_latest", by_mtime)


def timeouts_by_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """R12: who takes too long is told by the time of day."""
    abandon_overdue = Replica.abandon_overdue

    def by_wall_clock(self: Replica, _: float) -> None:
        abandon_overdue(self, time.time())

    clock = SimpleNamespace(**{**vars(trio), "current_time": time.time})
    for module in (replica_module, inflight_module):
        monkeypatch.setattr(module, "trio", clock)
    monkeypatch.setattr(Replica, "abandon_overdue", by_wall_clock)


def one_sync_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: a flush succeeds when anybody has synced."""
    finish_flush = Sidecars.finish_flush

    async def lenient(self: Sidecars, outcomes: Sequence[Outcome]) -> None:
        if all(outcome.error for outcome in outcomes):
            await finish_flush(self, outcomes)

    monkeypatch.setattr(Sidecars, "finish_flush", lenient)
    _nothing_early(monkeypatch)


def any_sync_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: a flush that waited for a failed one counts, though its sync found what was lost gone."""
    sync = Mirror.sync

    async def credulous(self: Mirror) -> bool:
        await sync(self)
        return True

    monkeypatch.setattr(Mirror, "sync", credulous)


def laggards_count_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: who has not written what the threshold has stays current when that is acknowledged."""

    async def not_waiting(self: FanOut, _: object) -> None:
        self._satisfied = True
        if not self.enough:
            await self._wait()
        self._satisfied = False

    monkeypatch.setattr(FanOut, "_leave_behind", not_waiting)


def source_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: after a crash all get what the first replica holds, whatever a majority does."""

    def first(answers: Sequence[tuple[int, bytes]], *_: int) -> voting.DataVerdict:
        return voting.DataVerdict(answers[0][1])

    monkeypatch.setattr(settle_module, "reconcile", first)


def unreadable_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: what nobody can be read at keeps every flush from succeeding."""

    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(settle_module, "cannot_be_read", never)


def log_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """R15: what a replica took last it still has when it comes back."""
    monkeypatch.setattr(Target, "doubt_log", _always(None))


def any_image_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """R15: an image is the one that its sidecar speaks of, wherever that lies."""
    for module in (assembly, returned):
        monkeypatch.setattr(module, "image_unproven", _always(False))


def last_writes_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """R15: what a server took last it still has when it comes back."""
    monkeypatch.setattr(LastWrite, "is_held", _always(True))


def any_mount_vouches(monkeypatch: pytest.MonkeyPatch) -> None:
    """R15: as long as it lasts, a mount of FUSE shows the same image."""
    monkeypatch.setattr(Found, "exchangeable", False)


def loss_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """R13: who hears of a loss that nobody can make good keeps it from the guest."""
    monkeypatch.setattr(Ledger, "tell_loss", _always(False))


def flush_ejects_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: a flush succeeds before it is on record who could not sync."""
    eject, finish_flush = Recorder.eject, Sidecars.finish_flush
    flushing = ContextVar("flushing", default=False)

    async def noted(self: Sidecars, outcomes: Sequence[Outcome]) -> None:
        token = flushing.set(True)
        try:
            await finish_flush(self, outcomes)
        finally:
            flushing.reset(token)

    async def only_in_memory(
        self: Recorder, failed: Sequence[Replica], chunks: range, reason: str
    ) -> None:
        if not flushing.get():
            await eject(self, failed, chunks, reason)
            return
        gone = [replica for replica in failed if replica.standing is Standing.CURRENT]
        if len(self.ledger.members) - len(gone) < self.ledger.threshold:
            raise OSError(errno.EIO, "too few replicas would be left")
        self.eject_in_memory(gone, reason)

    monkeypatch.setattr(Sidecars, "finish_flush", noted)
    monkeypatch.setattr(Recorder, "eject", only_in_memory)
    _nothing_early(monkeypatch)


def ties_are_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: whoever wins a vote, if only by being listed first, overwrites the others."""
    plurality = voting.plurality

    def strict(ballots: Iterable[Hashable]) -> voting.Plurality[Hashable]:
        return replace(plurality(ballots), strict=True)

    monkeypatch.setattr(voting, "plurality", strict)


def verified_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: images are compared beside the guest's writes."""
    _without_locks(monkeypatch, Verification, "_verify_unit")


def scrubbed_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: a scrub compares replicas beside the guest's writes."""
    _without_locks(monkeypatch, Scrub, "_go_on")


def _without_locks(monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    """The method *name* of *kind*, and all it calls and starts, claims no range."""
    held, method = RangeLock.held, getattr(kind, name)
    unlocked = ContextVar("unlocked", default=False)

    async def noted(*arguments: Any) -> None:
        token = unlocked.set(True)
        try:
            await method(*arguments)
        finally:
            unlocked.reset(token)

    @asynccontextmanager
    async def unless_noted(
        self: RangeLock, start: int, end: int, *, exclusive: bool
    ) -> AsyncGenerator[None, None]:
        if unlocked.get():
            yield
            return
        async with held(self, start, end, exclusive=exclusive):
            yield

    monkeypatch.setattr(kind, name, noted)
    monkeypatch.setattr(RangeLock, "held", unless_noted)


def scrubbed_while_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: a scrub compares what other repairs have still to make equal."""
    monkeypatch.setattr(Inspection, "comparable", lambda _, *place: iter([place]))


def scrub_believes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: a scrub repairs from the version that was read first, however many hold it."""

    def judged(
        ballots: Mapping[Replica, bytes], unread: Sequence[Replica], _: int
    ) -> tuple[Judgement, bytes | None]:
        first = next(iter(ballots.values()), None)
        wrong = tuple(replica for replica, ballot in ballots.items() if ballot != first)
        return Judgement(wrong, tuple(unread)), first

    monkeypatch.setattr(inspection, "judge", judged)


def holes_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: a resync writes zeros where its source has a hole."""

    async def zeros(self: Copying, offset: int, end: int) -> None:
        length = end - offset
        await self._tell(Operation(Kind.WRITE, offset, length, bytes(length)))

    monkeypatch.setattr(Copying, "_make_hole", zeros)


def always_minted(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: with somebody ejected every commit is a new generation."""
    composed = Records.composed

    def minted(self: Records, members: Sequence[Replica], **kinds: Any) -> Record:
        record = composed(self, members, **kinds)
        return record.minted() if len(members) < len(record.roles) else record

    monkeypatch.setattr(Records, "composed", minted)


def saved_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: how far a resync is gets durable when it has copied much, however long that takes."""
    monkeypatch.setattr(work_module, "SAVE_S", 1e9)


def short_copy_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: what could not be read of the source counts as copied."""
    take_over = Copying._take_over

    async def credulous(self: Copying, offset: int, length: int) -> int:
        return length if await take_over(self, offset, length) >= 0 else 0

    monkeypatch.setattr(Copying, "_take_over", credulous)


def gate_looks_at_no_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: the fast path writes to chunks whatever is known of them."""
    writable = Ledger.writable

    def anywhere(self: Ledger) -> Writable | None:
        found = writable(self)
        return None if found is None else found._replace(mask=0, wanted=0)

    monkeypatch.setattr(Ledger, "writable", anywhere)


def gate_ignores_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: the fast path writes to the members alone, whatever the target was given."""
    writable = Ledger.writable

    def careless(self: Ledger) -> Writable | None:
        found, target = writable(self), self.target
        if found is None or target is None:
            return found
        mask, wanted = found.mask & ~target.bit, found.wanted & ~target.bit
        return found._replace(receivers=self.members, mask=mask, wanted=wanted, kept_out=())

    monkeypatch.setattr(Ledger, "writable", careless)


def gate_ignores_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: the fast path serves requests beside others of the same place."""
    monkeypatch.setattr(Publisher, "_locked", lambda _: [])


def journal_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: nobody hears of what the fast path wrote, and a failed sync loses nothing of it."""
    monkeypatch.setattr(Ledger, "wrote", _always(None))
    log_is_believed(monkeypatch)  # a second line, which hides the first


def taken_without_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: a write that is taken over from the fast path locks nothing."""
    release = RangeLock.release

    def unlocked(self: RangeLock, start: int, end: int) -> RangeClaim:
        return RangeClaim(start, end, True)

    def if_locked(self: RangeLock, claim: RangeClaim) -> None:
        if claim in self.claims:
            release(self, claim)

    monkeypatch.setattr(RangeLock, "adopt", unlocked)
    monkeypatch.setattr(RangeLock, "release", if_locked)


def taken_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: a write of the fast path that was given up is taken for one that never was."""
    abandon = InFlight.abandon

    def forget(self: InFlight, operation: Operation) -> Any:
        waiting = abandon(self, operation)
        if operation in self.elsewhere:
            self.elsewhere.discard(operation)
            self.abandoned.discard(operation)
        return waiting

    monkeypatch.setattr(InFlight, "abandon", forget)


class _Instead:
    """A mirror that syncs in another way."""

    def __init__(self, mirror: Mirror, sync: Callable[[], Awaitable[None]]) -> None:
        self._mirror = mirror
        self.sync = sync

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mirror, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("_mirror", "sync"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._mirror, name, value)


def _syncing_by(
    monkeypatch: pytest.MonkeyPatch,
    verbs: type[Membership] | type[Growth],
    sync: Callable[[Disk], Awaitable[None]],
) -> None:
    """The *verbs* have the replicas of a disk sync by calling *sync* with it."""
    init = verbs.__init__

    def patched(self: Any, disk: Disk, *arguments: Any) -> None:
        init(self, disk, *arguments)
        self._mirror = _Instead(disk.mirror, partial(sync, disk))

    monkeypatch.setattr(verbs, "__init__", patched)


async def _never(_: Disk) -> None:
    await trio.lowlevel.checkpoint()


def leaves_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: a replica leaves, and what the guest wrote to it may not be durable."""
    _syncing_by(monkeypatch, Membership, _never)


def leaves_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: a replica leaves amid the guest's writes."""

    @asynccontextmanager
    async def unlocked(_: Disk) -> AsyncGenerator[None, None]:
        await trio.lowlevel.checkpoint()
        yield

    monkeypatch.setattr(Disk, "held", unlocked)


def told_to_the_administrator(monkeypatch: pytest.MonkeyPatch) -> None:
    """R13: an order that hears of a loss counts as the flush that tells of it."""
    _syncing_by(monkeypatch, Membership, Disk.flush)


def ordered_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: what an administrator orders counts before it is on record."""

    async def note(self: Enrolment, slot: int, order: Order) -> None:
        self._ledger.records.orders[slot] = order
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Enrolment, "_record_locked", note)


def threshold_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: another threshold is in force, and not on record."""

    async def note(self: Sidecars, threshold: int) -> None:
        self.ledger.records.threshold = threshold
        self.ledger.arrange()
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Sidecars, "change_threshold", note)


def threshold_lowered_by_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: as many as the new threshold put it on record; others know the old one alone."""
    change = Sidecars.change_threshold

    async def alone(self: Sidecars, threshold: int) -> None:
        self.ledger.records.quorum = self.ledger.records.threshold = threshold
        await change(self, threshold)

    monkeypatch.setattr(Sidecars, "change_threshold", alone)


def late_answers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: an answer that comes after its vote's decision is a mismatch, whatever was written."""

    async def tell(self: Disk, offset: int, length: int) -> None:
        await trio.lowlevel.checkpoint()
        self.mirror.report_outvoted([Outvoted(0, 0, length, strict=True)], offset)

    monkeypatch.setattr(Disk, "_compare", tell)


def first_answer_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """P9: a vote is over with the first answer."""
    monkeypatch.setattr(earlyvote, "unassailable", lambda count, *_: count > 0)


def recorded_before_it_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: the record says that the disk has grown, and no image has yet."""

    async def later(
        self: Growth, replicas: Sequence[Replica], size: int, _: Action
    ) -> list[Replica]:
        assert size > self._disk.size
        await trio.lowlevel.checkpoint()
        return list(replicas)

    monkeypatch.setattr(Growth, "_lengthen", later)


def longer_and_not_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: the record says that the disk has grown, and a power cut may make images shorter."""
    _syncing_by(monkeypatch, Growth, _never)


MUTATIONS: dict[str, Patch] = {
    "R1 no intent": no_intent,
    "R1 intent in memory": intent_in_memory,
    "R1 intent not synced": map_unsynced,
    "R1 gate looks at no bits": gate_looks_at_no_bits,
    "R2 one is enough": one_is_enough,
    "R2 failed is settled": failed_is_settled,
    "R2 all are blamed": all_are_blamed,
    "R3 in memory": ejected_in_memory,
    "R3 not awaited": ejected_later,
    "R3 not synced": slots_unsynced,
    "R3 always minted": always_minted,
    "R3 options in memory": options_in_memory,
    "R3 ordered in memory": ordered_in_memory,
    "R3 threshold in memory": threshold_in_memory,
    "R3 threshold lowered by few": threshold_lowered_by_few,
    "R4 failure ignored": failed_flush_is_ignored,
    "R4 compares": resync_compares,
    "R4 nothing lost": failed_flush_lost_nothing,
    "R4 loss in memory": loss_in_memory,
    "R4 all were given it": all_were_given_it,
    "R4 lost by the last": lost_by_all_alike,
    "R4 away is lost": away_is_lost,
    "R4 cut off": cut_off_flush_is_forgotten,
    "R4 gone twice": gone_is_lost_twice,
    "R4 repaired in memory": repaired_in_memory,
    "R4 written beside a loss": written_beside_a_loss,
    "R4 given for nothing": given_for_nothing,
    "R4 journal forgotten": journal_is_forgotten,
    "R5 cleared at once": cleared_at_once,
    "R5 no flush": cleared_without_flush,
    "R5 one is out": cleared_while_one_is_out,
    "R6 nothing conflicts": nothing_conflicts,
    "R6 votes": reads_conflict_with_nothing,
    "R6 repairs": repairs_do_not_lock,
    "R6 gate ignores locks": gate_ignores_locks,
    "R6 taken without a lock": taken_without_a_lock,
    "R7 forgotten": given_up_is_forgotten,
    "R7 opened while open": opened_under_its_own_close,
    "R7 closed together": sidecar_closed_after_the_image,
    "R7 taken is forgotten": taken_is_forgotten,
    "R8 not synced": target_is_not_synced,
    "R8 joins unsynced": joins_unsynced,
    "R8 no writes": target_gets_no_writes,
    "R8 holes are written": holes_are_written,
    "R8 gate ignores the target": gate_ignores_the_target,
    "R9 torn is clean": unreadable_is_clean,
    "R9 in place": committed_in_place,
    "R10 zeros": short_is_zeros,
    "R10 short copy": short_copy_is_whole,
    "R14 no identity": mounts_have_no_identity,
    "R14 opened is changed": opening_is_changing,
    "P3 saved rarely": saved_rarely,
    "P3 leaves unsynced": leaves_unsynced,
    "P3 leaves unlocked": leaves_unlocked,
    "R10 forgotten": truncated_lacks_nothing,
    "R10 recorded before it is longer": recorded_before_it_is_longer,
    "R10 longer, and not durable": longer_and_not_durable,
    "R12 latest by mtime": latest_by_mtime,
    "R12 wall clock": timeouts_by_wall_clock,
    "P9 source decides": source_decides,
    "P9 first answer decides": first_answer_decides,
    "P2 bad sector": unreadable_is_undecided,
    "R15 log believed": log_is_believed,
    "R15 all proven": any_image_is_proven,
    "R15 last writes believed": last_writes_are_believed,
    "R15 a mount vouches": any_mount_vouches,
    "R13 not told": loss_is_not_told,
    "R13 told to the administrator": told_to_the_administrator,
    "R14 not read back": not_read_back,
    "R14 goes on": fenced_goes_on,
    "P2 one sync is enough": one_sync_is_enough,
    "P1 laggards count as done": laggards_count_as_done,
    "P2 any sync is believed": any_sync_is_believed,
    "P2 record in memory": flush_ejects_in_memory,
    "P4 ties are repaired": ties_are_repaired,
    "P4 scrub believes the first": scrub_believes_the_first,
    "P5 every request waits": given_up_is_forgotten,
    "P6 guessed": absent_ones_are_ignored,
    "P7 shown before settled": shown_before_settled,
    "P8 verified unlocked": verified_unlocked,
    "P8 late answers told": late_answers_are_told,
    "P8 scrubbed unlocked": scrubbed_unlocked,
    "P8 scrubbed while settled": scrubbed_while_settled,
}
"""By the rule or promise, and what becomes of it."""
