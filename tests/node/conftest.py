"""A real holder in a directory of its own, as a fixture."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tabane.clock import SYSTEM
from tabane.node.spawner import HolderSpawner
from tabane.unix import connect_unix

POLL_S = 0.002
GIVE_UP_S = 60.0


def wait_until(condition: Any) -> None:
    """Block until `condition()` is true: for what other processes do without telling."""
    deadline = SYSTEM.now() + GIVE_UP_S
    while not condition():
        assert SYSTEM.now() < deadline
        time.sleep(POLL_S)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


class HolderProcess:
    """`python -m tabane.node.holder`; the control socket's path is longer than 108 bytes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / ("long-" * 20)
        self.directory.mkdir()
        self.control = self.directory / "holder.sock"
        self.log = self.directory / "node.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, sockets: Any = (), parts: Any = (), program: str = "") -> int:
        """Start it and return its pid, once it serves. `program` runs instead of the module."""
        config = self.directory / "holder.json"
        text = {
            "control": str(self.control),
            "sockets": list(sockets),
            "parts": list(parts),
            "environment": {"TABANE_FROM_CONFIG": "yes"},
        }
        config.write_text(json.dumps(text))
        how = ("-c", program) if program else ("-m", "tabane.node.holder")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                (sys.executable, *how, str(config)), stdin=subprocess.DEVNULL, stderr=log
            )
        wait_until(lambda: self.has_ended or self._serves())
        assert not self.has_ended, self.log.read_text()
        return self.process.pid

    def _serves(self) -> bool:
        """Whether it took a connection, and has put it away again."""
        try:
            with connect_unix(self.control, GIVE_UP_S) as sock:
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
        except OSError:
            return False
        return True

    @property
    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def children(self) -> set[int]:
        assert self.process is not None
        pid = self.process.pid
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def descriptors(self) -> list[str]:
        assert self.process is not None
        found = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return sorted(str(path.readlink()) for path in found)

    def terminate(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait()

    def end(self) -> None:
        """Whatever a test did: no process of it stays."""
        if self.process is None or self.has_ended:
            return
        self.process.send_signal(signal.SIGSTOP)
        for child in self.children():
            os.kill(child, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Any:
    return wait_until


@pytest.fixture(name="is_gone")
def is_gone_fixture() -> Any:
    return is_gone


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[HolderProcess]:
    """Not started yet."""
    process = HolderProcess(tmp_path)
    yield process
    process.end()


@pytest.fixture
async def spawner(holder: HolderProcess) -> AsyncIterator[HolderSpawner]:
    """Connected to a holder without parts."""
    holder.start()
    spawner = HolderSpawner(holder.control)
    await spawner.connect()
    yield spawner
    spawner.close()
