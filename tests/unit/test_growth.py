"""How large a disk may become, and what is said of images longer than the disk."""

from dataclasses import replace

import pytest

from quorumfs.decisions.dirtymap import CHUNK_MIN, CHUNKS_MAX, INTENT, DirtyMap, out_of_sync
from quorumfs.decisions.growth import LONGER, longer, wanted_size
from quorumfs.decisions.newset import new_record
from quorumfs.errors import UserError

SIZE = 20 << 30
RECORD = new_record(["/a.img", "/b.img"], SIZE, 1)


def test_a_size_is_what_is_asked_for_or_that_much_more() -> None:
    assert wanted_size(RECORD, 2 * SIZE) == wanted_size(RECORD, SIZE, more=True) == 2 * SIZE
    assert wanted_size(RECORD, SIZE) == SIZE
    odd = replace(RECORD, size=SIZE + 1)  # it stays as odd as it is
    assert wanted_size(odd, SIZE + 1) == SIZE + 1


@pytest.mark.parametrize(
    ("size", "more", "reason"),
    [
        (SIZE - 512, False, "to shrink it"),
        (SIZE + 1, False, f"grow to {SIZE + 512}"),
        (1, True, f"grow to {SIZE + 512}"),
        (CHUNK_MIN * CHUNKS_MAX + 512, False, "chunk-size=65536"),
        (1 << 63, True, "at most 274877906944 bytes"),
    ],
)
def test_what_a_disk_cannot_become_is_refused_in_words(size: int, more: bool, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        wanted_size(RECORD, size, more=more)


def test_of_a_longer_image_the_command_is_said() -> None:
    assert longer("/a.img", SIZE, SIZE) is None
    note = longer("/a.img", 2 * SIZE, SIZE)
    assert note is not None
    assert note.startswith(f"/a.img {LONGER}")
    assert note.endswith(f"quorumfs grow MOUNTPOINT {2 * SIZE}")


def test_a_map_that_grows_keeps_what_is_known_and_leaves_a_view_of_the_old_one_alone() -> None:
    known = DirtyMap(3 * CHUNK_MIN - 5, CHUNK_MIN)
    known.add(INTENT, range(1, 3))
    old = known.planes[0]
    view = memoryview(old)  # C looks at it
    known.grow(5 * CHUNK_MIN + 1, out_of_sync(1))
    assert bytes(known.planes[0]) == bytes([0, INTENT, INTENT] + 3 * [out_of_sync(1)])
    assert (known.size, known.bounds(2)[1]) == (5 * CHUNK_MIN + 1, 3 * CHUNK_MIN)
    assert known.planes[0] is not old
    assert bytes(view) == bytes([0, INTENT, INTENT])
    assert bytes(known.resized(CHUNK_MIN).planes[0]) == b"\0"
