"""No response reaches a wrong request.

The invariant (see `tabane.gateway.upstream`): a connection to an app serves one exchange at a time,
and is used again only after a request that was sent whole and a response that was read whole with
nothing behind it. Here apps and clients do at random all that could break it; each app's answer
repeats the id of the request it answers, and nobody may see another's.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tabane.testing.http import Message, Rig, Script, Wire, http_rig

CLIENTS = 12
ROUNDS = 40
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
METHODS = (b"GET", b"GET", b"HEAD", b"PUT", b"POST")


def erratic(dice: random.Random) -> Script:
    """Answer in all manners of framing and timing; at times break off, or say too much."""

    async def script(wire: Wire) -> None:
        while True:
            message = await wire.receive()
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)
            fate = dice.random()
            if fate < 0.05:
                return
            if fate < 0.08:
                wire.reset()
                return
            reply = framed(dice, message)
            if fate < 0.12 and b"Length" in reply:
                await wire.send(reply[: dice.randrange(len(reply))])
                return
            if fate < 0.18 and b"Length" in reply:
                await wire.send(reply + EVIL[: dice.randrange(1, len(EVIL) + 1)])
                continue
            cut = dice.randrange(len(reply))
            await wire.send(reply[:cut])
            await asyncio.sleep(0)
            await wire.send(reply[cut:])
            if b"Length" not in reply:
                return

    return script


def framed(dice: random.Random, message: Message) -> bytes:
    name = message.headers["x-id"].encode()
    early = b"HTTP/1.1 103 Early\r\nX-Id: %b\r\n\r\n" % name if dice.random() < 0.1 else b""
    body = name + b" " + message.body
    head = early + b"HTTP/1.1 200 OK\r\nX-Id: %b\r\n" % name
    if message.line.startswith("HEAD"):
        return head + b"Content-Length: %d\r\n\r\n" % len(body)
    fate = dice.random()
    if fate < 0.2:
        return head + b"Connection: close\r\n\r\n" + body
    if fate < 0.4:
        chunk = b"%x\r\n%b\r\n" % (len(body), body)
        return head + b"X-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def request(dice: random.Random, name: bytes, method: bytes) -> bytes:
    head = b"%b /%b HTTP/1.1\r\nHost: a.test\r\nX-Id: %b\r\n" % (method, name, name)
    if method in (b"GET", b"HEAD"):
        return head + b"\r\n"
    body = name * dice.randrange(1, 40)
    if dice.random() < 0.5:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


async def converse(rig: Rig, dice: random.Random, number: int, answered: list[bytes]) -> None:
    wire = await rig.connect()
    for round_ in range(ROUNDS):
        names = [b"c%dr%dn%d" % (number, round_, n) for n in range(dice.randrange(1, 4))]
        methods = [dice.choice(METHODS) for _ in names]
        data = b"".join(request(dice, *pair) for pair in zip(names, methods, strict=True))
        try:
            cut = dice.randrange(len(data))
            await wire.send(data[:cut])
            if dice.random() < 0.05:
                raise ConnectionError("the client leaves")
            await wire.send(data[cut:])
            for name, method in zip(names, methods, strict=True):
                if not await sees_own(wire, name, method, answered):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            wire.reset()
            wire = await rig.connect()


async def sees_own(wire: Wire, name: bytes, method: bytes, answered: list[bytes]) -> bool:
    response = await wire.receive(no_body=method == b"HEAD")
    while response.status == 103:
        assert response.headers["x-id"].encode() == name
        response = await wire.receive(no_body=method == b"HEAD")
    if response.status == 200:
        assert response.headers["x-id"].encode() == name
        if method != b"HEAD":
            own, _, body = response.body.partition(b" ")
            assert own == name
            assert body == name * (len(body) // len(name))
        answered.append(name)
    else:
        assert response.status in (502, 503)
    if response.headers.get("connection") == "close":
        raise ConnectionError("the gateway closes")
    return True


@pytest.mark.parametrize("seed", range(4))
async def test_each_sees_its_own_answer(seed: int) -> None:
    dice = random.Random(seed)
    answered: list[bytes] = []
    scripts = [erratic(random.Random(seed * 10 + n)) for n in range(3)]
    async with http_rig(*scripts, concurrency=4) as rig:
        await asyncio.gather(
            *(converse(rig, random.Random(dice.random()), n, answered) for n in range(CLIENTS))
        )
        await rig.until(lambda: rig.gateway.counters.active == 0)
        assert rig.gateway.counters.retries > 0
    assert len(answered) == len(set(answered))
    assert len(answered) > CLIENTS * ROUNDS
