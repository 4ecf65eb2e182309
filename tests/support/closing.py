"""Closing a storage as a replica does."""

import trio

from quorumfs.replica.storage import FileStatus, Kind, Operation, Storage, Value


async def close(storage: Storage) -> None:
    """Close *storage*, of which nothing is in flight; raises what this fails with."""
    returned = trio.Event()
    errors: list[OSError] = []

    def done(_: Operation, value: Value, error: OSError | None) -> None:
        assert isinstance(value, FileStatus) or value == 0
        if error is not None:
            errors.append(error)
        returned.set()

    storage.submit(Operation(Kind.CLOSE), done)
    await returned.wait()
    if errors:
        raise errors[0]
