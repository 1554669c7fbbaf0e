"""A conversation with an instance over one HTTP request: its body is what the client says, the
answer's body what the node says, both at the same time, in the frames of `frames.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from tabane.api import frames
from tabane.api.presence import BodyReader
from tabane.api.problems import to_body
from tabane.errors import Closed, ProtocolError, SystemFault, TabaneError, TimedOut, UsageError
from tabane.runtimes.api import Conversation, Output, TerminalSize
from tabane.supervise import Supervisor

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/vnd.tabane.conversation"
LINGER_S = 10.0
"""For a client to hear the last frame and end its side: what is not read to its end is lost when
the connection closes."""


class FrameReader:
    """The client's frames."""

    def __init__(self, body: BodyReader) -> None:
        self.body = body
        self._frames = self._parse()

    async def _parse(self) -> AsyncIterator[frames.Frame]:
        parser = frames.Parser(frames.CLIENTS)
        async for block in self.body.blocks():
            for frame in parser.feed(block):
                yield frame

    async def begin(self) -> bytes:
        """What the first frame carries. Raises `UsageError`, `Closed`."""
        with suppress(ProtocolError):
            async for kind, data in self._frames:
                if kind == frames.BEGIN:
                    return data
                break
        raise UsageError("a conversation begins with a frame B (see docs/exec.md)")

    def rest(self) -> AsyncIterator[frames.Frame]:
        return self._frames


class ConversationResponse(Response):
    """The answer: all of `talk`, which is closed at its end, whatever that is. `hold` runs until
    then; `what` is named when it takes longer than `timeout_s`."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        talk: Conversation,
        said: FrameReader,
        hold: Callable[[], Coroutine[Any, Any, None]],
        what: str,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__()
        self._talk = talk
        self._said = said
        self._hold = hold
        self._what = what
        self._timeout_s = timeout_s
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._waiting_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async with Supervisor("conversation", on_failure=lambda *_: None) as tasks:
                tasks.start("hold", self._hold())
                client = tasks.start("client", self._hear())
                tasks.start("input", self._feed(send))
                said = tasks.start("output", self._pass_on(send))
                last = await self._await_end(said, client)
                if last is None:
                    return
                await _say(send, last)
                ended = tasks.start("ended", self._said.body.has_ended.wait())
                first = asyncio.FIRST_COMPLETED
                await asyncio.wait({client, ended}, timeout=LINGER_S, return_when=first)
        finally:
            await self._talk.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _await_end(self, said: asyncio.Task[int], client: asyncio.Task[None]) -> bytes | None:
        """The last frame; None when nobody is there to hear it."""
        first = asyncio.FIRST_COMPLETED
        done, _ = await asyncio.wait({said, client}, timeout=self._timeout_s, return_when=first)
        try:
            if said in done:
                return frames.encode_number(frames.EXIT, said.result() & 0xFFFFFFFF)
            if client in done:
                client.result()
            problem: TabaneError = TimedOut(
                f"{self._what} did not end within {self._timeout_s:g} s and was killed"
            )
        except Closed as error:
            if said not in done:
                return None
            problem = Closed(f"{self._what} was lost: {error.message}")
        except TabaneError as error:
            problem = error
        except Exception:
            log.exception("%s failed", self._what)
            problem = SystemFault(f"{self._what} failed by a mistake of the node's: see its log")
        return frames.encode(frames.FAILURE, msgspec.json.encode(to_body(problem)))

    async def _hear(self) -> None:
        """Take what the client says until it leaves, which raises `Closed`."""
        async for kind, data in self._said.rest():
            await self._on_frame(kind, data)
        self._waiting.put_nowait(None)
        await self._said.body.wait_left()

    async def _on_frame(self, kind: bytes, data: bytes) -> None:
        if kind == frames.INPUT:
            self._waiting_bytes += len(data)
            if self._waiting_bytes > frames.WINDOW:
                raise ProtocolError(f"more than {frames.WINDOW} bytes of input wait: heed C")
            self._waiting.put_nowait(data)
        elif kind == frames.END:
            self._waiting.put_nowait(None)
        elif kind == frames.SIZE:
            await self._talk.resize(TerminalSize(*frames.parse_size(data)))
        elif kind == frames.SIGNAL and len(data) == 1 and 0 < data[0] < 65:
            await self._talk.signal(data[0])
        else:
            raise ProtocolError(f"{kind!r} with {len(data)} bytes has no meaning here")

    async def _feed(self, send: Send) -> None:
        while (data := await self._waiting.get()) is not None:
            await self._talk.write(data)
            self._waiting_bytes -= len(data)
            await _say(send, frames.encode_number(frames.CREDIT, len(data)))
        await self._talk.end_input()

    async def _pass_on(self, send: Send) -> int:
        """All that it says, then its exit code."""
        outputs = [_pass_output(send, frames.OUTPUT, self._talk.stdout)]
        if self._talk.stderr is not None:
            outputs.append(_pass_output(send, frames.ERROR, self._talk.stderr))
        await asyncio.gather(*outputs)
        return await self._talk.wait()


async def _pass_output(send: Send, kind: bytes, output: Output) -> None:
    while block := await output.read():
        await _say(send, frames.encode(kind, block))


async def _say(send: Send, frame: bytes) -> None:
    await send({"type": "http.response.body", "body": frame, "more_body": True})
