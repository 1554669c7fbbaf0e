"""The host's side, with guests that behave and guests that do not."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tabane.errors import Busy, Closed, EngineError, ProtocolError, TimedOut, UsageError
from tabane.guest import client
from tabane.guest.client import Guest, connect
from tabane.guest.frames import (
    FIRST_LINK,
    MAX_PAYLOAD,
    SILENCE,
    VERSION,
    WINDOW_BYTES,
    Frame,
    FrameReader,
    Kind,
    encode_frame,
)
from tabane.guest.processes import list_processes


class Agent:
    """The other end of the port: what the host says, and what is said to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self._heard: list[Frame] = []

    async def hear(self, kind: Kind | None = None) -> Frame:
        """The next frame (of that kind)."""
        while True:
            while self._heard:
                frame = self._heard.pop(0)
                if kind is None or frame.kind == kind:
                    return frame
            data = await self._reader.read(65536)
            assert data, "the host has left"
            self._heard += self._frames.feed(data)

    def say(self, kind: int, channel: int, payload: bytes = b"") -> None:
        self._writer.write(encode_frame(kind, channel, payload))

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def pour(self, data: bytes) -> None:
        """Write it as fast as it is taken."""
        self._writer.write(data)
        await self._writer.drain()

    async def welcome(self, version: int = VERSION) -> None:
        hello = await self.hear(Kind.HELLO)
        self.write(SILENCE)
        self.say(Kind.WELCOME, 0, struct.pack("<H", version) + hello.payload[2:])

    def leave(self) -> None:
        self._writer.close()


Script = Callable[[Agent], Awaitable[None]]


@asynccontextmanager
async def pretend(path: Path, script: Script) -> AsyncIterator[Path]:
    """A guest that follows a script; what that raises fails the test."""
    running: list[asyncio.Task[None]] = []
    agents: list[Agent] = []

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        agents.append(Agent(reader, writer))
        running.append(asyncio.ensure_future(script(agents[-1])))  # type: ignore[arg-type]

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for agent in agents:
            agent.leave()
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def guest_with(
    path: Path, script: Script, faults: list[ProtocolError] | None = None
) -> AsyncIterator[Guest]:
    """`faults` gets what the guest does that no agent does."""
    told = [] if faults is None else faults

    async def welcomed(agent: Agent) -> None:
        await agent.welcome()
        await script(agent)

    async with pretend(path / "agent", welcomed):
        guest = await connect(path / "agent", on_fault=told.append)
        try:
            yield guest
        finally:
            await guest.aclose()


