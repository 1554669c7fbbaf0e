"""QEMU's control socket, with one that answers as QEMU does, and with ones that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tabane.errors import Closed, EngineError, TimedOut
from tabane.runtimes.qemu import qmp

GREETING = {"QMP": {"version": {}, "capabilities": []}}
Answers = Callable[[dict[str, Any]], list[Any]]


@asynccontextmanager
async def pretend(
    path: Path, answers: Answers, greeting: bytes | None = None
) -> AsyncIterator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(GREETING).encode() + b"\r\n" if greeting is None else greeting)
        while line := await reader.readline():
            for answer in answers(json.loads(line)):
                writer.write(json.dumps(answer).encode() + b"\r\n")
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


async def test_a_command_and_its_answer(tmp_path: Path) -> None:
    heard = []

    def answers(request: dict[str, Any]) -> list[Any]:
        heard.append(request)
        return [{"event": "STOP", "timestamp": {}}, {"return": {"running": False}}]

    async with pretend(tmp_path / "q", answers):
        assert await qmp.execute(tmp_path / "q", "stop", now=True) == {"running": False}
    assert [request["execute"] for request in heard] == ["qmp_capabilities", "stop"]
    assert heard[1]["arguments"] == {"now": True}


async def test_a_refusal(tmp_path: Path) -> None:
    def answers(request: dict[str, Any]) -> list[Any]:
        if request["execute"] == "qmp_capabilities":
            return [{"return": {}}]
        return [{"error": {"class": "CommandNotFound", "desc": "no such command"}}]

    async with pretend(tmp_path / "q", answers):
        with pytest.raises(EngineError, match="QEMU refuses to dance: no such command"):
            await qmp.execute(tmp_path / "q", "dance")


async def test_silence_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "TIMEOUT_S", 0.05)
    async with pretend(tmp_path / "q", lambda request: []):
        with pytest.raises(TimedOut, match=r"did not answer stop within 0\.05 s"):
            await qmp.execute(tmp_path / "q", "stop")


@pytest.mark.parametrize("greeting", [b"no JSON\n", b"[1]\n", b"x" * (3 << 20)])
async def test_what_is_no_answer(tmp_path: Path, greeting: bytes) -> None:
    async with pretend(tmp_path / "q", lambda request: [], greeting):
        with pytest.raises(EngineError, match="QEMU answers what is no JSON"):
            await qmp.execute(tmp_path / "q", "stop")


async def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(Closed, match="no QEMU any more to stop"):
        await qmp.execute(tmp_path / "none", "stop")
