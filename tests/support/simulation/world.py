"""The machine: replicas that stay while daemons come and go.

One daemon lives at a time, inside `World.boot`; the world may end its life at any moment, from
within::

    world = World(seed=7, count=3, size=1 << 20)
    async with world.boot() as life:
        storages = [life.image(index) for index in range(3)]
        ...  # start the daemon and the guests in life.nursery
        life.crash_at(500)  # or world.kill(), world.power_cut() wherever you like
    # here everything of that life is gone
"""

import errno
import itertools
import os
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from string import ascii_letters

import trio

from quorumfs.decisions.claim import Claim, decode_claim, encode_claim
from quorumfs.decisions.model import Found
from quorumfs.decisions.record import Identity, Sidecar
from quorumfs.decisions.sidecar import CLAIM_OFFSET, PAGE, FormatError
from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.storage import Operation
from support.sidecars import decode, encode
from support.simulation.media import Backup, Content, SimulatedFile
from support.simulation.oracle import BrokenError
from support.simulation.storage import (
    CALM,
    SYNCS,
    Agenda,
    DaemonKilledError,
    Faults,
    SimulatedStorage,
)

_CLAIM = CLAIM_OFFSET, CLAIM_OFFSET + PAGE


@dataclass
class SimulatedReplica:
    """An image and its sidecar, on a file system of their own."""

    path: str
    image: SimulatedFile
    sidecar: SimulatedFile | None = None
    reachable: bool = True
    local: bool = True
    """Another image may be copied to it, or from it, in one operation."""
    instance: int | None = None
    """Its file system has no lasting inode numbers: of the mount that it is in, see `Found`."""
    image_faults: Faults = field(default_factory=Faults)
    sidecar_faults: Faults = field(default_factory=Faults)

    @property
    def identity(self) -> Identity:
        """What can be told of the image that outlasts a mount of its file system."""
        identity = self.image.identity
        return identity if self.instance is None else replace(identity, inode=0, ctime_ns=0)

    @property
    def files(self) -> list[SimulatedFile]:
        return [self.image] if self.sidecar is None else [self.image, self.sidecar]


@dataclass(frozen=True, slots=True)
class ReplicaBackup:
    """An image and its sidecar as they were copied together."""

    image: Backup
    sidecar: Backup | None


Watch = Callable[[SimulatedReplica, SimulatedFile, Operation], None]


INVARIANTS_EVERY = 4
"""Steps of a life between two looks at the invariants."""