async def test_what_was_said_to_another_host_is_passed_over(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        agent.write(SILENCE + encode_frame(Kind.WELCOME, 0, struct.pack("<H", 1) + bytes(16)))
        agent.write(encode_frame(Kind.OUTPUT, 9, b"not for you")[:-5])
        await agent.welcome()
        agent.say(Kind.ANSWER, (await agent.hear(Kind.STATS)).channel, b"figures")

    async with pretend(tmp_path / "agent", script):
        guest = await connect(tmp_path / "agent")
        assert await guest.call(Kind.STATS) == b"figures"
        await guest.aclose()
        await guest.aclose()


async def test_an_agent_of_another_version(tmp_path: Path) -> None:
    async with pretend(tmp_path / "agent", lambda agent: agent.welcome(7)):
        with pytest.raises(EngineError, match="speaks version 7, not 1"):
            await connect(tmp_path / "agent")


async def test_it_waits_for_a_machine_that_is_not_there_yet(tmp_path: Path) -> None:
    connecting = asyncio.ensure_future(connect(tmp_path / "agent"))
    await asyncio.sleep(0.01)
    async with pretend(tmp_path / "agent", lambda agent: agent.welcome()):
        await (await connecting).aclose()


@pytest.mark.parametrize(
    ("code", "error"), [(b"u", UsageError), (b"b", Busy), (b"f", EngineError), (b"", EngineError)]
)
async def test_a_refusal(tmp_path: Path, code: bytes, error: type[Exception]) -> None:
    async def script(agent: Agent) -> None:
        asked = await agent.hear()
        agent.say(Kind.REFUSED, asked.channel, code and code + "nö".encode() + b"\xff")

    async with guest_with(tmp_path, script) as guest:
        with pytest.raises(error, match="nö" if code else "refuses"):
            await guest.converse(Kind.EXEC, b"")


async def test_a_silent_guest(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        await agent.hear()

    async with guest_with(tmp_path, script) as guest:
        with pytest.raises(TimedOut, match=r"did not answer within 0\.05 s"):
            await guest.call(Kind.STATS, timeout_s=0.05)


async def test_a_machine_that_ends(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        asked = await agent.hear(Kind.EXEC)
        agent.say(Kind.BEGUN, asked.channel)
        agent.say(Kind.OUTPUT, asked.channel, b"last")
        await agent.hear(Kind.STATS)
        agent.leave()

    async with guest_with(tmp_path, script) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        with pytest.raises(Closed, match="machine has ended"):
            await guest.call(Kind.STATS)
        assert [await talk.stdout.read(), await talk.stdout.read()] == [b"last", b""]
        with pytest.raises(Closed):
            await talk.wait()
        assert not guest.is_open
        with pytest.raises(Closed):
            await guest.call(Kind.STATS)
        await talk.write(b"nobody hears it")
        await talk.aclose()


async def test_output_waits_for_who_reads_it(tmp_path: Path) -> None:
    granted = []

    async def script(agent: Agent) -> None:
        number = (await agent.hear(Kind.EXEC)).channel
        agent.say(Kind.BEGUN, number)
        for _ in range(WINDOW_BYTES // MAX_PAYLOAD):
            agent.say(Kind.OUTPUT, number, bytes(MAX_PAYLOAD))
        while sum(granted) < WINDOW_BYTES:
            grant = await agent.hear(Kind.GRANT)
            granted.append(struct.unpack("<IB", grant.payload)[0])
        agent.say(Kind.ENDED, number, struct.pack("<I", 3))

    async with guest_with(tmp_path, script) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        assert granted == []
        said = b""
        while block := await talk.stdout.read():
            said += block
        assert said == bytes(WINDOW_BYTES)
        assert await talk.wait() == 3
        await talk.aclose()


async def test_who_sends_more_than_was_granted_is_left(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        number = (await agent.hear(Kind.EXEC)).channel
        agent.say(Kind.BEGUN, number)
        for _ in range(WINDOW_BYTES // MAX_PAYLOAD + 1):
            agent.say(Kind.OUTPUT, number, bytes(MAX_PAYLOAD))

    async with guest_with(tmp_path, script) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        with pytest.raises(ProtocolError, match="more than it was asked for"):
            await talk.wait()
        await talk.aclose()
        assert not guest.is_open


async def test_input_waits_for_the_guest(tmp_path: Path) -> None:
    taken = bytearray()

    async def script(agent: Agent) -> None:
        number = (await agent.hear(Kind.EXEC)).channel
        agent.say(Kind.BEGUN, number)
        while (frame := await agent.hear()).kind == Kind.INPUT:
            taken.extend(frame.payload)
            if len(taken) >= WINDOW_BYTES:
                agent.say(Kind.TAKEN, number, struct.pack("<I", len(frame.payload)))
        assert frame.kind == Kind.END_INPUT
        agent.say(Kind.ENDED, number, struct.pack("<I", 0))

    async with guest_with(tmp_path, script) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        await talk.write(b"x" * (3 * WINDOW_BYTES))
        await talk.end_input()
        await talk.end_input()
        assert await talk.wait() == 0
        await talk.aclose()
    assert bytes(taken) == b"x" * (3 * WINDOW_BYTES)


async def test_who_closes_waits_for_the_end(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        number = (await agent.hear(Kind.EXEC)).channel
        agent.say(Kind.BEGUN, number)
        await agent.hear(Kind.CLOSE)
        agent.say(Kind.OUTPUT, number, b"nobody reads this")
        agent.say(Kind.ENDED, number, struct.pack("<I", 129))

    async with guest_with(tmp_path, script) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        await talk.aclose()
        assert await talk.wait() == 129
        assert await talk.stdout.read() == b""


async def test_who_waits_for_a_port_no_more_says_so(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        asked = await agent.hear(Kind.LISTEN)
        assert asked.payload == struct.pack("<H", 8000)
        assert (await agent.hear(Kind.CLOSE)).channel == asked.channel
        agent.say(Kind.ANSWER, (await agent.hear(Kind.LISTEN)).channel)

    async with guest_with(tmp_path, script) as guest:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(guest.wait_listening(8000), 0.05)
        await asyncio.wait_for(guest.wait_listening(8001), 5)


async def test_a_guest_that_takes_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_UNSENT_BYTES", 100_000)

    async def script(agent: Agent) -> None:
        """It hears no more."""

    async with guest_with(tmp_path, script) as guest:
        for _ in range(100):
            guest.say(Kind.RESEED, 1, bytes(MAX_PAYLOAD))
        assert not guest.is_open
        with pytest.raises(Closed):
            guest.say(Kind.RESEED, 1, must=True)


@pytest.mark.parametrize("told", [b"nonsense", b"x" * (5 << 20)])
async def test_a_list_of_processes_that_is_none(tmp_path: Path, told: bytes) -> None:
    async def script(agent: Agent) -> None:
        number = (await agent.hear(Kind.LIST)).channel
        agent.say(Kind.BEGUN, number)
        room = WINDOW_BYTES
        for at in range(0, len(told), MAX_PAYLOAD):
            while room < MAX_PAYLOAD:
                frame = await agent.hear()
                if frame.kind == Kind.CLOSE:
                    break
                room += struct.unpack("<IB", frame.payload)[0]
            room -= MAX_PAYLOAD
            if room < 0:
                break
            agent.say(Kind.OUTPUT, number, told[at : at + MAX_PAYLOAD])
        agent.say(Kind.ENDED, number, struct.pack("<I", 0))

    async with guest_with(tmp_path, script) as guest:
        with pytest.raises(EngineError, match=r"breaks off|more than \d+ bytes"):
            await list_processes(guest)


MUCH = encode_frame(Kind.OUTPUT, 77, b"x") * 1000


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (MUCH, "a conversation that there is not"),
        (encode_frame(Kind.ANSWER, 77), "answers what nobody asked"),
        (encode_frame(Kind.WELCOME, 0, bytes(18)), "a conversation that there is not"),
        (encode_frame(Kind.OUTPUT, 1, b""), "more than it was asked for"),
        (encode_frame(Kind.TAKEN, 1, bytes(4)), "took more than it was given"),
        (encode_frame(Kind.TAKEN, 1, b"\x01\0\0\0"), "took more than it was given"),
        (encode_frame(200, 1), "said 200 in a conversation"),
        (bytes(3 * len(SILENCE)), "the guest sent nothing"),
        (b"no frame at all", "a frame of"),
        (encode_frame(Kind.DIAL, FIRST_LINK, b"docker.sock"), "asks for 'docker.sock'"),
        (encode_frame(Kind.DIAL, 3, b"hub.sock"), "a conversation"),
        (encode_frame(Kind.OUTPUT, FIRST_LINK, b"x"), "a conversation that there is not"),
    ],
)
async def test_a_guest_that_does_what_no_agent_does_is_left(
    tmp_path: Path, said: bytes, words: str
) -> None:
    """The first such frame ends it: nothing is kept of the rest."""

    async def script(agent: Agent) -> None:
        agent.say(Kind.BEGUN, (await agent.hear(Kind.EXEC)).channel)
        await agent.hear(Kind.SIGNAL)
        agent.write(said)

    faults: list[ProtocolError] = []
    async with guest_with(tmp_path, script, faults) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        await talk.signal(1)
        await guest.over()
        assert not guest.is_open
        (fault,) = faults
        assert words in fault.message
        await talk.aclose()


@pytest.mark.parametrize("flood", [b"garbage!", SILENCE + MUCH], ids=["bytes", "frames"])
async def test_a_flood_instead_of_a_welcome(tmp_path: Path, flood: bytes) -> None:
    async def script(agent: Agent) -> None:
        with suppress(ConnectionError):
            while True:
                await agent.pour(flood * (65536 // len(flood) + 1))

    faults: list[ProtocolError] = []
    async with pretend(tmp_path / "agent", script):
        with pytest.raises(ProtocolError, match="talks on and on"):
            await connect(tmp_path / "agent", on_fault=faults.append)
    assert len(faults) == 1


async def test_a_flood_on_a_conversation_that_was_left(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        number = (await agent.hear(Kind.EXEC)).channel
        agent.say(Kind.BEGUN, number)
        await agent.hear(Kind.CLOSE)
        for _ in range(WINDOW_BYTES // MAX_PAYLOAD + 1):
            agent.say(Kind.OUTPUT, number, bytes(MAX_PAYLOAD))

    faults: list[ProtocolError] = []
    async with guest_with(tmp_path, script, faults) as guest:
        talk = await guest.converse(Kind.EXEC, b"")
        await talk.aclose()
        await guest.over()
        assert len(faults) == 1


async def test_what_comes_too_late_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to questions that were given up, and all of a conversation that was."""
    monkeypatch.setattr(client, "ANSWER_S", 0.01)

    async def script(agent: Agent) -> None:
        question = (await agent.hear(Kind.CLOCK)).channel
        number = (await agent.hear(Kind.EXEC)).channel
        await agent.hear(Kind.CLOSE)
        agent.say(Kind.ANSWER, question)
        agent.say(Kind.BEGUN, number)
        agent.say(Kind.OUTPUT, number, b"words")
        agent.say(Kind.ENDED, number, bytes(4))
        agent.say(Kind.ANSWER, (await agent.hear(Kind.STATS)).channel, b"figures")

    faults: list[ProtocolError] = []
    async with guest_with(tmp_path, script, faults) as guest:
        with pytest.raises(TimedOut):
            await guest.call(Kind.CLOCK, timeout_s=0.01)
        with pytest.raises(TimedOut):
            await guest.converse(Kind.EXEC, b"")
        assert await guest.call(Kind.STATS, timeout_s=5) == b"figures"
        assert faults == []


async def test_no_more_conversations_than_a_guest_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that it begins and never ends."""
    monkeypatch.setattr(client, "MOST_TALKS", 3)
    monkeypatch.setattr(client, "ANSWER_S", 0.01)

    async def script(agent: Agent) -> None:
        """It answers nothing."""

    async with guest_with(tmp_path, script) as guest:
        for _ in range(3):
            with pytest.raises(TimedOut):
                await guest.converse(Kind.EXEC, b"")
        with pytest.raises(Busy, match="too many conversations"):
            await guest.converse(Kind.EXEC, b"")


async def test_the_end_of_one_of_its_programs(tmp_path: Path) -> None:
    async def script(agent: Agent) -> None:
        agent.say(Kind.ENDED, 0, b"exit 3 cache\n")

    async with guest_with(tmp_path, script) as guest:
        await guest.over()
        assert guest.end == "exit 3 cache" and guest.is_open
