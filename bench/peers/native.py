"""The programs in C: a hub that does the least, and members of each protocol."""

from __future__ import annotations

import subprocess
from pathlib import Path

from peers.processes import Failed, Processes, free_port, wait_for_port

SOURCES = Path(__file__).parent.parent / "native"
GCC = ("gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-function")


def compile_all(directory: Path) -> Path:
    """Compile every program into `directory`. Raises `Failed`."""
    directory.mkdir(exist_ok=True)
    for source in sorted(SOURCES.glob("*.c")):
        argv = [*GCC, "-o", str(directory / source.stem), str(source)]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"gcc could not compile {source.name}: {done.stderr[-2000:]}")
    return directory


def serve_floor(programs: Path, processes: Processes) -> str:
    port = free_port()
    processes.start(str(programs / "floor_hub"), str(port))
    wait_for_port(port)
    return f"tcp://127.0.0.1:{port}"


def place(url: str) -> str:
    """How the programs take an address: a port of the loopback, or a path."""
    return url.removeprefix("unix://") if url.startswith("unix://") else url.rpartition(":")[2]
