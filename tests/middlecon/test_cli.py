from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
import termios
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tabane.errors import Refused
from tabane.middlecon import Client
from tabane.middlecon.addresses import parse_host_port
from tabane.middlecon.cli import main
from tabane.middlecon.commands import Watcher
from tabane.middlecon.frames import DATA_BYTES


async def start(*arguments: str, **options) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tabane.middlecon",
        *arguments,
        **{"stdin": asyncio.subprocess.DEVNULL, "stdout": pipe, "stderr": pipe} | options,
    )


async def run(*arguments: str, given: bytes | None = None) -> tuple[int, str, str]:
    stdin = asyncio.subprocess.DEVNULL if given is None else asyncio.subprocess.PIPE
    process = await start(*arguments, stdin=stdin)
    out, err = await process.communicate(given)
    return process.returncode, out.decode(), err.decode()


@asynccontextmanager
async def running(*arguments: str, **options):
    """A program that is ended, well, by SIGTERM."""
    process = await start(*arguments, **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@asynccontextmanager
async def joined(room: str, *arguments: str, **options):
    async with running("join", room, *arguments, **options) as member:
        name = arguments[arguments.index("--name") + 1]
        assert await member.stderr.readline() == f"{name} is in {room}\n".encode()
        yield member


@pytest.fixture
async def at(cluster):
    """The options that lead to a hub in this process."""
    await cluster.hub()
    return "--hub", cluster.url()


async def test_hubs_are_linked_by_name(cluster, tmp_path, eventually):
    a, b = cluster.url("a"), cluster.url("b")
    async with running("serve", "--listen", a, "--name", "a", "--link", f"b={b}") as first:
        await first.stdout.readline()
        error = (await first.stderr.readline()).decode()
        assert error == f"no link to hub b: no hub at {tmp_path}/b: No such file or directory\n"
        room = await (await cluster.client("y", url=a)).join("r", member=False)
        async with running("serve", "--listen", b, "--name", "b") as second:
            await second.stdout.readline()
            async with joined("r", "--hub", b, "--name", "x"):
                await eventually(lambda: "x" in room.members)
                assert (await room.say(b"hi")).acknowledged == ("x",)


@pytest.mark.parametrize(
    ("name", "said"), [("a", b"two hubs are named a"), ("c", b"the hub there is a, not b")]
)
async def test_a_hub_of_another_name_is_not_linked(cluster, name, said):
    await cluster.hub("a")
    link = f"b={cluster.url('a')}"
    async with running("serve", "--listen", cluster.url(), "--name", name, "--link", link) as hub:
        assert said in await hub.stderr.readline()


async def test_serve_join_say_and_ask_as_programs():
    async with running("127.0.0.1:0") as hub:
        line = (await hub.stdout.readline()).decode()
        assert line.startswith("Listening on: 127.0.0.1:")
        at = "--hub", f"tcp://{line.split()[-1]}"
        assert await run("say", "r", "anyone?", *at) == (0, "0 of 0 acknowledged\n", "")
        async with joined("r", *at, "--name", "ear") as member:
            code, out, _ = await run("say", "r", "hello", *at, "--name", "mouth")
            assert (code, out) == (0, "1 of 1 acknowledged\n")
            assert await member.stdout.readline() == b"mouth: hello\n"
            code, out, err = await run("ask", "r", "eh?", *at)
            assert (code, out, err) == (0, "ear: \n", "1 of 1 acknowledged\n")
            member.terminate()
            assert await member.wait() == 0
        hub.terminate()
        assert await hub.wait() == 0


@pytest.mark.parametrize(("option", "chats"), [("--chat", True), ("--no-chat", False)])
async def test_people_may_chat_if_the_hub_lets_them(option, chats):
    async with running("serve", "--listen", "tcp://127.0.0.1:0", option) as hub:
        where = (await hub.stdout.readline()).decode().split()[-1]
        async with joined("lobby", "--hub", f"tcp://{where}", "--name", "ear") as member:
            reader, writer = await asyncio.open_connection(*parse_host_port(where))
            writer.write("こんにちは\n".encode())
            if chats:
                line = (await member.stdout.readline()).decode()
                assert line.startswith("127.0.0.1:") and line.endswith(": こんにちは\n")
            else:
                assert b"middlecon" in await reader.read()
            writer.close()
            await writer.wait_closed()


async def test_an_address_that_is_open_to_others_wants_a_token():
    code, _, err = await run("0.0.0.0:0")
    assert (code, err.count("\n")) == (2, 1)
    assert "a hub there needs a token" in err


@pytest.mark.parametrize("command", [("say", "r", "t"), ("state", "r"), ("top",), ("bench",)])
async def test_nobody_listening_is_1(tmp_path, command):
    code, _, err = await run(*command, "--hub", f"unix://{tmp_path}/none")
    assert (code, err.count("\n")) == (1, 1)
    assert "no hub at" in err


async def test_a_name_that_is_taken_is_1(at, cluster):
    await cluster.client("x")
    code, out, err = await run("cast", "r", "t", *at, "--name", "x")
    assert (code, out) == (1, "")
    assert "the name x is taken" in err


# Texts


async def test_text_comes_from_standard_input(at, cluster):
    room, heard = await (await cluster.client("ear")).join("r"), []
    room.on_message(lambda message: heard.append(message.data))
    assert await run("say", "r", "-", *at, given=b"\xff\0two\n") == (0, "1 of 1 acknowledged\n", "")
    assert await run("say", "r", "-", *at, given=b"") == (0, "1 of 1 acknowledged\n", "")
    assert await run("cast", "r", "日本 -", *at) == (0, "", "")
    assert await run("cast", *at, "--", "r", "-x") == (0, "", "")
    code, _, err = await run("say", "r", "-", *at, given=bytes(DATA_BYTES + 1))
    assert code == 2 and "more than 1048576 bytes" in err
    assert heard == [b"\xff\0two\n", b"", "日本 -".encode(), b"-x"]


def test_without_a_standard_input_there_is_none_to_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["say", "r", "-"]) == 2
    assert "there is none" in capsys.readouterr().err


