"""Finding runsc, and its command lines: as an ordinary user of the machine, in the app's own ids.

The engine needs no right over the machine. It joins the user namespace of the instance's link first
and is root only there: it can mount in a mount namespace of its own, take over the link, and make
namespaces for the sandbox. Two files of /proc are covered for it:

- /proc/sys/net: where that shows `core/rmem_default`, as newer kernels do in every namespace, runsc
  believes that it is about to take the machine's own network, and refuses;
- /proc/meminfo: by it the sandbox's kernel tells the program how much memory there is.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from tabane.errors import EngineError, TimedOut, Unsupported
from tabane.model import Value
from tabane.runtimes.runsc.formats import OLDEST_RELEASE, parse_release

OWN = Path("/opt/tabane/runsc/usr/bin/runsc")
"""Where `scripts/setup` puts it on a Debian whose own is too old."""
ANSWER_TIMEOUT_S = 10.0
MEMINFO = "meminfo"
_COVER = """
mount -t tmpfs -o size=4k,ro none /proc/sys/net || exit 126
mount --bind "$1" /proc/meminfo || exit 126
shift
exec "$@"
"""


class Engine(Value, frozen=True):
    path: str
    version: str


def find_engine() -> Engine:
    """The newest that is installed. Raises `Unsupported` when there is none, or only older ones."""
    found = [path for path in (str(OWN), shutil.which("runsc")) if path and Path(path).exists()]
    if not found:
        raise Unsupported("runsc is not installed")
    engines = [Engine(path, _ask_version(path)) for path in found]
    newest = max(engines, key=lambda engine: parse_release(engine.version))
    if parse_release(newest.version) < OLDEST_RELEASE:
        raise Unsupported(
            f"{newest.path} is too old ({newest.version or 'it names no version'}): "
            f"install a release of {OLDEST_RELEASE} or later, as scripts/setup does"
        )
    return newest


def _ask_version(path: str) -> str:
    """The first line of what it says; empty when it cannot be run."""
    try:
        done = subprocess.run(
            (path, "--version"), capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0]


def joining(pid: int, argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv` as root of the user namespace of a process."""
    return ("nsenter", "--user", "--target", str(pid), "-S", "0", "-G", "0", "--", *argv)


def covering(directory: Path, argv: tuple[str, ...]) -> tuple[str, ...]:
    """`argv` in a mount namespace of its own, with the covers; `directory` has the memory's."""
    own = ("unshare", "--mount", "--propagation", "slave", "--")
    return (*own, "/bin/sh", "-c", _COVER, "sh", str(directory / MEMINFO), *argv)


def write_meminfo(directory: Path, memory_bytes: int) -> None:
    (directory / MEMINFO).write_text(f"MemTotal:       {memory_bytes >> 10} kB\n")


async def ask(argv: tuple[str, ...], timeout_s: float | None) -> str:
    """What a command of the engine answers. Raises `EngineError` with its words, and `TimedOut`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(timeout_s):
            said, complained = await process.communicate()
    except TimeoutError:
        raise TimedOut(f"runsc does not answer: {' '.join(argv[-3:])}") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
    if process.returncode:
        words = complained.decode(errors="replace").strip()
        raise EngineError(
            f"runsc failed: {words}", argv=argv, status=process.returncode, output=words
        )
    return said.decode(errors="replace")
