"""Programs in containers: their names, their rooms, and what they may not do."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tabane.errors import (
    Busy,
    Closed,
    Conflict,
    Denied,
    NotFound,
    ProtocolError,
    Refused,
    UsageError,
)
from tabane.middlecon import Change, connect
from tabane.middlecon.contained import (
    ROOMS,
    STATE_BYTES,
    STATE_KEYS,
    Served,
    choose_name,
    encode_served,
    find_refusal,
    matches,
    parse_served,
)
from tabane.middlecon.frames import GONE, MAGIC, Decoder, Frame, JoinFlag, Kind, encode_frame
from tabane.middlecon.session import Hello, encode_hello
from tabane.unix import connect_unix

WEB = "default/web-0123456789ab"
ROOMS_OF_WEB = ("deploys", "chat.*")


class Instance:
    """A hub that serves an instance, its agent, and programs of the instance."""

    def __init__(self, cluster, path: Path) -> None:
        self.cluster = cluster
        self.path = path
        self.url = f"unix://{path}"

    async def start(self, **options):
        self.hub = await self.cluster.hub(**options)
        self.agent = await self.cluster.client("agent")
        await self.serve()
        return self

    async def serve(self, rooms=ROOMS_OF_WEB, **options):
        await self.agent.serve(self.path, name=WEB, rooms=rooms, **options)

    async def program(self, name: str | None = None, **options):
        return await self.cluster.client(name, url=self.url, **options)


@pytest.fixture
def make(cluster, tmp_path):
    """The path is longer than a socket's address may be."""
    directory = tmp_path / ("deep-" * 30)
    directory.mkdir()
    return Instance(cluster, directory / "hub.sock").start


@pytest.fixture
async def instance(make):
    return await make()


# Who they are


async def test_an_instance_has_its_identity_whatever_it_says(instance):
    names = [None, None, "worker", "worker", "tokyo/tokyo-1/agent", "a~2", WEB, "x" * 250]
    programs = [await instance.program(name) for name in names]
    assert [program.name for program in programs] == [
        WEB,
        f"{WEB}~2",
        f"{WEB}/worker",
        f"{WEB}/worker~2",
        *(f"{WEB}~{number}" for number in (3, 4, 5, 6)),
    ]
    assert set(instance.hub.members) == {"agent", *(program.name for program in programs)}


async def test_others_hear_it_under_that_name(instance):
    program, other = await instance.program("worker"), await instance.cluster.client("other")
    mine, room = await program.join("deploys"), await other.join("deploys")
    mine.on_message(lambda message: b"here")
    room.on_message(lambda message: message.sender.encode())
    assert (await room.ask(b"who?")).answers == {f"{WEB}/worker": b"here"}
    assert (await mine.ask(b"who am I?")).answers == {"other": f"{WEB}/worker".encode()}
    await program.state.put("load", b"1")
    await room.say(b"after that")
    assert room.state == {f"{WEB}/worker": {"load": b"1"}, "other": {}}


def hello(name: str = "", run: str = "new", **more) -> Hello:
    return Hello(name, run, **more)


@pytest.mark.parametrize(
    ("said", "held", "runs", "given"),
    [
        (hello(), [], {}, WEB),
        (hello(), [WEB, f"{WEB}~2", f"{WEB}~4"], {}, f"{WEB}~3"),
        (hello("member-1", drawn=True), [], {}, WEB),
        (hello(was=f"{WEB}~7"), [], {}, f"{WEB}~7"),
        (hello(was=f"{WEB}~7"), [f"{WEB}~7"], {}, WEB),
        (hello("worker", was=f"{WEB}/worker~2"), [], {}, f"{WEB}/worker~2"),
        (hello("worker", was=f"{WEB}~2"), [], {}, f"{WEB}/worker"),
        (hello(was="default/web-of-a-clone~2"), [], {}, WEB),
        (hello(was=f"{WEB}~2/agent"), [], {}, WEB),
        (hello(run="old"), [WEB, f"{WEB}~2"], {"old": f"{WEB}~2"}, f"{WEB}~2"),
        (hello("worker", "old"), [WEB], {"old": WEB}, f"{WEB}/worker"),
        (hello(run=""), [WEB], {"": WEB}, f"{WEB}~2"),
        (hello("束"), [], {}, f"{WEB}/束"),
        (hello("a\nb"), [], {}, WEB),
    ],
)
def test_names(said, held, runs, given):
    assert choose_name(WEB, said, runs, lambda name: name not in held) == given


