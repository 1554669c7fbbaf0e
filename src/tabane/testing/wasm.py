"""What tests of WebAssembly programs need: C compiled with Debian's wasi-libc, made into images."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tabane.runtimes.api import Image

CLANG = ("clang", "--target=wasm32-wasi", "-O2", "-s", "-Wl,--allow-undefined")
TIMEOUT_S = 60


def compile_wasm(source: Path, target: Path, *options: str) -> Path:
    """A WASI module from C. Needs the packages clang, lld, wasi-libc, libclang-rt-dev-wasm32."""
    argv = (*CLANG, *options, "-o", str(target), str(source))
    subprocess.run(argv, check=True, timeout=TIMEOUT_S)
    return target


def make_program_image(program: Path, directory: Path, *, name: str = "") -> Image:
    """An image of this one file, as the image store would unpack it below `directory`."""
    tree = directory / f"{name or program.name}-tree"
    tree.mkdir()
    (tree / program.name).write_bytes(program.read_bytes())
    return Image(f"sha256:{tree.name}", tree, kind="wasm", entrypoint=(f"/{program.name}",))