async def test_what_could_move_the_cursor_is_shown_as_escapes(at, cluster):
    room = await (await cluster.client("ear")).join("r")
    room.on_message(lambda message: b"\x1b[2Jred\r\n")
    async with joined("r", *at, "--name", "eye") as eye:
        code, out, _ = await run("ask", "r", "\x1b]0;title\x07", *at, "--name", "m")
        assert (code, out) == (0, "ear: \\x1b[2Jred\\r\neye: \n")
        assert await eye.stdout.readline() == b"m: \\x1b]0;title\\x07\n"


# Receipts


async def test_who_failed_is_told_and_is_1(at, cluster):
    await (await cluster.client("deaf")).join("r")
    good = await (await cluster.client("good")).join("r")
    good.on_message(lambda message: message.data[::-1])
    code, out, err = await run("say", "r", "ab", *at)
    assert (code, err) == (1, "")
    first, second = out.splitlines()
    assert first == "1 of 2 acknowledged" and second.startswith("  deaf: refused: ")
    code, out, err = await run("ask", "r", "ab", "--json", *at)
    told = json.loads(out)
    assert (code, err, told["answers"], told["acknowledged"]) == (1, "", {"good": "ba"}, ["good"])
    assert told["failed"]["deaf"]["cause"] == "refused" and told["complete"] is False
    code, out, _ = await run("ask", "r", "-", "--json", *at, given=b"\xff\xfe")
    assert json.loads(out)["answers"] == {"good": {"base64": "/v8="}}


# Scripts as members


async def test_a_script_publishes_and_answers(at):
    options = ("--put", "load=0.7", "--put", "v==4 2", "--answer", "ready")
    async with joined("r", *at, "--name", "web-1", *options, "--json") as member:
        assert (await run("ask", "r", "up?", *at, "--name", "m"))[:2] == (0, "web-1: ready\n")
        line = json.loads(await member.stdout.readline())
        assert line == {"sender": "m", "room": "r", "data": "up?", "wants_reply": True}
        assert await run("state", "r", *at) == (0, "web-1: load=0.7\nweb-1: v==4 2\n", "")
        code, out, _ = await run("state", "r", "--json", "--member", "web-1", *at)
        assert (code, json.loads(out)) == (0, {"web-1": {"load": "0.7", "v": "=4 2"}})
        code, out, err = await run("state", "r", "--member", "web-2", *at)
        assert (code, out) == (1, "") and "no member web-2 in the room r" in err
    assert await run("state", "r", *at) == (0, "", "")
    assert await run("state", "r", "--json", *at) == (0, "{}\n", "")


async def test_a_value_over_the_limits_is_1(at):
    async with running("join", "r", *at, "--put", f"k={'v' * 70_000}") as member:
        assert await member.wait() == 1
        assert (await member.stderr.read()).count(b"\n") == 1


COMMAND = """
case "$(cat)" in
    who) printf %s "$MIDDLECON_SENDER in $MIDDLECON_ROOM" ;;
    why) echo "the disk is full"; echo more; exit 3 ;;
    no) exit 3 ;;
    dead) kill -9 $$ ;;
    big) head -c 2000000 /dev/zero ;;
    slow) sleep 600 ;;
esac
"""


async def test_a_command_answers_and_its_exit_code_refuses(at):
    async with joined("r", *at, "--name", "sh", "--exec", COMMAND):

        async def ask(text, *options):
            _, out, _ = await run("ask", "r", text, *at, "--name", "m", "--json", *options)
            told = json.loads(out)
            return told["answers"].get("sh") or told["failed"]["sh"]["text"]

        assert await ask("who") == "m in r"
        assert await ask("why") == "the disk is full"
        assert "exit code 3" in await ask("no")
        assert "killed by signal 9" in await ask("dead")
        assert "wrote 2000000 bytes" in await ask("big")
        await ask("slow", "--timeout", "0.05")
        assert await ask("who") == "m in r"


async def test_a_command_that_reads_nothing_may_still_answer(at):
    unread = {"stdout": asyncio.subprocess.DEVNULL}
    async with joined("r", *at, "--name", "sh", "--exec", "echo done", **unread):
        code, out, _ = await run("ask", "r", "-", *at, given=bytes(DATA_BYTES))
        assert (code, out) == (0, "sh: done\n")


async def test_commands_end_with_their_member(at, cluster, eventually, tmp_path):
    marker = tmp_path / "pid"
    command = f"sleep 600 & echo $! > {marker}; wait"
    async with joined("r", *at, "--name", "sh", "--exec", command) as member:
        room = await (await cluster.client("m")).join("r", member=False)
        await room.cast(b"")
        await eventually(lambda: marker.exists() and marker.read_text().endswith("\n"))
        member.terminate()
        assert await member.wait() == 0
    sleeper = Path("/proc", marker.read_text().strip(), "stat")
    await eventually(lambda: not sleeper.exists() or b") Z" in sleeper.read_bytes())


async def test_a_member_outlives_its_hub(cluster, at):
    hub = await cluster.hub("other")
    url = cluster.url("other")
    async with joined("r", "--hub", url, "--name", "ear") as member:
        await hub.aclose()
        assert (await member.stderr.readline()).startswith(b"ear lost its hub: ")
        await cluster.hub("other")
        assert await member.stderr.readline() == b"ear is in r again\n"
        assert (await run("say", "r", "t", "--hub", url))[:2] == (0, "1 of 1 acknowledged\n")


# Ends


async def test_a_reader_that_goes_away_ends_a_member_quietly(at, cluster):
    reading, writing = os.pipe()
    member = await start("join", "r", *at, "--name", "ear", stdout=writing)
    os.close(writing)
    assert await member.stderr.readline() == b"ear is in r\n"
    os.close(reading)
    room = await (await cluster.client("m")).join("r", member=False)
    receipt = await room.say(b"anyone?")
    _, err = await member.communicate()
    assert (member.returncode, err) == (141, b"")
    assert "ear" in receipt.failed


async def test_output_that_nobody_reads_and_a_full_disk(at):
    reading, writing = os.pipe()
    os.close(reading)
    process = await start("say", "r", "t", *at, stdout=writing)
    os.close(writing)
    assert ((await process.communicate())[1], process.returncode) == (b"", 141)
    with Path("/dev/full").open("wb") as full:
        process = await start("say", "r", "t", *at, stdout=full)
        _, err = await process.communicate()
    assert process.returncode == 1 and b"No space left on device" in err and err.count(b"\n") == 1


async def test_an_interrupt_is_130_and_quiet(at, cluster):
    slow, asked = await (await cluster.client("slow")).join("r"), asyncio.Event()

    @slow.on_message
    async def hang(message):
        asked.set()
        await asyncio.Event().wait()

    process = await start("ask", "r", "t", *at)
    await asked.wait()
    process.send_signal(signal.SIGINT)
    assert (await process.communicate(), process.returncode) == ((b"", b""), 130)


async def test_an_interrupt_ends_the_reading_of_standard_input(at, eventually):
    reading, writing = os.pipe()
    process = await start("say", "r", "-", *at, stdin=reading)
    os.write(writing, b"begin")
    await eventually(lambda: unread_bytes(reading) == 0)
    process.send_signal(signal.SIGINT)
    assert (await process.communicate(), process.returncode) == ((b"", b""), 130)
    os.close(reading)
    os.close(writing)


def unread_bytes(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


# top and bench


async def test_top_shows_members_state_and_hubs(cluster):
    a, _ = await cluster.pair()
    at = "--hub", cluster.url("a")
    x, y = await cluster.client("x", hub="a"), await cluster.client("東京", hub="b")
    for client in (x, y):
        await client.join("r")
    await y.state.put("load", b"0.7\n")
    code, out, err = await run("top", "r", "-b", "-n1", *at)
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()
    assert "hub a: 1 room, 2 members, 1 of 1 link open" in header
    cells = [row.split() for row in rows if row]
    assert [row[:2] for row in cells[:2]] == [["HUB", "LINK"], ["b", "open"]]
    assert cells[2:] == [
        ["ROOM", "MEMBERS", "MSG/S"],
        ["r", "2", "-"],
        ["MEMBER", "ROOM", "HUB", "MSG/S", "STATE"],
        ["x", "r", "a", "-"],
        ["東京", "r", "b", "-", "load=0.7"],
    ]
    assert a.peers == {"b": True}


@pytest.mark.parametrize("stats", [{"rooms": {"r": 1}, "new": 1}, {"rooms": 3}, None])
async def test_top_follows_what_a_hubs_statistics_name(cluster, stats, monkeypatch):
    await cluster.hub()
    me = await cluster.client("me")
    await me.join("r")
    watcher = Watcher(await cluster.client("top"), member=False)

    async def hub_stats(client):
        if stats is None:
            raise Refused("this hub has none")
        return stats

    monkeypatch.setattr(Client, "hub_stats", hub_stats, raising=False)
    view = await watcher.look([])
    understood = stats is not None and stats["rooms"] != 3
    assert list(view.rooms) == (["r"] if understood else [])
    assert list((await watcher.look(["s"])).rooms) == ["s"]


async def test_top_counts_as_a_member(at, cluster):
    me = await cluster.client("me")
    room = await me.join("r")
    async with running("top", "r", "--join", "--json", "-d", "0.01", *at) as top:
        first = json.loads(await top.stdout.readline())
        assert first["rooms"]["r"]["messages_per_s"] is None
        assert first["connected"] and len(first["rooms"]["r"]["members"]) == 2
        assert len((await room.say(b"")).acknowledged) == 1
        while True:
            seen = json.loads(await top.stdout.readline())["rooms"]["r"]
            if seen["messages_per_s"] > 0:
                break
        assert seen["members"]["me"]["messages_per_s"] == seen["messages_per_s"]
        top.send_signal(signal.SIGINT)
        await top.stdout.read()
        assert (await top.wait(), await top.stderr.read()) == (0, b"")


async def test_top_on_a_terminal_is_drawn_in_place_and_leaves_it_as_it_was(at):
    terminal, its_end = os.openpty()
    top = await start("top", "r", "-n2", "-d", "0.01", *at, stdout=its_end)
    os.close(its_end)
    _, err = await top.communicate()
    drawn = os.read(terminal, 100_000)
    os.close(terminal)
    assert (top.returncode, err) == (0, b"")
    assert drawn.startswith(b"\x1b[?25l\x1b[H\x1b[J") and drawn.endswith(b"\x1b[?25h")
    assert drawn.count(b"\x1b[Hmiddlecon - ") == 2


async def test_bench_prints_every_job(at):
    few = "--members", "2", "--size", "8", "--duration", "0.001", *at
    code, out, err = await run("bench", *few)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == [
        "hub",
        "JOB",
        "say",
        "ask",
        "call",
        "cast",
    ]
    code, out, _ = await run("bench", "--json", *few)
    told = json.loads(out)
    assert (code, told["missed"], told["members"]) == (0, 0, 2)
    assert [row["job"] for row in told["results"]] == ["say", "ask", "call", "cast"]
    for row in told["results"]:
        assert 0 < row["p50_us"] <= row["p99_us"] and row["n"] > 0 and row["deliveries_per_s"] > 0