def test_a_room_of_a_pattern():
    names = ("a", "ab", "b", "chat.", "chat.x", "chat")
    found = [name for name in names if matches(("a", "chat.*"), name)]
    assert found == ["a", "chat.", "chat.x"]
    assert not matches((), "a")


# What they may do


async def test_only_rooms_that_were_asked_for(instance):
    program = await instance.program()
    assert (await program.join("chat.lobby")).members.keys() == {WEB}
    for name in ("secret", "chat", "deploys2", "nodes"):
        with pytest.raises(Denied, match=f"{WEB} may not enter the room {name}: its app asks for"):
            await program.join(name)
        with pytest.raises(Denied):
            await program.join(name, member=False)
    assert instance.hub._directory.rooms.keys() == {"chat.lobby"}


async def test_calls_reach_those_it_shares_a_room_with(instance):
    program, other = await instance.program(), await instance.cluster.client("other")
    heard = []
    other.on_message(lambda message: heard.append(message.data) or b"done")
    program.on_message(lambda message: b"yes")
    secret = await instance.cluster.client("secret")
    await secret.join("elsewhere")
    await program.join("deploys")
    for name in ("other", "secret", "agent", "nobody"):
        with pytest.raises(Denied, match=f"is in no room with a member {name}"):
            await program.call(name, b"call")
        with pytest.raises(Denied):
            await program.send(name, b"send")
        program.send_nowait(name, b"post")
    await other.join("deploys")
    assert await program.call("other", b"now") == b"done"
    assert heard == [b"now"]
    assert await secret.call(WEB, b"others may call it") == b"yes"


async def test_it_sees_no_rooms_but_its_own(instance):
    program, other = await instance.program(), await instance.cluster.client("other")
    room = await program.join("deploys")
    await other.join("secret")
    await other.state.put("key", b"value")
    seen = []
    room.on_state(seen.append)
    room.on_presence(seen.append)
    await other.join("deploys")
    await room.say(b"")
    assert {event.member for event in seen} == {"other"}
    assert room.state["other"] == {"key": b"value"}


async def test_it_may_not_serve_nor_link(instance, tmp_path):
    program = await instance.program()
    for asked in (
        program.serve(tmp_path / "s", name="root", rooms=["*"]),
        program.unserve(instance.path),
        program.sleep(WEB),
    ):
        with pytest.raises(Denied, match="it is in a container"):
            await asked
    assert not (tmp_path / "s").exists()
    reader, writer = await open_raw(instance.path)
    writer.write(encode_hello(Hello("hub-2", "run", role="hub")))
    (error,) = Decoder().feed((await reader.read()).removeprefix(MAGIC))
    assert (error.kind, error.name) == (Kind.ERROR, "denied")
    assert b"may not link hubs" in error.data
    writer.close()
    await writer.wait_closed()


async def open_raw(path: Path):
    return await asyncio.open_unix_connection(sock=connect_unix(path, timeout_s=0))


def test_limits_on_rooms_and_state(brain):
    port = brain.session(WEB)
    served = Served("/s", ("*",))

    def refusal(kind, **fields):
        return find_refusal(served, port, Frame(kind, **fields), brain.directory.members)

    for number in range(ROOMS):
        assert refusal(Kind.JOIN, name=f"r{number}") is None
        brain.join(port, f"r{number}")
    assert isinstance(refusal(Kind.JOIN, name="one more"), Busy)
    assert refusal(Kind.JOIN, name="r0") is None
    assert isinstance(refusal(Kind.STATE, value=1, data=b"k" + bytes(STATE_BYTES + 1)), Busy)
    assert refusal(Kind.STATE, value=1, data=b"k" + bytes(STATE_BYTES)) is None
    for number in range(STATE_KEYS):
        brain.directory.put(port, f"k{number}", b"")
    assert isinstance(refusal(Kind.STATE, value=1, data=b"k"), Busy)
    assert refusal(Kind.STATE, value=2, data=b"k0") is None
    assert refusal(Kind.STATE, flags=GONE, value=1, data=b"k") is None
    assert isinstance(refusal(Kind.SERVE), Denied)
    assert isinstance(refusal(99), Denied)


async def test_a_limit_on_sessions(make):
    instance = await make()
    await instance.serve(sessions=2)
    first, second = await instance.program(), await instance.program()
    with pytest.raises(Busy, match="has 2 sessions, the most it may"):
        await instance.program(timeout_s=0)
    silent = [await open_raw(instance.path) for _ in range(3)]
    assert await silent[2][0].read() == b""
    await second.aclose()
    for _, writer in silent:
        writer.close()
        await writer.wait_closed()
    third = await instance.program()
    assert (first.connected, third.name) == (True, f"{WEB}~2")


