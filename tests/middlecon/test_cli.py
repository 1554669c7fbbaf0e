from __future__ import annotations

import asyncio
import sys

import pytest

from tabane.middlecon.addresses import Tcp, parse_host_port
from tabane.middlecon.cli import _parse, main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bogus"], "there is no command 'bogus', only serve, join, say, ask (or ADDR:PORT)"),
        (["serve", "--listen", "foo"], "'foo' is no hub's address"),
        (["0.0.0.0:99999"], "is no address"),
        (["say"], "the following arguments are required: room, text"),
        (["say", "r", "t", "--timeout", "0"], "no time to wait"),
        (["say", "r\x07", "t"], "cannot be printed"),
        (["say", "r", "t", "--name", ""], "1 to 255 bytes"),
        (["serve", "--token-file", "/nonexistent"], "/nonexistent: No such file"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_bare_addresses_serve() -> None:
    assert _parse([]).listen == []
    assert _parse(["[::1]:5000"]).listen == ["tcp://[::1]:5000"]
    assert parse_host_port("[::1]:5000") == Tcp("::1", 5000)
    assert str(Tcp("::1", 5000)) == "[::1]:5000"


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tabane.middlecon",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(*arguments: str) -> tuple[int, str, str]:
    process = await start(*arguments)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_serve_join_say_and_ask_as_programs():
    hub = await start("127.0.0.1:0")
    try:
        line = (await hub.stdout.readline()).decode()
        assert line.startswith("Listening on: 127.0.0.1:")
        url = f"tcp://{line.split()[-1]}"
        assert await run("say", "r", "anyone?", "--hub", url) == (0, "0 of 0 acknowledged\n", "")
        member = await start("join", "r", "--hub", url, "--name", "ear")
        try:
            assert await member.stderr.readline() == b"ear is in r\n"
            code, out, _ = await run("say", "r", "hello", "--hub", url, "--name", "mouth")
            assert (code, out) == (0, "1 of 1 acknowledged\n")
            assert await member.stdout.readline() == b"mouth: hello\n"
            code, out, err = await run("ask", "r", "eh?", "--hub", url)
            assert (code, out, err) == (0, "ear: \n", "1 of 1 acknowledged\n")
        finally:
            member.terminate()
            assert await member.wait() == 0
    finally:
        hub.terminate()
        assert await hub.wait() == 0


async def test_an_address_that_is_open_to_others_wants_a_token():
    code, _, err = await run("0.0.0.0:0")
    assert (code, err.count("\n")) == (2, 1)
    assert "a hub there needs a token" in err


async def test_nobody_listening_is_1(tmp_path):
    code, _, err = await run("say", "r", "t", "--hub", f"unix://{tmp_path}/none")
    assert (code, err.count("\n")) == (1, 1)
    assert "no hub at" in err
