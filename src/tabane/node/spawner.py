"""The agent's side of the holder: spawn engines, learn how they and their instances ended.

On every connect the holder first tells all it knows, so nothing that ended while the agent was
away is missed. When the holder itself is gone the node is gone: every wait fails with `Closed`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabane.errors import Closed, EngineError, NotFound
from tabane.model import ExitStatus
from tabane.runtimes.api import Command, Finished
from tabane.unix import connect_unix

GREETING = 0
"""The holder answers this request, which is the connection itself, when it has told all."""


class _Job:
    """The holder's latest report of a command; `outdated` once there is a newer one, or none."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.report = report
        self.outdated = asyncio.Event()


class HolderSpawner(asyncio.Protocol):
    """A `tabane.runtimes.api.Spawner` that asks the holder. `connect()` once, before use.
    `on_part_end` is told of each part of the node that has ended, also before this: see
    `Holder._on_part_end`."""

    def __init__(
        self, path: Path, on_part_end: Callable[[dict[str, Any]], None] = lambda end: None
    ) -> None:
        self._path = path
        self._on_part_end = on_part_end
        self._ids = itertools.count(GREETING + 1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._jobs: dict[str, _Job] = {}
        self._inbox = b""
        self._transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        """Connect to the holder's control socket; return when it has told all it knows.

        Raises `Closed` when there is no holder.
        """
        sock = connect_holder(self._path)
        loop = asyncio.get_running_loop()
        told = self._answers[GREETING] = loop.create_future()
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=sock)
        await told

    def close(self) -> None:
        """Leave; every wait fails with `Closed`. Idempotent."""
        if self._transport is None:
            return
        self._transport.abort()
        self._transport = None
        for future in self._answers.values():
            if not future.done():
                future.set_exception(_closed())
        self._answers.clear()
        for job in self._jobs.values():
            job.outdated.set()

    def connection_lost(self, error: Exception | None) -> None:
        """The holder is gone (called by asyncio)."""
        self.close()

    def data_received(self, data: bytes) -> None:
        """Take what the holder tells (called by asyncio)."""
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "re" in message:
                self._on_answer(message)
            elif "part" in message:
                self._on_part_end(message)
            else:
                self._on_report(message)

    def _on_answer(self, answer: dict[str, Any]) -> None:
        future = self._answers.pop(answer["re"], None)
        if future is not None and not future.done():
            future.set_result(answer)

    def _on_report(self, report: dict[str, Any]) -> None:
        self._drop(report["key"])
        self._jobs[report["key"]] = _Job(report)

    def _drop(self, key: str) -> None:
        if (job := self._jobs.pop(key, None)) is not None:
            job.outdated.set()

    async def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self._transport is None:
            raise _closed()
        number = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        request = {"id": number, "do": do, "with": arguments}
        self._transport.write(json.dumps(request).encode() + b"\n")
        try:
            answer: dict[str, Any] = await future
        finally:
            self._answers.pop(number, None)
        return answer

    async def spawn(self, command: Command) -> int:
        """Start it and return its pid. Raises `EngineError` when it cannot be started."""
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
            program = command.argv[0] if command.argv else "nothing"
            problem = f"cannot start {program} for {command.key}: {answer['error']}"
            raise EngineError(problem, argv=command.argv)
        return int(answer["pid"])

    async def _wait(self, key: str, what: str) -> dict[str, Any]:
        """The report of `key`, once it says `what`."""
        while True:
            if self._transport is None:
                raise _closed()
            job = self._jobs.get(key)
            if job is None:
                raise NotFound(f"the holder knows no process {key}")
            if what in job.report:
                return job.report
            await job.outdated.wait()

    async def finished(self, key: str) -> Finished:
        """Wait until the command itself has ended. Raises `NotFound` for an unknown key."""
        report = await self._wait(key, "finished")
        return Finished(ExitStatus(**report["finished"]), report["output"])

    async def exited(self, key: str) -> ExitStatus:
        """Wait until the process of the pid file has ended; without a pid file, or when the command
        failed, that is the command itself. Raises `NotFound` for an unknown key."""
        report = await self._wait(key, "exited")
        return ExitStatus(**report["exited"])

    async def forget(self, key: str) -> None:
        """Drop what is kept of `key`; who waits for it gets `NotFound`. Unknown keys are fine."""
        self._drop(key)
        await self._ask("forget", key=key)

    async def signal(self, key: str, number: int) -> bool:
        """Signal the process of `key`; False when it has ended. Raises `EngineError` for a signal
        that the kernel refuses."""
        answer = await self._ask("signal", key=key, number=number)
        if "error" in answer:
            raise EngineError(f"cannot send signal {number} to {key}: {answer['error']}")
        return bool(answer["sent"])

    async def listen(self, addresses: Sequence[str]) -> dict[str, str]:
        """Have the holder listen at these TCP addresses, and no others: why it cannot, by address.
        Raises `EngineError`, `Closed`."""
        answer = await self._ask("listen", addresses=list(addresses))
        if "error" in answer:
            raise EngineError(f"the holder does not listen for apps: {answer['error']}")
        problems: dict[str, str] = answer["problems"]
        return problems

    def known(self) -> tuple[str, ...]:
        """Keys of all commands the holder has books of."""
        return tuple(self._jobs)


def connect_holder(path: Path) -> socket.socket:
    """Raises `Closed` when nobody listens there."""
    try:
        sock = connect_unix(path)
    except OSError as error:
        raise Closed(f"no holder answers at {path}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def _closed() -> Closed:
    return Closed("the connection to the holder is closed")