# What agents say


@pytest.mark.parametrize(
    ("data", "name", "problem"),
    [
        (b"", WEB, "cannot be read"),
        (encode_served(Served("relative", ())), WEB, "no absolute path"),
        (encode_served(Served("/a\0b", ())), WEB, "no absolute path"),
        (encode_served(Served("/a", ("a*b",))), WEB, r"a \* elsewhere than at its end"),
        (encode_served(Served("/a", ("",))), WEB, "1 to 255 bytes"),
        (encode_served(Served("/a", (), sessions=0)), WEB, "at least 1"),
        (encode_served(Served("/a", ())), "", "1 to 255 bytes"),
        (msgspec.msgpack.encode({"path": "/a", "rooms": "a"}), WEB, "cannot be read"),
    ],
)
def test_what_cannot_be_served(data, name, problem):
    with pytest.raises((UsageError, ProtocolError), match=problem):
        parse_served(Frame(Kind.SERVE, name=name, data=data))


async def test_serving_is_for_root_and_who_has_the_token(cluster, tmp_path):
    open_hub = await cluster.hub("open", listen=["tcp://127.0.0.1:0"])
    closed = await cluster.hub("closed", listen=["tcp://127.0.0.1:0"], token="word")
    stranger = await cluster.client("x", url=f"tcp://{open_hub.addresses[0]}")
    with pytest.raises(Denied, match="only root may"):
        await stranger.serve(tmp_path / "s", name=WEB, rooms=[])
    with pytest.raises(Denied):
        await stranger.sleep("x")
    friend = await cluster.client("x", url=f"tcp://{closed.addresses[0]}", token="word")
    await friend.serve(tmp_path / "s", name=WEB, rooms=[])
    assert (await cluster.client(url=f"unix://{tmp_path}/s")).name == WEB


async def test_a_path_that_cannot_be_had(instance, tmp_path):
    with pytest.raises(Refused, match=f"{WEB} is served at") as refused:
        await instance.agent.serve(instance.path, name="default/other-1", rooms=[])
    assert refused.value.reason == Conflict.code
    with pytest.raises(Refused, match="cannot listen on"):
        await instance.agent.serve(tmp_path / "no/where", name=WEB, rooms=[])
    with pytest.raises(Refused, match="is taken"):
        await instance.agent.serve(tmp_path / "hub", name=WEB, rooms=[])


async def test_withdrawal_closes_the_socket_and_its_sessions(instance, eventually):
    program, other = await instance.program(), await instance.cluster.client("other")
    room = await other.join("deploys")
    await program.join("deploys")
    assert WEB in room.members
    left = []
    room.on_presence(left.append)
    await instance.agent.unserve(instance.path)
    await instance.agent.unserve(instance.path)
    assert not instance.path.exists()
    await eventually(lambda: left and not program.connected)
    assert (left[0].member, left[0].change) == (WEB, Change.LEFT)
    await eventually(lambda: "no hub at" in program.trouble)
    await instance.serve()
    await eventually(lambda: WEB in room.members)


async def test_saying_it_again_changes_what_is_allowed_and_nothing_else(instance):
    program = await instance.program()
    deploys, chat = await program.join("deploys"), await program.join("chat.x")
    lost = []
    program.on_disconnected(lambda: lost.append(1))
    await instance.serve()
    await deploys.say(b"still in")
    await instance.serve(rooms=["deploys"])
    with pytest.raises(Denied):
        await program.join("chat.y")
    with pytest.raises(NotFound, match="join the room first"):
        await chat.say(b"")
    await deploys.say(b"still in")
    assert not lost


async def test_after_a_restart_of_the_hub_all_are_back_under_their_names(instance):
    instance.agent.on_connected(instance.serve)
    programs = [await instance.program(name) for name in (None, None, "worker", None)]
    names = [program.name for program in programs]
    rooms = [await program.join("deploys") for program in programs]
    back = [asyncio.Event() for _ in programs]
    for program, event in zip(programs, back, strict=True):
        program.on_connected(event.set)
    await instance.hub.aclose()
    assert not instance.path.exists()
    await instance.cluster.hub()
    await asyncio.gather(*(event.wait() for event in back))
    assert [program.name for program in programs] == names
    assert rooms[0].members.keys() == set(names)


