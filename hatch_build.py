"""The build of what is in C, for those who have a C compiler; without it all is pure.

That is middlecon's module, and programs that some drivers need. `python -m pip install` runs it
through hatchling. A wheel with any of it is one for this platform and Python. In an editable
installation all of it lies beside its source.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path(__file__).parent / "src/tabane/middlecon/_native.c"
FLAGS = ("-shared", "-fPIC", "-O2", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra")
HOST = Path(__file__).parent / "src/tabane/runtimes/unikernel/host"
HOST_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-fstack-protector-strong", "-fPIE", "-pie")
HOST_LIBRARIES = ("-Wl,-z,relro,-z,now", "-ldl", "-pthread")
AGENT = Path(__file__).parent / "src/tabane/guest/agent"
CONFINE = Path(__file__).parent / "src/tabane/runtimes/confine.c"
RELAY = CONFINE.with_name("relay.c")
MEMORY = Path(__file__).parent / "src/tabane/runtimes/qemu/memory.c"
PRIVATE = MEMORY.with_name("private.c")
STAGE = Path(__file__).parent / "src/tabane/runtimes/criu/stage.c"
STATIC_FLAGS = ("-static", "-s", "-Os", "-std=gnu11", "-Wall", "-Wextra", "-Wno-format-truncation")
"""For guests, and roots of their own, that have no libraries. A name that is too long is cut."""
MAX_WORDS = 300


class Missing(Exception):
    """Why there is no module, in a few words."""


def find_compiler() -> list[str]:
    """The command of a C compiler; the one Python was built with, if it is there."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise Missing("there is no C compiler")


def find_headers() -> Path:
    found = Path(sysconfig.get_path("include"))
    if not (found / "Python.h").is_file():
        raise Missing(f"{found} has no Python.h")
    return found


def compile_native(directory: Path) -> Path:
    """Compile the module into `directory`, where it replaces the one before. Raises `Missing`."""
    target = directory / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    return run_compiler(target, *FLAGS, f"-I{find_headers()}", str(SOURCE))


def compile_host(directory: Path) -> Path:
    """Compile the host program likewise."""
    sources = sorted(map(str, HOST.glob("*.c")))
    return run_compiler(directory / "_host", *HOST_FLAGS, *sources, *HOST_LIBRARIES)


def compile_agent(directory: Path) -> Path:
    """Compile the agent of virtual machines likewise."""
    sources = sorted(map(str, AGENT.glob("*.c")))
    return run_compiler(directory / "_agent", *STATIC_FLAGS, *sources)


def compile_confine(directory: Path) -> Path:
    """Compile what starts virtual machines likewise."""
    return run_compiler(directory / "_confine", *STATIC_FLAGS, str(CONFINE))


def compile_stage(directory: Path) -> Path:
    """Compile what starts restores of containers likewise."""
    return run_compiler(directory / "_stage", *STATIC_FLAGS, str(STAGE))


def compile_relay(directory: Path) -> Path:
    """Compile what writes the logs of containers in virtual machines likewise."""
    return run_compiler(directory / "_relay", *STATIC_FLAGS, str(RELAY))


def compile_memory(directory: Path) -> Path:
    """Compile what saves the memory of virtual machines likewise."""
    return run_compiler(directory / "_memory", *STATIC_FLAGS, str(MEMORY))


def compile_private(directory: Path) -> Path:
    """Compile what has virtual machines go on with saved memory likewise."""
    return run_compiler(directory / "_private", *FLAGS, str(PRIVATE))


def run_compiler(target: Path, *words: str) -> Path:
    made = target.with_suffix(".new")
    argv = [*find_compiler(), "-o", str(made), *words]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(str(error)) from None
    if done.returncode:
        made.unlink(missing_ok=True)
        raise Missing(" ".join(f"{argv[0]} failed: {done.stderr}".split())[:MAX_WORDS])
    return made.replace(target)


def parts() -> list[tuple[Callable[[Path], Path], Path, str]]:
    """How each is compiled, where it belongs, and what becomes of those who have none."""
    return [
        (compile_native, SOURCE.parent, "middlecon goes without its module in C"),
        (compile_host, HOST.parent, "the node goes without unikernels"),
        (compile_agent, AGENT.parent, "the node goes without virtual machines"),
        (compile_confine, CONFINE.parent, "the node goes without virtual machines"),
        (compile_relay, RELAY.parent, "the node goes without virtual machines"),
        (compile_memory, MEMORY.parent, "the node goes without checkpoints of virtual machines"),
        (compile_private, PRIVATE.parent, "the node goes without checkpoints of virtual machines"),
        (compile_stage, STAGE.parent, "the node goes without checkpoints of containers"),
    ]


def find_made() -> list[Path]:
    """What an editable installation has. Each is replaced in one step, since it may be in use."""
    homes = (HOST, AGENT, CONFINE, RELAY, STAGE, MEMORY, PRIVATE)
    programs = (home.with_name(f"_{home.stem}") for home in homes)
    return [*SOURCE.parent.glob("_native.*.so"), *(path for path in programs if path.exists())]


class CustomBuildHook(BuildHookInterface):
    """Adds what is compiled to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="tabane-build-")
        if self.target_name != "wheel":
            return
        beside = version == "editable"
        stale = set(find_made()) if beside else set()
        for compile_part, home, without in parts():
            try:
                made = compile_part(home if beside else Path(self._scratch.name))
            except Missing as error:
                print(f"tabane: {without}: {error}", file=sys.stderr)
                continue
            stale.discard(made)
            if not beside:
                target = Path(*home.parts[home.parts.index("tabane") :], made.name)
                build_data["force_include"][str(made)] = str(target)
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
        for old in stale:  # what was made from another source, or for another Python
            old.unlink(missing_ok=True)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._scratch.cleanup()
