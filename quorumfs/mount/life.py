"""The life of one mount: open, lock, mount, serve, unmount.

Everything that can be refused is refused before the mount point changes. Whatever was acquired
is given back in reverse order by one exit stack, except after a crash: then the mount point stays
dead (ENOTCONN), because clients must not find the empty directory below it and write there.
"""

import ctypes
import logging
import os
import signal
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import trio

from quorumfs.control import logs, mounts, runtime
from quorumfs.control.hook import Hook
from quorumfs.control.journal import Journal
from quorumfs.control.logs import status_event
from quorumfs.control.service import ServiceManager, status_line
from quorumfs.control.status import Status
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import EventLog
from quorumfs.errors import UserError
from quorumfs.fastpath import native
from quorumfs.fastpath.path import FastPath
from quorumfs.fuse import session
from quorumfs.fuse.operations import DiskOperations
from quorumfs.mount.console import Console
from quorumfs.mount.letting_go import STOP_SIGNALS, ended_by_signals
from quorumfs.mount.limits import require_for_service
from quorumfs.mount.replicaset import ReplicaSet, open_replica_set
from quorumfs.options.table import MountOptions
from quorumfs.replica.images import close_all
from quorumfs.replica.space import Space

log = logging.getLogger(__name__)

BURST_S = 2.0
"""Without a request for this long (up to twice as long), a burst of requests is over."""

