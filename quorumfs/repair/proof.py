"""How an image that comes back proves that it is no older copy, where nothing else does (R15)."""

from collections.abc import Callable

from quorumfs.replica.fanout import carry_out
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation


async def holds_last_writes(replica: Replica, doubtful: Callable[[int, int], bool]) -> bool:
    """Whether the image of *replica*, opened anew, holds what was last written to it.

    *doubtful* tells whether *replica* may lack some of a range (offset, length; bytes): what was
    written there proves nothing, and is copied anyway.
    """
    writes = [one for one in replica.health.last_writes if not doubtful(one.offset, one.length)]
    # What this host has cached of the file is what it wrote itself.
    reads = [Operation(Kind.READ, one.offset, one.length) for one in writes]
    for operations in ([Operation(Kind.EVICT)], reads):
        await carry_out((replica, operation) for operation in operations)
        if any(operation.error is not None for operation in operations):
            return False
    return bool(writes) and all(
        isinstance(read.value, bytes) and write.is_held(read.value)
        for write, read in zip(writes, reads, strict=True)
    )
