"""Programs in C that test the fast path: compiled with what they test, and run."""

import subprocess
from pathlib import Path

import quorumfs.fastpath

SOURCES = Path(quorumfs.fastpath.__file__).parent
PROGRAMS = Path(__file__).parents[1] / "native"

MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""Any access behind the end, and any undefined behaviour, ends the program."""

THREADS = ("-fsanitize=thread",)
"""Any access that another thread may make at the same time ends the program with a failure."""


def build(into: Path, name: str, *options: str, with_: tuple[str, ...] = ("gate.c",)) -> Path:
    """Compile the program *name* of ``tests/native`` with parts *with_* of the fast path.

    A missing compiler is an error: who develops has one, and without it nothing is tested.
    """
    program = into / name
    command = ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += [*options, f"-I{SOURCES}", "-o", str(program), str(PROGRAMS / f"{name}.c")]
    command += [str(SOURCES / part) for part in with_]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


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
