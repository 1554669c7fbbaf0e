"""The build of middlecon's module in C, for those who have a C compiler; without it all is pure.

`python -m pip install` runs it through hatchling. A wheel with the module is one for this platform
and Python. In an editable installation the module lies beside its source.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path(__file__).parent / "src/tabane/middlecon/_native.c"
FLAGS = ("-shared", "-fPIC", "-O2", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra")
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
    made = target.with_suffix(".new")
    argv = [*find_compiler(), *FLAGS, f"-I{find_headers()}", "-o", str(made), str(SOURCE)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(str(error)) from None
    if done.returncode:
        made.unlink(missing_ok=True)
        raise Missing(" ".join(f"{argv[0]} failed: {done.stderr}".split())[:MAX_WORDS])
    return made.replace(target)


class CustomBuildHook(BuildHookInterface):
    """Adds the module to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="tabane-build-")
        if self.target_name != "wheel":
            return
        beside = version == "editable"
        if beside:  # what was made from another source, or for another Python
            for old in SOURCE.parent.glob("_native.*.so"):
                old.unlink()
        try:
            made = compile_native(SOURCE.parent if beside else Path(self._scratch.name))
        except Missing as error:
            print(f"tabane: middlecon goes without its module in C: {error}", file=sys.stderr)
            return
        if not beside:
            build_data["force_include"][str(made)] = f"tabane/middlecon/{made.name}"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._scratch.cleanup()