TELL_SIGNAL = signal.SIGUSR1
"""Has the daemon put its status into the log."""


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What to mount, where and how."""

    replicas: Sequence[str]
    mountpoint: str
    """Absolute, without symbolic links."""
    options: MountOptions
    log_file: Path | None = None
    log_json: bool = False
    runtime_dir: Path | None = None
    """None: the usual one."""


def serve(plan: MountPlan, ready: Callable[[], None], *, detached: bool) -> None:
    """Mount and serve until unmounted or told to stop; *ready* is called when it can be used.

    Raises `UserError` if it cannot be mounted.
    """
    with ExitStack() as stack:
        manager = ServiceManager.from_environment()
        stack.callback(manager.close)
        if detached:  # it waits for the process that it started, and for no other one
            manager.close()
        _check_mountpoint(plan.mountpoint, plan.runtime_dir)
        require_for_service(len(plan.replicas))
        signal.signal(TELL_SIGNAL, signal.SIG_IGN)  # but while somebody listens for it
        _become_io_flusher()
        _share_heaps()
        with ended_by_signals():
            replica_set = open_replica_set(plan.replicas, plan.mountpoint, plan.options)
        claim = runtime.claim(plan.mountpoint, plan.runtime_dir)
        stack.callback(claim.give_up)
        fields = {"QUORUMFS_MOUNTPOINT": plan.mountpoint}
        if replica_set.plan is not None:
            fields["QUORUMFS_SET"] = replica_set.plan.record.set_id.hex()
        destination = logs.destination(
            plan.log_file, detached=detached, fallback=claim.path("log"), fields=fields
        )
        if not plan.options.read_only:
            with ended_by_signals(replica_set.give_up):
                replica_set.take_into_use(plan.options)
        # Until somebody listens for them, lest a signal leaves a mount without a daemon; and
        # before there are more threads, which must never be the ones to take them.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        stack.callback(logs.start(destination, as_json=plan.log_json).stop)
        journal = Journal(os.getpid())
        logs.events_log.addHandler(journal)
        stack.callback(logs.events_log.removeHandler, journal)
        hook = Hook(plan.mountpoint, plan.options.on_event)
        logs.events_log.addHandler(hook)
        stack.callback(hook.close)
        stack.callback(logs.events_log.removeHandler, hook)
        trio.run(_serve, plan, claim, replica_set, journal, hook, manager, ready)


def rehearse(plan: MountPlan) -> list[str]:
    """What `serve` would mount, in words, a line each; nothing is written or mounted.

    Raises `UserError` where `serve` would refuse before it changes anything.
    """
    _check_mountpoint(plan.mountpoint, plan.runtime_dir)
    require_for_service(len(plan.replicas))
    replica_set = open_replica_set(plan.replicas, plan.mountpoint, plan.options)
    close_all(replica_set.opened)
    found = replica_set.plan
    if found is None:
        return []
    lines = ["the images would be adopted, and get sidecars"] if found.adopted else []
    lines += found.notes
    return lines + [
        f"{member.path} would be {member.state.value}: {member.reason}"
        for member in found.members
        if not member.state.is_member
    ]


async def _serve(
    plan: MountPlan,
    claim: runtime.Claim,
    replica_set: ReplicaSet,
    journal: Journal,
    hook: Hook,
    manager: ServiceManager,
    ready: Callable[[], None],
) -> None:
    events = EventLog(plan.mountpoint, logs.tell)
    disk, repairs = replica_set.make_disk(plan.options, events)
    mtime_ns = max(image.mtime_ns for image in replica_set.images)
    space = Space(lambda: disk.replicas, disk.mirror.rhythm)
    fast = _fast_path(disk, plan.options)
    operations = DiskOperations(disk, plan.options, mtime_ns, space, fast)
    try:
        _clear_stale_mount(plan.mountpoint)
        await _record_options(disk)
        _mount(operations, plan, fast)
        claim.note_device()
    except BaseException:
        replica_set.give_up()
        raise
    served = False

    def serving() -> None:
        nonlocal served
        served = True
        ready()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_stop_on_signal, plan.mountpoint)
            nursery.start_soon(disk.run)
            nursery.start_soon(_return_memory, disk, fast)
            nursery.start_soon(space.run)
            console = Console(
                plan.mountpoint,
                plan.options,
                replica_set,
                disk,
                repairs,
                journal=journal,
                hook=hook,
                manager=manager,
            )
            await console.start(nursery, claim.path("sock"))
            await nursery.start(_tell_on_signal, console.take_now)
            if repairs is not None:
                nursery.start_soon(repairs.run)
            log.info(
                "mounted %s at %s: %s, threshold %d",
                ", ".join(replica.path for replica in disk.replicas),
                plan.mountpoint,
                plan.options.read_pattern,
                disk.threshold,
            )
            replica_set.tell_log()
            for note in console.notes():
                log.warning("%s", note)
            nursery.start_soon(_say_when_serving, serving, manager, console)
            nursery.start_soon(manager.beat)
            await session.serve(operations, fast)
            manager.tell("STOPPING=1")
            await console.actions.stop()
            if repairs is not None:
                await repairs.stop()
            with trio.move_on_after(console.settings.present.replica_timeout_s):
                await console.path_watch.look()
            failure = await _close(disk)  # in the nursery, where its deadlines are watched
            nursery.cancel_scope.cancel()
    except BaseException:
        disk.events.close()
        if served:
            log.critical("the mount at %s died and stays dead", plan.mountpoint, exc_info=True)
        session.close(unmount=not served)  # nobody has used it yet
        raise
    session.close(unmount=True)
    log.info("unmounted %s", plan.mountpoint)
    if failure:
        claim.leave_word(failure)
        raise UserError(failure)


def _fast_path(disk: Disk, options: MountOptions) -> FastPath | None:
    """The fast path, where it can be had and is wanted."""
    if native.library is None or not options.fast_path:
        return None
    writes = not options.read_only and not options.sync
    return FastPath(disk, keep_zeros=options.detect_zeroes != "off", writes=writes)


async def _record_options(disk: Disk) -> None:
    """Put on record what the next mount must know of this one's options. Raises `UserError`."""
    failure: OSError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.run)  # a replica may hang: there are deadlines
        try:
            await disk.metadata.record_options()
        except OSError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise UserError(
            f"option vote-threshold: {disk.threshold} cannot be put on record: {failure.strerror}; "
            "mend the replicas, or mount without this option"
        )


async def _close(disk: Disk) -> str | None:
    """Sync and close the replicas; returns what went wrong, for the one who unmounts."""
    for replica in disk.replicas:
        if not replica.state.is_member:
            log.warning("%s is %s: do not use it as it is", replica.path, replica.state.value)
    try:
        await disk.close()
    except OSError as error:
        failure = f"the last flush failed, recent writes may be lost: {error.strerror}"
        log.error("%s", failure)
        return failure
    return None


def _become_io_flusher() -> None:
    """Tell the kernel that memory it frees may have to go through us (see prctl(2)).

    Else, short of memory, it may wait in one of our allocations for pages that only we can write.
    Threads inherit it, so it comes before them. Not permitted to an ordinary user.
    """
    pr_set_io_flusher = 57
    ctypes.CDLL(None).prctl(pr_set_io_flusher, 1, 0, 0, 0)


def _share_heaps() -> None:
    """Have all threads allocate from two heaps instead of one for nearly each.

    The C library cannot give back the end of any heap but the first, which after a burst of large
    requests is several MiB of each. Our threads allocate one at a time anyway, for Python does.
    Before there are threads.
    """
    m_arena_max = -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(m_arena_max, 2)


