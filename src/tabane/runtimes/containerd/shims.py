"""The runtimes of containerd that drivers use: names, and what they need to be there."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tabane.model import Class, Value


class Shim(Value, frozen=True):
    """A `shim` is the program that containerd starts for each instance, and that keeps it."""

    driver: str
    isolation: Class
    runtime: str
    """As containerd's clients name it."""
    program: str
    """Looked for on PATH, under the name that containerd makes of the runtime's."""


RUNC = Shim("containerd", Class.CONTAINER, "io.containerd.runc.v2", "containerd-shim-runc-v2")
KATA = Shim("kata", Class.VM, "io.containerd.kata.v2", "containerd-shim-kata-v2")
FIRECRACKER = Shim(
    "containerd-firecracker", Class.MICROVM, "aws.firecracker", "containerd-shim-aws-firecracker"
)


def socket_of(address: Path, namespace: str, instance: str) -> Path:
    """Where the shim of an instance listens (containerd's `shim.SocketAddress`): one that was
    killed leaves it behind."""
    name = hashlib.sha256(f"{address}/{namespace}/{instance}".encode()).hexdigest()
    return Path("/run/containerd/s") / name


def find_shims(program: str, instance: str) -> Iterator[int]:
    """The processes that have the instance's name among the words of a shim's command line."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(words[0]).name == program and instance in words:
                yield int(process.name)


def kill_shims(program: str, instance: str) -> None:
    """For when no containerd can be asked to."""
    for pid in find_shims(program, instance):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
