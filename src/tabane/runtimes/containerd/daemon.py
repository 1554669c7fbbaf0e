"""containerd itself: one that runs already, or one of the node's own.

Its own has root, state and sockets in the driver's directory, no plugin that pulls, unpacks or
serves Kubernetes, and lives in the node's namespaces, since shims mount and look up processes where
containerd does. All these are in memory: none of it outlives the processes that it tells of, and a
start writes a dozen files, each through to its disk, which took a fifth of it.

The spawner starts it, so it outlives the agent; it ends with the spawner (the kernel sends it TERM
then). Whoever finds it gone starts it again: the shims, which keep the instances, have gone on
meanwhile, and it finds them by its state.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
from pathlib import Path

from tabane.errors import EngineError, Unsupported
from tabane.runtimes import mounts
from tabane.runtimes.api import Command, Spawner
from tabane.unix import LONGEST, connect_unix

ADDRESS_VARIABLE = "CONTAINERD_ADDRESS"
"""As `ctr` has it: the socket of a containerd to use."""
START_TIMEOUT_S = 10.0
POLL_S = 0.002
MOST_BYTES = 1 << 30
"""Of all that is kept: an instance has under 100 KiB."""
UNNEEDED = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.overlayfs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
)
"""One snapshotter must be there, or nothing works: the one called `native` needs nothing."""


class Daemon:
    """The containerd that `$CONTAINERD_ADDRESS` names, else one of the node's own."""

    def __init__(self, key: str, spawner: Spawner, directory: Path) -> None:
        configured = os.environ.get(ADDRESS_VARIABLE, "")
        self.is_own = not configured
        self.socket = Path(configured) if configured else directory / "containerd.sock"
        self._key = key
        self._spawner = spawner
        self._directory = directory
        self._starting = asyncio.Lock()

    def check(self) -> None:
        """Raises `Unsupported` with what keeps it from being used."""
        if not self.is_own:
            _check_namespaces(self.socket)
            return
        if shutil.which("containerd") is None:
            raise Unsupported(
                f"containerd is not installed, and {ADDRESS_VARIABLE} names no socket of one"
            )
        if len(os.fsencode(self.socket)) > LONGEST - len(".ttrpc"):
            raise Unsupported(
                f"{self.socket} is longer than a socket's path may be: "
                "keep the node's directory where its path is shorter"
            )

    async def ensure(self) -> bool:
        """Have it answer; whether it had to be started. Raises `Unsupported` and `EngineError`."""
        async with self._starting:
            if _answers(self.socket):
                return False
            self.check()
            if not self.is_own:
                raise EngineError(f"no containerd answers at {self.socket} any more")
            await self._start()
            return True

    async def _start(self) -> None:
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        if not self._directory.is_mount():
            flags = mounts.MS_NOSUID | mounts.MS_NODEV
            mounts.mount("tmpfs", self._directory, f"mode=0711,size={MOST_BYTES}", flags)
        config = self._directory / "config.toml"
        config.write_text(make_config(self._directory, self.socket))
        argv = ("setpriv", "--pdeathsig", "TERM", "containerd", "--config", str(config))
        await self._spawner.forget(self._key)  # one that was killed
        await self._spawner.spawn(Command(self._key, argv, log=self._log))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._wait_answers(argv)
        except TimeoutError:
            problem = f"containerd does not answer after {START_TIMEOUT_S:.0f} s: see {self._log}"
            raise EngineError(problem, argv=argv) from None

    @property
    def _log(self) -> Path:
        return self._directory.with_name("containerd.log")

    async def _wait_answers(self, argv: tuple[str, ...]) -> None:
        while not _answers(self.socket):
            if not await self._spawner.signal(self._key, 0):
                status = (await self._spawner.finished(self._key)).status
                problem = f"containerd {status.describe()} at its start: see {self._log}"
                raise EngineError(problem, argv=argv, status=status.code)
            await asyncio.sleep(POLL_S)

    @property
    def engine_state(self) -> Path:
        """Where the shims' engine keeps what it knows of containers."""
        return self._directory / "runc"

    async def stop(self) -> None:
        """End the node's own; instances go on. Idempotent."""
        if not self.is_own:
            return
        if await self._spawner.signal(self._key, signal.SIGTERM):
            await self._spawner.exited(self._key)
        await self._spawner.forget(self._key)

    def remove(self) -> None:
        """Remove what it kept, after `stop` and the instances' end. Idempotent."""
        mounts.unmount(self._directory)


def make_config(directory: Path, address: Path) -> str:
    """`config.toml` of a containerd that keeps all it has in `directory`."""
    quoted = ", ".join(f'"{name}"' for name in UNNEEDED)
    return f"""version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [{quoted}]

[grpc]
  address = "{address}"

[ttrpc]
  address = "{address}.ttrpc"
"""


def _answers(path: Path) -> bool:
    try:
        connect_unix(path, 1.0).close()
    except OSError:
        return False
    return True


def _check_namespaces(path: Path) -> None:
    """It mounts and finds processes where it lives, so that must be where the node does."""
    try:
        with connect_unix(path, 1.0) as sock:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError as error:
        raise Unsupported(f"no containerd answers at {path}: {error.strerror}") from error
    pid = struct.unpack("iII", credentials)[0]
    for kind, name in (("pid", "process"), ("mnt", "mount")):
        try:
            same = Path(f"/proc/{pid}/ns/{kind}").samefile(f"/proc/self/ns/{kind}")
        except FileNotFoundError:
            same = False
        if not same:
            raise Unsupported(
                f"the containerd at {path} lives in another {name} namespace than this node, "
                f"which it cannot serve: unset {ADDRESS_VARIABLE} to have one of the node's own"
            )
