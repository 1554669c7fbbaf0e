"""Finding CRIU, and its command lines.

A dump is made by root, who alone may read seccomp filters back. A restore runs as root of the app's
own user namespace: all that it makes is made with the rights of an engine that starts the app, and
the link's namespaces, which belong to that user namespace, can be joined. What CRIU finds out of
the kernel by trying, as root, it then reads from a file (`FEATURES`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tabane.errors import Unsupported
from tabane.model import Value

OWN = Path("/opt/tabane/criu")
"""Where `scripts/setup` puts it: no released Debian has one that knows kernels of today."""
OLDEST = (4, 2)
"""It knows what newer kernels have changed: the vDSO's data, SO_PASS* of sockets."""
STAGE = Path(__file__).with_name("_stage")
FEATURES = "criu.kdat"
CHECK_TIMEOUT_S = 20.0
IMAGES, WORK, ROOT, EXTERNAL = "images", "work", "root", "external"
"""What is shown to a restore, below /tmp."""
DUMP_LOG, RESTORE_LOG, SAID = "dump.log", "restore.log", "said"
"""In the directory for work."""
LINK = "link"
"""What the link's network namespace is called in images."""
OUTPUT_FD, LINK_FD = 3, 5
"""As of `stage.c`."""
_PROBE = """
mount -t tmpfs none /run || exit 126
"$@" check && cat /run/criu.kdat >&3
"""


class Criu(Value, frozen=True):
    argv: tuple[str, ...]
    version: str


def find_criu() -> Criu:
    """The newest that is installed. Raises `Unsupported` when there is none, or only older ones."""
    found = [Criu(argv, version) for argv in _candidates() if (version := _ask_version(argv))]
    if not found:
        raise Unsupported("CRIU is not installed: run scripts/setup, or install criu 4.2 or later")
    newest = max(found, key=lambda criu: parse_version(criu.version))
    if parse_version(newest.version) < OLDEST:
        raise Unsupported(
            f"CRIU {newest.version} is too old: install {'.'.join(map(str, OLDEST))} or later, "
            "as scripts/setup does"
        )
    if not STAGE.exists():
        raise Unsupported(f"{STAGE.name} was not compiled: install a C compiler, then Tabane again")
    return newest


def _candidates() -> list[tuple[str, ...]]:
    program, on_path = OWN / "usr/sbin/criu", shutil.which("criu")
    loaders = OWN.glob("usr/lib/*/ld-linux*.so.*")
    own = [(str(each), "--library-path", str(each.parent), str(program)) for each in loaders]
    return own + ([(on_path,)] if on_path else [])


def _ask_version(argv: tuple[str, ...]) -> str:
    """Empty when it cannot be run."""
    try:
        done = subprocess.run(
            (*argv, "--version"), capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else ""


def parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("."))


def learn_features(criu: Criu, directory: Path) -> None:
    """Have it find out what the kernel can, for restores to come, into `directory`. Raises
    `Unsupported` with its own words when something is missing."""
    target = directory / FEATURES
    fresh = target.with_suffix(".new")
    command = ("unshare", "--mount", "--", "sh", "-c", f'exec 3>"$0"; {_PROBE}', str(fresh))
    try:
        done = subprocess.run(
            (*command, *criu.argv), capture_output=True, text=True, timeout=CHECK_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise Unsupported(f"CRIU {criu.version} checked the kernel without end") from None
    if done.returncode != 0 or not fresh.stat().st_size:
        fresh.unlink(missing_ok=True)
        words = find_problem(f"{done.stdout}\n{done.stderr}") or "it does not say why"
        raise Unsupported(f"CRIU {criu.version} cannot work with this kernel: {words}")
    fresh.chmod(0o644)
    fresh.replace(target)


_ENTRY = re.compile(r"^(?:\(\s*[\d.]+\)\s*)?(?:pie: )?\s*(?:\d+: )?Error \([^)]*\): (.*)$")
_NOISE = (
    "rlimit: Can't setup",
    "suspending seccomp failed",
    "failed to suspend seccomp",
    "cg: cgroupd:",
    "exited, status=",
    "Dumping FAILED",
    "Restoring FAILED",
)


def find_problem(log: str) -> str:
    """What CRIU failed for, of its log: the first error that is not said always, nor a
    consequence."""
    errors = (found[1] for line in log.splitlines() if (found := _ENTRY.match(line)))
    return next((error.strip() for error in errors if not error.startswith(_NOISE)), "")


def dump_argv(
    criu: Criu, pid: int, images: Path, work: Path, external: Iterable[str], freezer: Path
) -> tuple[str, ...]:
    """Dumps the tree of `pid`, which stands still before and after. `external`: what is not of it.

    Connections are not saved: who has one at the other end would not know of a copy's. Nothing in
    the network is blocked for that.
    """
    return (
        *(*criu.argv, "dump", "-v1", "--tree", str(pid), "--images-dir", str(images)),
        *("--work-dir", str(work), "--log-file", DUMP_LOG, "--freeze-cgroup", str(freezer)),
        *("--manage-cgroups=ignore", "--leave-running", "--network-lock", "skip"),
        *("--timeout", STOP_TIMEOUT_S, "--tcp-close", "--skip-in-flight", "--file-locks"),
        *("--ghost-limit", GHOST_LIMIT),
        *(word for each in external for word in ("--external", each)),
    )


STOP_TIMEOUT_S = "2"
"""For all processes to stop: a child that ends at that very moment is waited for in vain."""
NOT_STOPPED = "Timeout reached"
"""How CRIU begins to say so."""
GHOST_LIMIT = "64M"
"""Largest file without a name that a program has open."""


def restore_argv(
    criu: Criu, external: dict[str, str], inherited: dict[str, int]
) -> tuple[str, ...]:
    """Restores what is on the stage (see `stage.c`). `external`: key in the images -> path there;
    `inherited`: name of a descriptor in the images -> its number now."""
    mounts = (f"mnt[{key}]:{path}" for key, path in external.items())
    descriptors = (f"fd[{number}]:{name}" for name, number in inherited.items())
    return (
        *(*criu.argv, "restore", "-v1", "--unprivileged", "--images-dir", f"/tmp/{IMAGES}"),
        *("--work-dir", f"/tmp/{WORK}", "--log-file", RESTORE_LOG, "--root", f"/tmp/{ROOT}"),
        *("--restore-detached", "--pidfile", f"/tmp/{WORK}/pid", "--manage-cgroups=ignore"),
        *("--tcp-close", "--file-locks"),
        *(word for each in mounts for word in ("--external", each)),
        *(word for each in descriptors for word in ("--inherit-fd", each)),
    )
