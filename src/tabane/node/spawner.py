"""The agent's side of the holder: spawn engines, learn how they and their instances ended.

On every connect the holder first tells all it knows, so nothing that ended while the agent was
away is missed. When the holder itself is gone the node is gone: every wait fails with `Closed`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from pathlib import Path
from typing import Any

from tabane.errors import Closed, EngineError, NotFound
from tabane.model import ExitStatus
from tabane.runtimes.api import Command, Finished

PACKET_BYTES = 1 << 20


class HolderSpawner:
    """A `tabane.runtimes.api.Spawner` that asks the holder. `connect()` before use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._jobs: dict[str, dict[str, Any]] = {}
        self._waiters: dict[tuple[str, str], list[asyncio.Future[dict[str, Any]]]] = {}
        self._sock: socket.socket | None = None

    def connect(self) -> None:
        """Connect to the holder's control socket. Raises `Closed` when there is no holder."""
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        except OSError as error:
            sock.close()
            raise Closed(f"no holder answers at {self._path}: {error.strerror}") from error
        finally:
            os.close(directory)
        sock.setblocking(False)
        self._sock = sock
        asyncio.get_running_loop().add_reader(sock, self._on_readable)

    def close(self) -> None:
        if self._sock is None:
            return
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._sock = None
        gone = Closed("the connection to the holder is closed")
        waiters = [future for futures in self._waiters.values() for future in futures]
        for future in (*self._answers.values(), *waiters):
            if not future.done():
                future.set_exception(gone)
        self._answers.clear()
        self._waiters.clear()

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            packet = self._sock.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            return self.close()
        message = json.loads(packet)
        if "re" in message:
            future = self._answers.pop(message["re"], None)
            if future is not None and not future.done():
                future.set_result(message)
        else:
            self._on_report(message)

    def _on_report(self, report: dict[str, Any]) -> None:
        key = report["key"]
        self._jobs[key] = report
        for what in ("finished", "exited"):
            if what in report:
                for future in self._waiters.pop((key, what), ()):
                    if not future.done():
                        future.set_result(report)

    async def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self._sock is None:
            raise Closed("the connection to the holder is closed")
        number = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        self._sock.send(json.dumps({"id": number, "do": do, "with": arguments}).encode())
        try:
            answer: dict[str, Any] = await future
        finally:
            self._answers.pop(number, None)
        return answer

    async def spawn(self, command: Command) -> int:
        answer = await self._ask(
            "spawn",
            key=command.key,
            argv=command.argv,
            env=command.env,
            log=str(command.log) if command.log else None,
            log_bytes=command.log_bytes,
            log_files=command.log_files,
            pid_file=str(command.pid_file) if command.pid_file else None,
        )
        if "error" in answer:
            problem = f"cannot start {command.argv[0]} for {command.key}: {answer['error']}"
            raise EngineError(problem, argv=command.argv)
        # Its report may be here already; one of an earlier command with this key is not it.
        if self._jobs.get(command.key, {}).get("engine") != answer["pid"]:
            self._jobs[command.key] = {"key": command.key, "engine": answer["pid"]}
        return int(answer["pid"])

    async def _report(self, key: str, what: str) -> dict[str, Any]:
        job = self._jobs.get(key)
        if job is None:
            raise NotFound(f"the holder knows no process {key}")
        if what in job:
            return job
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault((key, what), []).append(future)
        return await future

    async def finished(self, key: str) -> Finished:
        report = await self._report(key, "finished")
        return Finished(ExitStatus(**report["finished"]), report.get("output", ""))

    async def exited(self, key: str) -> ExitStatus:
        report = await self._report(key, "exited")
        return ExitStatus(**report["exited"])

    async def forget(self, key: str) -> None:
        self._jobs.pop(key, None)
        await self._ask("forget", key=key)

    async def signal(self, key: str, number: int) -> bool:
        answer = await self._ask("signal", key=key, number=number)
        return bool(answer.get("sent"))

    def known(self) -> tuple[str, ...]:
        """Keys of all commands the holder has books of."""
        return tuple(self._jobs)
