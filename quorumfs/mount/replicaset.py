"""From paths to a disk: the replicas' files opened, assembled, and put under a `Disk`."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.claim import Claim, FoundClaim, Tenure
from quorumfs.decisions.growth import longer
from quorumfs.decisions.model import Found, Plan
from quorumfs.decisions.patterns import Blkverify, Fastest, Fifo, Quorum, ReadPattern
from quorumfs.decisions.record import Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sidecar import file_size
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.errors import UserError
from quorumfs.metadata.protocol import Metadata
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.metadata.volatile import Volatile
from quorumfs.mount.limits import require_file_size
from quorumfs.mount.reopening import Reopener
from quorumfs.mount.storages import image_storage, lengthen, sidecar_storage
from quorumfs.options.parsing import write_mostly
from quorumfs.options.table import MountOptions
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.rewrite import Rewriting
from quorumfs.replica.answers import ask
from quorumfs.replica.claimant import claim_of_this_mount
from quorumfs.replica.claiming import (
    claim_all,
    claim_in,
    found_claims,
    look_again,
    release_all,
    require_free,
    require_ours,
    wait_until_noticed,
)
from quorumfs.replica.filesystems import locality
from quorumfs.replica.images import Image, Unanswered, close_all, open_images, open_set
from quorumfs.replica.replica import Replica
from quorumfs.replica.sidecarfile import SidecarLockedError, create_sidecar, open_sidecar
from quorumfs.replica.storage import Kind

log = logging.getLogger(__name__)

RELEASE_S = 1.0
"""How long (seconds) the release of a claim may take: the claim of a process that ended is over."""


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
        patience_s = 2 * options.replica_timeout_s
        if self.plan.adopted:
            assert self.tenure.mine is not None
            self.opened = _adopt(self.opened, self.plan, self.tenure.mine, patience_s)
        try:
            silent = claim_all(self._ours, self.tenure, patience_s)
            self._leave_out(silent)
            if self.held:
                wait_until_noticed(self.held)
                require_ours(self._ours, self.tenure)
                self.opened = look_again(self.opened)
            if self.held or silent:
                self.plan = _assembled(self.opened, options)
        except BaseException:
            self.give_up()
            close_all(self.opened)
            raise

    def give_up(self) -> None:
        """Take back what says that they are in use, for they are not going to be."""
        if self.tenure.mine is not None:
            self._leave_out(release_all(self._ours, self.tenure.mine, RELEASE_S))

    def _leave_out(self, silent: Sequence[Unanswered]) -> None:
        """Use nothing of these any more: they are closed when their file systems answer."""
        left_out = {one.path: one for one in silent}
        self.opened = [left_out.get(one.path, one) for one in self.opened]

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
        reopener = Reopener(
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


def _adopt(
    opened: Sequence[Image | Found], plan: Plan, mine: Claim, patience_s: float
) -> list[Image | Found]:
    """Write the first sidecars, where there is none, with our claim. Raises `UserError`."""
    images = [image for image in opened if isinstance(image, Image)]
    with ExitStack() as undo:
        adopted = _create_sidecars(images, plan, mine, patience_s, undo)
        undo.pop_all()
    return adopted


def _create_sidecars(
    images: Sequence[Image], plan: Plan, mine: Claim, patience_s: float, undo: ExitStack
) -> list[Image | Found]:
    adopted: list[Image | Found] = []
    roles = [plan.record.roles[member.slot or 0] for member in plan.members]
    for image, role in zip(images, roles, strict=True):
        if image.sidecar is not None:  # from an adoption that ended here
            adopted.append(image)
            continue
        sidecar = Sidecar(role.replica_id, plan.record, plan.map, image.identity)
        try:
            make = partial(create_sidecar, image.real_path, sidecar, mine, image.place)
            unmake = partial(Path(image.place).unlink, missing_ok=True)
            ask(image.path, make, patience_s, partial(_ignoring, unmake))
            undo.callback(unmake)
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


def _ignoring(call: Callable[[], None], _: None) -> None:
    call()


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
        return Replica(index, one.path, image_storage(one, one.size), timeout_s)
    usable = plan.members[index].state.is_ours
    sidecar_size = file_size(plan.map)
    sidecar = None
    if one.sidecar_fd is not None:
        sidecar = sidecar_storage(one, sidecar_size)
        if usable:
            lengthen(one.sidecar_fd, sidecar_size)
    image = image_storage(one, plan.record.size)
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
