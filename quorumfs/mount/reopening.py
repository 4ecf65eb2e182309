"""Files of replicas that were ejected, or are lost: opened again, in threads that may hang."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, suppress
from threading import Thread
from types import MappingProxyType
from typing import Any

import trio

from quorumfs.decisions.claim import in_the_way
from quorumfs.decisions.returned import judge_returned
from quorumfs.decisions.sidecar import file_size
from quorumfs.errors import UserError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.mount.storages import image_storage, lengthen, sidecar_storage
from quorumfs.repair.rejoin import ForeignError, Returned
from quorumfs.replica.answers import Answer
from quorumfs.replica.claiming import MOUNT, found_claims
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.images import Image, open_again
from quorumfs.replica.replica import Replica
from quorumfs.replica.sidecarfile import sign


class Reopener:
    """Opens the files of replicas that were ejected.

    Opening may hang for as long as the file system does. It then goes on in its thread, and is
    not begun again; what it opens too late is closed.
    """

    def __init__(
        self,
        sidecars: Sidecars,
        patience_s: Callable[[], float],
        directory: Callable[[], str | None] = lambda: None,
        late: Mapping[str, Answer[Any] | None] = MappingProxyType({}),
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
        # The result of a thread that was given up is lost, whenever it ended: and with it the
        # descriptors, which hold the locks. So an image is handed over by a future, or closed.
        opened = Future[Image]()
        # The disk may grow meanwhile: with the join, the sidecar does, too.
        sidecar_size = file_size(self._sidecars.ledger.map)

        def open_files() -> None:
            try:
                image = self._open(replica, sidecar_size)
                try:
                    opened.set_result(image)
                except InvalidStateError:  # nobody waits for it any more
                    image.close()
            finally:
                self._opening.discard(replica.path)

        self._opening.add(replica.path)
        try:
            with trio.move_on_after(self._patience_s()):
                await trio.to_thread.run_sync(open_files, abandon_on_cancel=True)
        except trio.Cancelled:
            if not opened.cancel():
                self._close(opened.result())
            raise
        if opened.cancel():
            raise UserError("its file system does not answer")
        image = opened.result()
        try:
            storage = image_storage(image, self._sidecars.ledger.map.size)
            sidecar = sidecar_storage(image, sidecar_size)
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
                    lengthen(image.sidecar_fd, sidecar_size)
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
