"""How a request is cut into whole blocks: nothing is left out, and nothing is changed beside it."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.alignment import kept, pieces, ragged

BLOCKS = st.sampled_from([1, 512, 4096])
PLACES = st.integers(0, 40_000) | st.integers(0, 80).map(lambda sectors: sectors * 512)


@given(PLACES, PLACES, BLOCKS, st.integers(1, 5))
def test_pieces_are_whole_blocks_and_have_exactly_what_was_asked_for(
    one: int, other: int, block: int, blocks: int
) -> None:
    offset, end = sorted((one, other))
    cut = list(pieces(offset, end, block, blocks * block))
    for piece in cut:
        assert piece.start % block == piece.stop % block == 0
        assert piece.start <= piece.first < piece.end <= piece.stop <= piece.start + blocks * block
        assert piece.first - piece.start < block
        assert piece.stop - piece.end < block
    assert all(a.end == b.first and a.stop == b.start for a, b in pairwise(cut))
    if offset < end:
        assert (cut[0].first, cut[-1].end) == (offset, end)
    else:
        assert not cut


@given(PLACES, PLACES, BLOCKS)
def test_blocks_are_kept_that_a_write_has_part_of(one: int, other: int, block: int) -> None:
    offset, end = sorted((one, other))
    touched = range(offset - offset % block, end, block) if offset < end else range(0)
    partly = [start for start in touched if offset > start or end < start + block]
    cut = list(pieces(offset, end, block, 2 * block))
    assert [start for piece in cut for start in kept(piece, block)] == partly
    assert ragged(offset, end, block) == [start // block for start in partly]