def _check_mountpoint(mountpoint: str, runtime_dir: Path | None) -> None:
    mounted = mounts.mount_at(mountpoint)
    if mounted and mounted.fs_type == mounts.FS_TYPE:
        pid = runtime.daemon_pid(mountpoint, mounted.owner, runtime_dir)
        if pid is not None or not mounts.is_dead(mountpoint):
            served = f"served by quorumfs, pid {pid}" if pid else "a quorumfs mount"
            raise UserError(f"{mountpoint} is already {served}; unmount it first")
        return
    try:
        if not stat.S_ISDIR(os.stat(mountpoint).st_mode):
            raise UserError(f"the mount point {mountpoint} is not a directory")
    except OSError as error:
        raise UserError(f"the mount point {mountpoint}: {error.strerror}") from None


def _clear_stale_mount(mountpoint: str) -> None:
    """Take away what a killed daemon of ours left mounted."""
    while (mounted := mounts.mount_at(mountpoint)) and mounted.fs_type == mounts.FS_TYPE:
        if not mounts.is_dead(mountpoint):
            raise UserError(f"{mountpoint} has just been mounted by another quorumfs")
        log.warning("%s: clearing the mount of a daemon that died", mountpoint)
        mounts.unmount(mountpoint, lazy=True)


def _mount(operations: DiskOperations, plan: MountPlan, fast: FastPath | None) -> None:
    options = {"default_permissions", f"subtype={mounts.SUBTYPE}", f"fsname={_source(plan)}"}
    options |= plan.options.kernel_flags
    if plan.options.read_only:
        options.add("ro")
    session.mount(operations, plan.mountpoint, options, plan.options.max_background, fast)


def _source(plan: MountPlan) -> str:
    """What ``findmnt`` and ``df`` show as the source."""
    if plan.options.fsname is not None:
        return plan.options.fsname
    source = ":".join(plan.replicas)
    # libfuse splits at commas and pyfuse3 takes ASCII; a mount's options must fit in one page.
    plain = source.isascii() and source.isprintable() and not set(source) & set(",\\ ")
    return source if plain and len(source) <= 1024 else mounts.SUBTYPE


async def _return_memory(disk: Disk, fast: FastPath | None) -> None:
    """Give the buffers of a burst of requests back to the system when it is over.

    The C library keeps freed blocks of up to a few MiB: tens of MiB after parallel requests of
    1 MiB. Returning each at once instead would cost a page fault per page of every request.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    seen = returned = disk.mirror.requests
    while malloc_trim is not None:
        await disk.mirror.rhythm.until_tick(BURST_S)
        if disk.mirror.requests == seen != returned:
            malloc_trim(0)
            if fast is not None:
                fast.return_memory()
            for file in (file for replica in disk.replicas for file in replica.files):
                file.return_memory()
            returned = seen
        seen = disk.mirror.requests


async def _say_when_serving(
    ready: Callable[[], None], manager: ServiceManager, console: Console
) -> None:
    await trio.lowlevel.checkpoint()  # the session loop, started just before, now waits
    ready()
    status = console.take_now()
    await manager.tell_surely("READY=1", f"STATUS={status_line(status)}")


async def _tell_on_signal(
    take_status: Callable[[], Status],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Put the status into the log at each `TELL_SIGNAL`: also where the socket is out of reach."""
    with trio.open_signal_receiver(TELL_SIGNAL) as signals:
        task_status.started()
        async for _ in signals:
            logs.tell(status_event(take_status()))


async def _stop_on_signal(
    mountpoint: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Unmount in good order at SIGTERM or SIGINT, even if the disk is in use."""
    for meaningless in (signal.SIGHUP, signal.SIGUSR2):
        if signal.getsignal(meaningless) is signal.SIG_DFL:  # which takes the disk from its guest
            signal.signal(meaningless, signal.SIG_IGN)
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        task_status.started()
        async for signum in signals:
            log.info("%s: unmounting %s", signal.Signals(signum).name, mountpoint)
            try:
                # The kernel writes back dirty pages of mapped files meanwhile, so the session
                # loop must go on.
                await trio.to_thread.run_sync(mounts.unmount, mountpoint)
            except UserError as error:
                log.warning("%s; whoever uses it now loses it", error)
                await session.write_back()
                session.stop()
                return
