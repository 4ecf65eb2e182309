"""Where it was measured: without it figures mean nothing."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def facts() -> dict[str, object]:
    """The machine, and the versions of what was measured and with what."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "pyfuse3": importlib.metadata.version("pyfuse3"),
        "trio": importlib.metadata.version("trio"),
        "qemu": first_line("qemu-storage-daemon", "--version"),
        "fio": first_line("fio", "--version"),
        "load_average": os.getloadavg()[0],
    }


def checkout_version(directory: Path) -> str | None:
    """The commit of the checkout that *directory* lies in; None where there is no checkout."""
    described = first_line("git", "-C", str(directory), "describe", "--always", "--dirty")
    return described or None


def file_system(directory: Path) -> str:
    """The kind of file system that *directory* lies on."""
    return first_line("findmnt", "-no", "FSTYPE", "-T", str(directory)) or "unknown"


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def first_line(*command: str) -> str:
    """The first line that a command says; empty if it fails, or there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""