class Life:
    """One life of the daemon."""

    def __init__(self, world: "World", number: int, nursery: trio.Nursery) -> None:
        self.world = world
        self.number = number
        self.nursery = nursery
        """Everything of the daemon and its guests runs in here, and dies with it."""
        self.agenda = Agenda()
        self.dead = False
        self.steps = 0
        """Operations asked for, and operations that happened, so far."""
        self.watch: Watch | None = None
        """Told of every operation that is asked for, before it is."""
        self.seen_short: set[str] = set()
        """Paths of images of which the daemon could see that they were too short."""
        self.broken_invariants: Callable[[], Iterable[str]] = tuple
        """The invariants of the daemon that do not hold: there must be none at any step. They are
        looked at every few steps: at each it would take half as long as all the rest."""
        self.outside: set[trio.lowlevel.Task] = set()
        """Tasks of guests that wait for nothing of the daemon: what they do does not wake it."""
        self.shields: list[trio.CancelScope] = []
        """Scopes in which the daemon does not let itself be stopped; a kill asks nobody."""
        self._crash_step = 0
        self._crash_power = False
        self._storages: list[tuple[SimulatedReplica, SimulatedStorage]] = []

    def image(self, index: int, size: int | None = None) -> SimulatedStorage:
        """Open the image of a replica; *size* is the disk's, where the file is longer or shorter.

        Raises `OSError` if it cannot be reached.
        """
        replica = self.world.replicas[index]
        return self._open(replica, replica.image, replica.image_faults, size)

    def sidecar(self, index: int) -> SimulatedStorage:
        """Open the sidecar of a replica; raises `OSError` if there is none."""
        replica = self.world.replicas[index]
        return self._open(replica, replica.sidecar, replica.sidecar_faults, None)

    def storage(self, fd: int) -> SimulatedStorage:
        """The handle that the fast path knows by this number."""
        return self._storages[fd][1]

    def storages(self, index: int) -> list[SimulatedStorage]:
        """All handles on the files of a replica that were opened in this life."""
        mine = self.world.replicas[index]
        return [storage for replica, storage in self._storages if replica is mine]

    @property
    def syncing(self) -> bool:
        """Whether a sync is under way on any image."""
        images = [replica.image for replica in self.world.replicas]
        return any(s.file in images and s.flying(SYNCS) for _, s in self._storages)

    def crash_at(self, step: int, *, power: bool = False) -> None:
        """Die when that many steps have been made: the daemon alone, or with *power* all of it."""
        self._crash_step = step
        self._crash_power = power

    def step(self) -> None:
        """Something is about to be asked for, or to happen."""
        if not self.dead:
            self.steps += 1
            if self.steps == self._crash_step:
                self.world.note(f"crash at step {self.steps}")
                if self._crash_power:
                    self.world.power_cut()
                else:
                    self.world.kill()
        if self.dead:
            raise DaemonKilledError
        if self.steps % INVARIANTS_EVERY == 0:
            for broken in self.broken_invariants():
                raise BrokenError(broken)

    def end(self, why: str) -> None:
        """The process is gone."""
        if self.dead:
            return
        self.dead = True
        for _, storage in self._storages:
            storage.end_life(why)
        for scope in self.shields:
            scope.shield = False
        self.nursery.cancel_scope.cancel()

    def _open(
        self,
        replica: SimulatedReplica,
        file: SimulatedFile | None,
        faults: Faults,
        size: int | None,
    ) -> SimulatedStorage:
        assert not self.dead
        if file is None or not replica.reachable:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), replica.path)
        name = f"{file.name}/{len(self._storages)}"
        fast = FastFile(len(self._storages), memory=True, reads=True)
        storage = SimulatedStorage(
            file,
            self.agenda,
            dice=self.world.dice_for(f"life {self.number} {name}"),
            faults=faults,
            size=size,
            local=replica.local,
            fast_file=fast if replica.instance is None else None,  # as on FUSE
            step=self.step,
            asked=lambda operation: self.watch and self.watch(replica, file, operation),
            truncated=lambda: self.seen_short.add(replica.path),
            note=self.world.note,
        )
        self._storages.append((replica, storage))
        return storage