async def test_a_dead_hubs_socket_is_replaced(cluster, tmp_path):
    path = tmp_path / "served"
    program = (
        "import asyncio, os, sys\n"
        "from tabane.middlecon import Hub, connect\n"
        "async def main():\n"
        "    async with Hub(listen=[f'unix://{sys.argv[1]}-hub']):\n"
        "        me = await connect(f'unix://{sys.argv[1]}-hub')\n"
        "        await me.serve(sys.argv[1], name='n', rooms=[])\n"
        "        os._exit(0)\n"
        "asyncio.run(main())\n"
    )
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", program, path], check=True)
    assert path.is_socket()
    await cluster.hub()
    agent = await cluster.client("agent")
    await agent.serve(path, name=WEB, rooms=[])
    assert (await cluster.client(url=f"unix://{path}")).name == WEB


async def test_the_same_run_takes_its_place(instance):
    """As after a restore: it dials again, while its old session still seems to be there."""
    program = await instance.program("worker")
    again = await connect(instance.url, name="worker")
    assert again.name == f"{WEB}/worker~2"
    await again.aclose()
    again = await taken_over(instance, program)
    assert again == program.name


async def taken_over(instance, program) -> str:
    run = program._connection._hello.instance
    reader, writer = await open_raw(instance.path)
    writer.write(encode_hello(Hello("worker", run)))
    decoder = Decoder()
    frames: list[Frame] = []
    await reader.readexactly(len(MAGIC))
    while not frames:
        frames = decoder.feed(await reader.read(1 << 16))
    writer.close()
    await writer.wait_closed()
    name: str = msgspec.msgpack.decode(frames[0].data)["name"]
    return name


# Asleep

MEMBER = """
import asyncio, sys
from tabane.middlecon import connect

async def main():
    me = await connect(sys.argv[1])
    room = await me.join("deploys")
    room.on_message(lambda message: b"awake")
    print(me.name, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_frozen_instance_is_asleep_until_it_is_thawed(make):
    instance = await make(heartbeat_s=0.2)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MEMBER, instance.url), stdout=subprocess.PIPE
    )
    try:
        await sleep_and_wake(instance, process)
    finally:
        process.kill()
        await process.communicate()


async def sleep_and_wake(instance, process):
    assert process.stdout is not None
    assert (await process.stdout.readline()).decode().strip() == WEB
    room = await instance.agent.join("deploys", member=False)
    lost = []
    room.on_presence(lost.append)
    assert (await room.ask(b"")).answers == {WEB: b"awake"}
    await instance.agent.sleep(WEB)
    process.send_signal(signal.SIGSTOP)
    receipt = await room.say(b"")
    assert (receipt.asleep, receipt.acknowledged, receipt.failed) == ((WEB,), (), {})
    await cut_off_for_silence(instance)
    await instance.serve(asleep=True)  # an agent that was started again says so, too
    assert (await room.say(b"")).asleep == (WEB,)
    assert not lost
    process.send_signal(signal.SIGCONT)
    await instance.agent.sleep(WEB, asleep=False)
    assert (await room.ask(b"")).answers == {WEB: b"awake"}
    assert not lost


async def cut_off_for_silence(instance):
    """Return when somebody who is not known to sleep has been cut off for it."""
    reader, writer = await open_raw(Path(instance.cluster.url().removeprefix("unix://")))
    writer.write(encode_hello(Hello("silent", "run")))
    await reader.read()
    writer.close()
    await writer.wait_closed()


async def test_who_comes_to_a_sleeping_instance_sleeps(instance):
    await instance.agent.sleep(WEB)
    program = await instance.program()
    await program.join("deploys")
    room = await instance.agent.join("deploys", member=False)
    assert (await room.say(b"")).asleep == (WEB,)
    await instance.agent.sleep(WEB, asleep=False)
    assert (await room.say(b"")).asleep == ()


async def test_a_single_member_may_sleep(instance):
    other = await instance.cluster.client("other")
    await other.join("deploys")
    room = await instance.agent.join("deploys", member=False)
    await instance.agent.sleep("other")
    assert (await room.say(b"")).asleep == ("other",)
    with pytest.raises(NotFound, match="this hub serves no nobody"):
        await instance.agent.sleep("nobody")


async def test_serving_needs_a_session(instance):
    await instance.agent.aclose()
    with pytest.raises(Closed):
        await instance.serve()


def test_the_bytes_in_the_manual():
    data = encode_served(Served("/run/i/hub.sock", ("deploys", "chat.*")))
    frame = encode_frame(Kind.SERVE, id=7, name="default/web-1", data=data)
    page = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
    shown = "".join(page.split("serves an instance:")[1].split("\n\n")[1].split())
    assert frame.hex() == shown
    assert JoinFlag.MEMBER == 1
