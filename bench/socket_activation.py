"""What people have without Tabane: systemd's socket activation of containers by podman.

The first process of a node of its own, like `wake_by_hand`; a line is a rung and the name of an app
file. `systemd-socket-activate` listens, and with the first connection becomes a shell, which brings
the container up as the rung has it (`podman run`, `unpause`, `container restore`), waits until its
port is open, and becomes `systemd-socket-proxyd`, as that program's manual has it. podman runs as
root, with the host's network and without a user namespace, which is less than Tabane does. `open`
has a container run with the proxy before it, for `warm` and `thaw`, until `close`; `save` has
podman make a checkpoint for `restore`, until `drop`.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from rungs_by_hand import FROZEN_S
from tabane import spec
from tabane.errors import Unsupported
from tabane.images import ImageStore
from tabane.model import App
from tabane.network import prepare_node
from tabane.network.sockets import SocketTable
from tabane.node.local import HERE
from tabane.runtimes.criu.engine import Criu, find_criu
from wake_by_hand import first_byte, serve

ADDRESS, PORT = "127.0.0.1", 7000
PROXY = "/lib/systemd/systemd-socket-proxyd"
POLL_S = 0.001
NAME = "peer"
WAKE = """
env -u LISTEN_FDS -u LISTEN_PID -u LISTEN_FDNAMES {order} </dev/null >&2 3<&- || exit 1
until (exec 4<>/dev/tcp/{address}/{port}) 2>/dev/null; do sleep 0.002; done
exec {proxy} {address}:{port}
"""


class Podman:
    def __init__(self, directory: Path, cgroup: str) -> None:
        self.directory = directory
        self.cgroup = cgroup
        self.images = ImageStore(directory / "images")
        self.sockets = SocketTable(os.getpid())
        self.activation: asyncio.subprocess.Process | None = None
        self.podman_here = ["podman", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        for option in ("root", "runroot", "tmpdir"):
            self.podman_here += [f"--{option}", str(HERE / "run" / option)]
        for place in ("/run", "/dev/shm"):  # with books of podman's, which are to go with the node
            subprocess.run(("mount", "-t", "tmpfs", "none", place), check=True)
        self.show_criu(HERE / "run" / "bin")

    def show_criu(self, place: Path) -> None:
        """podman and runc look for it among the programs. Without one they say so themselves."""
        with suppress(Unsupported):
            self.make_criu(place / "criu", find_criu())
            os.environ["PATH"] = f"{place}:{os.environ['PATH']}"

    def make_criu(self, program: Path, criu: Criu) -> None:
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shlex.join(criu.argv)} "$@"\n')
        program.chmod(0o755)

    async def answer(self, line: str) -> float:
        """Milliseconds of a rung; 0 where nothing is timed."""
        rung, name = line.split()
        app = await self.app(name)
        self.command = [*self.podman_here, "--runtime", app.driver]
        if rung in ("cold", "open", "save"):
            await self.remove()  # what a failure left
        if rung == "cold":
            took_ms = await self.wake(app, self.run(app))
            await self.remove()
            return took_ms
        if rung == "open":
            await self.wake(app, self.run(app), keep=True)
        elif rung == "warm":
            return await first_byte(ADDRESS, PORT)
        elif rung == "thaw":
            await self.let_go()
            self.podman("pause", NAME)
            await asyncio.sleep(FROZEN_S)
            return await self.wake(app, self.words("unpause", NAME), keep=True)
        elif rung == "save":
            await self.wake(app, self.run(app))
            self.podman("container", "checkpoint", "--tcp-established", NAME)
        elif rung == "restore":
            took_ms = await self.wake(app, self.words("container", "restore", "--keep", NAME))
            self.podman("kill", NAME)
            self.podman("wait", NAME)
            return took_ms
        elif rung in ("close", "drop"):
            await self.remove()
        return 0.0

    async def app(self, name: str) -> App:
        """With its image's tree in place of its image."""
        app = spec.load_app(self.directory / f"{name}.toml")
        if app.image == "host":
            image = await self.images.prepare("host")
            return replace(app, image=str(image.tree))
        return replace(app, image=app.image.removeprefix("rootfs:"))

    def run(self, app: App) -> str:
        options = ["--detach", "--name", NAME, "--network", "host", "--log-driver", "none"]
        options += ["--cgroup-parent", self.cgroup, "--cgroups", "no-conmon"]
        options += ["--memory", str(app.resources.memory_bytes)]
        if not Path(app.image, "bin/busybox").exists():
            options += ["--volume", "/usr:/usr:ro"]
        return self.words("run", *options, "--rootfs", f"{app.image}:O", *app.command)

    def words(self, *arguments: str) -> str:
        return shlex.join((*self.command, *arguments))

    def podman(self, *arguments: str) -> None:
        done = subprocess.run((*self.command, *arguments), capture_output=True, text=True)
        if done.returncode != 0:
            problem = done.stderr.rpartition("Error: ")[2].strip()
            raise RuntimeError(f"podman {' '.join(arguments)}: {problem}")

    async def wake(self, app: App, order: str, *, keep: bool = False) -> float:
        """Milliseconds from a connection to the first byte; the proxy stays if it is to `keep`."""
        script = WAKE.format(order=order, address=ADDRESS, port=app.port, proxy=PROXY)
        argv = ("systemd-socket-activate", "-l", f"{ADDRESS}:{PORT}", "bash", "-c", script)
        self.activation = await asyncio.create_subprocess_exec(*argv)
        while not self.sockets.listens(ADDRESS, PORT):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_S)
        took_ms = await first_byte(ADDRESS, PORT)
        if not keep:
            await self.let_go()
        return took_ms

    async def let_go(self) -> None:
        if self.activation is not None:
            with suppress(ProcessLookupError):
                self.activation.kill()
            await self.activation.wait()
            self.activation = None

    async def remove(self) -> None:
        await self.let_go()
        self.podman("rm", "--force", "--ignore", "--time", "0", NAME)


async def main() -> None:
    directory = Path(sys.argv[1])
    await prepare_node([])
    await serve(directory, Podman(directory, sys.argv[2]).answer)


if __name__ == "__main__":
    asyncio.run(main())