class World:
    """*count* replicas of a disk of *size* bytes, all zeros and without sidecars at first."""

    def __init__(self, seed: int, count: int, size: int) -> None:
        self.seed = seed
        self.size = size
        self.trace: list[str] = []
        """What happened, a line each: the same for the same seed."""
        self.life: Life | None = None
        self.lives = 0
        self.power_cuts = 0
        self._decoded: dict[int, tuple[bytes, Sidecar | None]] = {}
        """What each sidecar held when it was last looked at, and what that says."""
        self._inodes = itertools.count(1000)
        self._dice = self.dice_for("world")
        self.replicas = [
            SimulatedReplica(f"/{letter}.img", SimulatedFile(f"{letter}.img", size, self._inodes))
            for letter in ascii_letters[:count]
        ]

    def index_of(self, path: str) -> int:
        """The index of the replica with its image at *path*."""
        return [one.path for one in self.replicas].index(path)

    def length(self, index: int) -> int:
        """How long (bytes) the image of a replica has to be, by its own sidecar: a disk may have
        grown without it."""
        sidecar = self.known_sidecar(index)
        return self.size if sidecar is None else sidecar.record.size

    def known_sidecar(self, index: int) -> Sidecar | None:
        """What the sidecar of a replica says, to be looked at only; None if it cannot be read."""
        file = self.replicas[index].sidecar
        content = b"" if file is None else file.whole
        before, sidecar = self._decoded.get(index, (None, None))
        if content != before:
            sidecar = None
            with suppress(FormatError):
                sidecar = decode(content) if content else None
            self._decoded[index] = content, sidecar
        return sidecar

    def is_short(self, index: int) -> bool:
        """Whether the image of a replica was truncated."""
        return self.replicas[index].image.size < self.length(index)

    def new_replica(self) -> SimulatedReplica:
        """An empty image beside the others, without a sidecar."""
        name, like = f"{ascii_letters[len(self.replicas)]}.img", self.replicas[0]
        instance = None if like.instance is None else 1
        image = SimulatedFile(name, self.size, self._inodes)
        self.replicas.append(
            SimulatedReplica(f"/{name}", image, local=like.local, instance=instance)
        )
        self.note(f"/{name} is there")
        return self.replicas[-1]

    def dice_for(self, purpose: str) -> random.Random:
        """A source of chance of its own, so that one purpose does not disturb another."""
        return random.Random(f"{self.seed}/{purpose}")

    def note(self, text: str) -> None:
        """Append to the trace, with the time of the life at hand."""
        now = trio.current_time() if trio.lowlevel.in_trio_run() else 0.0
        self.trace.append(f"{self.lives} {now:.6f} {text}")

    # The daemon

    @asynccontextmanager
    async def boot(self, *, beside: bool = False) -> AsyncGenerator[Life, None]:
        """A daemon's life. Leaving the block ends it in order; what hangs then is cut off.

        *beside*: another one lives, on another host; what happens to the world is this one's until
        it ends.
        """
        before = self.life
        assert before is None or beside
        self.lives += 1
        self.note("boot")
        try:
            async with trio.open_nursery() as nursery:
                life = self.life = Life(self, self.lives, nursery)
                nursery.start_soon(life.agenda.run)
                yield life
                life.end("exited")
        except* DaemonKilledError:
            pass  # it is what was wanted
        finally:
            if self.life:
                self.life.end("failed")
            self.life = before

    def found(self, order: Iterable[int] | None = None) -> list[Found]:
        """What a mount of these replicas, or of all, finds beside the images."""
        indices = range(len(self.replicas)) if order is None else order
        return [self._found(self.replicas[index]) for index in indices]

    def _found(self, replica: SimulatedReplica) -> Found:
        if not replica.reachable:
            return Found(replica.path, None, None, "No such file or directory")
        found = self._with_sidecar(replica)
        if self.life is not None and found.is_short(self.size):
            self.life.seen_short.add(replica.path)
        return found

    def _with_sidecar(self, replica: SimulatedReplica) -> Found:
        if replica.sidecar is None:
            return Found(replica.path, replica.identity)
        try:
            sidecar = decode(replica.sidecar.whole)
        except FormatError as error:
            return Found(replica.path, replica.identity, None, str(error))
        return Found(replica.path, replica.identity, sidecar, instance=replica.instance)

    def sign(self, index: int, claim: Claim) -> None:
        """Leave a claim in the sidecar of a replica, durably."""
        sidecar = self.replicas[index].sidecar
        assert sidecar is not None
        sidecar.rot(CLAIM_OFFSET, encode_claim(claim))

    def claim(self, index: int) -> Claim | None:
        """The one in the sidecar of a replica."""
        sidecar = self.replicas[index].sidecar
        return None if sidecar is None else decode_claim(sidecar.cache.read(*_CLAIM))

    def create_sidecar(self, index: int, sidecar: Sidecar) -> None:
        """What `quorumfs.replica.sidecarfile.create_sidecar` does: all of it durable, or nothing.

        Raises `OSError` if the replica cannot be reached.
        """
        if self.life is not None:
            self.life.step()
        replica = self.replicas[index]
        if not replica.reachable:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), replica.path)
        content = encode(sidecar)
        name = f"{replica.image.name}.quorumfs"
        size = len(content) + PAGE  # for what is remembered of scrubs: a file becomes longer then
        replica.sidecar = SimulatedFile(name, size, self._inodes, content)
        self.note(f"{name} created")

    # What happens to it

    def kill(self) -> None:
        """SIGKILL, if a daemon lives: the page cache stays, and nobody calls back any more."""
        self.note("kill")
        if self.life is not None:
            self.life.end("killed")

    def power_cut(self) -> None:
        """The daemon and everything un-synced is gone; the dice decide what survives by luck."""
        self.note("power cut")
        self.power_cuts += 1
        if self.life is not None:
            self.life.end("cut off")
        for replica in self.replicas:
            for file in replica.files:
                file.power_cut(self._dice)

    def detach(self, index: int, *, hang: bool = False, lose_cache: bool = False) -> None:
        """The file system of a replica is gone, for the daemon and for the next mount.

        Between lives: it is unmounted. In a life: what is in flight perhaps happens, and these
        handles fail with ENOTCONN for ever, whether it comes back or not; with *hang* they say
        nothing, and go on when it comes back. *lose_cache*: its medium, or its server, lost power.
        """
        replica = self.replicas[index]
        assert not (hang and lose_cache), "what hangs still has its cache"
        self.note(f"{replica.path} detached{' hanging' if hang else ''}")
        replica.reachable = False
        if replica.instance is not None and not hang:
            replica.instance += 1
        if self.life is not None:
            for storage in self.life.storages(index):
                if storage.broken:
                    continue  # its file system is another one by now
                if hang:
                    storage.stalled = True
                else:
                    storage.break_off(errno.ENOTCONN)
        for file in replica.files:
            if lose_cache:
                file.power_cut(self._dice)
            elif self.life is None:
                file.settle()

    def attach(self, index: int) -> None:
        """The file system of a replica is back, and what hung on it goes on."""
        replica = self.replicas[index]
        self.note(f"{replica.path} attached")
        replica.reachable = True
        self.release(index)

    def release(self, index: int) -> None:
        """Let everything go on that hangs on a replica, detached or by its faults."""
        if self.life is not None:
            for storage in self.life.storages(index):
                if not storage.broken:
                    storage.release()

    def calm(self) -> None:
        """Faults stop: everything is back, nothing hangs, nothing fails any more."""
        for index, replica in enumerate(self.replicas):
            for faults in (replica.image_faults, replica.sidecar_faults):
                faults.weather = CALM
                faults.forget_plans()
            for file in replica.files:
                file.space = None
            if not replica.reachable:
                self.attach(index)
            self.release(index)

    def lose_pages(self, index: int) -> None:
        """What an image has not synced is gone, and one sync says so."""
        self.note(f"{self.replicas[index].path}: pages are lost")
        self.replicas[index].image.lose_pages()

    def backup(self, index: int) -> ReplicaBackup:
        """Copy the image of a replica and its sidecar as they are at this moment."""
        replica = self.replicas[index]
        return ReplicaBackup(
            replica.image.backup(), replica.sidecar.backup() if replica.sidecar else None
        )

    def copy(self) -> list[ReplicaBackup]:
        """Copy the whole set, images and sidecars, as they are at this moment."""
        self.note("the set is copied")
        return [self.backup(index) for index in range(len(self.replicas))]

    def put(self, index: int, copied: ReplicaBackup) -> None:
        """In the place of a replica is that of a copy of the set, down to the times of its files:
        a daemon that has opened the replica keeps the one that it has.
        """
        one = self.replicas[index]
        assert copied.sidecar is not None
        self.note(f"{one.path} is that of a copy of the set")
        for name, size, backup in (
            (one.image.name, copied.image.content.size, copied.image),
            (f"{one.image.name}.quorumfs", copied.sidecar.content.size, copied.sidecar),
        ):
            file = SimulatedFile(name, size, self._inodes)
            file.restore(backup, in_place=True)
            if backup is copied.image:
                one.image = file
            else:
                one.sidecar = file

    def roll_back(self, index: int, backup: ReplicaBackup) -> None:
        """The file system of a replica goes back to a snapshot: the same files, the old times."""
        replica = self.replicas[index]
        assert self.life is None or not replica.reachable, "not under a daemon that has it open"
        self.note(f"{replica.path} rolled back to a snapshot")
        replica.image.restore(backup.image, in_place=True)
        if replica.sidecar is not None and backup.sidecar is not None:
            replica.sidecar.restore(backup.sidecar, in_place=True)

    def restore(
        self,
        index: int,
        backup: ReplicaBackup,
        *,
        image: bool = True,
        sidecar: bool = True,
        anew: bool = True,
    ) -> None:
        """Put a backup in the place of a replica, or only its image, or only its sidecar.

        *anew*: a store without lasting identities is mounted anew for it.
        """
        replica = self.replicas[index]
        assert self.life is None or not replica.reachable, "not under a daemon that has it open"
        self.note(f"{replica.path} put back from a backup: {image=} {sidecar=}")
        if image:
            replica.image.restore(backup.image)
            if replica.instance is not None and anew:
                replica.instance += 1
        if sidecar:
            if backup.sidecar is None:
                replica.sidecar = None
            else:
                name = f"{replica.image.name}.quorumfs"
                size = backup.sidecar.content.size
                replica.sidecar = replica.sidecar or SimulatedFile(name, size, self._inodes)
                replica.sidecar.restore(backup.sidecar)

    # What is left in the end

    def contents(self, order: Sequence[int] | None = None) -> list[Content]:
        """What readers see of the images, in the order of the command line."""
        indices = range(len(self.replicas)) if order is None else order
        return [self.replicas[index].image.cache for index in indices]
