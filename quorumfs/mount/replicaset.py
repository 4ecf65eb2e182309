"""From paths to a disk: the replicas' files opened, assembled, and put under a `Disk`."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, Thread
from types import MappingProxyType

import trio

from quorumfs.decisions.assembly import AssemblyRefusedError, assemble, judge_returned
from quorumfs.decisions.claim import Claim, FoundClaim, Tenure, in_the_way
from quorumfs.decisions.growth import longer
from quorumfs.decisions.model import Found, Plan
from quorumfs.decisions.patterns import Blkverify, Fastest, Fifo, Quorum, ReadPattern
from quorumfs.decisions.record import Sidecar
from quorumfs.decisions.sidecar import file_size
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.errors import UserError
from quorumfs.metadata.protocol import Metadata
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.metadata.volatile import Volatile
from quorumfs.mount.limits import require_file_size
from quorumfs.options import MountOptions, write_mostly
from quorumfs.repair.rejoin import ForeignError, Returned
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.rewrite import Rewriting
from quorumfs.replica.answers import Answer
from quorumfs.replica.claimant import claim_of_this_mount
from quorumfs.replica.claiming import (
    MOUNT,
    claim_all,
    claim_in,
    found_claims,
    look_again,
    release_all,
    require_free,
    require_ours,
    wait_until_noticed,
)
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.filesystems import locality
from quorumfs.replica.images import Image, Unanswered, open_again, open_images, open_set
from quorumfs.replica.replica import Replica
from quorumfs.replica.sidecarfile import SidecarLockedError, create_sidecar, open_sidecar, sign
from quorumfs.replica.storage import Kind

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ReplicaSet:
    """The opened files of a disk's replicas, and what they are to each other."""

    opened: list[Image | Found]
    """One for each path given, in this order."""
    plan: Plan | None
    """None with ``metadata=none``."""
    tenure: Tenure = field(default_factory=lambda: Tenure(None))
    held: Sequence[FoundClaim] = ()
    """The claims of mounts that are taken over from, and may be at work."""
    directory: str | None = None
    """Where the sidecars of devices are."""

    @property
    def images(self) -> list[Image]:
        """What could be opened."""
        return [one for one in self.opened if isinstance(one, Image)]

    def take_into_use(self, options: MountOptions) -> None:
        """Write what is to be found beside the images while they are in use: the first sidecars
        of raw images, and who uses them. Raises `UserError`.

        Where somebody may still be at work this gives it the time to notice, and decides anew.
        """
        if self.plan is None:
            return
        if self.plan.adopted:
            assert self.tenure.mine is not None
            self.opened = _adopt(self.opened, self.plan, self.tenure.mine)
        try:
            claim_all(self._ours, self.tenure)
            if self.held:
                wait_until_noticed(self.held)
                require_ours(self._ours, self.tenure)
                self.opened = look_again(self.opened)
                self.plan = _assembled(self.opened, options)
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Take back what says that they are in use, for they are not going to be."""
        if self.tenure.mine is not None:
            release_all(self._ours, self.tenure.mine)

    @property
    def _ours(self) -> list[Image]:
        """Those whose sidecars are ours to write."""
        if self.plan is None:
            return []
        return [
            image
            for image, member in zip(self.opened, self.plan.members, strict=True)
            if isinstance(image, Image) and member.state.is_ours
        ]

    def tell_log(self) -> None:
        """Log what was decided, and why."""
        if self.plan is None:
            return
        log.info("assembled by the rule: %s", self.plan.rule)
        for note in self.plan.notes:
            log.warning("%s", note)
        for member in self.plan.members:
            if not member.state.is_member:
                log.warning("%s is %s: %s", member.path, member.state.value, member.reason)
        current = sum(member.state.is_member for member in self.plan.members)
        if current < self.plan.threshold:
            log.warning(
                "only %d replicas are current, and vote-threshold=%d needs as many: requests fail "
                "until others were brought up to date",
                current,
                self.plan.threshold,
            )

    def longer_than(self, size: int) -> list[str]:
        """What is to be said of images that were longer than a disk of *size* bytes when opened.

        Nothing of devices, which are as long as they are.
        """
        images = (image for image in self.images if image.device is None)
        notes = (longer(image.path, image.size, size) for image in images)
        return [note for note in notes if note is not None]

    def make_disk(self, options: MountOptions, events: EventLog) -> tuple[Disk, Repairs | None]:
        """The disk, and with sidecars what repairs it. Must be called inside `trio.run`."""
        replicas = [
            _replica(index, one, options, plan=self.plan) for index, one in enumerate(self.opened)
        ]
        plan = self.plan
        metadata: Metadata
        sidecars, found = None, list[Found]()
        if plan is None:
            size, threshold = self.images[0].size, options.vote_threshold
            metadata = Volatile(replicas, size, threshold)
        else:
            size, threshold = plan.record.size, plan.threshold
            found = [one.found if isinstance(one, Image) else one for one in self.opened]
            metadata = sidecars = Sidecars(
                replicas,
                plan,
                found,
                threshold=threshold,
                read_only=options.read_only,
                tenure=self.tenure,
            )
            sidecars.claims.when_fenced = events.fenced
            self._forget_sidecars()
        mirror = Mirror(
            size,
            metadata,
            pattern=read_pattern(options, threshold),
            search_s=options.replica_timeout_s,
            events=events,
        )
        mirror.read_order.write_mostly = write_mostly([one.path for one in replicas], options)
        mirror.read_order.hedges = plan is not None
        for replica in replicas:
            replica.behind_max_s = options.patience_with_laggards_s
        zero_kind = {"off": None, "on": Kind.ZERO, "unmap": Kind.DISCARD}[options.detect_zeroes]
        if sidecars is None or options.read_only:
            rewriting = Rewriting(mirror) if options.rewrite_corrupted else None
            return Disk(mirror, rewriting, zero_kind=zero_kind), None
        present = {
            replica: one
            for replica, one in zip(replicas, found, strict=True)
            if not replica.standing.is_member and replica.attached
        }
        late = {one.path: one.opening for one in self.opened if isinstance(one, Unanswered)}
        reopener = _Reopener(
            sidecars,
            lambda: mirror.search_s,
            lambda: self.directory,
            late,
            replica_io=options.replica_io,
        )
        repairs = Repairs(
            mirror,
            sidecars,
            reopener,
            present=present,
            limit=options.resync_rate,
            outvoted=options.rewrite_corrupted,
            scrub_every_s=options.scrub_every_s,
        )
        return Disk(mirror, repairs, zero_kind=zero_kind), repairs

    def _forget_sidecars(self) -> None:
        """Keep the map of the ledger alone: of a large disk each takes many megabytes."""
        self.opened = [replace(one, sidecar=None) for one in self.opened]


def open_replica_set(
    paths: Sequence[str], mountpoint: str | None, options: MountOptions
) -> ReplicaSet:
    """Open and lock the replicas at *paths*, and decide what they are; nothing is written.

    Raises `UserError`.
    """
    write_mostly(paths, options)
    # Twice, as for any request that cannot do without: none of the others is known yet.
    patience_s = 2 * options.replica_timeout_s
    if options.metadata == "none":
        assert mountpoint is not None
        images = open_images(
            paths,
            mountpoint,
            read_only=options.read_only,
            replica_io=options.replica_io,
            patience_s=patience_s,
            directory=options.sidecars,
        )
        if not options.read_only:
            require_file_size(images[0].size, "the replicas")
        return ReplicaSet(list(images), None)
    opened = open_set(
        paths,
        mountpoint,
        read_only=options.read_only,
        replica_io=options.replica_io,
        patience_s=patience_s,
        directory=options.sidecars,
    )
    here = claim_of_this_mount()
    found = found_claims(opened, here)
    held = require_free(found, takeover=options.takeover)
    plan = _assembled(opened, options)
    if plan.adopted and options.read_only:
        return ReplicaSet(opened, None)
    if not options.read_only:
        require_file_size(max(plan.record.size, file_size(plan.map)), "the replicas")
    over = frozenset(one.claim.mount for one in found)
    tenure = Tenure(None if options.read_only else here, over)
    return ReplicaSet(opened, plan, tenure, held, options.sidecars)


def _assembled(opened: Sequence[Image | Found], options: MountOptions) -> Plan:
    """What these are to each other. Raises `AssemblyRefusedError`."""
    try:
        return assemble(
            [one.found if isinstance(one, Image) else one for one in opened],
            threshold=options.vote_threshold if options.vote_threshold_given else None,
            chunk_size=options.chunk_size,
            degraded=options.degraded,
            read_only=options.read_only,
        )
    except AssemblyRefusedError as error:
        raise _with_who_hangs(error, opened) from None


def _with_who_hangs(
    error: AssemblyRefusedError, opened: Sequence[Image | Found]
) -> AssemblyRefusedError:
    """The same refusal with why replicas that do not answer are missing, if it does not say so."""
    text = str(error)
    reasons = [f"{one.path}: {one.problem}" for one in opened if isinstance(one, Unanswered)]
    if told := [reason for reason in reasons if reason not in text]:
        text += f" ({'; '.join(told)})"
    return AssemblyRefusedError(error.rule, text, error.exit_code)


def _adopt(opened: Sequence[Image | Found], plan: Plan, mine: Claim) -> list[Image | Found]:
    """Write the first sidecars, where there is none, with our claim. Raises `UserError`."""
    images = [image for image in opened if isinstance(image, Image)]
    with ExitStack() as undo:
        adopted = _create_sidecars(images, plan, mine, undo)
        undo.pop_all()
    return adopted


def _create_sidecars(
    images: Sequence[Image], plan: Plan, mine: Claim, undo: ExitStack
) -> list[Image | Found]:
    adopted: list[Image | Found] = []
    roles = [plan.record.roles[member.slot or 0] for member in plan.members]
    for image, role in zip(images, roles, strict=True):
        if image.sidecar is not None:  # from an adoption that ended here
            adopted.append(image)
            continue
        sidecar = Sidecar(role.replica_id, plan.record, plan.map, image.identity)
        try:
            create_sidecar(image.real_path, sidecar, mine, image.place)
            undo.callback(Path(image.place).unlink, missing_ok=True)
            fd = open_sidecar(image.place, read_only=False)
        except FileExistsError:
            raise _came_between(image, mine) from None
        except OSError as error:
            raise UserError(
                f"cannot write {image.place}: {error.strerror}; metadata=none does without it"
            ) from None
        except SidecarLockedError as error:
            raise UserError(f"{image.path} has just been taken into use by {error}") from None
        assert fd is not None
        where = locality(fd)
        adopted.append(replace(image, sidecar_fd=fd, sidecar=sidecar, sidecar_locality=where))
    return adopted


def _came_between(image: Image, mine: Claim) -> UserError:
    """Why there is a sidecar of *image* where there was none when it was opened."""
    claim = claim_in(image.place)
    if claim is not None and claim.mount == mine.mount:
        # The file system may show one directory twice under different device numbers.
        return UserError(f"{image.path} and another replica are the same file")
    return UserError(f"{image.path} has just been taken into use by {claim or 'another quorumfs'}")


def _replica(index: int, one: Image | Found, options: MountOptions, plan: Plan | None) -> Replica:
    timeout_s = options.replica_timeout_s
    if isinstance(one, Found):
        return Replica(index, one.path, None, timeout_s)
    if plan is None:
        return Replica(index, one.path, _image_storage(one, one.size), timeout_s)
    usable = plan.members[index].state.is_ours
    sidecar_size = file_size(plan.map)
    sidecar = None
    if one.sidecar_fd is not None:
        sidecar = _sidecar_storage(one, sidecar_size)
        if usable:
            _lengthen(one.sidecar_fd, sidecar_size)
    image = _image_storage(one, plan.record.size)
    replica = Replica(index, one.path, image, timeout_s, sidecar=sidecar)
    if sidecar is None or not usable:
        replica.detach()
    return replica


def read_pattern(options: MountOptions, threshold: int) -> ReadPattern:
    """How reads are answered with *options* and a vote *threshold*."""
    if options.blkverify:
        return Blkverify(threshold)
    if options.read_pattern == "quorum":
        return Quorum(threshold)
    return Fifo() if options.read_pattern == "fifo" else Fastest()


class _Reopener:
    """Opens the files of replicas that were ejected.

    Opening may hang for as long as the file system does. It then goes on in its thread, and is
    not begun again; what it opens too late is closed.
    """

    def __init__(
        self,
        sidecars: Sidecars,
        patience_s: Callable[[], float],
        directory: Callable[[], str | None] = lambda: None,
        late: Mapping[str, Answer[Image] | None] = MappingProxyType({}),
        *,
        replica_io: str,
    ) -> None:
        """*patience_s*: the replica timeout (seconds), which may change, and so may the
        *directory* for sidecars of devices.

        *late*: by path, an attempt of the mount that was given up, and may hold locks yet.
        *replica_io*: the value of that option.
        """
        self._replica_io = replica_io
        self._late = late
        self._sidecars = sidecars
        self._patience_s = patience_s
        self._directory = directory
        self._opening: set[str] = set()
        self._looking: set[str] = set()

    async def reopen(self, replica: Replica) -> Returned:
        """Open, check and lock *replica* again; raises `OSError` or `UserError`."""
        late = self._late.get(replica.path)
        if replica.path in self._opening or (late is not None and late.pending):
            raise UserError("its file system does not answer")
        handover = _Handover()
        # The disk may grow meanwhile: with the join, the sidecar does, too.
        sidecar_size = file_size(self._sidecars.ledger.map)

        def open_files() -> None:
            try:
                handover.give(self._open(replica, sidecar_size))
            finally:
                self._opening.discard(replica.path)

        self._opening.add(replica.path)
        try:
            with trio.move_on_after(self._patience_s()):
                await trio.to_thread.run_sync(open_files, abandon_on_cancel=True)
        except trio.Cancelled:
            if (image := handover.take()) is not None:
                self._close(image)
            raise
        image = handover.take()
        if image is None:
            raise UserError("its file system does not answer")
        try:
            storage = _image_storage(image, self._sidecars.ledger.map.size)
            sidecar = _sidecar_storage(image, sidecar_size)
        except BaseException:
            self._close(image)
            raise
        return Returned(image.found, storage, sidecar)

    async def is_lost(self, replica: Replica) -> bool:
        """Whether the open image of *replica* fails what the image answers when opened anew.

        False if its file system does not answer in time.
        """
        image, path = replica.image, replica.path
        if not isinstance(image, FileStorage) or path in self._looking or not image.lend():
            return False
        token = trio.lowlevel.current_trio_token()

        def ended() -> None:
            self._looking.discard(path)
            image.give_back()

        def look() -> bool:
            try:
                return image.is_lost(path)
            finally:
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(ended)

        self._looking.add(path)
        with trio.move_on_after(self._patience_s()):
            return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
        return False

    def _open(self, replica: Replica, sidecar_size: int) -> Image:
        """In a thread: whatever touches the files may hang."""
        image = open_again(replica.path, self._directory(), replica_io=self._replica_io)
        with ExitStack() as stack:
            stack.callback(image.close)
            if image.sidecar_fd is None or image.sidecar is None:
                raise UserError(image.problem or f"there is no {image.place}")
            if replica.slot is not None:
                member = judge_returned(self._sidecars.ledger.record, replica.slot, image.found)
                if member.state.is_ours:
                    self._refuse_claimed(image)
                    _lengthen(image.sidecar_fd, sidecar_size)
                    self._sign(image)
            stack.pop_all()
        return image

    def _refuse_claimed(self, image: Image) -> None:
        """Raise `ForeignError` if another mount has this replica, or all of them."""
        tenure = self._sidecars.claims.tenure
        if self._sidecars.fenced is not None:
            raise ForeignError(f"fenced: the set was taken over by {self._sidecars.fenced}")
        if tenure.mine is None:
            return
        found = found_claims([image], tenure.mine)
        if held := in_the_way(found, tenure.over):
            raise ForeignError(held[0].in_words(MOUNT))

    def _sign(self, image: Image) -> None:
        if self._sidecars.claims.tenure.mine is not None and image.sidecar_fd is not None:
            with suppress(OSError):
                sign(image.sidecar_fd, self._sidecars.claims.tenure.mine)

    def _close(self, image: Image) -> None:
        """Close *image* in a thread; until that has ended it is not opened again."""

        def give_back() -> None:
            try:
                image.close()
            finally:
                self._opening.discard(image.path)

        self._opening.add(image.path)
        Thread(target=give_back, name="close", daemon=True).start()


class _Handover:
    """What a thread opened goes to who waits for it, or is closed if nobody does any more.

    The result of a thread that was given up is lost, whenever it ended: and with it the
    descriptors, which hold the locks.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._image: Image | None = None
        self._too_late = False

    def give(self, image: Image) -> None:
        """Leave *image* for who waits for it."""
        with self._lock:
            self._image, refused = image, self._too_late
        if refused:
            image.close()

    def take(self) -> Image | None:
        """Wait no longer: what was opened until now, for the caller to close."""
        with self._lock:
            self._too_late = True
            return self._image


def _lengthen(sidecar_fd: int, size: int) -> None:
    """Give a sidecar its length back where it was cut off: it is written in place."""
    with suppress(OSError):
        if os.fstat(sidecar_fd).st_size < size:
            os.ftruncate(sidecar_fd, size)


def _image_storage(image: Image, size: int) -> FileStorage:
    name = os.path.basename(image.path)
    written = image.sidecar.identity.regions if image.sidecar else ()
    return FileStorage(
        image.fd, size, name, locality=image.locality, direct=image.direct, written=written
    )


def _sidecar_storage(image: Image, size: int) -> FileStorage:
    assert image.sidecar_fd is not None
    name = f"{os.path.basename(image.path)} sidecar"
    where = image.sidecar_locality
    return FileStorage(image.sidecar_fd, size, name, locality=where)
