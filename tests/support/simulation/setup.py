"""What one history is given: its size, its replicas and options, and how its set came to be.

`Setup.drawn` draws all of that from a seed; a story names it. `create_set` makes the set.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from unittest import mock

from quorumfs.decisions import dirtymap
from quorumfs.decisions import sidecar as sidecar_module
from quorumfs.decisions.dirtymap import UNVERIFIED, DirtyMap, out_of_sync
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.patterns import Fastest, Fifo, Quorum, ReadPattern
from quorumfs.decisions.record import RoleState, Sidecar
from quorumfs.disk import zeroing
from quorumfs.metadata.ledger import epochs as epochs_module
from quorumfs.metadata.ledger import intents as intents_module
from quorumfs.repair import work as work_module
from quorumfs.replica.storage import Kind
from support.simulation.guest import KIB
from support.simulation.media import SECTOR, SimulatedFile
from support.simulation.world import World


@dataclass(frozen=True, slots=True)
class Scale:
    """How large things are: a disk of many chunks, extents, pieces and batches, yet small."""

    size: int
    chunk_size: int
    extent: int
    piece: int
    batch: int
    chunk_set_max: int
    misses_max: int

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The real code with its constants at this scale."""
        with ExitStack() as stack:
            for module, name, value in (
                (dirtymap, "EXTENT", self.extent),
                (sidecar_module, "CHUNK_MIN", self.chunk_size),
                (work_module, "PIECE", self.piece),
                (work_module, "LARGE_UNIT", 2 * self.piece),
                (work_module, "BATCH", self.batch),
                (epochs_module, "CHUNKS_MAX", self.chunk_set_max),
                (intents_module, "MISSES_MAX", self.misses_max),
                (zeroing, "STEP_MAX", 2 * self.piece),
                (zeroing, "LEAST", self.piece // 2),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield


SCALES = (
    Scale(32 * 16 * KIB, 16 * KIB, 64 * KIB, 32 * KIB, 128 * KIB, 65_536, 256),
    Scale(20 * 16 * KIB + 5 * SECTOR, 16 * KIB, 16 * KIB, 16 * KIB, 64 * KIB, 8, 2),
    Scale(9 * KIB * 256, SECTOR, 16 * KIB, 64 * KIB, 256 * KIB, 64, 8),  # two pages of map
)


class Origin(Enum):
    """How the set came to be."""

    CREATED = "created"
    ADOPTED = "adopted"
    """By the first mount of raw images, which are then compared."""
    COPIED = "copied"
    """From one raw image over all others, whatever they hold."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same in all lives of a history."""

    replicas: int
    threshold: int
    scale: Scale
    fifo: bool
    rewrite_corrupted: bool
    zero_kind: Kind | None
    origin: Origin
    filled: bool
    """With data at first; else with zeros."""
    lives: int
    careless: bool
    """The operator mounts what is there."""
    local: bool = True
    """Images are copied from one to another in one operation, where that is allowed."""
    passing: bool = False
    """No store has lasting inode numbers: its images are known while it is mounted."""
    claims: bool = False
    """Each mount says that it has the set, and looks whether it still has."""
    fast: float = 0.0
    """How many of the requests come while the daemon sleeps, and go by the fast path."""
    fastest: bool = False
    """Of patterns that read one replica: the one that lately answered fastest."""
    mostly: bool = False
    """The first replica of a mount is marked write-mostly."""
    behind_max_s: float | None = None
    """How long a write waits for replicas that the threshold can do without; None: the timeout."""

    def pattern(self, threshold: int) -> ReadPattern:
        """How reads are answered."""
        if not self.fifo:
            return Quorum(threshold)
        return Fastest() if self.fastest else Fifo()

    @classmethod
    def drawn(cls, dice: random.Random) -> "Setup":
        """Any setup; the useful ones more often."""
        replicas = dice.choice((2, 2, 3, 3, 3, 4))
        thresholds = {2: (1, 1, 1, 2), 3: (1, 1, 2, 2, 2, 3), 4: (1, 2, 2, 3, 3, 4)}[replicas]
        return cls(
            replicas=replicas,
            threshold=dice.choice(thresholds),
            scale=dice.choice((SCALES[0], SCALES[0], *SCALES)),
            fifo=dice.random() < 0.5,
            rewrite_corrupted=dice.random() < 0.3,
            zero_kind=dice.choice((None, Kind.ZERO, Kind.DISCARD)),
            origin=dice.choice((*[Origin.CREATED] * 6, *[Origin.ADOPTED] * 3, Origin.COPIED)),
            filled=dice.random() < 0.3,
            lives=dice.randrange(1, 7),
            careless=dice.random() < 0.2,
            local=dice.random() < 0.7,
            passing=dice.random() < 0.2,
            claims=dice.random() < 0.5,
            fast=dice.choice((0.0, 0.0, 0.7, 1.0)),
            fastest=dice.random() < 0.4,
            mostly=dice.random() < 0.3,
            behind_max_s=dice.choice((None, None, 0.05)),
        )


def create_set(setup: Setup, world: World, initial: bytes | None) -> bool:
    """A new set, as ``create`` or the first mount of raw images makes it.

    *initial*: what the images hold; None: zeros. Returns whether copying the first image over the
    others was cut off, and is to be done again.
    """
    if initial is not None:
        for one in world.replicas:
            _fill(one.image, initial)
    dice = world.dice_for("set")
    record = new_record(
        [one.path for one in world.replicas],
        setup.scale.size,
        setup.threshold,
        chunk_size=setup.scale.chunk_size,
        random_bytes=dice.randbytes,
    )
    disk_map = DirtyMap(record.size, record.chunk_size)
    everything = range(len(disk_map))
    order = list(range(setup.replicas))
    if setup.origin is Origin.ADOPTED:
        disk_map.add(UNVERIFIED, everything)
    elif setup.origin is Origin.COPIED:
        # As resolve() does it for raw images, in its order: the source comes last.
        order = [*order[1:], 0]
        record = record.with_state(order[:-1], RoleState.RESYNCING)
        for index in order[:-1]:
            _fill(world.replicas[index].image, dice.randbytes(setup.scale.size))
            disk_map.add(out_of_sync(index), everything)
    killed = setup.origin is not Origin.CREATED and setup.lives and dice.random() < 0.3
    if killed:
        order = order[: dice.randrange(1, setup.replicas)]
        world.note(f"killed when only {order} had sidecars")
    for index in order:
        identity = world.replicas[index].identity
        replica_id = record.roles[index].replica_id
        world.create_sidecar(index, Sidecar(replica_id, record, disk_map, identity))
    return bool(killed) and setup.origin is Origin.COPIED


def _fill(image: SimulatedFile, content: bytes) -> None:
    image.restore(image.backup())
    for one in (image.cache, image.durable):
        one.write(0, content)
