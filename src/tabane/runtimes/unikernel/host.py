"""The command lines of the host, a small program in C beside this file that `hatch_build.py`
compiles: what a process of an instance is, and how it is confined. Pure but for `find_host`.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from tabane.errors import Unsupported
from tabane.model import Value
from tabane.runtimes.api import Link

HOST = Path(__file__).parent / "_host"
INNER_ID = 65532
"""User and group of every host, in its app's id range: nobody's, and not its root."""
MOST_WORKERS = 64
TIMEOUT_S = 10


class Confinement(Value, frozen=True):
    """What is common to all hosts. Namespaces of `link`; without one, none of the machine's."""

    root: Path
    """An empty directory, on which the process's tree of files is made in memory."""
    filter: Path
    """A compiled seccomp filter."""
    link: Link | None = None
    cgroups: tuple[Path, ...] = ()
    id: int = INNER_ID
    binds: tuple[str, ...] = ()
    """`SOURCE:TARGET` read-only, `SOURCE:TARGET:rw`; of a device, a node that the host may use."""
    pid_file: Path | None = None
    """Where the pid of what is left behind goes; without, the process itself goes on."""
    errors: Path | None = None
    """Where a sentence goes when it cannot start."""


class Run(Value, frozen=True):
    """One instance of a module. `port`: it answers requests, else it runs once."""

    library: Path
    module: Path
    trial: Path
    memory_bytes: int
    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    address: str = ""
    port: int = 0
    workers: int = 1
    timeout_ms: int = 0


def find_host() -> str:
    """Raises `Unsupported` when it was not compiled."""
    if not HOST.exists():
        raise Unsupported(
            "its host program was not compiled: install a C compiler, then Tabane again"
        )
    return str(HOST)


@cache
def wasi_functions() -> frozenset[str]:
    """What a module may import, as the host itself says."""
    argv = (find_host(), "wasi")
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    return frozenset(done.stdout.split())


def options(confinement: Confinement) -> tuple[str, ...]:
    named: list[tuple[str, object]] = [
        ("errors", confinement.errors),
        ("root", confinement.root),
        ("filter", confinement.filter),
        ("id", confinement.id),
        ("pid-file", confinement.pid_file),
        *(("cgroup", cgroup) for cgroup in confinement.cgroups),
        *(("bind", bind) for bind in confinement.binds),
    ]
    if confinement.link is not None:
        named += [
            ("user-namespace", confinement.link.user_namespace),
            ("network-namespace", confinement.link.network_namespace),
        ]
    return tuple(f"--{name}={value}" for name, value in named if value is not None)


def run_argv(confinement: Confinement, run: Run) -> tuple[str, ...]:
    """Leaves an instance of a module behind."""
    serving = (
        f"--address={run.address}",
        f"--port={run.port}",
        f"--workers={run.workers}",
        f"--timeout-ms={run.timeout_ms}",
    )
    return (
        *(find_host(), "run", *options(confinement)),
        f"--library={run.library}",
        f"--module={run.module}",
        f"--trial={run.trial}",
        f"--memory-bytes={run.memory_bytes}",
        *(serving if run.port else ()),
        *(f"--env={entry}" for entry in run.env),
        *("--", *run.args),
    )


def compile_argv(
    confinement: Confinement, library: Path, source: Path, target: Path, *, cpu_s: int, most: int
) -> tuple[str, ...]:
    """Compiles a module into a new file; `most` bytes of memory."""
    return (
        *(find_host(), "compile", *options(confinement)),
        *(f"--cpu-s={cpu_s}", f"--address-bytes={most}"),
        *(f"--library={library}", f"--module={source}", f"--output={target}"),
    )


def exec_argv(
    confinement: Confinement,
    argv: tuple[str, ...],
    env: tuple[str, ...] = (),
    limits: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Another program, by its path in the confined tree."""
    settings = tuple(f"--env={entry}" for entry in env)
    return (find_host(), "exec", *options(confinement), *limits, *settings, "--", *argv)
