"""How a copy is told that it is one, with a server and a process of the test's own."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.errors import EngineError, Unsupported
from tabane.model import App
from tabane.node.hooks import tell_restored
from tabane.reactions import Hooks

OK = b"HTTP/1.1 200 OK\r\n\r\n"


def copy(hook: str, port: int = 0, pid: int = 0, *, own_stack: bool = False) -> Any:
    app = App("web", "host", port=port, hooks=Hooks(hook, deadline_s=0.05))
    return SimpleNamespace(
        record=SimpleNamespace(app=app),
        instance=SimpleNamespace(address="127.0.0.1", pid=pid),
        driver=SimpleNamespace(capabilities=SimpleNamespace(own_stack=own_stack)),
    )


async def tell(answer: bytes | None) -> bytes:
    """The request that a server got, which answers so; None: not at all."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        await tell_restored(copy("http:/restored", server.sockets[0].getsockname()[1]))
    return heard[0]


async def test_without_a_hook_nothing_is_done() -> None:
    await tell_restored(copy(""))


async def test_it_is_posted_to_and_any_2xx_is_yes() -> None:
    assert (await tell(OK)).startswith(b"POST /restored HTTP/1.1\r\nHost: 127.0.0.1\r\n")
    await tell(b"HTTP/1.0 204 Done\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "not answered within 0.05 s"),
        (b"", "not answered: "),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", "answered by no HTTP"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "answered 302"),
        (b"HTTP/1.1 500 No\r\n\r\n", "answered 500"),
    ],
)
async def test_any_other_answer_is_a_problem(answer: bytes | None, problem: str) -> None:
    with pytest.raises(EngineError, match=f"its hook `restored`, POST /restored, is {problem}"):
        await tell(answer)


async def test_nobody_listens() -> None:
    with pytest.raises(EngineError, match="is not answered: "):
        await tell_restored(copy("http:/restored", 1))


async def test_a_signal_goes_to_its_first_process() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    await tell_restored(copy("signal:USR1", pid=process.pid))
    assert await process.wait() == -signal.SIGUSR1


async def test_a_signal_to_what_has_ended_or_is_in_a_machine_is_a_problem() -> None:
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    with pytest.raises(ProcessLookupError):
        await tell_restored(copy("signal:HUP", pid=process.pid))
    with pytest.raises(Unsupported, match="use a hook that is asked by HTTP"):
        await tell_restored(copy("signal:HUP", pid=process.pid, own_stack=True))
