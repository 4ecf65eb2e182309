"""Programs in C that test the fast path: compiled with what they test, and run."""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import quorumfs.fastpath
from quorumfs.fastpath.native import Gate, Request

SOURCES = Path(quorumfs.fastpath.__file__).parent
PROGRAMS = Path(__file__).parents[1] / "native"

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""Any access behind the end, and any undefined behaviour, ends the program."""

THREADS = ("-fsanitize=thread",)
"""Any access that another thread may make at the same time ends the program with a failure."""


def compile_c(into: Path, *options: str | Path) -> None:
    """Compile C, with the headers of the fast path.

    A missing compiler is an error: who develops has one, and without it nothing is tested.
    """
    command = ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += [f"-I{SOURCES}", "-o", str(into), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(into: Path, name: str, *options: str, with_: tuple[str, ...] = ("gate.c",)) -> Path:
    """Compile the program *name* of ``tests/native`` with parts *with_* of the fast path."""
    program = into / name
    compile_c(program, *options, PROGRAMS / f"{name}.c", *(SOURCES / part for part in with_))
    return program


@cache
def gate_library() -> ctypes.CDLL:
    """What C decides, compiled from the sources that are here now."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "gate.so"
        compile_c(file, "-shared", "-fPIC", SOURCES / "gate.c")
        library = ctypes.CDLL(str(file))
    library.gate_admits.argtypes = (ctypes.POINTER(Gate), ctypes.POINTER(Request))
    library.gate_note.argtypes = (
        ctypes.POINTER(Gate),
        ctypes.POINTER(Request),
        ctypes.POINTER(ctypes.c_uint64),
    )
    library.gate_note.restype = None
    library.gate_times.argtypes = (ctypes.POINTER(Gate), ctypes.c_int)
    library.gate_times.restype = ctypes.c_bool
    return library


def run(program: Path, *arguments: object, timeout_s: float = 300) -> str:
    """What *program* prints; a failure fails the test with all it said."""
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout
