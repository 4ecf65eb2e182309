"""A sidecar as one piece of bytes, for tests that look at it, damage it and read it again."""

from quorumfs.decisions import sidecar as form
from quorumfs.decisions.record import Sidecar


def encode(sidecar: Sidecar) -> bytes:
    """A whole new file."""
    content = bytearray(form.file_size(sidecar.map))
    for offset, piece in form.encode(sidecar):
        content[offset : offset + len(piece)] = piece
    return bytes(content)


def decode(content: bytes) -> Sidecar:
    """The sidecar in a whole file."""
    return form.decode(lambda offset, length: content[offset : offset + length])
