"""Replicas that were never one set, or whose images were renamed. Pure decisions."""

from collections.abc import Sequence
from dataclasses import replace

from quorumfs.decisions.model import Found
from quorumfs.decisions.record import Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError, account, resolve_command
from quorumfs.decisions.sameimage import image_changed
from quorumfs.errors import ExitCode


def refuse_strangers(found: Sequence[Found]) -> None:
    """Refuse replicas that were never one set."""
    members = [f for f in found if f.sidecar]
    for one in found:
        if one.image and not one.sidecar and not one.problem:
            if not members:
                continue
            where = f" (there is no {one.sidecar_place})" if one.device else ""
            paths = [f.path for f in found]
            whole = [f.path for f in members if f.sidecar and not f.sidecar.is_mixture]
            if not whole:
                raise AssemblyRefusedError(
                    "stranger",
                    f"{one.path} has no sidecar{where}, and {members[0].path} was being made a "
                    "copy, which was cut off: it is no disk. Run the same command again; or, to "
                    f"keep what {one.path} holds, {resolve_command('--keep', one.path, paths)}",
                )
            raise AssemblyRefusedError(
                "stranger",
                f"{one.path} has no sidecar{where}, but {whole[0]} is a member of a set: to "
                f"make {one.path} a copy of it, run: {resolve_command('--keep', whole[0], paths)}",
            )
    seen: dict[bytes, Found] = {}
    for one in members:
        assert one.sidecar
        first = members[0]
        assert first.sidecar
        ours, theirs = first.sidecar.record.set_id, one.sidecar.record.set_id
        if ours != theirs:
            raise AssemblyRefusedError(
                "foreign",
                f"{first.path} is of set {ours.hex()}, {one.path} is of set {theirs.hex()}: "
                "they do not belong together",
            )
        if one.sidecar.record.disk != first.sidecar.record.disk:
            raise AssemblyRefusedError(
                "foreign",
                f"{first.path} says that the disk has {_shape(first.sidecar)}, {one.path} says "
                f"{_shape(one.sidecar)}: one of their sidecars is not what quorumfs wrote",
            )
        other = seen.setdefault(one.sidecar.replica_id, one)
        if other is not one:
            raise AssemblyRefusedError(
                "duplicate",
                f"{other.path} and {one.path} are the same replica {one.sidecar.replica_id.hex()}: "
                "one is a copy of the other with its sidecar. Give only one of them; to make the "
                f"other a replica of its own, remove {one.sidecar_place} and run quorumfs resolve",
            )
    if not members:
        accounts = "; ".join(account(one, one.problem) for one in found if one.problem)
        raise AssemblyRefusedError(
            "unreadable",
            f"{accounts}. No other replica knows the set. If that is impossible: remove all "
            "sidecars, and the images are adopted anew",
            ExitCode.UNUSABLE,
        )


def refuse_exchanged(found: Sequence[Found]) -> None:
    """Refuse an image that is the one of another replica's sidecar: they were renamed."""
    for one in found:
        for other in found:
            if one is other or not one.sidecar or not other.sidecar or not one.image:
                continue
            left = other.sidecar.identity
            known = left.inode and left.mtime_ns and not one.device and not other.device
            same = known and replace(left, ctime_ns=0) == replace(one.image, ctime_ns=0)
            if same and image_changed(one) and image_changed(other):
                raise AssemblyRefusedError(
                    "exchanged",
                    f"{one.path} is the image that the sidecar of {other.path} was left with: the "
                    "images were renamed, and their sidecars were not. Give them back their names",
                    ExitCode.NEEDS_OPERATOR,
                )


def _shape(sidecar: Sidecar) -> str:
    return f"chunks of {sidecar.record.chunk_size} bytes"
