"""The C library of the fast path, its structures, and why it cannot be had where that is so."""

import ctypes
import os
from enum import IntEnum
from pathlib import Path

REPLICAS, PLANES, RANGES, JOURNAL, HANDLES, BOUNDS = 32, 5, 64, 4096, 1024, 14
"""The limits of gate.h."""

SERVERS = REPLICAS + 1

NOWAY = "it was not built: that needs a C compiler and Linux's headers"


class KeepsOut(IntEnum):
    """Which requests a range keeps out; both are joined by *or*."""

    WRITES = 1
    READS = 2


class RequestKind(IntEnum):
    """``enum request_kind``."""

    OTHER = 0
    READ = 1
    WRITE = 2


class Phase(IntEnum):
    """``enum phase``, of those that Python acts on."""

    TAKEN = 3
    RETURNED = 4
    FAILED = 5


TRY_AGAIN = -1
"""The outcome of a system call that may be tried again, whole."""


class Range(ctypes.Structure):
    """``struct gate_range``."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("keeps_out", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class GateReplica(ctypes.Structure):
    """``struct gate_replica``."""

    _fields_ = (
        ("fd", ctypes.c_int32),
        ("slot", ctypes.c_uint32),
        ("memory", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("durations", ctypes.c_void_p),
        ("regions", ctypes.c_void_p),
    )


class GatePlane(ctypes.Structure):
    """``struct gate_plane``."""

    _fields_ = (
        ("states", ctypes.c_void_p),
        ("mask", ctypes.c_uint8),
        ("wanted", ctypes.c_uint8),
        ("unused", ctypes.c_uint8 * 6),
    )


class GateCounters(ctypes.Structure):
    """``struct gate_counters``."""

    _fields_ = (
        ("reads", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("writes", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
    )


class Gate(ctypes.Structure):
    """``struct gate``: see gate.h for the meaning of each field."""

    _fields_ = (
        ("size", ctypes.c_uint64),
        ("chunk_size", ctypes.c_uint64),
        ("bounds_ns", ctypes.c_uint64 * BOUNDS),
        ("plane", GatePlane * PLANES),
        ("planes", ctypes.c_uint32),
        ("keep_zeros", ctypes.c_uint32),
        ("readers", ctypes.c_uint32),
        ("writers", ctypes.c_uint32),
        ("ranges", ctypes.c_uint32),
        ("journalled", ctypes.c_uint32),
        ("reader", GateReplica * REPLICAS),
        ("writer", GateReplica * REPLICAS),
        ("range", Range * RANGES),
        ("requests", ctypes.c_uint64),
        ("counters", GateCounters * REPLICAS),
        ("journal", ctypes.c_uint64 * JOURNAL),
        ("wrote", ctypes.c_uint8 * HANDLES),
    )


class Request(ctypes.Structure):
    """``struct request``."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("unique", ctypes.c_uint64),
        ("handle", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
    )


class Server(ctypes.Structure):
    """``struct server``."""

    _fields_ = (
        ("phase", ctypes.c_uint32),
        ("outcome", ctypes.c_int32),
        ("request", Request),
        ("begun", ctypes.c_uint64),
        ("message", ctypes.c_uint32),
        ("length", ctypes.c_uint32),
        ("answer", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
    )


def _load() -> tuple[ctypes.CDLL, ctypes.PyDLL] | str:
    """The library, or why there is none."""
    if os.environ.get("QUORUMFS_NO_SHIM"):
        return "QUORUMFS_NO_SHIM is set"
    place = Path(__file__).with_name("_native.abi3.so")
    if not place.exists():
        return NOWAY
    try:
        library = ctypes.CDLL(str(place))
    except OSError as error:
        return str(error)
    library.loop_sizes.restype = ctypes.c_size_t
    if library.loop_sizes() != ctypes.sizeof(Gate) << 16 | ctypes.sizeof(Server):
        return "it was built from another version"
    library.loop_start.argtypes = (
        ctypes.POINTER(Gate),
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_uint64,
    )
    library.loop_servers.restype = ctypes.POINTER(Server * SERVERS)
    library.loop_release.argtypes = library.loop_requeue.argtypes = (ctypes.POINTER(Server),)
    library.loop_close.argtypes = ()
    library.loop_reply.argtypes = (
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_size_t,
    )
    library.request_parse.argtypes = (
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.POINTER(Request),
    )
    library.gate_admits.argtypes = (ctypes.POINTER(Gate), ctypes.POINTER(Request))
    library.gate_note.argtypes = (
        ctypes.POINTER(Gate),
        ctypes.POINTER(Request),
        ctypes.POINTER(ctypes.c_uint64),
    )
    return library, ctypes.PyDLL(str(place))


_loaded = _load()

library = None if isinstance(_loaded, str) else _loaded[0]
"""The library; None where it cannot be had."""

brief = None if isinstance(_loaded, str) else _loaded[1]
"""The same library, for calls so short that to give the interpreter away takes longer."""

missing = _loaded if isinstance(_loaded, str) else None
"""Why the library cannot be had; None where it can."""
