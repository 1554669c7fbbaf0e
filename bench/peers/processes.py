"""Processes that are started, stopped, continued and ended together, and end with this one."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

PYTHON = (sys.executable, "-m")
BENCH = Path(__file__).parent.parent
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""Some of Debian's servers are commands of root."""
ANSWER_S = 120.0
"""The longest that anything here may take: opening 1,000 sessions, or one order."""
END_S = 5.0


class Failed(Exception):
    """A process did not do what it was started for."""


class Process:
    """One process and, in a session of its own, what it forks."""

    def __init__(
        self, argv: tuple[str, ...], env: Mapping[str, str], log: Path, *, quiet: bool
    ) -> None:
        self.name = Path(argv[0]).name if argv[0] != sys.executable else " ".join(argv[2:5])
        self._log = log
        self._unread = b""
        with log.open("wb") as file:
            self._popen = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *argv),
                stdin=subprocess.PIPE,
                stdout=file if quiet else subprocess.PIPE,
                stderr=file,
                env={**os.environ, "PATH": PATH, "PYTHONPATH": str(BENCH), **env},
                start_new_session=True,
            )
        assert self._popen.stdin
        self._stdin, self._stdout = self._popen.stdin, self._popen.stdout

    @property
    def pid(self) -> int:
        return self._popen.pid

    def rss_kib(self) -> int:
        """Its resident memory."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(text.partition("\nRss:")[2].split()[0])

    def write_line(self, line: str) -> None:
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self.failed("has ended") from None

    def read_line(self, timeout_s: float = ANSWER_S) -> str:
        """The next line it prints. Raises `Failed` when there is none in time."""
        assert self._stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._stdout], [], [], left_s)[0]:
                raise self.failed(f"said nothing for {timeout_s:.0f} s")
            data = os.read(self._stdout.fileno(), 1 << 16)
            if not data:
                raise self.failed("has ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def wait_until_ready(self) -> None:
        if (said := self.read_line()) != "ready":
            raise self.failed(f"said {said!r}")

    def failed(self, what: str) -> Failed:
        said = self._log.read_text(errors="replace").strip()[-2000:]
        return Failed(f"{self.name} {what}: {said or 'it gave no reason'}")

    def signal(self, number: signal.Signals) -> None:
        """To all of its session that is still there."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """End it, and what it has forked. Idempotent."""
        self.signal(signal.SIGCONT)
        self._stdin.close()
        self._popen.terminate()
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            pass
        self.signal(signal.SIGKILL)
        self._popen.wait()
        if self._stdout is not None:
            self._stdout.close()


class Processes:
    """A contender's processes. Leaving the block ends all, the last first."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._all: list[Process] = []

    def __len__(self) -> int:
        return len(self._all)

    @property
    def first(self) -> Process:
        return self._all[0]

    def start(
        self, *argv: str, env: Mapping[str, str] | None = None, quiet: bool = False
    ) -> Process:
        """Of a `quiet` one nothing is read: what it prints goes to its log."""
        log = self.scratch / f"log-{len(self._all)}-{time.monotonic_ns()}"
        process = Process(argv, env or {}, log, quiet=quiet)
        self._all.append(process)
        return process

    def freeze(self) -> None:
        """While others are measured, these do nothing."""
        for process in self._all:
            process.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._all:
            process.signal(signal.SIGCONT)

    def close(self) -> None:
        while self._all:
            self._all.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_for_port(port: int, timeout_s: float = 60.0) -> None:
    """Until something listens there. Raises `Failed`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise Failed(f"nothing listens on port {port} after {timeout_s:.0f} s")
